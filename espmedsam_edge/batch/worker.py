"""What runs in a worker's process: a unit in, its masks on the disk, its rows back."""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from espmedsam_edge.batch.units import Unit
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import sha256_file
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.bundle_choice import choose_bundle
from espmedsam_edge.runtime.request import ModelOptions
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.measurements import area_in_mm2
from espmedsam_edge.runtime.sinks.sink import MaskImages
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.recognised import RecognisedSource, Recogniser
from espmedsam_edge.runtime.sources.source import Skippable, Source, SourceFrame
from espmedsam_edge.runtime.tiling import in_groups
from espmedsam_edge.version import __version__

Row = dict[str, Any]


@dataclass
class UnitResult:
    """What came of a unit.

    Attributes:
        rows: one a frame, see ``table.SCHEMA``.
        sha256: of the file; "" where it failed, or changed meanwhile.
        size: (H, W) of the last frame.
        failures: why not all of it could be done.
    """

    rows: list[Row] = field(default_factory=list)
    sha256: str = ""
    size: tuple[int, int] = (0, 0)
    failures: list[str] = field(default_factory=list)


class UnitWorker:
    """Loads networks when they are first needed, and keeps them.

    Args:
        model: which network, and on what; where no modality is named, each picture is recognised.
        out: the folder of the results.
        masks: whether masks are written.
    """

    def __init__(self, model: ModelOptions, out: str, masks: bool) -> None:
        self._model, self._out, self._masks = model, Path(out), masks
        self._chosen = choose_bundle(model.bundle, model.modality, model.precision)
        self._recogniser = None if self._chosen.modality else Recogniser(self._chosen.among)
        self._segmenters: dict[str, Segmenter] = {}

    def about(self) -> dict[str, Any]:
        """What this process is: versions, and whether it sees the folder of the results."""
        if self._chosen.modality is not None:
            self._segmenter(self._chosen.modality)
        return {
            "python": platform.python_version(),
            "package": __version__,
            "sees": self._out.is_dir(),
            "process": os.getpid(),
        }

    def do(self, unit: Unit) -> UnitResult:
        """Segment a unit; what fails of it is said in the result."""
        result = UnitResult()
        path = Path(unit.path)
        try:
            before = path.stat()
            self._segment(unit, result)
            after = path.stat()
            same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
            if same and not result.failures:  # what failed is tried again, whatever it holds, and may be terabytes
                result.sha256 = _hash(path, before.st_size, before.st_mtime_ns)
        except UserError as error:
            result.failures.append(str(error))
        except OSError as error:
            result.failures.append(f"cannot read {unit.source}: {error.strerror}.")
        return result

    def _segment(self, unit: Unit, result: UnitResult) -> None:
        sources, failures = open_sources([unit.path])
        path = Path(unit.path)
        sink = MaskImages({path: self._out / unit.mask}, numbered=unit.clip)
        for source in sources:
            if self._recogniser is not None:
                source = RecognisedSource(source, self._recogniser)
            with source:
                for frame, found in self._results(_between(source, unit)):
                    if self._masks:
                        sink.write(frame, found)
                    result.rows.append(self._row(unit, frame, found))
                    result.size = found.size
            failures += source.failures
        result.failures += [failure.message for failure in failures]

    def _results(self, frames: Iterator[SourceFrame]) -> Iterator[tuple[SourceFrame, Segmentation]]:
        """Frames of one modality with their results, in order."""
        first = next(frames, None)
        if first is None:
            return
        segmenter = self._segmenter(first.modality or str(self._chosen.modality))
        under_way: deque[SourceFrame] = deque()

        def images() -> Iterator[Frame]:
            under_way.append(first)
            yield first.segmented
            for frame in frames:
                under_way.append(frame)
                yield frame.segmented

        for found in in_groups(images(), segmenter.start, segmenter.batch, segmenter.in_flight):
            yield under_way.popleft(), found

    def _segmenter(self, modality: str) -> Segmenter:
        if modality not in self._segmenters:
            model = self._model
            self._segmenters[modality] = Segmenter.load(
                self._chosen.bundle_of(modality),
                modality,
                model.precision,
                model.backend_spec(),
                threshold=model.threshold,
                threads=model.threads,
                tta=model.tta,
                tile=model.tile,
                many=True,
            )
        return self._segmenters[modality]

    def _row(self, unit: Unit, frame: SourceFrame, found: Segmentation) -> Row:
        box, centroid = found.bounding_box or (None,) * 4, found.centroid or (None, None)
        numbered = f"{unit.mask}/{frame.index:06d}.png" if unit.clip else unit.mask
        return {
            "source": unit.source,
            "frame": frame.index,
            "time_s": frame.time,
            "modality": found.modality,
            "width": found.size[1],
            "height": found.size[0],
            "threshold": found.threshold,
            "area_px": found.area,
            "area_fraction": found.area / (found.size[0] * found.size[1]),
            "area_mm2": area_in_mm2(found.area, frame.spacing),
            **dict(zip(("box_x", "box_y", "box_width", "box_height"), box, strict=True)),
            **dict(zip(("centroid_x", "centroid_y"), centroid, strict=True)),
            "mask": numbered if self._masks else None,
            "unit": unit.label,
        }


@lru_cache(maxsize=64)
def _hash(path: Path, size: int, time: int) -> str:
    """Of a file as it was then: the stretches of a video share it."""
    return sha256_file(path)


def _between(source: Source, unit: Unit) -> Iterator[SourceFrame]:
    """The frames of a stretch of a video, by their times; all of anything else."""
    if unit.start and isinstance(source, Skippable):
        source.skip_to(unit.start)
    for frame in source:
        time = frame.time or 0.0
        if time >= unit.end:
            return
        if time >= unit.start:
            yield frame
