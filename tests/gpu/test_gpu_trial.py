"""A new engine tried by itself: its time, its masks beside ONNX Runtime's; and that a child does it on this driver."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_surface
from toy_bundles import toy_graph

from espmedsam_edge.bundle import Graph, Normalization
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.stream import Event
from espmedsam_edge.runtime.engines import child, trial, worker
from espmedsam_edge.runtime.engines.agreement import Agreement
from espmedsam_edge.runtime.engines.request import EngineRequest
from espmedsam_edge.runtime.engines.tensorrt_api import TensorRT

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("release", tensorrt_surface.RELEASES)]

Double = Callable[..., TensorRT]


def request_for(folder: Path, command: str, **more: Any) -> EngineRequest:
    """A request for the toy graph's engine, built by the double in this process."""
    content, file, plan = toy_graph(), folder / "fp32.onnx", folder / "fundus.plan"
    graph = Graph(
        modality="fundus", precision="fp32", file=file.name, sha256=hashlib.sha256(content).hexdigest(), image_size=64
    )
    build = EngineRequest(command="build", graph=graph, graph_path=file, flavour="tensorrt", plan_path=plan)
    if not plan.exists():
        file.write_bytes(content)
        worker.build(build, lambda phase, fraction: True)
    digest = hashlib.sha256(plan.read_bytes()).hexdigest()
    return build.model_copy(update={"command": command, "plan_sha256": digest, **more})


def compared(request: EngineRequest) -> Agreement:
    agreement = worker.compare_engine(request).agreement
    assert agreement is not None
    return agreement


def test_the_time_is_the_median_of_what_the_events_say(
    release: str, device: CudaDevice, tmp_path: Path, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_WARM_UP_S", 0.0)
    monkeypatch.setattr(trial, "_MEASURE_S", 0.0)
    seconds = iter([9.0, *(0.001 * each for each in (5, 1, 3, 2, 4) * 5)])  # the first warms up
    monkeypatch.setattr(Event, "seconds_since", lambda end, start: next(seconds))
    double(release=release)
    assert worker.time_engine(request_for(tmp_path, "time")).median_ms == pytest.approx(3.0)


def test_the_engine_s_masks_are_those_of_onnxruntime(
    release: str, device: CudaDevice, tmp_path: Path, double: Double
) -> None:
    double(release=release)
    found = compared(request_for(tmp_path, "compare"))
    assert (found.finite, found.dice, found.fault) == (True, 1.0, None)
    assert found.foreground == found.expected_foreground
    assert 0.01 < found.foreground < 0.99, "else the masks would say little"
    assert str(found) == "mask of a phantom 100.00 % Dice to ONNX Runtime's"


@pytest.mark.parametrize(
    ("logits", "fault"),
    [
        (float("nan"), "it gives logits that are not numbers"),
        (float("inf"), "it gives logits that are not numbers"),
        (-3.0, r"it gives an empty mask of a phantom, where ONNX Runtime finds [\d.]+ % foreground"),
        (3.0, r"it gives a full mask of a phantom, where ONNX Runtime finds [\d.]+ % foreground"),
    ],
)
def test_an_engine_that_computes_something_else_is_found(
    release: str, device: CudaDevice, logits: float, fault: str, tmp_path: Path, double: Double
) -> None:
    double(release=release, logits=logits)
    found = compared(request_for(tmp_path, "compare")).fault
    assert found is not None
    assert re.fullmatch(fault, found)


def test_the_bundle_s_threshold_and_normalization_count(
    release: str, device: CudaDevice, tmp_path: Path, double: Double
) -> None:
    double(release=release)
    usual = compared(request_for(tmp_path, "compare")).foreground
    stricter = compared(request_for(tmp_path, "compare", threshold=0.9)).foreground
    brighter = compared(request_for(tmp_path, "compare", normalization=Normalization(mean=(0.0, 0.9, 0.0)))).foreground
    assert stricter < usual < brighter


def test_a_child_does_both_on_the_driver_of_this_machine(
    release: str, device: CudaDevice, tmp_path: Path, double: Double
) -> None:
    double(release=release)
    median_ms = child.run(request_for(tmp_path, "time")).median_ms
    assert median_ms is not None
    assert median_ms > 0
    agreement = child.run(request_for(tmp_path, "compare")).agreement
    assert agreement is not None
    assert agreement.dice == 1.0


def test_nothing_is_left_on_the_gpu(
    release: str, device: CudaDevice, tmp_path: Path, double: Double, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_WARM_UP_S", 0.0)
    monkeypatch.setattr(trial, "_MEASURE_S", 0.0)
    double(release=release)
    before = machine.open()
    worker.time_engine(request_for(tmp_path, "time"))
    compared(request_for(tmp_path, "compare"))
    assert machine.open() == before
