"""Measurements of DICOM images as structured reports (DICOM-SR, template TID 1500), which point to image and mask."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.marks import MAKER
from espmedsam_edge.objects.instance import Instance, Instances, Size, Spacing, significant, unit_of
from espmedsam_edge.runtime.dicom.codes import OWN_SCHEME, Code, codes_of
from espmedsam_edge.runtime.dicom.discretion import discreet
from espmedsam_edge.runtime.dicom.segmentation import (
    NOTICE,
    Algorithm,
    completed,
    concept,
    name_of,
    save_whole,
    uids_of,
)

if TYPE_CHECKING:
    from pydicom import Dataset

MOST_OBJECTS = 2000
"""Of all frames of a file, each of which takes 40 kB of memory while its report is made."""

_SERIES_NUMBER = 9101
_UNITS: dict[str, tuple[Code, Code, float]] = {  # of areas and of lengths, and how many are a millimetre
    "mm": (("mm2", "UCUM", "square millimeter"), ("mm", "UCUM", "millimeter"), 1.0),
    "um": (("um2", "UCUM", "square micrometer"), ("um", "UCUM", "micrometer"), 1000.0),
    "px": (("{pixels}", "UCUM", "pixels"), ("{pixels}", "UCUM", "pixels"), 1.0),
}
_LENGTHS: dict[str, Code] = {
    "longest": ("103339001", "SCT", "Long axis"),
    "shortest": ("SHORTEST_DIAM", OWN_SCHEME, "Smallest distance of parallel tangents"),
    "perimeter": ("131191004", "SCT", "Perimeter"),
}


@dataclass(frozen=True, eq=False)
class MeasuredFrame:
    """What a report says of a frame.

    Attributes:
        index: from 0.
        area: of the whole mask, in pixels.
        objects: each, with its outline, (N, 2) float of (x, y) from the upper left corner of the frame.
        spacing: of the pixels, in millimetres; None: sizes are told in pixels.
    """

    index: int
    area: int
    objects: Sequence[tuple[Instance, NDArray[np.float64]]]
    spacing: Spacing | None


def write_report(
    path: Path,
    header: Dataset,
    frames: Sequence[MeasuredFrame],
    modality: str,
    algorithm: Algorithm,
    segmentation: Dataset | None = None,
    name: str = "this file",
) -> None:
    """Write the report of one DICOM image: of each frame the mask's area and number of objects, and the objects' sizes.

    Objects are followed from frame to frame by their tracking identifiers, where their numbers are kept. Identifiers
    are made from the source's and from what is said, as those of segmentations.

    Args:
        path: the file to write.
        header: the source's dataset; its pixels are not needed.
        frames: in order.
        modality: names what was measured.
        algorithm: what made the masks.
        segmentation: the dataset of the file that holds the masks; None: there is none.
        name: what errors call the source.

    Raises:
        UserError: the source lacks what a report must repeat.
    """
    with discreet(partial(_not_made, name)) as dicom:
        dicom.dataset = header
        report = _made(completed(header), frames, modality, algorithm, segmentation)
    save_whole(report, path, header, partial(_not_made, name))


def _not_made(name: str, fault: str) -> UserError:
    fault = fault or "highdicom cannot make one of it"
    return UserError(f"no structured report can be made of {name}: {fault}.", "Use --objects for it.", exit_code=1)


def _made(
    source: Dataset, frames: Sequence[MeasuredFrame], modality: str, algorithm: Algorithm, segmentation: Dataset | None
) -> Any:
    from highdicom.sr import ComprehensiveSR, MeasurementReport
    from pydicom.sr.codedict import codes

    said = [(frame.index, frame.area, [one.to_dict(frame.spacing) for one, _ in frame.objects]) for frame in frames]
    masks = "" if segmentation is None else str(segmentation.SOPInstanceUID)
    digest = hashlib.sha256(repr((said, masks)).encode()).hexdigest()
    series, instance = uids_of("report", str(source.SOPInstanceUID), digest, modality, algorithm)
    groups = _Groups(source, modality, algorithm, {} if segmentation is None else _masks_of(segmentation))
    content = MeasurementReport(
        observation_context=_observer(algorithm),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[group for frame in frames for group in groups.of(frame)],
        title=codes.DCM.ImagingMeasurementReport,
    )
    report = ComprehensiveSR(
        evidence=[source] if segmentation is None else [source, segmentation],
        content=content,
        series_instance_uid=series,
        series_number=_SERIES_NUMBER,
        sop_instance_uid=instance,
        instance_number=1,
        manufacturer=MAKER,
        is_complete=True,
    )
    report.ManufacturerModelName, report.SoftwareVersions, report.DeviceSerialNumber = MAKER, algorithm.version, "0"
    report.SeriesDescription = f"{name_of(algorithm)}: {codes_of(modality).kind[2]}"[:64]
    report.CompletionFlagDescription = NOTICE
    return report


def _observer(algorithm: Algorithm) -> Any:
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObservationContext, ObserverContext
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    device = DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=["device", MAKER]),
        name=name_of(algorithm),
        manufacturer_name=MAKER,
        model_name=algorithm.version,
    )
    return ObservationContext(ObserverContext(codes.DCM.Device, device))


def _masks_of(segmentation: Dataset) -> Mapping[int, tuple[str, str, int]]:
    """Class and identifier of the file of masks, and the number of the frame in it that is of each of the source's."""
    groups = segmentation.PerFrameFunctionalGroupsSequence
    images = [group.DerivationImageSequence[0].SourceImageSequence[0] for group in groups]
    return {
        int(image.get("ReferencedFrameNumber") or 1): (segmentation.SOPClassUID, segmentation.SOPInstanceUID, number)
        for number, image in enumerate(images, 1)
    }


