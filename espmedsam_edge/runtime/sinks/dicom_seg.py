"""What writes one result a DICOM file; the sink of those that are DICOM segmentations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from espmedsam_edge.closing import Closing
from espmedsam_edge.destinations import Destination, check_again
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path, write_errors
from espmedsam_edge.machine.installation import install_command
from espmedsam_edge.marks import SEGMENTATION, Kind
from espmedsam_edge.runtime.dicom.discretion import discreet, read_dataset
from espmedsam_edge.runtime.dicom.packed_masks import PackedMasks
from espmedsam_edge.runtime.dicom.reading import is_dicom
from espmedsam_edge.runtime.dicom.segmentation import Algorithm, frames_of, size_of, write_segmentation
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sources.source import SourceFrame

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_FRAMES = 20_000  # pydicom's objects for what is said of each take 30 kB of memory


@dataclass
class Begun(Closing, ABC):
    """A file's part of a result until its last frame has come."""

    path: Path
    name: str
    header: Any
    modality: str

    @abstractmethod
    def __len__(self) -> int:
        """How many frames are in it."""


_Begun = TypeVar("_Begun", bound=Begun)


class DicomResults(ABC, Generic[_Begun]):
    """Writes one result a DICOM file, when its last frame has come; each is complete or absent.

    It belongs to the source's patient and study, and holds the same patient data.

    Args:
        paths: the file to write for each DICOM input.
        overwrite: what of that which came there meanwhile is replaced, see ``check_destinations``.
    """

    kind: str
    """What lines call it."""

    mark: Kind
    """By which a file of this kind is known again."""

    def __init__(self, paths: Mapping[Path, Path], overwrite: bool | None) -> None:
        self._paths, self._overwrite = paths, overwrite
        self._current: _Begun | None = None
        self._incomplete: list[str] = []

    @abstractmethod
    def _begin(self, frame: SourceFrame, header: Any, modality: str) -> _Begun:
        """For a file's first frame."""

    @abstractmethod
    def _add(self, begun: _Begun, frame: SourceFrame, result: Segmentation) -> None:
        """The next frame."""

    @abstractmethod
    def _finish(self, place: Path, begun: _Begun) -> None:
        """Write a whole file's result."""

    def __enter__(self) -> Self:
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``; frames of a file come together and in order."""
        begun = self._current
        if begun is None or begun.path != frame.path:
            self._give_up_current()
            begun = self._current = self._begin(frame, read_header(frame, self.kind), result.modality)
        if frame.index != len(begun) or result.modality != begun.modality or result.size != size_of(begun.header):
            return
        place = self._paths[frame.path]
        with write_errors(place):
            self._add(begun, frame, result)
            if len(begun) == frames_of(begun.header):
                self._current = None
                place.parent.mkdir(parents=True, exist_ok=True)
                with begun, atomic_path(place) as temporary:
                    self._finish(temporary, begun)
                    check_again(Destination(place, self.mark), self._overwrite)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_up_current()
        if kind is None and self._incomplete:
            more = f" and {len(self._incomplete) - 1} more" if len(self._incomplete) > 1 else ""
            raise UserError(
                f"no {self.kind} of {self._incomplete[0]}{more}: not all of it was segmented, at its own size and with "
                "one modality.",
                "Segment the whole file without changing the modality.",
                exit_code=1,
            )

    def _give_up_current(self) -> None:
        if self._current is not None:
            self._current.close()
            self._incomplete.append(self._current.name)
            self._current = None


@dataclass
class _Masks(Begun):
    masks: PackedMasks

    def __len__(self) -> int:
        return self.masks.count

    def close(self) -> None:
        self.masks.close()


class DicomSegmentations(DicomResults[_Masks]):
    """Writes one DICOM-SEG a DICOM file.

    Pixels are binary and equal the masks; every frame is there, those without foreground, too. The frame of reference
    is the source's.

    Args:
        paths, overwrite: see ``DicomResults``.
        algorithm: what made the masks.

    Raises:
        UserError: highdicom is missing, or an input is not DICOM.
    """

    kind, mark = "DICOM-SEG", SEGMENTATION

    def __init__(self, paths: Mapping[Path, Path], algorithm: Algorithm, overwrite: bool | None = None) -> None:
        super().__init__(paths, overwrite)
        check_inputs(paths, "--dicom-seg", "--masks")
        self._algorithm = algorithm

    def _begin(self, frame: SourceFrame, header: Any, modality: str) -> _Masks:
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
            return _Masks(frame.path, frame.source, header, modality, PackedMasks(size_of(header), folder))

    def _add(self, begun: _Masks, frame: SourceFrame, result: Segmentation) -> None:
        begun.masks.append(result.mask)

    def _finish(self, place: Path, begun: _Masks) -> None:
        write_segmentation(place, begun.header, begun.masks, begun.modality, self._algorithm, begun.name)


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
