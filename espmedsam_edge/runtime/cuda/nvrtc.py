"""NVRTC: a kernel's source compiled for one GPU, and kept on disk by source and SM."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, write_errors
from espmedsam_edge.machine.cache import PRIVATE_FILE, cache_place, make_private, read_kept
from espmedsam_edge.runtime.cuda.driver import CudaUnavailable

log = logging.getLogger(__name__)

_OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",  # for lambdas: NVRTC 12 takes them for the host's otherwise
    "--generate-line-info",  # for compute-sanitizer and Nsight; the code is the same
)
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class KernelSource:
    """A kernel's source and the headers that it includes, by name."""

    name: str
    text: str
    headers: dict[str, str]


@dataclass(frozen=True)
class CompileTarget:
    """What NVRTC makes: machine code for one SM (``sm_90``), or PTX that the driver compiles on (``compute_90``)."""

    architecture: str

    @property
    def machine_code(self) -> bool:
        """Whether it is machine code rather than PTX."""
        return self.architecture.startswith("sm_")


def compile_target(sm: str, supported: list[int]) -> CompileTarget:
    """The best NVRTC can do for a GPU.

    Args:
        sm: the GPU's generation as TensorRT names it, ``sm87``.
        supported: what this NVRTC compiles for, as numbers: 87.

    Raises:
        UserError: the GPU is older than all of them.
    """
    number = int(sm.removeprefix("sm"))
    if number in supported:
        return CompileTarget(f"sm_{number}")
    older = [known for known in supported if known < number]
    if not older:
        raise UserError(
            f"this GPU is of generation {sm}; this NVRTC compiles for sm{min(supported)} and newer.",
            "Install an older NVRTC, the one of the CUDA version that the GPU's driver reports.",
            exit_code=1,
        )
    return CompileTarget(f"compute_{max(older)}")


def compile_kernels(source: KernelSource, target: CompileTarget, options: tuple[str, ...] = ()) -> bytes:
    """Compile a source with NVRTC; needs neither a GPU nor a driver.

    Returns:
        A cubin, or PTX for a ``compute_`` target.

    Raises:
        UserError: no NVRTC here, or it refuses the source.
    """
    nvrtc = _nvrtc()
    names = [name.encode() for name in source.headers]
    texts = [text.encode() for text in source.headers.values()]
    text, name = source.text.encode(), f"{source.name}.cu".encode()
    program = _nvrtc_call(nvrtc, "nvrtcCreateProgram", text, name, len(names), texts, names)
    try:
        given = [f"--gpu-architecture={target.architecture}".encode(), *(o.encode() for o in (*_OPTIONS, *options))]
        code, *_ = nvrtc.nvrtcCompileProgram(program, len(given), given)
        if int(code):
            text = bytes(_nvrtc_call(nvrtc, "nvrtcGetProgramLogSize", program))
            _nvrtc_call(nvrtc, "nvrtcGetProgramLog", program, text)  # fills the bytes in place
            raise UserError(
                f"NVRTC cannot compile {source.name}.cu for {target.architecture}: {_first_errors(text)}",
                "Update nvidia-cuda-nvrtc, or report this.",
                exit_code=1,
            )
        kind = "CUBIN" if target.machine_code else "PTX"
        image = bytes(_nvrtc_call(nvrtc, f"nvrtcGet{kind}Size", program))
        _nvrtc_call(nvrtc, f"nvrtcGet{kind}", program, image)  # fills the bytes in place
        return image
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def nvrtc_version() -> str:
    """Of the NVRTC that cuda-python loads here: ``13.0``.

    Raises:
        UserError: no NVRTC here.
    """
    major, minor = _nvrtc_call(_nvrtc(), "nvrtcVersion")
    return f"{major}.{minor}"


def supported_targets() -> list[int]:
    """The SMs that this NVRTC compiles for: 75, 80, …

    Raises:
        UserError: no NVRTC here.
    """
    return [int(number) for number in _nvrtc_call(_nvrtc(), "nvrtcGetSupportedArchs")]


def kernels_folder(cache: str | Path | None = None) -> Path:
    """Where compiled kernels are kept: beside the engines."""
    return cache_place(cache) / "kernels"


def kernel_image(source: KernelSource, sm: str, cache: str | Path | None = None) -> bytes:
    """A source compiled for a GPU: from the cache, or by NVRTC and then kept there.

    A folder that cannot be written only costs the compilation of a few seconds in every process.

    Args:
        source: what to compile.
        sm: ``sm87``.
        cache: the cache folder; None: $ESPMEDSAM_CACHE, else the user's.

    Raises:
        UserError: it is not in the cache, and NVRTC is missing or refuses it.
    """
    file = cache_file(source, sm, cache)
    root = file.parent.parent
    kept = _read(file, root)
    if kept is not None:
        log.debug("%s for %s is kept in %s", source.name, sm, file)
        return kept
    target = compile_target(sm, supported_targets())
    log.info("Compiling %s for this GPU (%s), once.", source.name, target.architecture)
    image = compile_kernels(source, target)
    try:
        with write_errors(file):
            make_private(file.parent, root)
        atomic_write(file, hashlib.sha256(image).digest() + image, PRIVATE_FILE)
    except UserError as error:
        log.warning("The compiled kernels cannot be kept: %s", error.message)
    return image


def cache_file(source: KernelSource, sm: str, cache: str | Path | None = None) -> Path:
    """Where ``kernel_image`` keeps a source compiled for a GPU."""
    digest = hashlib.sha256("\0".join((source.text, *source.headers.values(), *_OPTIONS)).encode())
    return kernels_folder(cache) / f"{source.name}-{digest.hexdigest()[:16]}-{sm}.bin"


def _read(file: Path, root: Path) -> bytes | None:
    """A kept image, or None: not there, not what was written, or not the user's alone."""
    try:
        content = read_kept(file, root)
    except OSError:
        return None
    digest, image = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return image if image and hashlib.sha256(image).digest() == digest else None


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CudaUnavailable(
            "cuda-python, which brings NVRTC's interface, is not installed.",
            "Install it: pip install 'espmedsam-edge[cuda]'; the extras rtx and trt bring it, too.",
            exit_code=1,
        ) from error
    return nvrtc


def _nvrtc_call(nvrtc: Any, name: str, *arguments: Any) -> Any:
    try:
        code, *values = getattr(nvrtc, name)(*arguments)
    except RuntimeError as error:  # cuda-python found no libnvrtc
        raise CudaUnavailable(
            "NVRTC, which compiles the kernels, is not installed.",
            "pip install nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 with cuda-python 12), or install the CUDA toolkit.",
            exit_code=1,
        ) from error
    if int(code):
        raise UserError(f"{name} failed: {code}.", "Reinstall nvidia-cuda-nvrtc and cuda-python.", exit_code=1)
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def _first_errors(text: bytes) -> str:
    lines = [line.strip() for line in text.rstrip(b"\0").decode("utf-8", "replace").splitlines() if "error" in line]
    return "; ".join(lines[:3]) or "no reason given."
