"""What a worker does at a time: a picture, a stretch of a video, a cine loop or stack as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sinks.places import fitting, output_names
from espmedsam_edge.runtime.sources.files import VideoFile
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.source import Failure, Source

MASKS = "masks"


@dataclass(frozen=True)
class Unit:
    """A file, or a part of a video.

    Attributes:
        path: of the file, from the root.
        source: the file as it was named.
        mask: where its mask goes, or the folder of its frames' masks, from the folder of the results.
        clip: whether it has several frames.
        start, end: seconds of a video that it begins at and ends before.
    """

    path: str
    source: str
    mask: str
    clip: bool = False
    start: float = 0.0
    end: float = math.inf

    @property
    def label(self) -> str:
        """Its name in the journal and the table."""
        whole = self.end == math.inf and not self.start
        return self.source if whole else f"{self.source}#{self.start:g}-{self.end:g}"


def source_of(label: str) -> str:
    """The file that a stretch's label names."""
    return label.rpartition("#")[0]


def plan_units(inputs: Sequence[str], chunk: float) -> tuple[list[Unit], list[Failure]]:
    """The units of files, folders and globs, in order, and what leads to nothing.

    Args:
        inputs: as the user named them.
        chunk: seconds of a video that make a unit.

    Raises:
        UserError: a camera or a stream.
    """
    sources, failures = open_sources(inputs)
    files = [file for source in sources for file in source.files]
    names = dict(zip(files, output_names(files), strict=True))
    units: list[Unit] = []
    for source in sources:
        if source.kind == "images":
            masks = {file: f"{MASKS}/{fitting(names[file], '.png')}" for file in source.files}
            units += [Unit(str(file.absolute()), str(file), mask) for file, mask in masks.items()]
            continue
        file = source.files[0]
        folder = f"{MASKS}/{fitting(names[file], '')}"
        try:
            place = str(file.absolute())
            units += [Unit(place, str(file), folder, True, *stretch) for stretch in _stretches(source, chunk)]
        except UserError as error:
            failures.append(Failure(str(file), str(error)))
    return units, failures


def _stretches(source: Source, chunk: float) -> list[tuple[float, float]]:
    """Where the units of a clip begin and end; those of a video share its frames by their times."""
    if not isinstance(source, VideoFile):
        return [(0.0, math.inf)]
    with source:
        fps, length = source.fps, source.length
    seconds = float(length / fps) if fps and length else 0.0
    starts = [number * chunk for number in range(max(1, math.ceil(seconds / chunk)))]
    return list(zip(starts, [*starts[1:], math.inf], strict=True))
