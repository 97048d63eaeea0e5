"""The bench's part on the GPU: stages by its own clock, memory, power."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from test_gpu_backend import Load, bundle, frame_of, load

from espmedsam_edge.runtime import bench_device
from espmedsam_edge.runtime.bench import Contender, Material, Settings, bench
from espmedsam_edge.runtime.bench_device import measure_device
from espmedsam_edge.runtime.bench_report import as_json, as_markdown, as_text
from espmedsam_edge.runtime.environment import collect_environment
from espmedsam_edge.runtime.frame_graph import STAGES
from espmedsam_edge.runtime.power import Sensor, watts_of_nvidia_smi
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
    result = bench(contenders, material, Settings(0.05, 0.0), collect_environment(Path("/")))
    shown: dict[str, Any] = as_json(result)
    assert set(shown["contenders"][0]["device_times"]["stages_ms"]) == set(STAGES)
    assert shown["contenders"][1]["device_times"] is None
    assert "GPU stages (ms): upload" in as_text(result)
    assert "GPU stages (ms): upload" in as_markdown(result)
