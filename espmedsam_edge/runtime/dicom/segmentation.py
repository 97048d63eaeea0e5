"""Masks of DICOM images as DICOM segmentations (DICOM-SEG), which point to the frames that they were made of."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.marks import MAKER
from espmedsam_edge.runtime.dicom.codes import Code, codes_of
from espmedsam_edge.runtime.dicom.discretion import Told, discreet
from espmedsam_edge.runtime.dicom.packed_masks import PackedMasks

if TYPE_CHECKING:
    from pydicom import Dataset

NOTICE = "Made by software for research; it is not a medical device"
_SERIES_NUMBER = 9100
_UTF8 = "ISO_IR 192"


@dataclass(frozen=True)
class Algorithm:
    """What made the masks.

    Attributes:
        version: of this package.
        parameters: name and value of what was chosen: bundle, precision, threshold, ...
        trained: whether the weights were ever trained; a segmentation by random ones says so.
    """

    version: str
    parameters: Mapping[str, str]
    trained: bool = True


def write_segmentation(
    path: Path, header: Dataset, masks: PackedMasks, modality: str, algorithm: Algorithm, name: str = "this file"
) -> None:
    """Write the segmentation of one DICOM image; memory holds none of the masks but one, and what is said of each.

    Its identifiers and its series's are made from the source's, the algorithm and the masks: the same once more
    is the same instance, which an archive keeps once.

    Args:
        path: the file to write.
        header: the source's dataset; its pixels are not needed.
        masks: one for every frame of the source, in order.
        modality: names the segment's target.
        algorithm: what made the masks.
        name: what errors call the source.

    Raises:
        UserError: the source lacks what a segmentation must repeat.
    """
    digest = masks.digest()
    with discreet(partial(_not_made, name)) as dicom:
        dicom.dataset = header
        source = completed(header)
        first = masks.frame(0)[None]
        # highdicom makes segmentations of several frames only where frames have places in space, and packs them in
        # memory. It gets the first frame for all of them, or of a cine for itself, and the others follow here.
        cine = masks.count > 1 and "PerFrameFunctionalGroupsSequence" not in source
        shown = first if cine else np.broadcast_to(first, (masks.count, *masks.size))
        uids = uids_of("", str(header.SOPInstanceUID), digest, modality, algorithm)
        segmentation = _made(_of_one_frame(source) if cine else source, shown, modality, algorithm, uids)
        _drop_incomplete_measures(segmentation.SharedFunctionalGroupsSequence[0])
        if "PlaneOrientationSequence" not in segmentation.SharedFunctionalGroupsSequence[0]:
            segmentation.PatientOrientation = None  # which has to be there, if only empty (PS3.3 C.7.6.1.1.1)
        if cine:
            _add_frames(segmentation, masks.count)
        order = _sources_of(segmentation) if masks.count > 1 else [0]
    with PackedMasks(masks.size, path.parent) as sorted_masks:
        for index in order if order != sorted(order) else ():  # highdicom sorts frames by their places
            sorted_masks.append(masks.frame(index))
        segmentation.PixelData = (sorted_masks if sorted_masks.count else masks).stored()
        save_whole(segmentation, path, header, partial(_not_made, name))


def _not_made(name: str, fault: str) -> UserError:
    fault = fault or "highdicom cannot make one of it"
    return UserError(f"no DICOM-SEG can be made of {name}: {fault}.", "Use --masks for it.", exit_code=1)


def save_whole(dataset: Any, path: Path, header: Dataset, told: Told) -> None:
    """Write a dataset that was made of a source's.

    Raises:
        UserError: what ``told`` makes of its fault.
        OSError: the disk's trouble.
    """
    failed: OSError | None = None
    with discreet(told) as dicom:
        dicom.dataset = header
        try:
            dataset.save_as(path)
        except OSError as error:  # of the disk: it names the path, no value; pydicom wraps it without its number
            failed = error
            while failed.errno is None and isinstance(failed.__cause__, OSError):
                failed = failed.__cause__
    if failed is not None:
        raise failed


def _sources_of(segmentation: Any) -> list[int]:
    """Which of the source's frames, from 0, each frame of a segmentation is of."""
    groups = segmentation.PerFrameFunctionalGroupsSequence
    return [int(g.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber) - 1 for g in groups]


def _drop_incomplete_measures(groups: Any) -> None:
    """Leave out a spacing without a slice's thickness: highdicom does not open it. The source states the spacing."""
    if "PixelMeasuresSequence" in groups and groups.PixelMeasuresSequence[0].get("SliceThickness") is None:
        del groups.PixelMeasuresSequence


def _of_one_frame(source: Dataset) -> Dataset:
    """A cine's header as that of a single frame without a place in space."""
    source.NumberOfFrames = 1
    if "FrameOfReferenceUID" in source:
        del source.FrameOfReferenceUID
    return source


def uids_of(kind: str, source: str, content: str, modality: str, algorithm: Algorithm) -> tuple[str, str]:
    """Identifiers of the series and the instance, made from those words: the same once more is the same instance."""
    from pydicom.uid import generate_uid

    words = [source, content, modality, algorithm.version, *map(str, sorted(algorithm.parameters.items()))]
    return generate_uid(entropy_srcs=[f"{kind}series", *words]), generate_uid(entropy_srcs=[f"{kind}instance", *words])


