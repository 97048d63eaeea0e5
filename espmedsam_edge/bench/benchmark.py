"""One whole bench of a bundle: environment, frames, contenders, measurement, encoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from espmedsam_edge.bench.competitors import load_competitor, load_first
from espmedsam_edge.bench.material import read_material, time_encoding
from espmedsam_edge.bench.measure import BenchResult, BenchSettings, OnProgress, bench
from espmedsam_edge.bench.rates import roofline
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.backends.backend import BackendUnavailable
from espmedsam_edge.runtime.tiling import OFF


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        bundle: its path.
        source: a file, folder or glob; None generates a clip.
        modality, precision, backend, threads: as ``Segmenter.load`` takes them.
        compare: names as ``load_competitor`` takes them.
        checkpoint: for the competitors that run in PyTorch.
        roofline: measure what the machine can do at best, and compare; left out where it cannot be.
        tile: as ``Segmenter.load`` takes it; a frame's time is then that of all its tiles.
    """

    bundle: Path
    source: str | None = None
    modality: str | None = None
    precision: str | None = None
    backend: str = "auto"
    threads: int | None = None
    compare: Sequence[str] = ()
    checkpoint: Path | None = None
    roofline: bool = True
    tile: str | int = OFF


def run_benchmark(request: BenchRequest, settings: BenchSettings, progress: OnProgress | None = None) -> BenchResult:
    """Measure a bundle, alone or in turn with competitors; all are loaded before anything is measured.

    A competitor that this machine cannot run is left out; the result says why. What the bundle runs on is
    logged before anything is measured.

    Raises:
        UserError: a bundle, source or competitor that is not what it should be, or a backend that cannot run here.
    """
    environment = collect_environment()  # first: what it says of the load must not be our own
    bundle = Bundle.open(request.bundle)
    contenders = [
        load_first(bundle, request.modality, request.precision, request.backend, request.threads, request.tile)
    ]
    try:
        first = contenders[0].segmenter
        material = read_material(request.source, first.modality)
        left_out = []
        for what in request.compare:
            try:
                competitor = load_competitor(what, first, request.checkpoint, request.threads)
            except BackendUnavailable as error:
                left_out.append(f"{what}: {error}")
                continue
            competitor.name = _unique(competitor.name, [contender.name for contender in contenders])
            contenders.append(competitor)
            try:
                competitor.segmenter.segment(material.frames[0])  # torch compiles at its first run
            except BackendUnavailable as error:
                left_out.append(f"{what}: {error}")
                contenders.pop().segmenter.close()
        first.choice.tell()
        result = bench(contenders, material, settings, environment, progress)
        result = replace(result, material=time_encoding(material, first))
        if request.roofline:
            try:
                threads = request.threads or usable_cores()
                result = replace(result, roofline=roofline(first, threads, _graph_seconds(result)))
            except UserError as error:  # a bench that is done is worth more than what it could be compared with
                left_out.append(f"roofline: {error}")
        return replace(result, left_out=tuple(left_out))
    finally:
        for contender in contenders:
            contender.segmenter.close()


def _graph_seconds(result: BenchResult) -> float:
    """Median seconds of the first contender's graph alone."""
    series = result.series[0]
    return series.device.engine if series.device else float(np.median(series.stage("inference")))


def _unique(name: str, taken: Sequence[str]) -> str:
    """The name, numbered where it is taken: a bundle measured against itself shows how far equals differ."""
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique
