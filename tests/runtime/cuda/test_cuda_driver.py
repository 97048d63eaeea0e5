"""Errors of the driver in words, and what is said where CUDA cannot be used."""

from __future__ import annotations

import enum
import pickle
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda import driver as cuda_api
from espmedsam_edge.runtime.cuda.driver import CudaDriver, CudaError, CudaUnavailable, cuda_driver, unavailable


class Bindings:
    """A stand-in for ``cuda.bindings.driver`` whose functions answer what a test says; calls are recorded."""

    class CUresult(enum.IntEnum):
        CUDA_SUCCESS = 0
        CUDA_ERROR_OUT_OF_MEMORY = 2
        CUDA_ERROR_NO_DEVICE = 100

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            answer = self.answers.get(name, (0,))
            if isinstance(answer, Exception):
                raise answer
            return answer

        return function

    def cuGetErrorName(self, code: Bindings.CUresult) -> tuple[int, bytes]:
        return 0, code.name.encode()

    def cuGetErrorString(self, code: Bindings.CUresult) -> tuple[int, bytes]:
        return 0, b"in words"


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    cuda_driver.cache_clear()
    yield
    cuda_driver.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, bindings: Bindings) -> None:
    package = ModuleType("cuda.bindings")
    package.driver = bindings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)


def test_results_come_without_their_code() -> None:
    driver = CudaDriver(Bindings(cuInit=(0,), cuMemAlloc=(0, 4096), cuMemGetInfo=(0, 1, 2)))
    assert driver.call("cuInit", 0) is None
    assert driver.call("cuMemAlloc", 16) == 4096
    assert driver.call("cuMemGetInfo") == (1, 2)


def test_an_error_names_the_call_its_value_and_cudas_words() -> None:
    driver = CudaDriver(Bindings(cuMemAlloc=(Bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)))
    with pytest.raises(CudaError) as caught:
        driver.call("cuMemAlloc", 16, about="for 16 bytes")
    assert caught.value.message == "cuMemAlloc for 16 bytes failed: CUDA_ERROR_OUT_OF_MEMORY (in words)."
    assert "nvidia-smi" in caught.value.hint
    assert caught.value.out_of_memory
    assert caught.value.exit_code == 1


def test_an_error_newer_than_the_bindings_keeps_its_number() -> None:
    with pytest.raises(CudaError, match=r"^cuInit failed: CUDA error 4711\. Check the driver"):
        CudaDriver(Bindings(cuInit=(4711,))).call("cuInit", 0)


def test_an_error_crosses_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(CudaError("a failed.", "Do b.", code=2)))
    assert (error.message, error.hint, error.exit_code, error.code) == ("a failed.", "Do b.", 1, 2)


def test_a_function_that_an_old_driver_lacks() -> None:
    driver = CudaDriver(Bindings(cuGraphLaunch=RuntimeError('Function "cuGraphLaunch" not found')))
    with pytest.raises(CudaError, match=r"cuGraphLaunch failed: .* not found. Update NVIDIA's driver"):
        driver.call("cuGraphLaunch")


@pytest.mark.parametrize("code", [46, 100, 700, 719, 802, 803, 999])
def test_every_known_failure_has_a_remedy_of_its_own(code: int) -> None:
    with pytest.raises(CudaError) as caught:
        CudaDriver(Bindings(cuInit=(code,))).call("cuInit", 0)
    assert caught.value.hint != cuda_api._OTHERWISE


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    reason = unavailable()
    assert reason is not None
    assert reason.startswith("cuda-python cannot be imported: ")
    assert "pip install 'espmedsam-edge[cuda]'" in reason


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, Bindings(cuInit=RuntimeError("Failed to dlopen libcuda.so.1")))
    assert str(unavailable()).startswith("there is no CUDA driver here. Install NVIDIA's driver; in a container")
    with pytest.raises(CudaUnavailable) as caught:
        cuda_driver()
    assert isinstance(caught.value, UserError)


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, Bindings(cuInit=(100,)))
    assert str(unavailable()).startswith("cuInit failed: CUDA_ERROR_NO_DEVICE (in words). The driver finds no GPU")


def test_the_driver_is_initialised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings()
    _install(monkeypatch, bindings)
    assert unavailable() is None
    assert cuda_driver() is cuda_driver()
    assert bindings.calls == [("cuInit", 0)]


def test_the_device_layer_is_imported_without_cuda_python() -> None:
    import subprocess

    script = (
        "import sys; sys.modules['cuda'] = None\n"
        "import espmedsam_edge.runtime.backends.frame_buffers, espmedsam_edge.runtime.backends.gpu_arrays\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
