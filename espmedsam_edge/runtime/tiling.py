"""Which pictures are segmented in tiles, and the result of one from those of its tiles."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame, Tensor, mask_from_logits
from espmedsam_edge.imaging.recognition import DOUBTFUL, confidences
from espmedsam_edge.modalities import Scale
from espmedsam_edge.runtime.backends.backend import AnyFrame, FrameOptions, Started
from espmedsam_edge.runtime.segmentation import Segmentation, Timings
from espmedsam_edge.runtime.sheets import grid_of
from espmedsam_edge.runtime.tiles import Tiles

log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
_SMALLEST, _LARGEST = 32, 8192  # pixels
_MOST_CELLS = 1 << 28  # logits of a picture: 1 GB
_LOOKS = 16  # at the parts of a sheet
_MUCH = 2  # times the largest picture of the training, from which shrinking is said

Start = Callable[[Sequence[Frame], FrameOptions], Started]


def parse_tile(tile: str | int) -> str | int:
    """``AUTO``, ``OFF`` or a tile's side in pixels.

    Raises:
        UserError: none of these.
    """
    text = str(tile).strip().lower()
    if text in (AUTO, OFF):
        return text
    if not (text.isascii() and text.isdecimal() and _SMALLEST <= int(text) <= _LARGEST):
        raise UserError(
            f"tile '{tile}' is no size.", f"Give auto, off, or the side of a tile: {_SMALLEST} to {_LARGEST} pixels."
        )
    return int(text)


class Tiler:
    """Decides for each picture, and segments one in tiles.

    Args:
        tile: as ``parse_tile`` takes it.
        scale: of the modality, if the bundle states it; without one ``auto`` is ``off``.
        modality: for what is said.

    Attributes:
        asked: what was asked for, as ``parse_tile`` gives it.
    """

    def __init__(self, tile: str | int, scale: Scale | None, modality: str) -> None:
        self.asked = parse_tile(tile)
        self._scale, self._modality = scale, modality
        self._said = self._enlarged = self._sheets = False

    def tiles(self, frame: AnyFrame, graph: Graph) -> Tiles | None:
        """The tiles of a frame, or the pictures of a sheet; None: it is taken whole.

        So is one on a GPU, and one that needs no shrinking.
        """
        if not isinstance(frame, np.ndarray):
            return None
        size, cells = (frame.shape[0], frame.shape[1]), graph.output_shape[2]
        asked, scale, longest = self.asked, self._scale, max(size)
        if isinstance(asked, int):
            return Tiles(size, self._bearable(asked, size, cells), cells) if longest > asked else None
        if asked == AUTO and scale is not None and scale.tile is not None and longest > graph.image_size:
            return Tiles(size, self._bearable(scale.tile, size, cells), cells)
        if asked == AUTO and scale is not None and longest > max(scale.largest, graph.image_size):
            sheet = self._sheet(frame, cells)
            if sheet is not None:
                return sheet
        if scale is not None and longest > _MUCH * scale.largest and not self._said:
            self._said = True
            log.info(
                "A picture of %dx%d pixels is shrunk more than any that %s was trained on (%d at most): what is small "
                "in it may be missed. In tiles: --tile SIZE",
                size[1],
                size[0],
                self._modality,
                scale.largest,
            )
        return None

    def _sheet(self, frame: Frame, cells: int) -> Tiles | None:
        """The pictures of a sheet; None: the frame is none, or its parts are not of the modality's kind."""
        height, width = frame.shape[:2]
        rows, columns = grid_of(frame)
        if rows * columns == 1:
            return None
        part = height // rows, width // columns
        places = list(Tiles((height, width), part, cells, overlap=0))
        looked_at = places[:: -(-len(places) // _LOOKS)]
        kinds = [confidences(place.of(frame)).get(self._modality, 0.0) for place in looked_at]
        if np.median(kinds) < DOUBTFUL:
            return None
        if not self._sheets:
            self._sheets = True
            log.info(
                "A picture of %dx%d pixels looks like %d pictures side by side, of %dx%d each: each is segmented for "
                "itself. As one: --tile off",
                width,
                height,
                len(places),
                *part[::-1],
            )
        return Tiles((height, width), part, cells, overlap=0)

    def _bearable(self, asked: int, size: tuple[int, int], cells: int) -> int:
        tile = max(asked, least_tile(size, cells))
        if tile > asked and not self._enlarged:
            self._enlarged = True
            log.warning(
                "Tiles of %d pixels would take gigabytes for a picture of %dx%d pixels: they are of %d there.",
                asked,
                size[1],
                size[0],
                tile,
            )
        return tile


def least_tile(size: tuple[int, int], cells: int) -> int:
    """The smallest tile, in pixels, whose logits of a whole picture, (H, W), are not too many to hold."""
    return math.ceil(cells * math.sqrt(size[0] * size[1] / _MOST_CELLS))


def in_groups(
    frames: Iterable[Frame], start: Callable[[Sequence[Frame]], Started], batch: int, in_flight: int
) -> Iterator[Segmentation]:
    """The results of frames in order, handed over in groups of ``batch``, at most ``in_flight`` groups at once."""
    under_way: deque[Started] = deque()
    waiting = iter(frames)
    while group := list(islice(waiting, batch)):
        under_way.append(start(group))
        if len(under_way) >= in_flight:
            yield from under_way.popleft().results()
    while under_way:
        yield from under_way.popleft().results()


def segment_tiles(
    frame: Frame, tiles: Tiles, options: FrameOptions, start: Start, batch: int, in_flight: int
) -> Segmentation:
    """Segment a picture in tiles; besides it and its result, memory is taken for a few tiles.

    Args:
        frame: (H, W, 3) uint8 BGR.
        tiles: of it.
        options: the threshold; tiles are not drawn.
        start: hands over a group of at most ``batch`` tiles.
        in_flight: how many groups may be under way.

    Raises:
        UserError: the backend failed.
    """
    options = replace(options, overlay=None)
    spent = [0.0, 0.0, 0.0]
    modality = ""

    def logits() -> Iterator[Tensor]:
        nonlocal modality
        parts = (place.of(frame) for place in tiles)
        for result in in_groups(parts, lambda group: start(group, options), batch, in_flight):
            modality, timings = result.modality, result.timings
            for stage, seconds in enumerate((timings.preprocess, timings.inference, timings.postprocess)):
                spent[stage] += seconds
            yield result.logits

    joined = tiles.join(logits())
    begin = time.perf_counter()
    mask = mask_from_logits(joined, (frame.shape[0], frame.shape[1]), options.threshold)
    spent[2] += time.perf_counter() - begin
    return Segmentation(mask, modality, joined, options.threshold, Timings(*spent))
