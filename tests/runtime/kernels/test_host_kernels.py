"""The kernels' own sources, built by the host's compiler, against OpenCV, NumPy and the CPU backend."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from host_build import HostKernels, build
from hypothesis import HealthCheck, given, settings
from kernel_checks import (
    PostprocessCase,
    PreprocessCase,
    check_postprocess,
    check_preprocess,
    postprocess_cases,
    preprocess_cases,
)
from kernel_frames import FrameCase, HostMemory

from espmedsam_edge.runtime.kernels import launch as launch_module
from espmedsam_edge.runtime.kernels import parameters
from espmedsam_edge.runtime.kernels.frame_view import PixelFormat
from espmedsam_edge.runtime.kernels.launch import FrameKernels

_RANDOM = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def host() -> HostKernels:
    return HostKernels(build())


@pytest.fixture(scope="module")
def kernels(host: HostKernels) -> FrameKernels:
    return FrameKernels(host, host)


def test_parameters_are_laid_out_as_in_the_sources(host: HostKernels) -> None:
    layout = host.layout()
    structures = (
        parameters.Frame,
        parameters.Preprocess,
        parameters.Measures,
        parameters.Totals,
        parameters.Canvas,
        parameters.Postprocess,
    )
    ours = {
        f"{structure.__name__}.{name}": (getattr(structure, name).offset, getattr(structure, name).size)
        for structure in structures
        for name, _ in structure._fields_
    }
    assert ours == layout
    assert ctypes.sizeof(parameters.Postprocess) <= 4096, "a kernel takes 4 KB of parameters before CUDA 12.1"


@_RANDOM
@given(case=preprocess_cases())
def test_preprocess(kernels: FrameKernels, case: PreprocessCase) -> None:
    check_preprocess(kernels, HostMemory(), case)


@_RANDOM
@given(case=postprocess_cases())
def test_postprocess(kernels: FrameKernels, case: PostprocessCase) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if case.outline is not None:
            patch.setattr(launch_module, "outline_width", lambda size: case.outline)
        check_postprocess(kernels, HostMemory(), case)


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (720, 576), (640, 480), (3840, 2160)])
def test_preprocess_gives_the_cpu_backends_pixels(kernels: FrameKernels, width: int, height: int) -> None:
    frame = FrameCase(PixelFormat.BGR8, width, height)
    off = check_preprocess(kernels, HostMemory(), PreprocessCase((frame,), 512))
    assert off <= 0.002  # of the values, by one level, where OpenCV's weights fall in the middle of two steps


def test_postprocess_of_a_camera_frame_twice_in_a_row(kernels: FrameKernels) -> None:
    case = PostprocessCase((FrameCase(PixelFormat.BGR8, 1280, 720),), (256, 256))
    check_postprocess(kernels, HostMemory(), case, launches=2)  # the second needs the first one's counter back at 0


def test_a_barrier_that_some_threads_miss_is_reported(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text(
        '#include "portable.cuh"\n'
        "__global__ void broken() { if (threadIdx.x < 40) __syncthreads(); else __ballot_sync(ANY_LANES, 1); }\n"
        "int main() { host_cuda::launch({1, 1, 1}, {64, 1, 1}, broken); }\n"
    )
    from host_build import DOUBLE, KERNELS, compiler

    program = tmp_path / "broken"
    subprocess.run(
        [compiler(), "-std=c++17", "-U_FORTIFY_SOURCE", f"-I{KERNELS}", f"-I{DOUBLE}", "-o", program, source],
        check=True,
    )
    ended = subprocess.run([program], capture_output=True, text=True)
    assert ended.returncode < 0
    assert "deadlock in block (0, 0, 0): 40 threads at a barrier, 24 at a warp collective" in ended.stderr


assert sys.maxsize > 2**32, "the kernels' parameters hold 64-bit addresses"
