"""Which frames of a source are segmented, turned which way, which part of them, and how large their pixels are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.crop import Crop, PictureFinder, find_picture
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.objects.instance import Spacing
from espmedsam_edge.objects.stated import stated_spacing
from espmedsam_edge.runtime.sources.passed_on import PassedOn
from espmedsam_edge.runtime.sources.source import Failure, Source, SourceFrame

log = logging.getLogger(__name__)

AUTO_FRAMES = 10
"""How many of a video's first frames ``auto`` looks at."""

_HELD_BYTES = 64 << 20  # at most, of those frames
_ROTATIONS: Final = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}


@dataclass(frozen=True)
class Selection:
    """What of sources is segmented. One object for all sources of a run.

    Attributes:
        start: seconds of a video or live source that are left out first.
        every: of those only each so many-th frame.
        fps: of a video or live source at most so many frames a second; None: all.
        rotate: degrees, clockwise: 0, 90, 180 or 270.
        crop: the part of the turned frame; None: all, or what ``auto`` finds.
        auto: whether the picture inside borders and text panels is looked for.
        spacing: millimetres between rows and between columns, of frames as they are read; None: as files state it.
        resolution: whether TIFF's resolution counts, where no program states more.
    """

    start: float = 0.0
    every: int = 1
    fps: float | None = None
    rotate: int = 0
    crop: Crop | None = None
    auto: bool = False
    spacing: Spacing | None = None
    resolution: bool = False
    _sizes: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False)
    _resolutions: dict[Path, Spacing | None] = field(default_factory=dict, compare=False)  # of one file, the last

    @property
    def everything(self) -> bool:
        """Whether nothing is left out or changed."""
        return self == Selection()

    def begin(self, size: tuple[int, int] | None) -> None:
        """Take a frame of that (H, W) for the run's first, which an earlier run has done; None: there is none."""
        if size is not None:
            self._sizes["first"] = size

    def spaced(self, frame: SourceFrame) -> SourceFrame:
        """The frame with the spacing that was asked for."""
        if self.spacing is not None:
            return replace(frame, spacing=self.spacing)
        if self.resolution and frame.spacing is None and frame.captured is None:
            return replace(frame, spacing=self._resolution_of(frame.path))
        return frame

    def _resolution_of(self, path: Path) -> Spacing | None:
        if path not in self._resolutions:
            self._resolutions.clear()
            self._resolutions[path] = stated_spacing(path, resolution=True)
        return self._resolutions[path]

    def turned(self, frame: SourceFrame) -> SourceFrame:
        """The frame as it is to be seen."""
        frame = self.spaced(frame)
        if not self.rotate:
            return frame
        image: Frame = np.asarray(cv2.rotate(frame.image, _ROTATIONS[self.rotate]), np.uint8)
        if self.rotate == 180:
            return replace(frame, image=image)
        spacing = None if frame.spacing is None else (frame.spacing[1], frame.spacing[0])
        return replace(frame, image=image, aspect=1 / frame.aspect, spacing=spacing)

    def cropped(self, frame: SourceFrame) -> SourceFrame:
        """The frame with the part that was named.

        Raises:
            UserError: it does not lie in the frame, or the frame has another size than the run's first.
        """
        if self.crop is None:
            return frame
        size = frame.size
        first = self._sizes.setdefault("first", size)
        if size != first:
            raise UserError(
                f"cannot crop {frame.source}: it has {size[1]}x{size[0]} pixels, the first one {first[1]}x{first[0]}.",
                "Segment pictures of other sizes in a run of their own, or take --crop auto.",
                exit_code=1,
            )
        try:
            self.crop.check(size)
        except UserError as error:
            raise UserError(f"cannot crop {frame.source}: {error.message}", error.hint, exit_code=1) from None
        return replace(frame, crop=None if self.crop == (0, 0, size[1], size[0]) else self.crop)