class _Groups:
    """Makes a report's groups of measurements."""

    def __init__(
        self, source: Dataset, modality: str, algorithm: Algorithm, masks: Mapping[int, tuple[str, str, int]]
    ) -> None:
        from highdicom.sr import AlgorithmIdentification, FindingSite

        self._source, self._masks, codes = source, masks, codes_of(modality)
        self._image = (source.SOPClassUID, source.SOPInstanceUID)
        self._several = int(source.get("NumberOfFrames") or 1) > 1
        self._what = {
            "finding_category": concept(codes.category),
            "finding_type": concept(codes.kind),
            "finding_sites": None if codes.region is None else [FindingSite(concept(codes.region))],
            "algorithm_id": AlgorithmIdentification(
                name_of(algorithm), algorithm.version, [f"{key}={value}" for key, value in algorithm.parameters.items()]
            ),
        }

    def of(self, frame: MeasuredFrame) -> list[Any]:
        """One of the whole mask, and one of each object."""
        return [self._whole(frame), *(self._object(frame, one, outline) for one, outline in frame.objects)]

    def _whole(self, frame: MeasuredFrame) -> Any:
        from highdicom.sr import (
            MeasurementsAndQualitativeEvaluations,
            PlanarROIMeasurementsAndQualitativeEvaluations,
            ReferencedSegmentationFrame,
            SourceImageForMeasurementGroup,
            SourceImageForSegmentation,
        )

        square = 1.0 if frame.spacing is None else frame.spacing[0] * frame.spacing[1]
        count = _measurement(("246205007", "SCT", "Quantity"), len(frame.objects), ("{objects}", "UCUM", "objects"))
        said = {
            "tracking_identifier": self._tracking("mask", f"Mask of frame {frame.index + 1}", frame.index),
            "measurements": [_area(frame.area * square, frame.spacing), count],
        }
        number = [frame.index + 1] if self._several else None
        mask = self._masks.get(frame.index + 1)
        if mask is None:
            image = SourceImageForMeasurementGroup(*self._image, number)
            said |= {name: self._what[name] for name in ("finding_category", "finding_type", "finding_sites")}
            return MeasurementsAndQualitativeEvaluations(source_images=[image], **said)
        image = SourceImageForSegmentation(*self._image, number)
        reference = ReferencedSegmentationFrame(*mask, segment_number=1, source_image=image)
        for item in reference:  # a frame has one segment, and no number of it beside its own (PS3.3 C.18.4.1.2)
            if "ReferencedSegmentNumber" in item.ReferencedSOPSequence[0]:
                del item.ReferencedSOPSequence[0].ReferencedSegmentNumber
        return PlanarROIMeasurementsAndQualitativeEvaluations(referenced_segment=reference, **said, **self._what)

    def _object(self, frame: MeasuredFrame, one: Instance, outline: NDArray[np.float64]) -> Any:
        from highdicom.sr import ImageRegion, PlanarROIMeasurementsAndQualitativeEvaluations, SourceImageForRegion

        image = SourceImageForRegion(*self._image, [frame.index + 1] if self._several else None)
        size: Size = one.pixels if one.physical is None else one.physical
        return PlanarROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=self._tracking("object", f"Object {one.id}", one.id),
            referenced_region=ImageRegion("POLYLINE", np.concatenate([outline, outline[:1]]), image),
            measurements=[_area(size.area, frame.spacing), *_lengths(size, frame.spacing)],
            **self._what,
        )

    def _tracking(self, kind: str, text: str, number: int) -> Any:
        from highdicom.sr import TrackingIdentifier
        from pydicom.uid import generate_uid

        uid = generate_uid(entropy_srcs=[kind, str(self._source.SOPInstanceUID), str(number)])
        return TrackingIdentifier(uid=uid, identifier=text)


def _area(area: float, spacing: Spacing | None) -> Any:
    unit, _, factor = _UNITS["px" if spacing is None else unit_of(spacing)]
    return _measurement(("42798000", "SCT", "Area"), area * factor**2, unit)


def _lengths(size: Size, spacing: Spacing | None) -> list[Any]:
    _, unit, factor = _UNITS["px" if spacing is None else unit_of(spacing)]
    known = {name: value for name in _LENGTHS if (value := getattr(size, name)) is not None}
    return [_measurement(_LENGTHS[name], value * factor, unit) for name, value in known.items()]


def _measurement(what: Code, value: float, unit: Code) -> Any:
    from highdicom.sr import Measurement

    return Measurement(concept(what), significant(value), concept(unit))


def outlines_of(found: Instances) -> list[tuple[Instance, NDArray[np.float64]]]:
    """Each object with the outline of its largest part, through its outermost pixels' centres."""
    import cv2

    outlined = []
    for one in found.measured:
        x, y, width, height = one.box
        own = (found.labels[y : y + height, x : x + width] == one.id).view(np.uint8)
        parts, _ = cv2.findContours(own, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(x, y))
        largest: Any = max(parts, key=lambda part: (cv2.contourArea(part), len(part)))
        outlined.append((one, np.asarray(largest, np.float64).reshape(-1, 2) + 0.5))
    return outlined
