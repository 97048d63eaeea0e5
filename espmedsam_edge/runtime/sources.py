"""Where frames come from: image files, folders, globs and video files, opened as context managers."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import read_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.headers import image_format
from espmedsam_edge.runtime.containers import looks_like_video
from espmedsam_edge.runtime.video_reading import VideoReader, open_video

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".bmp", ".dib", ".webp"})
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
        address: of a camera or a stream, without user names, passwords and queries; "" for files.
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


class ImageFiles:
    """Image files, one frame each, in the order given."""

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
                image = read_image(path)
            except UserError as error:
                self.failures.append(Failure(str(path), str(error)))
            else:
                yield SourceFrame(image, path)


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


def open_sources(specifications: Iterable[str]) -> tuple[list[Source], list[Failure]]:
    """What to read for a list of files, folders and globs (``**`` for any depth), each file once, in order.

    A folder stands for the images and videos in it by their suffix, not in its subfolders, in natural order (2 before
    10); hidden files are passed over. Files named one by one are told apart by content.

    Returns:
        Sources not yet opened, and a failure for each specification that leads to nothing.
    """
    sources: list[Source] = []
    failures: list[Failure] = []
    seen: set[str] = set()
    for specification in specifications:
        try:
            files = [path for path in _expand(specification) if not _repeated(path, seen)]
        except UserError as error:
            failures.append(Failure(specification, str(error)))
            continue
        except OSError as error:
            failures.append(Failure(specification, f"cannot read {specification}: {error.strerror}. Check the name."))
            continue
        images = [path for path in files if not _is_video(path)]
        if images:
            sources.append(ImageFiles(images, specification))
        sources += [VideoFile(path) for path in files if _is_video(path)]
    return sources, failures


def _expand(specification: str) -> list[Path]:
    path = Path(specification)
    if "://" in specification and not path.exists():
        raise UserError(f"cannot read {specification}.", "Give files, folders or globs.", exit_code=1)
    if path.is_dir():
        found = [entry for entry in path.iterdir() if _is_known(entry)]
        if not found:
            raise UserError(
                f"no images or videos in {path} (subfolders are not searched).",
                f"Name a glob for more: '{specification.rstrip('/')}/**/*.png'",
                exit_code=1,
            )
        return sorted(found, key=_natural)
    if not path.exists() and glob.has_magic(specification):
        found = [Path(name) for name in glob.glob(specification, recursive=True)]
        found = [entry for entry in found if _is_known(entry)]
        if not found:
            raise UserError(f"no image or video matches {specification}.", "Check the pattern.", exit_code=1)
        return sorted(found, key=_natural)
    return [path]


def _is_known(path: Path) -> bool:
    known = path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES
    return known and not path.name.startswith(".") and path.is_file()


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sorting key with numbers by value."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), part) if part.isdecimal() else (-1, part.casefold()) for part in parts]


def _repeated(path: Path, seen: set[str]) -> bool:
    name = os.path.abspath(path)
    if name in seen:
        return True
    seen.add(name)
    return False


def _is_video(path: Path) -> bool:
    """By content, else by suffix; what is neither is left to the image reader to refuse."""
    start = b""
    if path.is_file():  # opening a pipe would wait for its writer
        with suppress(OSError), path.open("rb") as stream:
            start = stream.read(16)
    if image_format(start):
        return False
    return looks_like_video(start) or path.suffix.lower() in VIDEO_SUFFIXES