class SelectedSource(PassedOn):
    """The frames of a source that are wanted, turned and with what of them is segmented.

    Their indices and times stay those of the source. Pictures of a folder are all taken.

    Args:
        source: not yet entered.
        selection: what is wanted.
    """

    def __init__(self, source: Source, selection: Selection) -> None:
        super().__init__(source)
        self._wanted = selection
        self._failures: list[Failure] = []
        self._over = False
        self._next_index = 0
        self._first_time: float | None = None
        self._last_number = -1  # at the wanted rate
        self._finder, self._finder_size = PictureFinder(), (0, 0)  # of a live source
        self._found: dict[tuple[int, int], Crop | None] = {}

    @property
    def fps(self) -> Fraction | None:
        fps = self._source.fps
        if fps is None or self.kind == "images":
            return fps
        fps /= self._wanted.every
        return fps if self._wanted.fps is None else min(fps, Fraction(self._wanted.fps).limit_denominator(1001))

    @property
    def length(self) -> int | None:
        length = self._source.length
        if length is None or self.kind == "images":
            return length
        if self._wanted.start or self._wanted.fps is not None:
            return None
        return ceil(length / self._wanted.every)

    @property
    def failures(self) -> list[Failure]:
        return [*self._source.failures, *self._failures]

    @property
    def waiting(self) -> bool:
        return not self._over and self._live.waiting

    @property
    def finished(self) -> bool:
        return self._over or self._live.finished

    def __iter__(self) -> Iterator[SourceFrame]:
        self.skip_to(self._wanted.start)
        frames = (self._wanted.turned(frame) for frame in self._source if self._chosen(frame))
        if self._wanted.auto:
            yield from self._auto_cropped(frames)
            self._tell_early_end()
            return
        for frame in frames:
            try:
                yield self._wanted.cropped(frame)
            except UserError as error:
                if self.kind == "video":
                    raise
                self._failures.append(Failure(str(frame.path), str(error)))
        self._tell_early_end()

    def _tell_early_end(self) -> None:
        if self.kind == "video" and self._wanted.start and self._next_index == 0 and not self._source.failures:
            message = f"{self.name} ends before second {self._wanted.start:g}: nothing of it is taken."
            self._failures.append(Failure(self.name, f"{message} Give an earlier --start."))

    def poll(self) -> SourceFrame | None:
        """See ``LiveFrames``; None too for a frame that is not wanted."""
        frame = self._live.poll()
        if frame is None or not self._chosen(frame):
            return None
        frame = self._wanted.turned(frame)
        if self._wanted.auto:
            return self._live_cropped(frame)
        try:
            return self._wanted.cropped(frame)
        except UserError as error:
            self._failures.append(Failure(self.name, str(error)))
            self._over = True
            self._live.stop()
            return None

    def _chosen(self, frame: SourceFrame) -> bool:
        if self.kind == "images":
            return True
        time = 0.0 if frame.time is None else frame.time
        if time < self._wanted.start or frame.index < self._next_index:
            return False
        if self._wanted.fps is not None:
            self._first_time = time if self._first_time is None else self._first_time
            number = int((time - self._first_time) * self._wanted.fps + _ROUNDING)
            if number <= self._last_number:
                return False
            self._last_number = number
        self._next_index = frame.index + self._wanted.every
        return True

    def _auto_cropped(self, frames: Iterator[SourceFrame]) -> Iterator[SourceFrame]:
        if self.kind == "images":
            yield from self._pictures(frames)
            return
        first: list[SourceFrame] = []
        for frame in frames:
            first.append(frame)
            held = len(first) * frame.image.nbytes
            if len(first) == AUTO_FRAMES or held + frame.image.nbytes > _HELD_BYTES or first[0].size != frame.size:
                break
        first.reverse()  # so that each is let go once it is on its way
        while first:
            size = first[-1].size
            if size not in self._found:
                self._hold(size, [frame.image for frame in first if frame.size == size])
            yield _with(first[-1], self._found[size])
            first.pop()
        for frame in frames:
            if frame.size not in self._found:
                self._hold(frame.size, [frame.image])
            yield _with(frame, self._found[frame.size])

    def _pictures(self, frames: Iterator[SourceFrame]) -> Iterator[SourceFrame]:
        """Each by itself: they need not be of one device."""
        count = cut = 0
        for frame in frames:
            crop = find_picture([frame.image])
            count, cut = count + 1, cut + (crop is not None)
            if len(self.files) == 1:
                self._tell(frame.size, crop)
            yield _with(frame, crop)
        if len(self.files) > 1:
            log.info("%s: --crop auto cut borders off %d of %d.", self.name, cut, count)

    def _live_cropped(self, frame: SourceFrame) -> SourceFrame:
        """With what was found so far: a live frame waits for no others."""
        size = frame.size
        if size not in self._found:
            if self._finder_size != size:
                self._finder, self._finder_size = PictureFinder(), size
            self._finder.add(frame.image)
            crop = self._finder.found()
            if self._finder.frames < AUTO_FRAMES:
                return _with(frame, crop)
            self._found[size] = crop
            self._tell(size, crop)
        return _with(frame, self._found[size])

    def _hold(self, size: tuple[int, int], frames: list[Frame]) -> None:
        self._found[size] = find_picture(frames)
        self._tell(size, self._found[size])

    def _tell(self, size: tuple[int, int], crop: Crop | None) -> None:
        if crop is None:
            log.info("%s: nothing is cut.", self.name)
        else:
            log.info("%s: the picture in its %dx%d pixels is --crop %s", self.name, size[1], size[0], crop)


def selected(sources: Sequence[Source], selection: Selection) -> list[Source]:
    """Sources with what of them is wanted."""
    return list(sources) if selection.everything else [SelectedSource(source, selection) for source in sources]


_ROUNDING = 1e-3  # of a frame, that times may be early


def _with(frame: SourceFrame, crop: Crop | None) -> SourceFrame:
    return frame if crop is None else replace(frame, crop=crop)
