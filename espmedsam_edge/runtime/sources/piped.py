"""What comes on standard input: a video as it arrives, or one picture; told apart by content, never on the disk."""

from __future__ import annotations

import logging
import os
import select
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import decode_image
from espmedsam_edge.imaging.headers import image_format, read_header
from espmedsam_edge.runtime.sources.files import VideoFile
from espmedsam_edge.runtime.sources.source import Failure, Source, SourceFrame
from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.reading import PyAvReader, VideoReader

log = logging.getLogger(__name__)

STANDARD_INPUT = "-"
NAME = "standard input"
LABEL = Path("stdin")
"""What results are named after."""

_LARGEST = 1 << 30  # bytes of a picture
_MOST_PARTS = 4_000_000  # of one: chunks, segments, stuffed bytes; a JPEG of 500 MB has two million
_START = 1024
_WAIT_SECONDS = 0.2  # between two looks at whether reading has to end


class Pipe:
    """Standard input, or another open file, from where it stands. Read by one thread; any may ``end`` it.

    Args:
        descriptor: of the open file; stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ahead = bytearray()
        self._ended = threading.Event()

    def read(self, size: int) -> bytes:
        """At most so many bytes, as soon as there are some; none at the end."""
        if self._ahead:
            data = bytes(self._ahead[:size])
            del self._ahead[:size]
            return data
        while not self._ended.is_set():
            if select.select([self._descriptor], [], [], _WAIT_SECONDS)[0]:
                return os.read(self._descriptor, size)
        return b""

    def end(self) -> None:
        """Have ``read`` find the end, even where it waits."""
        self._ended.set()

    def put_back(self, data: bytes) -> None:
        """Have ``read`` give these bytes first."""
        self._ahead[:0] = data


class _SeekablePipe(Pipe):
    """A file that was redirected: containers with their index at the end need to jump."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def tell(self) -> int:
        return os.lseek(self._descriptor, 0, os.SEEK_CUR)


class _Incoming:
    """Bytes of a pipe that are looked at before it is clear what they are."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._looks = 0
        self.data = bytearray()

    def has(self, count: int) -> bool:
        """Read on until there are so many bytes; False: there are fewer."""
        while len(self.data) < count:
            more = self._pipe.read(1 << 16)
            if not more:
                return False
            self.data += more
            if len(self.data) > _LARGEST:
                raise UserError(
                    f"the picture on {NAME} is over {_LARGEST >> 20} MiB.", "Give it as a file.", exit_code=1
                )
        return True

    def looks_on(self, count: int) -> bool:
        """As ``has``, for each of a picture's parts in turn; False after very many: they are no frame's."""
        self._looks += 1
        return self._looks <= _MOST_PARTS and self.has(count)

    def all(self) -> bytes:
        """Everything up to the end."""
        while self.has(len(self.data) + 1):
            pass
        return bytes(self.data)


def open_standard_input() -> Source:
    """The source of what comes on standard input; waits for its beginning, of a picture for all of it.

    Raises:
        UserError: a terminal, nothing, or what cannot be read from a pipe.
    """
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        raise UserError(f"there is no {NAME}.", "Pipe a video or a picture into this command.") from None
    if os.isatty(descriptor):
        raise UserError(
            f"{NAME} is a terminal.", "Pipe a video or a picture: ffmpeg ... -f matroska - | espmedsam-edge infer ... -"
        )
    redirected = stat.S_ISREG(os.fstat(descriptor).st_mode)  # < clip.mp4
    return source_of(_SeekablePipe(descriptor) if redirected else Pipe(descriptor))


def source_of(pipe: Pipe) -> Source:
    """The source of what a pipe gives; see ``open_standard_input``."""
    incoming = _Incoming(pipe)
    incoming.has(_START)
    start = bytes(incoming.data[:_START])
    if not start:
        raise UserError(f"nothing came on {NAME}.", "Does the command before the pipe work?", exit_code=1)
    if start[128:132] == b"DICM":
        raise UserError(f"a DICOM file came on {NAME}.", "Give it as a file.", exit_code=1)
    form = image_format(start)
    if form in (None, "GIF") or (form in ("JPEG", "PNG") and _another_follows(incoming, form)):
        if not has_pyav():
            raise UserError(f"a video on {NAME} needs PyAV.", "Install it: pip install 'espmedsam-edge[video]'")
        if isinstance(pipe, _SeekablePipe):
            pipe.seek(-len(incoming.data), os.SEEK_CUR)
        else:
            pipe.put_back(bytes(incoming.data))
        return PipedVideo(pipe)
    return PipedPicture(incoming.all())


def _another_follows(incoming: _Incoming, form: str) -> bool:
    """Whether a picture is followed by another one, as in Motion JPEG or FFmpeg's image2pipe."""
    end = _end_of_jpeg(incoming) if form == "JPEG" else _end_of_png(incoming)
    return end is not None and incoming.has(end + 8) and image_format(bytes(incoming.data[end : end + 8])) == form


def _end_of_png(incoming: _Incoming) -> int | None:
    at = 8
    while incoming.looks_on(at + 12):
        length, kind = int.from_bytes(incoming.data[at : at + 4], "big"), incoming.data[at + 4 : at + 8]
        at += 12 + length
        if kind == b"IEND":
            return at
    return None


def _end_of_jpeg(incoming: _Incoming) -> int | None:
    """Where the end marker ends; None: there is none, or further pictures belong to this one (a phone's previews)."""
    at, data = 2, incoming.data
    while incoming.looks_on(at + 4):
        marker = data[at + 1]
        if data[at] != 0xFF:
            return None
        if marker == 0xFF:  # filling
            at += 1
        elif marker == 0xD9:
            return at + 2
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            at += 2
        else:
            if marker == 0xE2 and incoming.has(at + 8) and data[at + 4 : at + 8] == b"MPF\0":
                return None
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == 0xDA and not incoming.has(at := _end_of_scan(incoming, at)):
                return None
    return at + 2 if incoming.has(at + 2) and data[at : at + 2] == b"\xff\xd9" else None


def _end_of_scan(incoming: _Incoming, at: int) -> int:
    """Where the next marker stands that is none of a scan's own."""
    while incoming.looks_on(at + 2):
        found = incoming.data.find(b"\xff", at, len(incoming.data) - 1)
        if found < 0:
            at = len(incoming.data) - 1
            incoming.has(len(incoming.data) + 1)
        elif incoming.data[found + 1] == 0 or 0xD0 <= incoming.data[found + 1] <= 0xD7:
            at = found + 2
        else:
            return found
    return at


class PipedVideo(VideoFile):
    """A video that is read as it comes; its sender waits while frames are segmented."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(LABEL)
        self.name = NAME
        self._pipe = pipe

    def _opened(self) -> VideoReader:
        return PyAvReader(Path(NAME), self._pipe)

    def interrupt(self) -> bool:
        self._pipe.end()
        return True


class PipedPicture(Closing):
    """One picture that came whole."""

    kind: Literal["images", "video"] = "images"
    live = False
    fps = None
    length = 1
    name = NAME

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.files = [LABEL]
        self.failures: list[Failure] = []

    def __iter__(self) -> Iterator[SourceFrame]:
        try:
            image = decode_image(self._data, NAME)
        except UserError as error:
            self.failures.append(Failure(NAME, str(error)))
        else:
            pictures = read_header(self._data).pictures
            if pictures > 1:
                log.warning("%s holds %d pictures, of which the first is taken. Give all as a file.", NAME, pictures)
            yield SourceFrame(image, LABEL)
