"""Builds the kernels with the host's compiler: as a library for ctypes, or as a libcuda that runs them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

DOUBLE = Path(__file__).parents[1] / "double"
KERNELS = Path(__file__).parents[2] / "espmedsam_edge" / "runtime" / "kernels"
_OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra")
_SOURCES = ("host_preprocess.cpp", "host_postprocess.cpp", "host_entry.cpp")
# No guards on stacks: the kernels' threads jump between them, which the sanitizer does not follow.
_SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "--param=asan-stack=0", "-g1", "-O1")


def compiler() -> str:
    """The C++ compiler; skips the test where there is none."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if found is None:
        pytest.skip("needs a C++ compiler to build the kernels for the CPU: install g++, or set CXX")
    return found


def build(*, driver: bool = False, sanitized: bool = False) -> Path:
    """Build the library, once for all test processes as long as no source changes.

    Args:
        driver: with the driver double in it, as ``libcuda.so.1``.
        sanitized: with the address and undefined-behaviour sanitizers.

    Returns:
        The library; the name of its folder tells what it was built from.
    """
    sources = [DOUBLE / name for name in (*_SOURCES, *(("cuda_machine.cpp", "cuda_work.cpp") if driver else ()))]
    command = [compiler(), *_OPTIONS, "-Wno-unknown-pragmas", "-Werror", f"-I{KERNELS}", f"-I{DOUBLE}"]
    if sanitized:
        command += _SANITIZED
    read = [*sources, *sorted(DOUBLE.glob("*.h")), *sorted(KERNELS.glob("*.cu*"))]
    digest = hashlib.sha256(b"\0".join([*(file.read_bytes() for file in read), " ".join(command).encode()]))
    folder = Path(tempfile.gettempdir()) / f"espmedsam-kernels-{os.getuid()}-{digest.hexdigest()[:16]}"
    library = folder / ("libcuda.so.1" if driver else "libkernels.so")
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", unfinished, *sources, "-ldl"], check=True)
        unfinished.replace(library)
    return library


class HostKernels:
    """The kernels as ``KernelModule.launch`` runs them, on the CPU and at once."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.host_layout_text.restype = ctypes.c_char_p

    def layout(self) -> dict[str, tuple[int, int]]:
        """``Structure.field`` -> its offset and size in bytes."""
        lines = self._library.host_layout_text().decode().splitlines()
        return {name: (int(offset), int(size)) for name, offset, size in (line.split() for line in lines)}

    def launch(
        self,
        stream: Any,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: ctypes.Structure,
    ) -> None:
        """Run a kernel."""
        assert all(side > 0 for side in (*grid, *block))
        code = self._library.run_host_kernel(kernel.encode(), *grid, *block, ctypes.byref(parameters))
        assert code == 0, f"no kernel {kernel}"
