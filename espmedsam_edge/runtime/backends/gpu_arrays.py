"""Frames that other libraries hold on the GPU, taken in place: DLPack and ``__cuda_array_interface__``."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.kernels.frame_view import FrameView, PixelFormat, view_of_array

_GPU = (2, 13)  # DLDeviceType: kDLCUDA, kDLCUDAManaged
_LEGACY_STREAM = 1
_DTYPES = {"|u1": "uint8", "<u2": "uint16"}
_UNSIGNED = 1  # DLDataTypeCode
_COPY = "Copy it to this GPU first, or give it as a NumPy array."


class _Tensor(ctypes.Structure):
    """``DLTensor`` of dlpack.h; a ``DLManagedTensor`` starts with one."""

    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


def on_gpu(array: Any) -> bool:
    """Whether ``array`` is something of a GPU that ``frame_in_place`` takes, not a NumPy array or a CPU tensor."""
    if hasattr(array, "__dlpack_device__"):
        return array.__dlpack_device__()[0] in _GPU
    return hasattr(array, "__cuda_array_interface__")


def frame_in_place(
    array: Any,
    stream: Stream,
    pixels: PixelFormat | None = None,
) -> FrameView:
    """A frame that another library holds in this GPU's memory, without a copy.

    What the library still has enqueued for it is waited for on ``stream``. Leave the array unchanged until the work
    that reads it is done.

    Args:
        array: with DLPack's methods (torch, CuPy, JAX) or ``__cuda_array_interface__`` (PyCUDA, Numba): uint8
            (H, W, 3), (H, W) or (3·H/2, W), or uint16 (H, W). Rows may be any distance apart.
        stream: that will read it.
        pixels: its format; None: BGR8 for three channels, GRAY8 or GRAY16 for one.

    Raises:
        UserError: not such an array, or not on this stream's GPU.
    """
    if hasattr(array, "__dlpack_device__") and hasattr(array, "__dlpack__"):
        layout = _from_dlpack(array, stream)
    elif hasattr(array, "__cuda_array_interface__"):
        layout = _from_cuda_array_interface(array, stream)
    else:
        raise UserError(
            f"{type(array).__name__} is no array of a GPU.",
            "Give a NumPy array, or anything with DLPack or __cuda_array_interface__.",
        )
    address, shape, strides, dtype, owner = layout
    return view_of_array(pixels, address, shape, strides, dtype, owner)


_Layout = tuple[int, tuple[int, ...], "tuple[int, ...] | None", str, object]  # address, shape, strides, dtype, owner


def _from_dlpack(array: Any, stream: Stream) -> _Layout:
    kind, ordinal = (int(value) for value in array.__dlpack_device__())
    if kind not in _GPU:
        raise UserError(f"the {type(array).__name__} is not in a GPU's memory.", "Give it as a NumPy array.")
    _check_ordinal(ordinal, stream)
    capsule = array.__dlpack__(stream=int(stream))  # the producer lets our stream wait for its own
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _Tensor.from_address(get(capsule, b"dltensor"))
    if tensor.code != _UNSIGNED or tensor.bits not in (8, 16) or tensor.lanes != 1:
        raise UserError(
            f"the {type(array).__name__} has elements of {tensor.bits} bits and kind {tensor.code}.",
            "A frame is uint8, or uint16 in GRAY16.",
        )
    item = tensor.bits // 8
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(stride * item for stride in tensor.strides[: tensor.ndim]) if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    return address, shape, strides, f"uint{tensor.bits}", capsule  # an unused capsule gives the tensor back itself


def _from_cuda_array_interface(array: Any, stream: Stream) -> _Layout:
    interface = array.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise UserError(f"the {type(array).__name__} has a mask of its own.", "Give the plain array.")
    dtype = _DTYPES.get(interface["typestr"])
    if dtype is None:
        raise UserError(
            f"the {type(array).__name__} has elements of type {interface['typestr']}.",
            "A frame is uint8, or uint16 in GRAY16.",
        )
    address = int(interface["data"][0])
    driver = stream.device.driver
    ordinal = driver.constant("CUpointer_attribute", "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL")
    about = f"for the {type(array).__name__} at {address:#x}"
    _check_ordinal(int(driver.call("cuPointerGetAttribute", ordinal, address, about=about)), stream)
    # Version 2 has no stream: what was enqueued on the default stream is all that can be waited for.
    producer = interface.get("stream", _LEGACY_STREAM)
    if producer is not None:
        stream.wait_for_foreign(int(producer))
    strides = interface.get("strides")
    return address, tuple(interface["shape"]), None if strides is None else tuple(strides), dtype, array


def _check_ordinal(ordinal: int, stream: Stream) -> None:
    if ordinal != stream.device.ordinal:
        raise UserError(f"the frame is on GPU {ordinal}, the segmenter on GPU {stream.device.ordinal}.", _COPY)
