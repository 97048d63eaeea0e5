"""A whole slide to a mask: region by region, its tiles with tissue alone, one region read ahead."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import write_errors
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.imaging.geometry import Frame, Tensor, mask_from_logits
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.runtime.run.finding import ObjectFinder
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.slide.mask_file import write_mask
from espmedsam_edge.runtime.slide.objects import write_objects
from espmedsam_edge.runtime.slide.pyramid import Slide
from espmedsam_edge.runtime.slide.regions import Mask, Regions
from espmedsam_edge.runtime.slide.tissue import Tissue
from espmedsam_edge.runtime.tiles import Tiles
from espmedsam_edge.runtime.tiling import in_groups, least_tile

log = logging.getLogger(__name__)

REGION = 4096
"""Side of a region in pixels: what is lost of a run that is killed, and what is held of a slide at once."""

_NOTHING = -16.0  # the logit of what was not looked at: a probability of a ten-millionth
"""Below any threshold."""


@dataclass(frozen=True)
class SlideOptions:
    """How a slide is segmented. None: the default.

    Attributes:
        tile: side of a tile in pixels of the level; None: what the bundle says, else the network's input.
        level: of the pyramid; 0 is the largest.
        pixel_size: micrometres a pixel of the largest level, where the file does not say or is wrong.
        everything: segment empty glass, too.
        region: side of a region.
        overwrite: replace files that exist, and begin anew what was begun otherwise.
        instances: whether objects that touch are outlined each for itself; None: where a modality shows many.
    """

    tile: int | None = None
    level: int = 0
    pixel_size: float | None = None
    everything: bool = False
    region: int = REGION
    overwrite: bool | None = None
    instances: bool | None = None


class SlideResults(NamedTuple):
    """Where a slide's results go."""

    mask: Path
    objects: Path
    overview: Path
    unfinished: Path

    @classmethod
    def of(cls, slide: Path, folder: Path) -> SlideResults:
        """Named after the slide, in a folder."""
        name = slide.name.removesuffix(slide.suffix).removesuffix(".ome")
        return cls(
            folder / f"{name}-mask.ome.tif",
            folder / f"{name}.geojson",
            folder / f"{name}-overview.jpg",
            folder / f"{name}.unfinished",
        )


@dataclass(frozen=True)
class SlideReport:
    """What was done: tiles with tissue, tiles of the whole level, objects, seconds; and what could not be read."""

    tiles: int
    of: int
    objects: int
    seconds: float
    failure: str | None = None


Progress = Callable[[int, int], None]  # tiles done, and of how many


def segment_slide(
    path: Path,
    segmenter: Segmenter,
    results: SlideResults,
    options: SlideOptions,
    progress: Progress | None = None,
    check: Callable[[Path], None] = lambda place: None,
) -> SlideReport:
    """Segment a slide; a run that ended goes on from the regions that are finished.

    Args:
        path: of the slide.
        segmenter: loaded with ``tile="off"``.
        results: where they go.
        options: how.
        progress: called after each group of tiles.
        check: called with a result's place right before it is written; what it raises keeps what is there.

    Raises:
        UserError: the slide cannot be read, an option does not fit it, or a result cannot be written.
    """
    begin = time.perf_counter()
    finder = ObjectFinder(ObjectOptions(options.instances))
    with Slide(path) as slide:
        if not 0 <= options.level < len(slide.levels):
            raise UserError(
                f"{path} has {len(slide.levels)} levels, none of number {options.level}.", "0 is the largest."
            )
        level = slide.levels[options.level]
        overview = slide.overview()
        tissue = Tissue(overview, (level.height, level.width), everywhere=options.everything)
        scale = segmenter.bundle.manifest.scales.get(segmenter.modality)
        tile = options.tile or (scale.tile if scale is not None and scale.tile is not None else segmenter.image_size)
        side = 3 * options.region // 2  # of what is read for a region
        tile = max(tile, least_tile((side, side), segmenter.graph.output_shape[2]))
        regions = Regions(results.unfinished, (level.height, level.width), options.region)
        regions.open(_plan(path, segmenter, options, tile), anew=bool(options.overwrite))
        work = _Work(slide, options.level, segmenter, tissue, tile, regions)
        done = work.run(progress)
        mpp = options.pixel_size or slide.mpp
        mpp = None if mpp is None else mpp * level.downsample
        log.info("%s: writing the mask and its outlines.", path.name)
        check(results.mask)
        with ThreadPoolExecutor(1, "espmedsam-mask") as beside:
            mask = beside.submit(write_mask, results.mask, regions, mpp)
            colour = color_of(segmenter.modality)
            check(results.objects)
            objects = write_objects(
                results.objects,
                regions,
                name=segmenter.bundle.manifest.targets.get(segmenter.modality, segmenter.modality),
                colour=(colour[2], colour[1], colour[0]),
                scale=level.downsample,
                mpp=mpp,
                split=finder.splits(segmenter.modality),
            )
            mask.result()
        step = max(1, -(-max(regions.size) // 2048))
        shown = _overlay(overview, regions.part(Crop(0, 0, level.width, level.height), step), colour)
        check(results.overview)
        with write_errors(results.overview):
            write_image(results.overview, shown)
        regions.remove()
        failure = None
        if slide.damaged:
            failure = f"{path}: {len(slide.damaged)} of its tiles are damaged and count as empty. Copy it again."
        return SlideReport(done, work.whole, objects, time.perf_counter() - begin, failure)


def _plan(path: Path, segmenter: Segmenter, options: SlideOptions, tile: int) -> dict[str, object]:
    """All that a region's mask depends on."""
    state = path.stat()
    return {
        "slide": [path.name, state.st_size, state.st_mtime_ns],
        "graph": segmenter.graph.sha256,
        "threshold": segmenter.threshold,
        "tile": tile,
        "level": options.level,
        "region": options.region,
        "everything": options.everything,
    }


def _overlay(overview: Frame, mask: Mask, colour: tuple[int, int, int]) -> Frame:
    import cv2

    size = (overview.shape[1], overview.shape[0])
    fitting = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST), np.uint8)
    return draw_overlay(overview, fitting, OverlayStyle(colour))


