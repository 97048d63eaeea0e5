"""What a source is: the protocol that everything frames come from fulfils, its frames and its failures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, runtime_checkable

from espmedsam_edge.errors import printable
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.imaging.geometry import Frame


@dataclass(frozen=True)
class Failure:
    """An input that could not be (wholly) done: which, and the line that says why and what next, made ``printable``."""

    name: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))


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
        spacing: millimetres between rows and between columns where the file or the user says so; else None.
        address: of a camera or a stream, without user names, passwords and queries; "" for files, unless they go by
            numbers (``anonymous``).
        aspect: width by height of a pixel as it is to be shown; videos from broadcast and DVD have others than 1.
        crop: the part of it that is segmented; None: all.
        modality: what it was recognised as (``recognised``); None: it is segmented as the run says.
        likeness: how much it is of the kind of each modality that this is known for (``recognition.confidences``), of
            videos and live sources once a second; None: nobody looked.
        z: micrometres along the optical axis from the first page, where a stack says so; else None.
    """

    image: Frame
    path: Path
    index: int = 0
    time: float | None = None
    captured: float | None = None
    skipped: int = 0
    spacing: tuple[float, float] | None = None
    address: str = ""
    aspect: Fraction = Fraction(1)
    crop: Crop | None = None
    modality: str | None = None
    likeness: Mapping[str, float] | None = None
    z: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def segmented(self) -> Frame:
        """What of the image is segmented: all, or a view of the crop."""
        return self.image if self.crop is None else self.crop.of(self.image)

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


@runtime_checkable
class Interruptible(Protocol):
    """A source that is no live one and yet may wait for long: what comes by a pipe."""

    def interrupt(self) -> bool:
        """Have it end with what has come; from any thread. False: it is none that could."""


@runtime_checkable
class Skippable(Protocol):
    """A source that need not give its beginning."""

    def skip_to(self, start: float) -> None:
        """Before iterating: frames that are earlier, in seconds, may be left out; the others stay what they are."""


@runtime_checkable
class Narrowable(Protocol):
    """A source of several files, of which not all need be read."""

    def narrow(self, wanted: Collection[Path]) -> None:
        """Before it is entered: read these files alone, each as if all were read."""


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

    def stop(self) -> None:
        """Have no more frames come; from any thread."""
