"""CUDA's driver API through cuda-python: imported on first use, every call checked, errors in one line."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from espmedsam_edge.errors import UserError

_SUCCESS = 0
_OUT_OF_MEMORY = 2
_STOPPED = (
    "The GPU gave up on this program (the kernel log has an Xid line that says why). Start it again; if it comes back, "
    "check the GPU's health with nvidia-smi -q."
)

# By CUresult's value: what to do about it.
_HINTS: dict[int, str] = {
    _OUT_OF_MEMORY: "Other programs hold the GPU's memory: nvidia-smi, or tegrastats on a Jetson, shows which. "
    "Stop them, or use smaller frames, a smaller batch or fewer modalities.",
    3: "CUDA is shutting down: close what uses the GPU before the program ends.",
    34: "This libcuda is a stub for linking. Install NVIDIA's driver, or take the stub out of LD_LIBRARY_PATH.",
    46: "Another program holds the GPU for itself, or it is being reset: stop that program and try again.",
    100: "The driver finds no GPU: check nvidia-smi, CUDA_VISIBLE_DEVICES, and a container's --gpus option.",
    101: "Check CUDA_VISIBLE_DEVICES and the number of the GPU.",
    200: "The cached kernels do not fit this driver. Update the driver to one made for this version of cuda-python.",
    209: "The kernels were not compiled for this GPU. Update cuda-python and nvidia-cuda-nvrtc.",
    218: "Update the driver, or install the NVRTC that belongs to its CUDA version.",
    222: "The driver is older than NVRTC. Update the driver, or install the NVRTC that belongs to its CUDA version.",
    802: "The GPU is starting up: wait a moment; on a server with NVLink start nvidia-fabricmanager.",
    803: "The driver in the kernel and libcuda are of different versions: reboot, or reinstall the driver.",
    804: "This GPU needs a newer driver than the compatibility package in use.",
    **dict.fromkeys((214, 220, 700, 702, 709, 710, *range(714, 720), 721, 999), _STOPPED),
}
_OTHERWISE = "Check the driver with nvidia-smi; espmedsam-edge doctor shows what is installed."


class CudaError(UserError):
    """A call of the driver failed; ``code`` is CUresult's value."""

    def __init__(self, message: str, hint: str = "", *, code: int = -1) -> None:
        super().__init__(message, hint, exit_code=1)
        self.code = code

    @property
    def out_of_memory(self) -> bool:
        """The GPU, or the memory it can reach, is full."""
        return self.code == _OUT_OF_MEMORY

    @property
    def lost(self) -> bool:
        """The GPU gave up on this process (an Xid): nothing works on it until the program starts again."""
        return _HINTS.get(self.code) is _STOPPED


def cuda_error(what: str, code: int, words: str = "") -> CudaError:
    """The error of a call that failed, with what to do about it.

    Args:
        what: was called: ``"cuMemAlloc for 24 MB"``.
        code: CUresult's value.
        words: what the driver calls it; without them the number is named.
    """
    if not words:
        words = "out of memory" if code == _OUT_OF_MEMORY else f"CUDA error {code}"
    return CudaError(f"{what} failed: {words}.", _HINTS.get(code, _OTHERWISE), code=code)


class CudaUnavailable(UserError):
    """This machine cannot run CUDA at all: no cuda-python, no driver or no GPU."""


class CudaDriver:
    """The driver API. ``call`` turns its codes into exceptions.

    Args:
        bindings: ``cuda.bindings.driver``, or what stands in for it.
    """

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings

    def call(self, name: str, *arguments: Any, about: str = "") -> Any:
        """Call one function.

        Args:
            name: such as ``cuMemAlloc``.
            arguments: as ``cuda.bindings.driver`` takes them.
            about: what it was called for, for the error: ``"for 24 MB"``.

        Returns:
            What the function returns beside its code: None, one value or a tuple.

        Raises:
            CudaError: the code is not CUDA_SUCCESS, or the driver has no such function.
        """
        code, value = self.attempt(name, *arguments)
        if code != _SUCCESS:
            raise cuda_error(f"{name} {about}".strip(), code, self._words(code))
        return value

    def attempt(self, name: str, *arguments: Any) -> tuple[int, Any]:
        """As ``call``, with the code returned and not judged.

        Raises:
            CudaError: the driver has no such function.
        """
        try:
            code, *values = getattr(self._bindings, name)(*arguments)
        except RuntimeError as error:  # how cuda-python says that libcuda lacks a function
            raise CudaError(
                f"{name} failed: {_line(error)}.", "Update NVIDIA's driver: this one is too old for cuda-python."
            ) from error
        return int(code), None if not values else values[0] if len(values) == 1 else tuple(values)

    def constant(self, enumeration: str, name: str) -> Any:
        """A member of one of CUDA's enumerations, such as ``CUstreamCaptureMode``."""
        return getattr(getattr(self._bindings, enumeration), name)

    def handle(self, kind: str, value: int) -> Any:
        """A foreign handle as cuda-python takes it: ``handle("CUstream", 2)``."""
        return getattr(self._bindings, kind)(value)

    def _words(self, code: int) -> str:
        """``CUDA_ERROR_OUT_OF_MEMORY (out of memory)``; "" where the driver cannot tell."""
        try:
            member = self._bindings.CUresult(code)
        except ValueError:  # newer than these bindings
            return ""
        named, name = self.attempt("cuGetErrorName", member)
        told, text = self.attempt("cuGetErrorString", member)
        if named != _SUCCESS or told != _SUCCESS:
            return ""
        return f"{_text(name)} ({_text(text)})"


@lru_cache(maxsize=1)
def cuda_driver() -> CudaDriver:
    """The driver of this machine, initialised.

    Raises:
        CudaUnavailable: no cuda-python, no driver or no GPU.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CudaUnavailable(
            f"cuda-python cannot be imported: {_line(error)}.",
            "Install it: pip install 'espmedsam-edge[cuda]'; the extras rtx and trt bring it, too.",
            exit_code=1,
        ) from error
    loaded = CudaDriver(driver)
    try:
        loaded.call("cuInit", 0)
    except CudaError as error:
        if error.code < 0:
            raise CudaUnavailable("there is no CUDA driver here.", _NO_DRIVER, exit_code=1) from error
        raise CudaUnavailable(error.message, error.hint, exit_code=1) from error
    return loaded


_NO_DRIVER = "Install NVIDIA's driver; in a container run it with --gpus all (or --runtime nvidia on a Jetson)."


def unavailable() -> str | None:
    """Why CUDA cannot be used on this machine, with the remedy, as one line; None if it can."""
    try:
        cuda_driver()
    except CudaUnavailable as error:
        return str(error)
    return None


def megabytes(size: int) -> str:
    """A number of bytes for messages: ``24.9 MB``."""
    return f"{size / 1e6:.1f} MB"


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
