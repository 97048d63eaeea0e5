"""Packed checkpoints: the safetensors format with large tensors in 8 bits, the whole file compressed with xz.

What ships with the package is such a file (``weights/``). Reading needs NumPy alone, so a device can do it. Inside,
a large tensor ``NAME`` is int8 with a scale for each row of its first axis in ``NAME@scale``: value = int8 · scale.
All else is stored as it is. ``xz -d`` gives a plain safetensors file.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write

SUFFIX = ".safetensors.xz"
_SCALE = "@scale"
_SMALLEST = 2048  # elements; smaller tensors are kept as they are
LEVELS = 127
"""The largest magnitude of an int8 weight; fewer levels take fewer bits once compressed."""

_MAX_BYTES = 4 << 30  # unpacked; a small file that unpacks to more is no checkpoint
_MAX_HEADER = 100_000_000
_TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I64": np.int64, "I32": np.int32}
_NAMES = {np.dtype(dtype): name for name, dtype in _TYPES.items()}

Arrays = dict[str, NDArray[np.generic]]


def write_packed(
    path: Path,
    arrays: Mapping[str, NDArray[np.generic]],
    metadata: Mapping[str, str],
    levels: Callable[[str], int] = lambda name: LEVELS,
) -> int:
    """Write a packed checkpoint, complete or not at all.

    Args:
        path: ends in ``.safetensors.xz``.
        arrays: float32 or integers.
        metadata: of the safetensors header.
        levels: the largest magnitude for a tensor of that name, at most ``LEVELS``.

    Returns:
        Its size in bytes.
    """
    stored: Arrays = {}
    for name, value in arrays.items():
        if value.dtype == np.float32 and value.ndim >= 2 and value.size >= _SMALLEST:
            stored[name], stored[name + _SCALE] = _quantise(np.asarray(value, np.float32), levels(name))
        else:
            stored[name] = value
    content = lzma.compress(_serialise(stored, metadata))
    atomic_write(path, content)
    return len(content)


def read_packed(path: Path) -> tuple[Arrays, dict[str, str]]:
    """The tensors (those in 8 bits as float32 again) and the metadata of a packed checkpoint.

    Raises:
        UserError: missing, truncated, or not such a file.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}.", "Check the name.")
    try:
        decompressor = lzma.LZMADecompressor(memlimit=1 << 30)
        content = decompressor.decompress(path.read_bytes(), max_length=_MAX_BYTES)
        if not decompressor.eof:
            raise ValueError("it ends early")
        stored, metadata = _parse(content)
        scales = {name for name in stored if name.endswith(_SCALE)}
        arrays = {name: value for name, value in stored.items() if name not in scales}
        for name in scales:
            whole = name.removesuffix(_SCALE)
            arrays[whole] = _restore(arrays[whole], stored[name])
    except (lzma.LZMAError, ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is not a readable packed checkpoint ({error}).", "Copy it again.") from error
    return arrays, metadata


def write_plain(path: Path, arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> None:
    """Write tensors as they are into a plain safetensors file, complete or not at all."""
    atomic_write(path, _serialise(arrays, metadata))


def _quantise(value: NDArray[np.float32], levels: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    rows = value.reshape(len(value), -1)
    scale = (np.abs(rows).max(axis=1) / levels).astype(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1))
    return np.rint(rows / divisor[:, None]).astype(np.int8).reshape(value.shape), scale


def _restore(value: NDArray[np.generic], scale: NDArray[np.generic]) -> NDArray[np.float32]:
    rows = value.reshape(len(scale), -1).astype(np.float32) * scale.astype(np.float32)[:, None]
    return np.asarray(rows.reshape(value.shape), np.float32)


def _serialise(arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    parts, offset = [], 0
    for name in sorted(arrays):
        data = np.ascontiguousarray(arrays[name]).tobytes()
        kind = _NAMES[arrays[name].dtype]
        header[name] = {"dtype": kind, "shape": list(arrays[name].shape), "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _parse(content: bytes) -> tuple[Arrays, dict[str, str]]:
    length = int.from_bytes(content[:8], "little")
    if length > min(_MAX_HEADER, len(content) - 8):
        raise ValueError("its header is too long")
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    metadata = {str(key): str(value) for key, value in dict(header.pop("__metadata__", {})).items()}
    body = memoryview(content)[8 + length :]
    arrays: Arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(body):
            raise ValueError(f"{name} lies outside the file")
        arrays[name] = np.frombuffer(body[begin:end], _TYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays, metadata
