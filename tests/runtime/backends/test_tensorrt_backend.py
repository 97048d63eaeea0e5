"""Which machine can run the TensorRT backends, what "auto" makes of it, and TensorRT-RTX's runtime cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt_fixtures import DOUBLE, ORIN

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.environment import Jetson
from espmedsam_edge.runtime.backends import backend, device_backend, tensorrt_backend
from espmedsam_edge.runtime.backends.backend import AUTO, BackendUnavailable, load_backend, unavailable
from espmedsam_edge.runtime.cuda import driver as cuda_api
from espmedsam_edge.runtime.cuda.driver import CudaDriver, CudaError, CudaUnavailable
from espmedsam_edge.runtime.engines import cache as engine_cache
from espmedsam_edge.runtime.engines.engine import RuntimeCache
from espmedsam_edge.runtime.segmenter import Segmenter

NAMES = ("tensorrt", "tensorrt-rtx")
WORDS = "cuda-python, which CUDA needs, is missing."


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Call it with what cuda-python says of this machine, None for: all is well."""

    def says(words: str | None) -> None:
        monkeypatch.setattr(cuda_api, "unavailable", lambda: words)

    says(None)
    return says


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with the flavours that are installed."""

    def only(*flavours: str) -> None:
        monkeypatch.setattr(tensorrt_backend, "installed", lambda flavour: flavour in flavours)

    return only


@pytest.mark.parametrize("name", NAMES)
def test_without_a_driver(name: str, no_gpu: None, has: Callable[..., None]) -> None:
    has(*NAMES)
    reason = unavailable(name)
    assert reason is not None
    assert reason.startswith("there is no NVIDIA driver here.")
    assert "--gpus all" in reason


@pytest.mark.parametrize("name", NAMES)
def test_with_a_driver_and_no_gpu(
    name: str, gpu: Callable[[str], None], cuda: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(ORIN)
    monkeypatch.setattr(tensorrt_backend, "find_gpu", lambda: None)
    reason = unavailable(name)
    assert reason == "the driver finds no GPU. Check nvidia-smi and CUDA_VISIBLE_DEVICES."
    cuda("cuInit failed: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (...). Reboot.")
    reason = unavailable(name)
    assert reason is not None
    assert "Reboot" in reason


def test_with_a_gpu_and_no_tensorrt(
    gpu: Callable[[str], None], cuda: Callable[[str | None], None], has: Callable[..., None]
) -> None:
    gpu(ORIN)
    has()
    for name, title in zip(NAMES, ("TensorRT", "TensorRT-RTX"), strict=True):
        reason = unavailable(name)
        assert reason is not None
        assert reason.startswith(f"{title} is not installed. Install it: ")
    has("tensorrt")
    assert unavailable("tensorrt") is None
    cuda(WORDS)
    assert unavailable("tensorrt") == WORDS


def test_on_a_jetson_there_is_no_rtx(
    gpu: Callable[[str], None],
    cuda: Callable[[str | None], None],
    has: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(ORIN)
    has("tensorrt")
    for module in ("backends.tensorrt_backend", "engines.tensorrt_api"):
        monkeypatch.setattr(f"espmedsam_edge.runtime.{module}.jetson", lambda: Jetson("Orin Nano", "36.4"))
    assert unavailable("tensorrt") is None
    assert unavailable("tensorrt-rtx") == "TensorRT-RTX does not run on a Jetson; use --backend tensorrt."


def test_auto_falls_back_with_one_line(no_gpu: None, toy_bundle: Bundle) -> None:
    assert AUTO == ("tensorrt", "tensorrt-rtx", "onnxruntime")
    with Segmenter.load(toy_bundle) as segmenter:
        assert segmenter.choice.backend.name == "onnxruntime"
        assert len(segmenter.choice.passed_over) == 1
        assert "; not tensorrt or tensorrt-rtx: there is no NVIDIA driver here." in str(segmenter.choice)
        assert segmenter.segment(np.zeros((8, 8, 3), np.uint8)).drawn is None


@pytest.mark.parametrize("name", NAMES)
def test_asked_for_by_name_it_fails_with_the_remedy(name: str, no_gpu: None, toy_bundle: Bundle) -> None:
    with pytest.raises(
        BackendUnavailable, match=f"backend {name} cannot run here: there is no NVIDIA driver"
    ) as caught:
        Segmenter.load(toy_bundle, backend=name)
    assert caught.value.exit_code == 1


def _failing(monkeypatch: pytest.MonkeyPatch, errors: dict[str, UserError]) -> list[str]:
    """Backends whose engines fail to build with these errors; returns the names tried."""
    tried: list[str] = []

    def find_or_build(*_: Any, flavour: str, **__: Any) -> None:
        tried.append(flavour)
        raise errors[flavour]

    monkeypatch.setattr(tensorrt_backend, "unavailable", lambda name: None)
    monkeypatch.setattr(tensorrt_backend, "load_tensorrt", lambda flavour: None)
    monkeypatch.setattr(engine_cache, "find_or_build", find_or_build)
    return tried


def test_auto_tries_the_better_first_and_says_why_not(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = UserError("TensorRT 10.3.0 refuses fundus-fp32.onnx: node 7.", "Export it again.", exit_code=1)
    other = UserError("this process already runs TensorRT 10.3.0; it cannot load TensorRT-RTX as well.")
    tried = _failing(monkeypatch, {"tensorrt": refused, "tensorrt-rtx": other})
    choice = load_backend(toy_bundle, toy_bundle.graph())
    assert tried == list(NAMES)
    assert choice.backend.name == "onnxruntime"
    assert choice.passed_over == (
        "not tensorrt: TensorRT 10.3.0 refuses fundus-fp32.onnx: node 7. Export it again.",
        "not tensorrt-rtx: this process already runs TensorRT 10.3.0; it cannot load TensorRT-RTX as well.",
    )
    with pytest.raises(BackendUnavailable, match=r"refuses fundus-fp32\.onnx: node 7") as caught:
        load_backend(toy_bundle, toy_bundle.graph(), "tensorrt")
    assert (caught.value.hint, caught.value.exit_code) == ("Export it again.", 1)


def test_a_driver_too_old_for_cuda_python(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f'Function "{name}" not found')

    with pytest.raises(CudaError, match='cuGreenCtxCreate failed: Function "cuGreenCtxCreate" not found') as caught:
        CudaDriver(Driver()).call("cuGreenCtxCreate")
    assert "too old" in caught.value.hint

    def old() -> None:
        raise CudaUnavailable(caught.value.message, caught.value.hint, exit_code=1)

    monkeypatch.setattr(tensorrt_backend, "unavailable", lambda name: None)
    monkeypatch.setattr(tensorrt_backend, "load_tensorrt", lambda flavour: None)
    monkeypatch.setattr(engine_cache, "find_or_build", lambda *_, **__: None)
    monkeypatch.setattr(device_backend.CudaDevice, "open", old)
    with pytest.raises(BackendUnavailable, match="too old for cuda-python"):
        load_backend(toy_bundle, toy_bundle.graph(), "tensorrt")


def test_a_build_is_announced_once(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def find_or_build(*_: Any, on_progress: Any, **__: Any) -> None:
        for step in range(5):
            on_progress("Building Engine", step / 5)
        raise UserError("stop")

    monkeypatch.setattr(tensorrt_backend, "unavailable", lambda name: None)
    monkeypatch.setattr(tensorrt_backend, "load_tensorrt", lambda flavour: None)
    monkeypatch.setattr(engine_cache, "find_or_build", find_or_build)
    with pytest.raises(BackendUnavailable, match="stop"):
        load_backend(toy_bundle, toy_bundle.graph(), "tensorrt-rtx")
    assert said == ["Building the TensorRT-RTX engine of fundus fp32 for this GPU, once; this takes minutes."]


def test_equal_reasons_are_told_once(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_backend, "unavailable", lambda name: "none.")
    monkeypatch.setattr(backend, "AUTO", NAMES)
    with pytest.raises(UserError, match=r"no backend can run .* here: not tensorrt or tensorrt-rtx: none\."):
        load_backend(toy_bundle, toy_bundle.graph())


class _Config:
    """TensorRT-RTX's runtime configuration."""

    def __init__(self) -> None:
        self.cache = _Cache()
        self.given: Any = None

    def create_runtime_cache(self) -> _Cache:
        return self.cache

    def set_runtime_cache(self, cache: _Cache) -> bool:
        self.given = cache
        return True


