"""Frames of other libraries, taken in place on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from gpu_memory import GpuMemory
from numpy.typing import NDArray

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import preprocess
from espmedsam_edge.runtime.backends.gpu_arrays import frame_in_place, on_gpu
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer
from espmedsam_edge.runtime.cuda.stream import Event, Stream
from espmedsam_edge.runtime.kernels.frame_view import PixelFormat
from espmedsam_edge.runtime.kernels.launch import FrameKernels

pytestmark = pytest.mark.gpu

SIZE = 32
FRAME = np.random.default_rng(3).integers(0, 256, (40, 52, 3), np.uint8)


class InterfaceArray:
    """An array with ``__cuda_array_interface__``, as PyCUDA and Numba have."""

    def __init__(self, address: int, shape: tuple[int, ...], **more: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
            **more,
        }


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class DlpackArray:
    """A producer of DLPack capsules, as torch, CuPy and JAX are."""

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        *,
        offset: int = 0,
        device: tuple[int, int] = (2, 0),
        code: int = 1,
        bits: int = 8,
    ) -> None:
        self.device, self.streams = device, list[int]()
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(shape))(*strides) if strides else None
        self._tensor = _ManagedTensor(
            address - offset, *device, len(shape), code, bits, 1, self._shape, self._strides, offset, None, None
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int) -> object:
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self._tensor), b"dltensor", None)


@pytest.fixture
def image(stream: Stream, kernels: FrameKernels) -> Iterator[Callable[..., NDArray[np.float32]]]:
    """Takes an array in place, runs the preprocess kernel on it and gives the network's input."""
    with DeviceBuffer(stream.device, 3 * SIZE * SIZE * 4) as out:

        def run(array: Any, pixels: PixelFormat | None = None) -> NDArray[np.float32]:
            view = frame_in_place(array, stream, pixels)
            kernels.preprocess(stream, [view], out.address, SIZE, Normalization())
            content = GpuMemory(stream).get(out.address, out.size)
            return content.view(np.float32).reshape(1, 3, SIZE, SIZE)

        yield run


def _close(got: NDArray[np.float32], frame: NDArray[np.uint8] = FRAME) -> bool:
    level = 1 / (255 * 0.224)  # see kernel_checks: OpenCV may round a weight the other way
    return bool(np.abs(got - preprocess(frame, SIZE, Normalization())).max() <= 1.001 * level)


def test_cuda_array_interface(memory: GpuMemory, image: Callable[..., NDArray[np.float32]]) -> None:
    array = InterfaceArray(memory.put(FRAME), FRAME.shape, stream=None)
    assert on_gpu(array)
    assert _close(image(array))


def test_cuda_array_interface_with_a_pitch_and_red_first(
    memory: GpuMemory, image: Callable[..., NDArray[np.float32]]
) -> None:
    padded = np.zeros((40, 60, 3), np.uint8)
    padded[:, :52] = FRAME[..., ::-1]
    array = InterfaceArray(memory.put(padded), FRAME.shape, strides=(180, 3, 1), stream=2)
    assert _close(image(array, PixelFormat.RGB8))


@pytest.mark.parametrize("more", [{}, {"stream": 1}], ids=["version 2", "default stream"])
def test_work_of_the_producers_stream_is_waited_for(
    device: Any, memory: GpuMemory, image: Callable[..., NDArray[np.float32]], more: dict[str, Any]
) -> None:
    address = memory.put(np.zeros_like(FRAME))
    source = memory.put(FRAME)
    legacy = device.driver.handle("CUstream", 1)
    device.driver.call("cuMemcpyDtoDAsync", address, source, FRAME.size, legacy)
    assert _close(image(InterfaceArray(address, FRAME.shape, **more)))


