"""Measures latency stage by stage, one segmenter alone or several in turn (A B A B ...) in one process."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.bench.device import DeviceTimes, measure_device
from espmedsam_edge.bench.ratios import Ratio, ratio_of_medians
from espmedsam_edge.bench.roofline import Roofline
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import sha256_file
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.machine.environment import machine_cpu_seconds, process_memory
from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.segmenter import Segmenter

STAGES = ("preprocess", "inference", "postprocess", "overlay")
_COMPARED_FRAMES = 4
_SETTLE_SECONDS = 0.01  # lets the threads of the contender before stop spinning


@dataclass(frozen=True)
class BenchSettings:
    """How long to measure, after trtexec: warm-up first, then at least ``duration`` and ``min_iterations``.

    Attributes:
        duration: seconds measured; with several contenders, seconds a contender on average.
        warmup: seconds a contender runs before, not counted; at least two runs.
        min_iterations: runs of each contender, even when they take longer than ``duration``.
    """

    duration: float = 3.0
    warmup: float = 0.5
    min_iterations: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.duration <= 86400:
            raise UserError(f"duration {self.duration:g} s is not possible.", "Give seconds, above 0 and up to a day.")


@dataclass(frozen=True)
class Sample:
    """Seconds of one run: frame in to mask and overlay out by the clock, and the part of each of ``STAGES``.

    A backend that draws on the GPU does so within inference; "overlay" is what is left to do on the CPU.
    """

    total: float
    stages: tuple[float, float, float, float]


@dataclass
class Contender:
    """A segmenter that takes part. ``load_seconds`` and ``load_bytes`` are what loading it cost."""

    name: str
    segmenter: Segmenter
    load_seconds: float
    load_bytes: int | None = None
    graph_sha256: str | None = None

    @classmethod
    def load(cls, name: str, load: Callable[[], Segmenter], graph_sha256: str | None = None) -> Contender:
        """Load a segmenter and note the time and memory that took."""
        before, _ = process_memory()
        start = time.perf_counter()
        segmenter = load()
        seconds = time.perf_counter() - start
        after, _ = process_memory()
        grown = after - before if after is not None and before is not None else None
        return cls(name, segmenter, seconds, grown, graph_sha256)


@dataclass
class Series:
    """Everything measured of one contender. ``cores_busy``: this process's CPU time over the clock's.

    ``device``: what the GPU's own clock says, after all else was measured; None on the CPU.
    """

    contender: Contender
    first_seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    cores_busy: float = 0.0
    mask_agreement: float = 1.0
    device: DeviceTimes | None = None

    @property
    def totals(self) -> list[float]:
        """Seconds of each run, frame to mask and overlay."""
        return [sample.total for sample in self.samples]

    def stage(self, name: str) -> list[float]:
        """Seconds of one of ``STAGES`` in each run."""
        index = STAGES.index(name)
        return [sample.stages[index] for sample in self.samples]

    def per_frame(self, seconds: Sequence[float]) -> list[float]:
        """Times of whole batches as times of one frame."""
        return [value / self.contender.segmenter.batch for value in seconds]

    @property
    def latency(self) -> Latency:
        """Frame to mask and overlay; of a whole batch where the graph takes several frames."""
        return Latency.of(self.totals)

    @property
    def fps(self) -> float:
        """Frames a second when one run follows the other: no overlap, no decoding."""
        return self.contender.segmenter.batch / self.latency.mean

    @property
    def around_model(self) -> float:
        """The part of a frame's time that is not inference, 0..1 (of medians)."""
        return 1 - float(np.median(self.stage("inference"))) / self.latency.p50


@dataclass(frozen=True)
class Comparison:
    """The first contender's time over another's: below 1, the first is faster.

    ``frame_to_mask``: with the overlay, where it is drawn. ``network``: of the networks alone by the GPU's own clock
    (medians), a frame; None where one has no such time.
    """

    first: str
    other: str
    frame_to_mask: Ratio
    inference: Ratio
    network: float | None = None


@dataclass(frozen=True)
class Material:
    """The frames to measure on, and what reading and writing them took (seconds a frame; empty: not measured).

    ``moving``: the frames are a video's, and overlays of them are written as one.
    """

    description: str
    frames: Sequence[Frame]
    decode: Sequence[float] = ()
    encode: Sequence[float] = ()
    encoder: str = ""
    moving: bool = False


@dataclass(frozen=True)
class BenchResult:
    """One bench: series in the order of the contenders, comparisons of the first with each other one.

    ``other_cores_busy`` is how many cores other programs (or, on a virtual machine, other machines) kept busy while
    measuring; None where the system does not say. ``roofline``: of the first contender's graph.
    ``left_out``: what could not be measured, and why.
    """

    bundle: dict[str, Any]
    material: Material
    settings: BenchSettings
    series: list[Series]
    memory: dict[str, int | None]
    major_page_faults: int
    other_cores_busy: float | None
    environment: dict[str, Any]
    roofline: Roofline | None = None
    left_out: tuple[str, ...] = ()

    @property
    def comparisons(self) -> list[Comparison]:
        """Paired ratios of the first contender to each of the others."""
        first, *others = self.series
        return [
            Comparison(
                first.contender.name,
                other.contender.name,
                ratio_of_medians(first.per_frame(first.totals), other.per_frame(other.totals)),
                ratio_of_medians(first.per_frame(first.stage("inference")), other.per_frame(other.stage("inference"))),
                _network_ratio(first, other),
            )
            for other in others
        ]


def _network_ratio(first: Series, other: Series) -> float | None:
    if first.device is None or other.device is None:
        return None
    ((own,), (others,)) = (series.per_frame([series.device.engine]) for series in (first, other) if series.device)
    return own / others


