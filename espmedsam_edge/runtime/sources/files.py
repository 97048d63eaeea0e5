"""Where frames come from: what a source is, and those that read image, video and DICOM files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import read_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.dicom.reading import DicomHeader, is_dicom, read_dicom_frames, read_dicom_header
from espmedsam_edge.runtime.video.reading import VideoReader, open_video

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".tif",
        ".tiff",
        ".bmp",
        ".dib",
        ".webp",
        ".gif",
        ".avif",
        ".heic",
        ".heif",
        ".hif",
    }
)
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".m2ts", ".wmv", ".flv", ".3gp"}
)


@dataclass(frozen=True)
class Failure:
    """An input that could not be (wholly) done: which, and the line that says why and what next."""

    name: str
    message: str


@dataclass(frozen=True, eq=False)
class SourceFrame:
    """One frame and where it came from.

    Attributes:
        image: (H, W, 3) uint8 BGR, upright.
        path: the file it was read from; for a camera or a stream a name that results can be called by.
        index: its number in that file, from 0 (always 0 for images).
        time: seconds from the start of the video; None for images.
        captured: ``time.monotonic()`` when a live source delivered it; None for files.
        skipped: frames that a live source passed over so far, so as to show the newest.
        spacing: millimetres between rows and between columns where the file says so (DICOM); else None.
        address: of a camera or a stream, without user names, passwords and queries; "" for files, unless they go by
            numbers (``source_names``).
    """

    image: Frame
    path: Path
    index: int = 0
    time: float | None = None
    captured: float | None = None
    skipped: int = 0
    spacing: tuple[float, float] | None = None
    address: str = ""

    @property
    def source(self) -> str:
        """What records call the source: the address, or the file as it was named."""
        return self.address or str(self.path)


class Source(Protocol):
    """An ordered supply of frames. Enter, iterate once, exit; all from one thread."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def kind(self) -> Literal["images", "video"]:
        """Whether its frames are independent pictures, one a file, or follow each other in time."""

    @property
    def live(self) -> bool:
        """Whether it goes on whether or not anyone looks: such a source gives its newest frame and skips the rest."""

    @property
    def files(self) -> Sequence[Path]:
        """The files it reads, in order; one for a video, for a camera or a stream the name of its results."""

    @property
    def fps(self) -> Fraction | None:
        """Frames a second of a video, once it is entered; else None."""

    @property
    def length(self) -> int | None:
        """How many frames to expect, for progress; None where that is not known (yet)."""

    @property
    def failures(self) -> list[Failure]:
        """What could not be read so far."""

    def __enter__(self) -> Source:
        """Open it.

        Raises:
            UserError: it cannot be read at all.
        """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""

    def __iter__(self) -> Iterator[SourceFrame]:
        """The frames that can be read; what cannot goes to ``failures`` and the rest follows."""


class LiveFrames(Source, Protocol):
    """A live source: besides, its newest frame can be taken without waiting, from one thread while another entered."""

    @property
    def waiting(self) -> bool:
        """Whether there is a frame that nobody took."""

    @property
    def finished(self) -> bool:
        """Whether no more frames will come; one may still wait."""

    @property
    def skipped(self) -> int:
        """Frames that nobody took in time."""

    @property
    def reconnects(self) -> int:
        """How often it dropped out and came back."""

    def poll(self) -> SourceFrame | None:
        """The newest frame, if there is one that nobody took."""

    def listen(self, call: Callable[[], None]) -> None:
        """Have ``call`` called when a frame has come or the source has ended."""


class ImageFiles:
    """Image files and DICOM files of one frame, in the order given."""

    kind: Literal["images", "video"] = "images"
    live = False
    fps: Fraction | None = None

    def __init__(self, files: Sequence[Path], name: str | None = None) -> None:
        self.files = list(files)
        self.name = name or (str(files[0]) if len(files) == 1 else f"{len(files)} images")
        self.length: int | None = len(self.files)
        self.failures: list[Failure] = []

    def __enter__(self) -> ImageFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def __iter__(self) -> Iterator[SourceFrame]:
        for path in self.files:
            try:
                frame = _read_picture(path)
            except UserError as error:
                self.failures.append(Failure(str(path), str(error)))
            else:
                yield frame


def _read_picture(path: Path) -> SourceFrame:
    if not is_dicom(path):
        return SourceFrame(read_image(path), path)
    header = read_dicom_header(path)
    return SourceFrame(next(read_dicom_frames(path)), path, spacing=header.spacing)


class VideoFile:
    """A video file's frames, its times in seconds."""

    kind: Literal["images", "video"] = "video"
    live = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self.name = str(path)
        self.fps: Fraction | None = None
        self.length: int | None = None
        self.failures: list[Failure] = []
        self._reader: VideoReader | None = None

    def __enter__(self) -> VideoFile:
        self._reader = open_video(self.path)
        self.fps, self.length = self._reader.fps, self._reader.length
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __iter__(self) -> Iterator[SourceFrame]:
        if self._reader is None:
            raise RuntimeError("enter the source before iterating")
        for index, (image, time) in enumerate(self._reader):
            yield SourceFrame(image, self.path, index, time)
        if self._reader.damage is not None:
            message = f"cannot read all of {self.path}: {self._reader.damage}. Copy it again, or convert it."
            self.failures.append(Failure(self.name, message))


class DicomCine:
    """A DICOM file's frames, with its frame times."""

    kind: Literal["images", "video"] = "video"
    live = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self.name = str(path)
        self.fps: Fraction | None = None
        self.length: int | None = None
        self.failures: list[Failure] = []
        self._header: DicomHeader | None = None

    def __enter__(self) -> DicomCine:
        self._header = read_dicom_header(self.path)
        self.fps, self.length = self._header.fps, self._header.frames
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def __iter__(self) -> Iterator[SourceFrame]:
        if self._header is None:
            raise RuntimeError("enter the source before iterating")
        times, spacing = self._header.times or (0.0,), self._header.spacing
        count = 0
        try:
            for image, time in zip(read_dicom_frames(self.path), times, strict=False):
                yield SourceFrame(image, self.path, count, time, spacing=spacing)
                count += 1
        except UserError as error:
            done = f" {count} of {self.length} frames were read." if count else ""
            self.failures.append(Failure(self.name, f"{error}{done}"))
