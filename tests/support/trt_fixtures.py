"""Fixtures for the tests of the TensorRT side: the double of TensorRT, a described GPU, the real TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from host_build import build

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines import tensorrt_api

DOUBLE = Path(__file__).parents[1] / "double"
ORIN = "Orin|8|7|8|7990000000|4000000000|0|5.5"
"""A GPU with 4 GB free; not marked as sharing its memory, so that the test's own machine does not matter."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Call it with a description (see ``ORIN``) and this process and its children see that GPU.

    Only children can run something on it: cuda-python looks for the driver once, and here there may be another.
    """
    library = build(driver=True)

    def describe(description: str) -> None:
        monkeypatch.setenv("CUDA_MACHINE_GPU", description)
        monkeypatch.setattr("espmedsam_edge.runtime.cuda.gpu._LIBRARY", str(library))
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))

    return describe


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process and its children see no GPU, whatever the machine has."""
    monkeypatch.setattr("espmedsam_edge.runtime.cuda.gpu._LIBRARY", "libcuda-that-is-not-there.so")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TensorRT is loaded in this process before the test, and what the test loads is forgotten after it."""
    monkeypatch.setattr(tensorrt_api, "_loaded", None)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tensorrt_api.TensorRT]:
    """Call it with settings of the double (``release``...): loads it in this process; children load it as well."""

    def choose(**settings: Any) -> tensorrt_api.TensorRT:
        monkeypatch.setenv("TENSORRT_DOUBLE", json.dumps(settings))
        monkeypatch.setenv("PYTHONPATH", str(DOUBLE), prepend=os.pathsep)
        module = _fresh_double()
        api = tensorrt_api.TensorRT("tensorrt", module.__version__, module)
        monkeypatch.setattr(tensorrt_api, "_loaded", api)
        return api

    return choose


def _fresh_double() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tensorrt_double", DOUBLE / "tensorrt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rtx() -> tensorrt_api.TensorRT:
    """The real TensorRT-RTX, or the reason why it cannot be loaded."""
    if not tensorrt_api.installed("tensorrt-rtx"):
        pytest.skip("needs TensorRT-RTX (extra rtx)")
    try:
        return tensorrt_api.load("tensorrt-rtx")
    except UserError as error:
        pytest.skip(f"TensorRT-RTX does not load: {error}")
