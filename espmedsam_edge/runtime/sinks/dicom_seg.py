"""The sink that writes masks of DICOM files as DICOM segmentations, one for each file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from espmedsam_edge.destinations import Destination, check_again
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path, write_errors
from espmedsam_edge.machine.installation import install_command
from espmedsam_edge.marks import SEGMENTATION
from espmedsam_edge.runtime.dicom.discretion import discreet, read_dataset
from espmedsam_edge.runtime.dicom.packed_masks import PackedMasks
from espmedsam_edge.runtime.dicom.reading import is_dicom
from espmedsam_edge.runtime.dicom.segmentation import Algorithm, frames_of, size_of, write_segmentation
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sources.source import SourceFrame

_MOST_FRAMES = 20_000  # pydicom's objects for what is said of each take 30 kB of memory


class DicomSegmentations:
    """Writes one DICOM-SEG a DICOM file, when its last frame has come; each is complete or absent.

    Pixels are binary and equal the masks; every frame is there, those without foreground, too. The patient, study and
    frame of reference are those of the source, to which it belongs: it holds the same patient data.

    Args:
        paths: the file to write for each DICOM input.
        algorithm: what made the masks.
        overwrite: what of that which came there meanwhile is replaced, see ``check_destinations``.

    Raises:
        UserError: highdicom is missing, or an input is not DICOM.
    """

    def __init__(self, paths: Mapping[Path, Path], algorithm: Algorithm, overwrite: bool | None = None) -> None:
        check_inputs(paths, "--dicom-seg", "--masks")
        self._paths, self._algorithm, self._overwrite = paths, algorithm, overwrite
        self._current: _Unfinished | None = None
        self._incomplete: list[str] = []

    def __enter__(self) -> DicomSegmentations:
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``; frames of a file come together and in order."""
        current = self._current
        if current is None or current.path != frame.path:
            self._give_up_current()
            current = self._current = self._begun(frame, result)
        masks, place = current.masks, self._paths[frame.path]
        with write_errors(place):
            if frame.index == masks.count and result.size == masks.size and result.modality == current.modality:
                masks.append(result.mask)
            if masks.count == frames_of(current.header) and masks.size == size_of(current.header):
                self._current = None
                with masks, atomic_path(place) as temporary:
                    write_segmentation(
                        temporary, current.header, masks, current.modality, self._algorithm, current.name
                    )
                    check_again(Destination(place, SEGMENTATION), self._overwrite)

    def _begun(self, frame: SourceFrame, result: Segmentation) -> _Unfinished:
        header = read_header(frame, "DICOM-SEG")
        count = frames_of(header)
        if count > _MOST_FRAMES:
            raise UserError(
                f"no DICOM-SEG of {frame.source}: its {count} frames are over the limit of {_MOST_FRAMES}.",
                "Export it in parts, or use --masks or --mask-video for it.",
                exit_code=1,
            )
        folder = self._paths[frame.path].parent
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            return _Unfinished(frame.path, frame.source, header, result.modality, PackedMasks(result.size, folder))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_up_current()
        if kind is None and self._incomplete:
            more = f" and {len(self._incomplete) - 1} more" if len(self._incomplete) > 1 else ""
            raise UserError(
                f"no DICOM-SEG of {self._incomplete[0]}{more}: not all of it was segmented, at its own size and with "
                "one modality.",
                "Segment the whole file without changing the modality.",
                exit_code=1,
            )

    def _give_up_current(self) -> None:
        if self._current is not None:
            self._current.masks.close()
            self._incomplete.append(self._current.name)
            self._current = None


@dataclass
class _Unfinished:
    path: Path
    name: str
    header: Any
    modality: str
    masks: PackedMasks


def check_inputs(paths: Iterable[Path], option: str, instead: str) -> None:
    """Refuse inputs of which there can be no DICOM results.

    Raises:
        UserError: one is not DICOM, or highdicom is missing.
    """
    if find_spec("highdicom") is None:
        raise UserError(
            f"highdicom, which writes what {option} asks for, is not installed.",
            f"Install it: {install_command('dicom')}",
        )
    for path in paths:
        if path.is_file() and not is_dicom(path):
            raise UserError(f"{path} is not DICOM; {option} is for DICOM inputs.", f"Leave it out, or use {instead}.")


def read_header(frame: SourceFrame, result: str) -> Any:
    """The dataset of a frame's file, without its pixels.

    Raises:
        UserError: it cannot be read, which ``result`` needs.
    """

    def told(fault: str) -> UserError:
        why = f": {fault}" if fault else ""
        return UserError(f"cannot read {frame.source} again for its {result}{why}.", "Copy it again.", exit_code=1)

    with discreet(told) as dicom:
        dicom.dataset = header = read_dataset(frame.path)
        _ = (size_of(header), frames_of(header), header.SOPInstanceUID)
        return header
