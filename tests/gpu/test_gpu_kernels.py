"""The kernels on a GPU against OpenCV, NumPy and the CPU backend. compute-sanitizer runs this file too."""

from __future__ import annotations

import os

import pytest
from gpu_memory import GpuMemory
from hypothesis import HealthCheck, given, settings
from kernel_checks import (
    PostprocessCase,
    PreprocessCase,
    check_postprocess,
    check_preprocess,
    postprocess_cases,
    preprocess_cases,
)
from kernel_frames import FrameCase

from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.kernels import launch as launch_module
from espmedsam_edge.runtime.kernels.frame_view import PixelFormat
from espmedsam_edge.runtime.kernels.launch import FrameKernels

pytestmark = pytest.mark.gpu

_RANDOM = settings(
    max_examples=int(os.environ.get("ESPMEDSAM_KERNEL_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@_RANDOM
@given(case=preprocess_cases())
def test_preprocess(kernels: FrameKernels, stream: Stream, case: PreprocessCase) -> None:
    memory = GpuMemory(stream)
    check_preprocess(kernels, memory, case)
    memory.close()


@_RANDOM
@given(case=postprocess_cases())
def test_postprocess(kernels: FrameKernels, stream: Stream, case: PostprocessCase) -> None:
    memory = GpuMemory(stream)
    with pytest.MonkeyPatch.context() as patch:
        if case.outline is not None:
            patch.setattr(launch_module, "outline_width", lambda size: case.outline)
        check_postprocess(kernels, memory, case)
    memory.close()


@pytest.mark.parametrize("pixels", PixelFormat)
def test_a_camera_frame_of_every_format(kernels: FrameKernels, memory: GpuMemory, pixels: PixelFormat) -> None:
    frame = FrameCase(pixels, 848, 480)
    off = check_preprocess(kernels, memory, PreprocessCase((frame,), 512))
    assert off <= 0.002  # of the values, by one level, where OpenCV's weights fall in the middle of two steps
    check_postprocess(kernels, memory, PostprocessCase((frame,), (128, 128)), launches=3)
