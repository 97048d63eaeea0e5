"""benchmarks/kernels.py: the bytes it counts, the buffers it goes through, and what it makes of a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from espmedsam_edge.bench import rates as bench_rates
from espmedsam_edge.runtime.cuda.module import KernelModule
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.kernels.frame_view import PixelFormat
from espmedsam_edge.runtime.kernels.launch import FrameKernels

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
TICK = 0.0015  # seconds: whatever the double's events enclose
SMALL = {"frame": (64, 48), "image_size": 64}


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType]) -> ModuleType:
    module = load_script("benchmarks/kernels.py")
    monkeypatch.setattr(module, "WORKING_SET", 1 << 18)
    monkeypatch.setattr(bench_rates, "_DEVICE_COPY", 1 << 20)
    return module


def test_bytes_are_those_of_the_documentation(rates: ModuleType) -> None:
    bgr, nv12 = PixelFormat.BGR8, PixelFormat.NV12
    counted = [
        rates.Preprocess(bgr).bytes,
        rates.Postprocess(bgr, overlay=False).bytes,
        rates.Postprocess(bgr).bytes,
    ]
    page = (ROOT / "docs" / "kernels.md").read_text()
    documented = re.findall(r"^\| p[a-z]+process, .* \| ([0-9.]+) MB \|$", page, re.M)
    assert [f"{number / 1e6:.1f}" for number in counted] == documented
    area = 1920 * 1080
    assert rates.Preprocess(nv12).bytes == area * 3 // 2 + 12 * 1024**2
    assert rates.Preprocess(PixelFormat.GRAY16).bytes == 2 * area + 12 * 1024**2
    assert rates.Postprocess(nv12).bytes == area + 4 * 256**2 + area * 3 // 2 + 3 * area
    assert len({case.name for case in rates.CASES}) == len(rates.CASES) == 11


def test_every_launch_has_buffers_of_its_own_and_the_time_is_divided(
    rates: ModuleType, machine: Any, stream: Stream, kernels: FrameKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[tuple[int, int]] = []
    launch = KernelModule.launch

    def noted(self: KernelModule, stream: Stream, kernel: str, grid: Any, block: Any, parameters: Any) -> None:
        if kernel == "postprocess":
            places.append((parameters.canvases[0].mask, parameters.canvases[0].frame.pixels))
        else:
            places.append((parameters.out, parameters.frames[0].pixels))
        launch(self, stream, kernel, grid, block, parameters)

    monkeypatch.setattr(KernelModule, "launch", noted)
    opened = machine.open()
    for case in (rates.Preprocess(PixelFormat.NV12, **SMALL), rates.Postprocess(PixelFormat.BGR8, **SMALL)):
        count = -(-(1 << 18) // case.bytes)
        places.clear()
        assert rates.seconds_a_launch(stream, kernels, case) == pytest.approx(TICK / count)
        assert len(places) == 2 * count  # once to load the kernel, once captured
        assert places[:count] == places[count:]
        assert len({mask for mask, _ in places}) == len({pixels for _, pixels in places}) == count
    assert machine.open() == opened


def test_rates_are_bytes_over_time_and_over_the_copies(rates: ModuleType, machine: Any, device: Any) -> None:
    case = rates.Postprocess(PixelFormat.BGR8, **SMALL)
    measured = rates.measure((case,))
    copies = 2 * (1 << 20) / TICK
    (row,) = measured["rows"]
    rate = case.bytes * -(-(1 << 18) // case.bytes) / TICK
    assert measured["copy_gb_per_s"] == pytest.approx(copies / 1e9, abs=0.06)
    assert row["gb_per_s"] == pytest.approx(rate / 1e9, abs=0.06)
    assert row["of_copy"] == pytest.approx(rate / copies, abs=1e-4)
    assert measured["targets"] == {"preprocess": 0.5, "postprocess": 0.35}
    assert "MISSED" in rates.table(measured)
    row["of_copy"] = 0.6
    assert "reached" in rates.table(measured)
