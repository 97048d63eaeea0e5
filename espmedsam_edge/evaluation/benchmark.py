"""One whole bench of a bundle: environment, frames, contenders, measurement, encoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.evaluation.competitors import load_competitor, load_first
from espmedsam_edge.runtime.bench import Progress, Result, Settings, bench
from espmedsam_edge.runtime.bench_material import read_material, time_encoding
from espmedsam_edge.runtime.environment import collect_environment


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        bundle: its path.
        source: a file, folder or glob; None generates a clip.
        modality, precision, backend, threads: as ``Segmenter.load`` takes them.
        compare: names as ``load_competitor`` takes them.
        checkpoint: for the competitor "torch".
    """

    bundle: Path
    source: str | None = None
    modality: str | None = None
    precision: str | None = None
    backend: str = "auto"
    threads: int | None = None
    compare: Sequence[str] = ()
    checkpoint: Path | None = None


def run_benchmark(request: Request, settings: Settings, progress: Progress | None = None) -> Result:
    """Measure a bundle, alone or in turn with competitors; all are loaded before anything is measured.

    Raises:
        UserError: a bundle, source or competitor that cannot be used.
    """
    environment = collect_environment()  # first: what it says of the load must not be our own
    bundle = Bundle.open(request.bundle)
    contenders = [load_first(bundle, request.modality, request.precision, request.backend, request.threads)]
    try:
        first = contenders[0].segmenter
        material = read_material(request.source, first.modality)
        for what in request.compare:
            competitor = load_competitor(what, first, request.checkpoint, request.threads)
            competitor.name = _unique(competitor.name, [contender.name for contender in contenders])
            contenders.append(competitor)
        result = bench(contenders, material, settings, environment, progress)
        return replace(result, material=time_encoding(material, first))
    finally:
        for contender in contenders:
            contender.segmenter.close()


def _unique(name: str, taken: Sequence[str]) -> str:
    """The name, numbered where it is taken: a bundle measured against itself shows how far equals differ."""
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique
