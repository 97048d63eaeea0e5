"""The child process: progress, crashes, kills and interruptions, each one clear line, and nothing left running."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trt_fixtures import ORIN

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines import child
from espmedsam_edge.runtime.engines.request import EngineRequest
from espmedsam_edge.runtime.engines.tensorrt_api import TensorRT

Double = Callable[..., TensorRT]


@pytest.fixture(autouse=True)
def _orin(gpu: Callable[[str], None]) -> None:
    gpu(ORIN)


@pytest.fixture
def request_(tmp_path: Path) -> EngineRequest:
    file = tmp_path / "fp16.onnx"
    file.write_bytes(b"an ONNX file")
    return EngineRequest(
        command="build",
        graph=Graph(
            modality="fundus",
            precision="fp16",
            file=file.name,
            sha256=hashlib.sha256(b"an ONNX file").hexdigest(),
            image_size=64,
        ),
        graph_path=file,
        flavour="tensorrt",
        plan_path=tmp_path / "fundus.plan",
        log_path=tmp_path / "fundus.log",
    )


def test_builds_in_a_child_and_tells_its_progress(request_: EngineRequest, double: Double) -> None:
    double(release="10.16.1.11")
    seen: list[tuple[str, float]] = []
    result = child.run(request_, lambda phase, fraction: seen.append((phase, fraction)))
    assert result.version == "10.16.1.11"
    assert result.engine_loaded
    assert seen[0] == ("Building Engine", 0.0)
    assert request_.plan_path is not None
    assert request_.plan_path.stat().st_size > 0
    assert result.peak_memory_bytes is not None
    assert 10 << 20 < result.peak_memory_bytes < 1 << 30  # a Python with pydantic, and no library


@pytest.mark.parametrize("release", ["10.3.0", "11.4.0.106"])
def test_an_error_in_the_child_comes_back_as_one(release: str, request_: EngineRequest, double: Double) -> None:
    double(release=release, build_log=["Error Code 10: Internal Error (Could not find any implementation for node a)"])
    with pytest.raises(UserError, match="Could not find any implementation for node a") as caught:
        child.run(request_)
    assert caught.value.exit_code == 1
    assert f"Log: {request_.log_path}" in caught.value.hint
    assert request_.log_path is not None
    assert "[ERROR] Error Code 10" in request_.log_path.read_text()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGSEGV, r"TensorRT's build of fp16\.onnx crashed \(SIGSEGV\): corrupted size vs\. prev_size\."),
        (signal.SIGABRT, r"crashed \(SIGABRT\): corrupted size"),
        (signal.SIGKILL, r"was killed, which systems do when memory runs out; \d+ MiB were available"),
    ],
)
def test_a_crash_is_one_line(number: signal.Signals, words: str, request_: EngineRequest, double: Double) -> None:
    double(release="10.3.0", crash=int(number))
    with pytest.raises(UserError, match=words) as caught:
        child.run(request_)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_child_that_cannot_import_says_why(
    request_: EngineRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pydantic.py").write_text("raise RuntimeError('broken environment')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="ended with code 1 and no answer: RuntimeError: broken environment"):
        child.run(request_)


def test_a_python_that_is_gone(request_: EngineRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(UserError, match="could not be started: No such file"):
        child.run(request_)


def test_an_interruption_ends_the_child(request_: EngineRequest, double: Double) -> None:
    double(release="10.3.0", seconds=60)
    before, children = _children(), list[int]()

    def interrupt(phase: str, fraction: float) -> None:
        children.extend(_children())
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        child.run(request_, interrupt)
    assert time.monotonic() - began < 30  # seconds; the build would have taken 60
    assert set(children) - set(before)
    assert not set(_children()) - set(before)


def test_modules_in_the_working_directory_are_not_imported(
    request_: EngineRequest, double: Double, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder with someone's tensorrt.py in it must not stand in for TensorRT."""
    double(release="10.3.0")
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("tensorrt", "json", "pydantic"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(folder)
    assert child.run(request_).version == "10.3.0"


def test_check_needs_no_plan(request_: EngineRequest, double: Double) -> None:
    double(release="10.3.0", errors=[[3, "n", "Det", "false"]])
    result = child.check(request_.graph, request_.graph_path, "tensorrt")
    assert [refusal.operator for refusal in result.refusals] == ["Det"]


def _children() -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        text: Any = (task / "children").read_text() if (task / "children").exists() else ""
        found += [int(number) for number in text.split()]
    return found
