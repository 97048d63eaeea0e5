"""Sources that read image, video and DICOM files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import read_image
from espmedsam_edge.objects.stated import stated_spacing
from espmedsam_edge.runtime.dicom.reading import DicomHeader, is_dicom, read_dicom_frames, read_dicom_header
from espmedsam_edge.runtime.sources.scales import SharedScales
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame
from espmedsam_edge.runtime.video.reading import VideoReader, open_video

VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".avi", ".mkv", ".webm", ".wmv", ".asf", ".flv", ".f4v", ".ogv",
    ".mxf", ".dv", ".nut",
    ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".tod", ".mjpeg", ".mjpg", ".y4m", ".ivf",
    ".h264", ".264", ".avc", ".h265", ".265", ".hevc",
})  # fmt: skip


class ImageFiles(Closing):
    """Image files and DICOM files of one frame, in the order given."""

    kind: Literal["images", "video"] = "images"
    live = False
    fps: Fraction | None = None

    def __init__(self, files: Sequence[Path], name: str | None = None) -> None:
        self.files = list(files)
        self._together = list(files)
        self.name = name or (str(files[0]) if len(files) == 1 else f"{len(files)} images")
        self.length: int | None = len(self.files)
        self.failures: list[Failure] = []

    def narrow(self, wanted: Collection[Path]) -> None:
        """See ``Narrowable``."""
        self.files = [file for file in self.files if file in wanted]
        self.length = len(self.files)

    def __iter__(self) -> Iterator[SourceFrame]:
        scales = SharedScales(self._together)
        for path in self.files:
            try:
                frame = _read_picture(path, scales)
            except UserError as error:
                self.failures.append(Failure(str(path), str(error)))
            else:
                yield frame


def _read_picture(path: Path, scales: SharedScales) -> SourceFrame:
    if not is_dicom(path):
        return SourceFrame(read_image(path, scales.of_picture(path)), path, spacing=stated_spacing(path))
    header = read_dicom_header(path)
    scale = scales.of_slice(path, header.order[0])
    return SourceFrame(next(read_dicom_frames(path, scale)), path, spacing=header.spacing)


class Clip(ABC):
    """The frames of one file, which follow each other in time; subclasses open and read it."""

    kind: Literal["images", "video"] = "video"
    live = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self.name = str(path)
        self.fps: Fraction | None = None
        self.length: int | None = None
        self.failures: list[Failure] = []
        self._entered = False

    def __enter__(self: _AnyClip) -> _AnyClip:
        self.fps, self.length = self._open()
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._entered:
            self._entered = False
            self._close()

    def __iter__(self) -> Iterator[SourceFrame]:
        if not self._entered:
            raise RuntimeError("enter the source before iterating")
        return self._frames()

    @abstractmethod
    def _open(self) -> tuple[Fraction | None, int | None]:
        """Frames a second and how many to expect, for ``fps`` and ``length``."""

    def _close(self) -> None:  # noqa: B027 (not all have to)
        """Let go of what ``_open`` took."""

    @abstractmethod
    def _frames(self) -> Iterator[SourceFrame]:
        """Each frame, of what ``_open`` opened."""


_AnyClip = TypeVar("_AnyClip", bound=Clip)


class VideoFile(Clip):
    """A video file's frames, its times in seconds."""

    _reader: VideoReader
    _start = 0.0

    def _open(self) -> tuple[Fraction | None, int | None]:
        self._reader = self._opened()
        return self._reader.fps, self._reader.length

    def _opened(self) -> VideoReader:
        return open_video(self.path)

    def skip_to(self, start: float) -> None:
        """See ``Skippable``."""
        self._start = start

    def _close(self) -> None:
        self._reader.close()
        del self._reader  # with its decoder: a run keeps its sources to the end, and a decoder takes 0.3 MB and more

    def _frames(self) -> Iterator[SourceFrame]:
        reader, number = self._reader, -1
        reader.start = self._start
        for number, (image, time) in enumerate(reader):
            yield SourceFrame(image, self.path, reader.skipped + number, time, aspect=reader.aspect)
        if reader.damage is not None and (number >= 0 or not self._start):  # else ``SelectedSource`` tells
            message = f"cannot read all of {self.name}: {reader.damage}. Copy it again, or convert it."
            self.failures.append(Failure(self.name, message))


class DicomCine(Clip):
    """A DICOM file's frames, with its frame times."""

    _header: DicomHeader

    def _open(self) -> tuple[Fraction | None, int | None]:
        self._header = read_dicom_header(self.path)
        return self._header.fps, self._header.frames

    def _close(self) -> None:
        del self._header

    def _frames(self) -> Iterator[SourceFrame]:
        times, spacing = self._header.times or (0.0,), self._header.spacing
        count = 0
        try:
            for image, time in zip(read_dicom_frames(self.path), times, strict=False):
                yield SourceFrame(image, self.path, count, time, spacing=spacing)
                count += 1
        except UserError as error:
            done = f" {count} of {self.length} frames were read." if count else ""
            self.failures.append(Failure(self.name, f"{error}{done}"))
