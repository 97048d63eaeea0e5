"""What a GPU's own clock says of each stage of a frame, the memory it takes and the power it draws."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from espmedsam_edge.bench.power import PowerMeter, Sensor, find_sensor
from espmedsam_edge.imaging.geometry import Frame, Tensor
from espmedsam_edge.runtime.backends.backend import DeviceUse
from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.segmenter import Segmenter

_STAGE_SECONDS = 1.0
_STAGE_RUNS = 20
_POWER_SECONDS = 2.0
_TRANSFERS = ("upload", "download")


@runtime_checkable
class TimedNetwork(Protocol):
    """A backend without preprocessing that can time its network on the GPU."""

    def network_seconds(self, image: Tensor) -> float | None:
        """Seconds of one run by the GPU's own clock, the input there already; None where it does not run on one."""


@dataclass(frozen=True)
class DeviceTimes:
    """One contender on its GPU, a batch a run.

    Attributes:
        stages: GPU seconds of each stage, by events around it; a backend that has the network alone has "engine" only.
        use: the GPU's memory; None where the backend does not count it.
        watts: median while frames follow each other without a pause; None without a sensor.
        power_of: what the watts are of.
        joules: a frame's part of them.
    """

    stages: dict[str, Latency]
    use: DeviceUse | None
    watts: float | None = None
    power_of: str = ""
    joules: float | None = None

    @property
    def engine(self) -> float:
        """Median seconds of the engine alone."""
        return self.stages["engine"].p50

    def against(self, frame_to_mask: float) -> float:
        """A frame's whole time over the engine's alone: 1 would mean that all the rest is free."""
        return frame_to_mask / self.engine

    @property
    def kernels(self) -> float | None:
        """The two kernels' time over the engine's (of medians); None where the network alone was timed."""
        if "preprocess" not in self.stages:
            return None
        return (self.stages["preprocess"].p50 + self.stages["postprocess"].p50) / self.engine

    @property
    def transfers(self) -> float:
        """Copies to and from the GPU over the computing between them (of medians)."""
        copies = sum(latency.p50 for name, latency in self.stages.items() if name in _TRANSFERS)
        return copies / (sum(latency.p50 for latency in self.stages.values()) - copies)

    def idle(self, frame_to_mask: float) -> float:
        """The part of a frame's whole time in which the GPU has nothing to do, 0..1; of whole frames only."""
        return max(0.0, 1 - sum(latency.p50 for latency in self.stages.values()) / frame_to_mask)

    def as_json(self) -> dict[str, Any]:
        """Plain values: milliseconds, bytes, watts."""
        return {
            "stages_ms": {name: latency.milliseconds() for name, latency in self.stages.items()},
            "kernels_to_engine": None if self.kernels is None else round(self.kernels, 4),
            "memory_bytes": asdict(self.use) if self.use else None,
            "watts": self.watts,
            "power_of": self.power_of,
            "joules_per_frame": self.joules,
        }

    def lines(self, frame_to_mask: float) -> list[str]:
        """For people.

        Args:
            frame_to_mask: median seconds of the same run, host to host, with the overlay.
        """
        stages = ", ".join(f"{name} {1000 * latency.p50:.3f}" for name, latency in self.stages.items())
        lines = [
            f"GPU stages (ms): {stages}",
            f"the whole frame takes {self.against(frame_to_mask):.2f} x the engine alone",
        ]
        if self.kernels is not None:
            lines.append(f"the kernels before and after it take {self.kernels:.1%} of the engine's time")
        if self.use is not None:
            lines.append(f"GPU memory: {self.use}")
        if self.watts is not None and self.joules is not None:
            lines.append(f"power of {self.power_of}: {self.watts:.1f} W, {self.joules:.3f} J a frame")
        return lines


def measure_device(segmenter: Segmenter, frames: Sequence[Frame], sensor: Sensor | None = None) -> DeviceTimes | None:
    """Measure a segmenter that is warm; None where its backend has no times of a GPU.

    Args:
        segmenter: what.
        frames: a batch of them is measured.
        sensor: of power; None: what the machine has.

    Raises:
        UserError: the GPU failed.
    """
    backend = segmenter.frame_backend
    if backend is None:
        return _network_alone(segmenter)
    batch = [frames[index % len(frames)] for index in range(segmenter.batch)]
    segmenter.stage_seconds(batch)
    taken: list[dict[str, float]] = []
    began = time.perf_counter()
    while len(taken) < _STAGE_RUNS or time.perf_counter() - began < _STAGE_SECONDS:
        taken.append(segmenter.stage_seconds(batch))
    stages = {name: Latency.of([run[name] for run in taken]) for name in taken[0]}
    use = backend.device_use()
    found = sensor or find_sensor()
    if found is None:
        return DeviceTimes(stages, use)
    done = 0
    with PowerMeter(found) as meter:
        began = time.perf_counter()
        while (seconds := time.perf_counter() - began) < _POWER_SECONDS:
            segmenter.segment_batch(batch)
            done += len(batch)
    joules = None if meter.watts is None else meter.watts * seconds / done
    return DeviceTimes(stages, use, meter.watts, found.what, joules)


def _network_alone(segmenter: Segmenter) -> DeviceTimes | None:
    backend = segmenter.choice.backend
    if not isinstance(backend, TimedNetwork):
        return None
    image = np.zeros(segmenter.graph.input_shape, np.float32)
    taken: list[float] = []
    while len(taken) < 1 + _STAGE_RUNS or sum(taken) < _STAGE_SECONDS:
        seconds = backend.network_seconds(image)
        if seconds is None:
            return None
        taken.append(seconds)
    return DeviceTimes({"engine": Latency.of(taken[1:])}, None)
