"""Runs the GPU's tests without a GPU: real cuda-python and NVRTC, and a driver that runs the kernels on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from host_build import build, compiler

TESTS = Path(__file__).parents[1]


def _run(library: Path, *arguments: str, **environment: str) -> str:
    pytest.importorskip("cuda.bindings", reason="needs cuda-python (cuda-bindings)")
    finder = pytest.importorskip("cuda.pathfinder", reason="needs cuda-python 12.9 or newer")
    try:
        nvrtc = Path(finder.load_nvidia_dynamic_lib("nvrtc").abs_path).parent  # a preloaded sanitizer hides its parts
    except finder.DynamicLibNotFoundError:
        pytest.skip("needs NVRTC (nvidia-cuda-nvrtc)")
    path = os.pathsep.join(filter(None, [str(library.parent), str(nvrtc), os.environ.get("LD_LIBRARY_PATH")]))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rs", *arguments]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, "LD_LIBRARY_PATH": path, "PYTEST_ADDOPTS": "", **environment},
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-6000:]
    return ended.stdout


def test_on_the_software_driver() -> None:
    # Of random frames few: tests/runtime/kernels runs many through the same build of the kernels.
    output = _run(build(driver=True), str(TESTS / "gpu"), ESPMEDSAM_KERNEL_EXAMPLES="10")
    assert int(re.findall(r"(\d+) passed", output)[-1]) > 30
    for line in re.findall(r"^SKIPPED .*", output, re.M):  # nothing but the tests of other libraries may be left out
        assert "needs a real GPU" in line, line


def test_the_kernels_stay_within_their_buffers() -> None:
    """The address sanitizer guards every buffer of the software driver: a memcheck that needs no GPU."""
    if "g++" not in Path(compiler()).name:
        pytest.skip("needs g++ for its address sanitizer")
    library = build(driver=True, sanitized=True)
    preloaded = [_runtime("libasan.so"), _runtime("libstdc++.so.6")]  # the second, for the sanitizer to find at start
    output = _run(
        library,
        "--capture=no",  # a report goes to the process's own stderr
        "-k",
        "not camera",  # small frames of every size do
        str(TESTS / "gpu" / "test_gpu_kernels.py"),
        LD_PRELOAD=" ".join(preloaded),
        ASAN_OPTIONS="detect_leaks=0",
        ESPMEDSAM_KERNEL_EXAMPLES="10",
    )
    assert "passed" in output


def _runtime(name: str) -> str:
    """The compiler's own copy of a library."""
    command = [compiler(), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"needs the compiler's {name}")
    return found