class _Cache:
    def __init__(self) -> None:
        self.content, self.loaded, self.fits = b"compiled", list[bytes](), True

    def deserialize(self, blob: bytes) -> bool:
        self.loaded.append(blob)
        return self.fits

    def serialize(self) -> bytes:
        return self.content


class _Engine:
    def __init__(self) -> None:
        self.config = _Config()

    def create_runtime_config(self) -> _Config:
        return self.config

    def create_execution_context(self, config: _Config) -> tuple[str, _Config]:
        return "context", config


def test_what_rtx_compiles_is_kept_beside_the_plan(tmp_path: Path) -> None:
    plan, kept = tmp_path / "fundus.plan", tmp_path / "fundus.runtime"
    engine = _Engine()
    cache = RuntimeCache.of(engine, plan)
    assert cache is not None
    assert cache.context(engine) == ("context", engine.config)
    assert engine.config.given is engine.config.cache
    assert engine.config.cache.loaded == []
    cache.save()
    assert kept.read_bytes().endswith(b"compiled")

    second = _Engine()
    again = RuntimeCache.of(second, plan)
    assert again is not None
    assert second.config.cache.loaded == [b"compiled"]
    before = kept.stat().st_ino
    again.save()
    assert kept.stat().st_ino == before  # nothing new: not written again
    second.config.cache.content = b"compiled more"
    again.save()
    assert kept.read_bytes().endswith(b"compiled more")