class _Job(NamedTuple):
    """A region that is to be segmented: its place, what is read for it, the tiles of that and which have tissue."""

    row: int
    column: int
    place: Crop
    read: Crop
    tiles: Tiles
    with_tissue: list[bool]


def _moved(tile: Crop, read: Crop) -> Crop:
    """Where a tile of what is read lies in the level."""
    return Crop(read.x + tile.x, read.y + tile.y, tile.width, tile.height)


class _Work:
    """The regions of one slide."""

    def __init__(
        self, slide: Slide, level: int, segmenter: Segmenter, tissue: Tissue, tile: int, regions: Regions
    ) -> None:
        self._slide, self._level, self._segmenter = slide, level, segmenter
        self._tissue, self._tile, self._regions = tissue, tile, regions
        self.whole = 0

    def run(self, progress: Progress | None) -> int:
        """Segment what is not finished; how many tiles have tissue."""
        waiting, tiles, there = [], 0, 0
        for row in range(self._regions.rows):
            for column in range(self._regions.columns):
                job = self._job(row, column)
                count = sum(job.with_tissue)
                tiles += count
                self.whole += len(job.tiles)
                if self._regions.is_finished(row, column):
                    there += count
                elif count:
                    waiting.append(job)
        done = there
        with (
            ThreadPoolExecutor(1, "espmedsam-slide") as reader,
            ThreadPoolExecutor(1, "espmedsam-region") as writer,
        ):
            written: Future[None] | None = None
            ahead: Future[Frame] | None = None
            for index, job in enumerate(waiting):
                frame = (ahead or reader.submit(self._read, job)).result()
                ahead = reader.submit(self._read, waiting[index + 1]) if index + 1 < len(waiting) else None

                def each(more: int) -> None:
                    nonlocal done
                    done += more
                    if progress is not None:
                        progress(done, tiles)

                joined = self._segment(job, frame, each)
                if written is not None:
                    written.result()
                written = writer.submit(self._finish, job, joined)
            if written is not None:
                written.result()
        return tiles

    def _job(self, row: int, column: int) -> _Job:
        """A region's tiles reach a part of a tile beyond it, so that they know what is around."""
        place = self._regions.place(row, column)
        rim = self._tile // 4
        height, width = self._regions.size
        left, top = max(0, place.x - rim), max(0, place.y - rim)
        right, bottom = min(width, place.x + place.width + rim), min(height, place.y + place.height + rim)
        read = Crop(left, top, right - left, bottom - top)
        cells = self._segmenter.graph.output_shape[2]
        tiles = Tiles((read.height, read.width), self._tile, cells)
        tissue = [self._tissue.among(_moved(one, read)) for one in tiles]
        return _Job(row, column, place, read, tiles, tissue)

    def _read(self, job: _Job) -> Frame:
        """A region and its rim, where tiles with tissue are."""
        only = [_moved(one, job.read) for one, wanted in zip(job.tiles, job.with_tissue, strict=True) if wanted]
        return self._slide.read(self._level, *job.read, only)

    def _segment(self, job: _Job, frame: Frame, each: Callable[[int], None]) -> Tensor:
        """The logits of a region and its rim."""
        segmenter = self._segmenter
        cells = segmenter.graph.output_shape[2]
        nothing = np.full((cells, cells), _NOTHING, np.float32)
        parts = (tile.of(frame) for tile, wanted in zip(job.tiles, job.with_tissue, strict=True) if wanted)
        results = in_groups(parts, segmenter.start, segmenter.batch, segmenter.in_flight)

        def logits() -> Iterator[Tensor]:
            for wanted in job.with_tissue:
                if wanted:
                    yield next(results).logits
                    each(1)
                else:
                    yield nothing

        return job.tiles.join(logits())

    def _finish(self, job: _Job, logits: Tensor) -> None:
        """Write the mask of a region."""
        mask = mask_from_logits(logits, (job.read.height, job.read.width), self._segmenter.threshold)
        inner = Crop(job.place.x - job.read.x, job.place.y - job.read.y, job.place.width, job.place.height)
        self._regions.write(job.row, job.column, np.ascontiguousarray(inner.of(mask)))
