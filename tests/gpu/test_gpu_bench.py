"""The bench's part on the GPU: stages by its own clock, memory, power."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gpu_backend import Load, bundle, frame_of, load

from espmedsam_edge.bench import device as bench_device
from espmedsam_edge.bench import rates
from espmedsam_edge.bench.competitors import load_competitor, load_first
from espmedsam_edge.bench.device import DeviceTimes, measure_device
from espmedsam_edge.bench.material import time_encoding
from espmedsam_edge.bench.measure import BenchSettings, Contender, Material, Sample, bench
from espmedsam_edge.bench.power import Sensor, watts_of_nvidia_smi
from espmedsam_edge.bench.report import as_json, as_markdown, as_text
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime import segmentation
from espmedsam_edge.runtime.backends.backend import Choice, DeviceUse
from espmedsam_edge.runtime.backends.frame_graph import STAGES
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.segmenter import Segmenter

__all__ = ["bundle", "load"]  # fixtures

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "_STAGE_SECONDS", 0.05)
    monkeypatch.setattr(bench_device, "_POWER_SECONDS", 1.0)


def test_stages_memory_and_power(load: Load) -> None:
    sensor = Sensor((sys.executable, "-c", "print('250.0\\n250.0')"), watts_of_nvidia_smi, "a test")
    times = measure_device(load(), [frame_of(50, 60)], sensor)
    assert times is not None
    assert tuple(times.stages) == STAGES
    assert all(latency.samples >= 20 for latency in times.stages.values())
    assert times.use.buffers > 0
    assert times.watts == 250.0
    assert times.joules is not None
    assert times.joules > 0
    text = "\n".join(times.lines(0.01))
    for words in ("GPU stages (ms): upload ", "x the engine alone", "GPU memory: ", "power of a test: 250.0 W"):
        assert words in text


def test_a_bench_shows_them(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "find_sensor", lambda: None)
    gpu = load()
    cpu = Segmenter.load(gpu.bundle, "fundus", backend="onnxruntime-cpu", threads=1)
    contenders = [Contender("gpu", gpu, 0.1), Contender("cpu", cpu, 0.1)]
    material = Material("noise", [frame_of(50, 60)])
    result = bench(contenders, material, BenchSettings(0.05, 0.0), collect_environment(Path("/")))
    shown: dict[str, Any] = as_json(result)
    assert set(shown["contenders"][0]["device_times"]["stages_ms"]) == set(STAGES)
    assert shown["contenders"][1]["device_times"] is None
    assert "GPU stages (ms): upload" in as_text(result)
    assert "GPU stages (ms): upload" in as_markdown(result)


def test_the_overlay_is_drawn_and_brought_by_the_gpu_and_by_the_cpu_for_a_contender_there(
    load: Load, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_device, "find_sensor", lambda: None)
    load()  # the double stands in TensorRT's place now
    first = load_first(bundle, "fundus", "fp32", "tensorrt", None)
    cpu = load_competitor("onnxruntime-cpu", first.segmenter, None, 1)
    frame = frame_of(48, 64)
    brought: list[int] = []
    copy = Stream.copy_to_host
    drawn = segmentation.draw_overlay
    on_cpu: list[int] = []

    def copy_noted(self: Stream, target: int, source: int, size: int) -> None:
        brought.append(size)
        copy(self, target, source, size)

    def draw_noted(*arguments: Any) -> Any:
        on_cpu.append(1)
        return drawn(*arguments)

    monkeypatch.setattr(Stream, "copy_to_host", copy_noted)
    monkeypatch.setattr(segmentation, "draw_overlay", draw_noted)
    with first.segmenter, cpu.segmenter:
        alone = bench([first], Material("noise", [frame]), BenchSettings(0.05, 0.0), collect_environment(Path("/")))
        runs, logits = len(alone.series[0].samples), 4 * 16 * 16
        assert sum(size > 4 * frame[..., 0].size for size in brought if size != logits) >= runs + 20  # stages as well
        assert min(size for size in brought if size != logits) > 4 * frame[..., 0].size  # a mask's byte, an overlay's 3
        assert "frame to mask and overlay" in as_text(alone)
        time_encoding(alone.material, first.segmenter)
        assert on_cpu == []
        both = bench([first, cpu], Material("noise", [frame]), BenchSettings(0.05, 0.0), collect_environment(Path("/")))
        assert len(on_cpu) == 2 + len(both.series[1].samples)  # two to warm up
        gpu_drawing, cpu_drawing = (np.median(series.stage("overlay")) for series in both.series)
        assert gpu_drawing < cpu_drawing
    first.segmenter.close()


def test_the_copy_rate_counts_reading_and_writing(machine: Any, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_DEVICE_COPY", 1 << 20)
    assert rates.copy_rate() == pytest.approx(2 * (1 << 20) / 0.0015, rel=1e-3)  # the double's clock: 1.5 ms


class Timed:
    """A backend that has its network alone, as PyTorch on a GPU."""

    name, device = "timed", "a GPU"

    def __init__(self, inner: Any, seconds: float | None) -> None:
        self.graph, self.run, self.close, self._seconds = inner.graph, inner.run, inner.close, seconds

    def network_seconds(self, image: Any) -> float | None:
        assert image.shape == self.graph.input_shape
        return self._seconds


def test_networks_alone_are_compared(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "find_sensor", lambda: None)
    gpu = load()
    cpu = Segmenter.load(gpu.bundle, "fundus", backend="onnxruntime-cpu", threads=1)
    timed = Segmenter(gpu.bundle, Choice(Timed(cpu.choice.backend, 0.006)), 0.5)
    assert measure_device(Segmenter(gpu.bundle, Choice(Timed(cpu.choice.backend, None)), 0.5), [frame_of(9, 9)]) is None
    contenders = [Contender("gpu", gpu, 0.1), Contender("timed", timed, 0.1), Contender("cpu", cpu, 0.1)]
    result = bench(
        contenders, Material("noise", [frame_of(50, 60)]), BenchSettings(0.05, 0.0), collect_environment(Path("/"))
    )
    first = result.series[0].device
    assert first is not None
    assert [comparison.network for comparison in result.comparisons] == [pytest.approx(first.engine / 0.006), None]
    shown = as_json(result)
    assert shown["contenders"][1]["device_times"]["memory_bytes"] is None
    assert shown["contenders"][1]["device_times"]["kernels_to_engine"] is None
    assert shown["comparisons"][0]["network_on_gpu"] == result.comparisons[0].network
    assert "Networks alone on the GPU: gpu takes " in as_text(result)


def test_what_bounds_a_frame_is_said(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "find_sensor", lambda: None)
    material = Material("noise", [frame_of(50, 60)])
    result = bench([Contender("gpu", load(), 0.1)], material, BenchSettings(0.05, 0.0), collect_environment(Path("/")))

    def hints(device: DeviceTimes, seconds: float) -> dict[str, str]:
        """By kind, of a frame that takes so many seconds."""
        series = replace(result.series[0], device=device, samples=[Sample(seconds, (0.0, seconds, 0.0, 0.0))])
        shown = as_json(replace(result, series=[series]))
        return {hint["kind"]: hint["text"] for hint in shown["hints"]}

    def times(*milliseconds: float) -> DeviceTimes:
        stages = {name: Latency.of([value / 1000]) for name, value in zip(STAGES, milliseconds, strict=True)}
        return DeviceTimes(stages, DeviceUse(1, 1, 1, 1, 1))

    assert times(0.4, 0.1, 1.6, 0.06, 0.4).as_json()["kernels_to_engine"] == 0.1
    assert "take 20.0% of the engine's time" in "\n".join(times(0.4, 0.1, 1.0, 0.1, 0.4).lines(0.0022))
    copying = hints(times(0.4, 0.1, 1.0, 0.1, 0.4), 0.0022)
    assert "Copies take 67% of the time computed between them (gpu)." in copying["transfer-bound"]
    assert "launch-bound" not in copying
    waiting = hints(times(0.1, 0.1, 1.0, 0.1, 0.1), 0.0028)
    assert "The GPU has nothing to do for 50% of a frame's time (gpu)" in waiting["launch-bound"]
    assert "transfer-bound" not in waiting
    alone = DeviceTimes({"engine": Latency.of([0.001])}, None)
    assert not {"launch-bound", "transfer-bound"} & set(hints(alone, 0.01))