def test_a_runtime_cache_of_another_gpu_is_replaced_and_a_folder_may_be_read_only(tmp_path: Path) -> None:
    first = RuntimeCache.of(_Engine(), tmp_path / "fundus.plan")
    assert first is not None
    first.save()
    engine = _Engine()
    engine.config.cache.fits = False
    cache = RuntimeCache.of(engine, tmp_path / "fundus.plan")
    assert cache is not None
    before = (tmp_path / "fundus.runtime").stat().st_ino
    cache.save()
    assert (tmp_path / "fundus.runtime").stat().st_ino != before
    (tmp_path / "file").write_bytes(b"")
    nowhere = RuntimeCache.of(engine, tmp_path / "file" / "fundus.plan")
    assert nowhere is not None
    nowhere.save()


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "empty", "no checksum"])
def test_a_damaged_runtime_cache_is_not_used_and_replaced(tmp_path: Path, damage: str, said: list[str]) -> None:
    plan, file = tmp_path / "fundus.plan", tmp_path / "fundus.runtime"
    first = RuntimeCache.of(_Engine(), plan)
    assert first is not None
    first.save()
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    damaged = {"a flipped bit": flipped, "cut short": whole[:-1], "empty": b"", "no checksum": b"compiled"}[damage]
    file.write_bytes(damaged)
    engine = _Engine()
    again = RuntimeCache.of(engine, plan)
    assert again is not None
    assert engine.config.cache.loaded == []
    assert said == ["fundus.runtime is damaged and not used: TensorRT-RTX compiles its kernels for this GPU again."]
    again.save()
    assert file.read_bytes() == whole


def test_tensorrt_has_no_runtime_cache(double: Callable[..., Any], tmp_path: Path) -> None:
    for release in ("10.3.0", "11.4.0.106"):
        assert RuntimeCache.of(double(release=release).module.ICudaEngine(), tmp_path / "a.plan") is None


def test_the_double_is_found_where_tensorrt_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOUBLE)
    assert tensorrt_backend.installed("tensorrt")


def test_rtx_has_what_the_runtime_cache_needs(rtx: Any) -> None:
    module = rtx.module
    assert {"create_runtime_cache", "set_runtime_cache"} <= set(dir(module.IRuntimeConfig))
    assert {"serialize", "deserialize"} <= set(dir(module.IRuntimeCache))
    assert "is_stream_capturable" in dir(module.IExecutionContext)
    assert "device_memory_size_v2" in dir(module.ICudaEngine)
