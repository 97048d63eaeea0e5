"""What a bench's numbers mean: noise, drift, what bounds the frame time, too many threads, unlike contenders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from espmedsam_edge.bench.measure import STAGES, BenchResult
from espmedsam_edge.bench.ratios import drift

Kind = Literal[
    "noisy", "few-samples", "drifting", "busy-machine", "oversubscribed", "short-of-memory", "growing-memory",
    "bound-around-model", "bound-by-codec", "transfer-bound", "launch-bound", "unlike-masks", "random-weights",
]  # fmt: skip

NOISY_COV = 0.05  # trtexec warns from 5 % on
DRIFT = 0.05
BUSY = 0.25  # of the cores, by other programs
AROUND_MODEL = 0.10
# trtexec warns of the same: transfers as long as a quarter of the computing are worth hiding.
MUCH_TRANSFER = 0.25
# trtexec warns where enqueuing takes longer than the GPU's work: then a faster GPU would not help.
IDLE = 0.25
AGREEMENT = 0.999
P99_SAMPLES = 100  # below, the 99th percentile is interpolated next to the maximum
_MIB = 1 << 20
_GROWTH = 64 * _MIB


@dataclass(frozen=True)
class Hint:
    """One reading of the numbers, in a sentence that says what to do about it."""

    kind: Kind
    text: str


def interpret(result: BenchResult) -> list[Hint]:
    """The hints that a result gives rise to, those that cast doubt on its numbers first."""
    hints = [*_machine(result), *_spread(result), *_work(result), *_device(result), *_memory(result), *_codec(result)]
    if result.bundle["weights_origin"] == "random":
        hints.append(Hint("random-weights", "The weights are untrained: times are real, masks mean nothing."))
    return hints


def _machine(result: BenchResult) -> Iterator[Hint]:
    cores = result.environment["cpu"]["usable"]
    before, during = result.environment["load_average_1min"] or 0.0, result.other_cores_busy or 0.0
    if max(before, during) >= BUSY * cores:
        when = "while measuring" if during >= before else "before the start"
        text = f"Other work kept {max(before, during):.1f} of {cores} cores busy {when}; measure on a quiet machine."
        yield Hint("busy-machine", text)
    governor = result.environment["cpu"]["governor"]
    if governor not in (None, "performance", "schedutil"):
        text = f"The frequency governor is '{governor}'; for steady numbers: sudo cpupower frequency-set -g performance"
        yield Hint("noisy", text)
    setting = result.environment["thread_variables"].get("OMP_NUM_THREADS", "")
    if setting.isdigit() and int(setting) > cores:
        text = f"OMP_NUM_THREADS={setting} on {cores} usable cores: threads wait for each other; unset it."
        yield Hint("oversubscribed", text)


def _spread(result: BenchResult) -> Iterator[Hint]:
    noisy = {s.contender.name: s.latency.cov for s in result.series if s.latency.cov > NOISY_COV}
    if noisy:
        text = f"The coefficient of variation is {_each(noisy)}: trust medians; measure on a quiet machine."
        yield Hint("noisy", text)
    moved = {s.contender.name: drift(s.totals) for s in result.series}
    slower = {name: value for name, value in moved.items() if value > DRIFT}
    if slower:
        text = f"The last third of the runs was slower than the first by {_each(slower)}: heat, power or other work."
        yield Hint("drifting", text)
    faster = {name: -value for name, value in moved.items() if value < -DRIFT}
    if faster:
        text = f"The last third of the runs was faster than the first by {_each(faster)}: measure longer (--duration)."
        yield Hint("drifting", text)
    fewest = min(len(series.samples) for series in result.series)
    if fewest < P99_SAMPLES:
        text = f"{fewest} runs put p99 next to the slowest one; for a tail you can trust, measure longer (--duration)."
        yield Hint("few-samples", text)


def _each(fractions: dict[str, float]) -> str:
    return ", ".join(f"{value:.0%} ({name})" for name, value in fractions.items())


def _work(result: BenchResult) -> Iterator[Hint]:
    first = result.series[0]
    if first.around_model > AROUND_MODEL:
        stages = {stage: float(np.median(first.stage(stage))) for stage in STAGES if stage != "inference"}
        worst = max(stages, key=lambda stage: stages[stage])
        text = (
            f"{first.around_model:.0%} of the frame time is not inference, most of it {worst} "
            f"({1000 * stages[worst]:.1f} ms): smaller frames would help, a faster graph would not."
        )
        yield Hint("bound-around-model", text)
    unlike = {s.contender.name: 1 - s.mask_agreement for s in result.series if s.mask_agreement < AGREEMENT}
    if unlike:
        text = f"Mask pixels differ from {first.contender.name}'s, {_each(unlike)}: this is not the same work."
        yield Hint("unlike-masks", text)


def _device(result: BenchResult) -> Iterator[Hint]:
    """What keeps the GPU from computing; of contenders that bring whole frames there."""
    for series in result.series:
        name, device = series.contender.name, series.device
        if device is None or device.use is None:
            continue
        if device.transfers > MUCH_TRANSFER:
            text = f"Copies take {device.transfers:.0%} of the time computed between them ({name})."
            yield Hint("transfer-bound", text)
        idle = device.idle(series.latency.p50)
        if idle > IDLE:
            text = (
                f"The GPU has nothing to do for {idle:.0%} of a frame's time ({name}), while the CPU copies frames and "
                "enqueues; several frames under way (infer) hide that."
            )
            yield Hint("launch-bound", text)


def _memory(result: BenchResult) -> Iterator[Hint]:
    if result.major_page_faults > 50:
        text = f"{result.major_page_faults} page faults went to disk while measuring: the machine is short of memory."
        yield Hint("short-of-memory", text)
    start, end = result.memory["at_start"], result.memory["at_end"]
    if start is not None and end is not None and end - start > max(_GROWTH, 0.05 * start):
        text = f"Memory grew by {(end - start) / _MIB:.0f} MiB while measuring; if it grows with --duration, report it."
        yield Hint("growing-memory", text)


def _codec(result: BenchResult) -> Iterator[Hint]:
    frame = result.series[0].latency.p50 / result.series[0].contender.segmenter.batch
    for verb, times in (("Reading", result.material.decode), ("Drawing and writing", result.material.encode)):
        if len(times) and float(np.median(times)) > frame:
            text = f"{verb} a frame takes {1000 * float(np.median(times)):.1f} ms, longer than segmenting it."
            yield Hint("bound-by-codec", text)
