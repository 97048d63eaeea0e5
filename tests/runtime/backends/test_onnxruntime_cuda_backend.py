"""ONNX Runtime's CUDA provider without a GPU: bound addresses with the real library, and why it cannot run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.runtime.backends import onnxruntime_backend
from espmedsam_edge.runtime.backends import onnxruntime_cuda_backend as cuda_backend
from espmedsam_edge.runtime.backends.backend import BackendUnavailable, load_backend, unavailable
from espmedsam_edge.runtime.backends.onnxruntime_cuda_backend import CUDA, BoundSession
from espmedsam_edge.runtime.onnx_session import open_session, reference_logits
from espmedsam_edge.shipped.bundles import shipped_bundle


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that start where ONNX Runtime's own tensors may."""
    size = 4 * int(np.prod(shape))
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.float32).reshape(shape)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_bound_session_reads_and_writes_in_place(tmp_path: Path, batch: int) -> None:
    bundle = save_toy_bundle(tmp_path / "b", batch=batch)
    graph = bundle.graph()
    content = bundle.read_graph(graph)
    image, logits = aligned(graph.input_shape), aligned(graph.output_shape)
    bound = BoundSession(open_session(content, 1), graph, image.ctypes.data, logits.ctypes.data, ("cpu", 0))
    random = np.random.default_rng(0)
    for _ in range(3):  # the same addresses with new content, as a frame after the other
        image[:] = random.standard_normal(image.shape)
        bound.run()
        np.testing.assert_array_equal(logits, reference_logits(graph, content, image.copy()))
        assert logits.any()


def test_a_bound_session_makes_the_masks_of_the_shipped_network() -> None:
    bundle = shipped_bundle("microscopy")
    graph = bundle.graph()
    content = bundle.read_graph(graph)
    image, logits = aligned(graph.input_shape), aligned(graph.output_shape)
    image[:] = np.random.default_rng(1).standard_normal(image.shape)
    BoundSession(open_session(content, 1), graph, image.ctypes.data, logits.ctypes.data, ("cpu", 0)).run()
    expected = reference_logits(graph, content, image)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())  # other numbers of threads


def test_what_is_missing_is_named(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no CUDA provider. Install onnxruntime-gpu" in str(unavailable("onnxruntime-cuda"))
    monkeypatch.setattr(cuda_backend, "available_providers", lambda: [CUDA])
    assert "NVIDIA driver" in str(unavailable("onnxruntime-cuda"))
    monkeypatch.setattr(cuda_backend, "driver_installed", lambda: True)
    assert "the driver finds no GPU" in str(unavailable("onnxruntime-cuda"))
    monkeypatch.setattr("espmedsam_edge.runtime.onnx_session.installed", lambda name: False)
    assert "onnxruntime is not installed. Install it: " in str(unavailable("onnxruntime-cuda"))
    assert str(unavailable("onnxruntime-cuda")).endswith("pip install onnxruntime-gpu")


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime that says that it has a CUDA provider, on a machine with a GPU; the provider is not there."""
    monkeypatch.setattr(onnxruntime_backend, "available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(cuda_backend, "unavailable", lambda name: None)


def test_onnxruntime_goes_on_with_the_cpu_where_cuda_does_not_start(
    with_cuda: None, toy_bundle: Bundle, said: list[str]
) -> None:
    choice = load_backend(toy_bundle, toy_bundle.graph(), "onnxruntime", threads=1)
    assert choice.taken == "onnxruntime (CPU, 1 thread)"
    (line,) = [line for line in said if "CUDA provider did not start" in line]
    assert line.startswith("onnxruntime goes on with the CPU: ")
    assert "libonnxruntime_providers_cuda.so" in line
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in line


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime:CUDA"])
def test_cuda_that_was_asked_for_is_insisted_on(with_cuda: None, toy_bundle: Bundle, name: str) -> None:
    with pytest.raises(BackendUnavailable, match="CUDA provider did not start"):
        load_backend(toy_bundle, toy_bundle.graph(), name, threads=1)


def test_a_driver_too_old_for_the_cuda_libraries_is_one_line(
    with_cuda: None, toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    def refuse(*_: Any, **options: Any) -> Any:
        assert options["enable_fallback"] == 0  # else it would print, and start again on the CPU
        raise RuntimeError(
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=0\nat x"
        )

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(BackendUnavailable, match="driver is too old for this ONNX Runtime: update the driver") as told:
        load_backend(toy_bundle, toy_bundle.graph(), "onnxruntime-cuda", threads=1)
    assert "\n" not in str(told.value)
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_the_driver_lacks_functions_for_wants_a_newer_driver(
    with_cuda: None, toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_backend, "_why_not_started", lambda: "x.so: undefined symbol: cuTensorMapEncodeTiled")
    with pytest.raises(BackendUnavailable, match=r"undefined symbol.* driver is too old for this ONNX Runtime"):
        load_backend(toy_bundle, toy_bundle.graph(), "onnxruntime-cuda", threads=1)


def test_cuda_libraries_of_another_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that sees the system's packages has ONNX Runtime in one folder, and NVIDIA's in another."""
    import onnxruntime

    folders = [tmp_path / "nvidia" / name / "lib" for name in ("cu13", "cudnn")]
    for folder in folders:
        folder.mkdir(parents=True)
    asked: list[Any] = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda directory=None: asked.append(directory), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    bundle = save_toy_bundle(tmp_path / "b")
    open_session(bundle.read_graph(bundle.graph()), 1, providers=[CUDA])
    assert asked[0] is None
    assert set(map(str, folders)) <= set(asked[1:])
    assert not any(str(Path(onnxruntime.__file__).parents[1]) in str(folder) for folder in asked)  # known to it