Run = Callable[[int], Sample]
OnProgress = Callable[[float], None]


def run_in_turn(
    runs: Sequence[Run],
    settings: BenchSettings,
    progress: OnProgress | None = None,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> list[list[Sample]]:
    """Call every run once a round, in order, until time and iterations are enough: A B A B ...

    Args:
        runs: each takes the round's number and returns what it measured.
        settings: how long.
        progress: called with the fraction done after each round.
        clock: seconds.
        pause: waits between contenders (not called for a single one).

    Returns:
        The samples of each run, one a round.
    """
    samples: list[list[Sample]] = [[] for _ in runs]
    start, wanted, rounds = clock(), settings.duration * len(runs), 0
    while rounds < settings.min_iterations or clock() - start < wanted:
        for own, run in zip(samples, runs, strict=True):
            if len(runs) > 1:
                pause(_SETTLE_SECONDS)
            own.append(run(rounds))
        rounds += 1
        if progress:
            progress(min(1.0, rounds / settings.min_iterations, (clock() - start) / wanted))
    return samples


def bench(
    contenders: Sequence[Contender],
    material: Material,
    settings: BenchSettings,
    environment: dict[str, Any],
    progress: OnProgress | None = None,
) -> BenchResult:
    """Warm up and measure contenders on the same frames; the first one is the reference of comparisons.

    Args:
        contenders: at least one.
        material: at least one frame.
        settings: how long.
        environment: of ``collect_environment``, taken before anything was loaded.
        progress: called with the fraction done.
    """
    frames = material.frames
    series = [Series(contender) for contender in contenders]
    for own in series:
        own.first_seconds = _warm_up(own.contender.segmenter, frames, settings.warmup)
    _agreement(series, frames[:_COMPARED_FRAMES])
    cpu = [0.0] * len(series)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    at_start, _ = process_memory()
    others = _OtherWork()

    def runner(index: int) -> Run:
        segmenter = series[index].contender.segmenter

        def run(number: int) -> Sample:
            before = time.process_time()
            sample = _sample(segmenter, frames, number)
            cpu[index] += time.process_time() - before
            return sample

        return run

    for own, samples in zip(
        series, run_in_turn([runner(i) for i in range(len(series))], settings, progress), strict=True
    ):
        own.samples = samples
    other_cores_busy = others.cores_busy()
    at_end, peak = process_memory()
    for own, busy in zip(series, cpu, strict=True):
        own.cores_busy = busy / sum(own.totals)
        own.device = measure_device(own.contender.segmenter, frames)
    return BenchResult(
        bundle=_bundle_facts(contenders[0].segmenter),
        material=material,
        settings=settings,
        series=series,
        memory={"at_start": at_start, "at_end": at_end, "peak": peak},
        major_page_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
        other_cores_busy=other_cores_busy,
        environment=environment,
    )


class _OtherWork:
    """What other programs and other virtual machines take of the processor from now on."""

    def __init__(self) -> None:
        self._machine, self._own, self._clock = machine_cpu_seconds(), time.process_time(), time.perf_counter()

    def cores_busy(self) -> float | None:
        machine = machine_cpu_seconds()
        if machine is None or self._machine is None:
            return None
        own, seconds = time.process_time() - self._own, time.perf_counter() - self._clock
        used = sum(machine) - sum(self._machine)
        return max(0.0, (used - own) / seconds)


def _batch(segmenter: Segmenter, frames: Sequence[Frame], number: int) -> list[Frame]:
    start = number * segmenter.batch
    return [frames[(start + i) % len(frames)] for i in range(segmenter.batch)]


def _sample(segmenter: Segmenter, frames: Sequence[Frame], number: int) -> Sample:
    batch = _batch(segmenter, frames, number)
    start = time.perf_counter()
    results = segmenter.segment_batch(batch)
    segmented = time.perf_counter()
    style = segmenter.frame_options.overlay
    if style is not None:
        for frame, result in zip(batch, results, strict=True):
            result.overlay(frame, style)
    end = time.perf_counter()
    timings = [result.timings for result in results]
    stages = (
        sum(t.preprocess for t in timings),
        sum(t.inference for t in timings),
        sum(t.postprocess for t in timings),
        end - segmented,
    )
    return Sample(end - start, stages)


def _warm_up(segmenter: Segmenter, frames: Sequence[Frame], seconds: float) -> float:
    """Run at least twice and for some seconds; return what the first run took."""
    start = time.perf_counter()
    first = _sample(segmenter, frames, 0).total
    number = 1
    while number < 2 or time.perf_counter() - start < seconds:
        _sample(segmenter, frames, number)
        number += 1
    return first


def _agreement(series: Sequence[Series], frames: Sequence[Frame]) -> None:
    """Note how many pixels of each contender's masks equal the first one's: times of unlike work say nothing."""
    if len(series) < 2:
        return
    masks = [[result.mask for result in own.contender.segmenter.segment_batch(frames)] for own in series]
    pixels = sum(mask.size for mask in masks[0])
    for own, found in zip(series, masks, strict=True):
        equal = sum(int(np.count_nonzero(a == b)) for a, b in zip(masks[0], found, strict=True))
        own.mask_agreement = equal / pixels


def _bundle_facts(segmenter: Segmenter) -> dict[str, Any]:
    bundle, graph = segmenter.bundle, segmenter.graph
    weights = bundle.manifest.weights
    return {
        "name": bundle.path.resolve().name,
        "manifest_sha256": sha256_file(Path(bundle.path) / "manifest.json"),
        "preset": bundle.manifest.preset,
        "checkpoint_sha256": weights.checkpoint_sha256,
        "weights_origin": weights.origin,
        "modality": graph.modality,
    }
