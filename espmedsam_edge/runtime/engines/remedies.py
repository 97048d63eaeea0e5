"""What to do about what a CUDA library says: a driver too old, a GPU it does not know or cannot see, full memory."""

from __future__ import annotations

_OLD_DRIVER = (
    "NVIDIA's driver is too old for this {title}: update the driver, or install an older {title} (docs/engines.md)."
)
_UNKNOWN_GPU = (
    "This {title} does not run on this GPU: install a release that does (docs/engines.md), "
    "or use --backend onnxruntime."
)
_UNSEEN_GPU = (
    "{title} cannot reach the GPU: check nvidia-smi, CUDA_VISIBLE_DEVICES and a container's --gpus option "
    "(--runtime nvidia on a Jetson), or use --backend onnxruntime."
)
_MISMATCH = "The driver in the kernel and libcuda are of different versions: reboot, or reinstall the driver."

# Words of the log, in lower case -> the remedy. CUDA's own words and error numbers; the first that is found counts.
_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "driver version is insufficient",
            "error: 35",
            "error code 35",
            "error 35",
            "update your driver",
            "undefined symbol: cu",
        ),
        _OLD_DRIVER,
    ),
    (("system driver mismatch", "error: 803", "forward compatibility", "error: 804"), _MISMATCH),
    (
        ("no cuda-capable device", "error: 100", "invalid device ordinal", "error: 101", "no cuda device"),
        _UNSEEN_GPU,
    ),
    (
        ("target gpu sm", "unsupported sm", "compute capability", "no kernel image is available", "error: 209"),
        _UNKNOWN_GPU,
    ),
)
_NO_MEMORY = ("out of memory", "outofmemory", "cudamalloc", "insufficient memory")


def remedy(said: str, otherwise: str, title: str = "TensorRT") -> str:
    """What to do.

    Args:
        said: the lines of the log, in any case.
        otherwise: what to do about a line that is not known.
        title: of the library, for people.
    """
    lower = said.lower()
    found = next((hint for words, hint in _REMEDIES if any(word in lower for word in words)), None)
    return otherwise if found is None else found.format(title=title)


def tells_of_full_memory(said: str) -> bool:
    """Whether lines of TensorRT's log say that memory ran out."""
    return any(word in said.lower() for word in _NO_MEMORY)