def name_of(algorithm: Algorithm) -> str:
    """What results call it."""
    return MAKER if algorithm.trained else f"{MAKER}, UNTRAINED WEIGHTS"


def _made(source: Dataset, masks: NDArray[np.uint8], modality: str, algorithm: Algorithm, uids: tuple[str, str]) -> Any:
    import highdicom
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes as concepts

    codes = codes_of(modality)
    name = name_of(algorithm)
    family = concepts.DCM.ArtificialIntelligence
    description = SegmentDescription(
        segment_number=1,
        segment_label=codes.kind[2],
        segmented_property_category=concept(codes.category),
        segmented_property_type=concept(codes.kind),
        anatomic_regions=None if codes.region is None else [concept(codes.region)],
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=name, version=algorithm.version, family=family, parameters=dict(algorithm.parameters) or None
        ),
    )
    return highdicom.seg.Segmentation(
        source_images=[source],
        pixel_array=masks,
        segmentation_type="BINARY",
        segment_descriptions=[description],
        series_instance_uid=uids[0],
        series_number=_SERIES_NUMBER,
        sop_instance_uid=uids[1],
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=MAKER,
        software_versions=algorithm.version,
        device_serial_number="0",
        content_label="ESPMEDSAM",
        content_description=NOTICE,
        series_description=f"{name}: {codes.kind[2]}"[:64],
        omit_empty_frames=False,
    )


def concept(code: Code) -> Any:
    """As highdicom takes it."""
    from highdicom.sr import CodedConcept

    value, scheme, meaning = code
    return CodedConcept(value, scheme, meaning)


def _add_frames(segmentation: Any, count: int) -> None:
    """Give a segmentation of a first frame the others: one more place in time each, no place in space.

    What is said of them differs in three numbers; the rest they share, as copies would take half as much memory again.
    """
    from pydicom.sequence import Sequence as Items

    organization = segmentation.DimensionOrganizationSequence[0].DimensionOrganizationUID
    segmentation.DimensionIndexSequence.append(_time_dimension(organization))
    first = segmentation.PerFrameFunctionalGroupsSequence[0]
    derivation, content = first.DerivationImageSequence[0], first.FrameContentSequence[0]
    indices = content.get("DimensionIndexValues")
    before = [] if indices is None else [indices] if isinstance(indices, int) else list(indices)
    groups = []
    for number in range(1, count + 1):
        image = _with(derivation.SourceImageSequence[0], ReferencedFrameNumber=number)
        place = _with(content, TemporalPositionIndex=number, DimensionIndexValues=[*before, number])
        made = _with(derivation, SourceImageSequence=[image])
        groups.append(_with(first, DerivationImageSequence=[made], FrameContentSequence=[place]))
    segmentation.PerFrameFunctionalGroupsSequence = Items(groups)
    segmentation.NumberOfFrames = count


def _with(item: Dataset, **values: Any) -> Dataset:
    """A dataset of the same elements but these."""
    from pydicom import Dataset as New

    changed = New()
    for element in item:
        if element.keyword not in values:
            changed[element.tag] = element
    for keyword, value in values.items():
        setattr(changed, keyword, value)
    return changed


def _time_dimension(organization: str) -> Dataset:
    from pydicom import Dataset as New
    from pydicom.datadict import tag_for_keyword

    dimension = New()
    dimension.DimensionIndexPointer = tag_for_keyword("TemporalPositionIndex")
    dimension.FunctionalGroupPointer = tag_for_keyword("FrameContentSequence")
    dimension.DimensionOrganizationUID = organization
    dimension.DimensionDescriptionLabel = "Temporal Position Index"
    return dimension


_REPEATED: Sequence[str] = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)


def completed(header: Dataset) -> Dataset:
    """A copy in which what highdicom asks for is empty rather than absent, without private elements."""
    from highdicom.content import PixelMeasuresSequence
    from pydicom import Dataset as New

    source = copy.deepcopy(header)
    source.remove_private_tags()  # those of sequences would go along: nobody knows whom they name
    source.decode()  # names in Japanese or Korean switch character sets in the middle, which highdicom does not write
    source.SpecificCharacterSet = _UTF8
    if "SharedFunctionalGroupsSequence" not in source and source.get("NumberOfFrames") is not None:
        group = New()  # of which nothing stays: _drop_incomplete_measures has the last word
        group.PixelMeasuresSequence = PixelMeasuresSequence(pixel_spacing=(1, 1), slice_thickness=None)
        source.SharedFunctionalGroupsSequence = [group]
    for keyword in _REPEATED:
        if keyword not in source:
            setattr(source, keyword, "")
    return source


def frames_of(header: Dataset) -> int:
    """How many frames a DICOM image has."""
    return int(header.get("NumberOfFrames") or 1)


def size_of(header: Dataset) -> tuple[int, int]:
    """Its frames' (height, width)."""
    return int(header.Rows), int(header.Columns)