def test_dlpack(memory: GpuMemory, stream: Stream, image: Callable[..., NDArray[np.float32]]) -> None:
    array = DlpackArray(memory.put(FRAME), FRAME.shape, offset=64)
    assert on_gpu(array)
    assert _close(image(array))
    assert array.streams == [int(stream)]  # the producer was told which stream reads it


def test_dlpack_with_a_pitch_in_elements(memory: GpuMemory, image: Callable[..., NDArray[np.float32]]) -> None:
    gray = np.random.default_rng(4).integers(0, 65536, (30, 50), np.uint16)
    array = DlpackArray(memory.put(gray), (30, 40), (50, 1), bits=16)
    picture = np.repeat(np.rint(gray[:, :40] / 257.0).astype(np.uint8)[..., None], 3, axis=2)
    assert _close(image(array), picture)


def test_nv12_in_one_array(memory: GpuMemory, image: Callable[..., NDArray[np.float32]]) -> None:
    import cv2

    content = np.random.default_rng(4).integers(0, 256, (60, 48), np.uint8)
    array = InterfaceArray(memory.put(content), content.shape)
    assert _close(image(array, PixelFormat.NV12), np.asarray(cv2.cvtColor(content, cv2.COLOR_YUV2BGR_NV12)))


def test_what_cannot_be_taken_is_refused(memory: GpuMemory, stream: Stream) -> None:
    address = memory.put(FRAME)
    shape = FRAME.shape
    for array, words in [
        (InterfaceArray(address, shape, typestr="<f4"), "elements of type <f4"),
        (InterfaceArray(address, shape, mask=1), "has a mask of its own"),
        (InterfaceArray(8, shape), "cuPointerGetAttribute for the InterfaceArray at 0x8 failed"),
        (InterfaceArray(address, (3, 40, 52)), r"a BGR8 frame is a uint8 array of shape \(height, width, 3\)"),
        (InterfaceArray(address, shape, strides=(3, 120, 1)), "its pixels are not neighbours"),
        (DlpackArray(address, shape, device=(1, 0)), "not in a GPU's memory"),
        (DlpackArray(address, shape, device=(2, 3)), "the frame is on GPU 3, the segmenter on GPU 0"),
        (DlpackArray(address, shape, code=2, bits=32), "elements of 32 bits"),
        ([1, 2], "list is no array of a GPU"),
    ]:
        with pytest.raises(UserError, match=words):
            frame_in_place(array, stream)
    assert not on_gpu(FRAME)
    assert not on_gpu([1])


@pytest.mark.usefixtures("real_gpu")
def test_a_torch_tensor(image: Callable[..., NDArray[np.float32]]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    with torch.cuda.stream(torch.cuda.Stream()):
        assert _close(image(torch.from_numpy(FRAME).cuda()))
        wide = torch.zeros((40, 64, 3), dtype=torch.uint8, device="cuda")
        wide[:, :52] = torch.from_numpy(FRAME).cuda()
        assert _close(image(wide[:, :52]))


@pytest.mark.usefixtures("real_gpu")
def test_a_cupy_array(image: Callable[..., NDArray[np.float32]]) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    with cupy.cuda.Stream(non_blocking=True):
        assert _close(image(cupy.asarray(FRAME)))


@pytest.mark.usefixtures("real_gpu")
def test_a_pycuda_array(device: Any, image: Callable[..., NDArray[np.float32]]) -> None:
    driver = pytest.importorskip("pycuda.driver", reason="PyCUDA is not installed")
    driver.init()
    context = driver.Device(0).retain_primary_context()
    context.push()
    try:
        from pycuda import gpuarray

        assert _close(image(gpuarray.to_gpu(FRAME)))
    finally:
        context.pop()
        device.make_current()


def test_a_view_keeps_its_owner(memory: GpuMemory, stream: Stream) -> None:
    array = InterfaceArray(memory.put(FRAME), FRAME.shape)
    view = frame_in_place(array, stream)
    assert view.owner is array
    with Event(stream.device) as event:
        event.record(stream)
        event.synchronize()
