"""Packed checkpoints: the safetensors format with large tensors in 8 bits, the whole file compressed with xz.

What ships with the package is such a file (``weights/``). Reading needs NumPy alone, so a device can do it. Inside,
a large tensor ``NAME`` is int8 with a scale for each row of its first axis in ``NAME@scale``: value = int8 · scale.
All else is stored as it is. ``xz -d`` gives a plain safetensors file.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, read_json, read_regular
from espmedsam_edge.modalities import Scale

SUFFIX = ".safetensors.xz"
SCALES = "scales.json"
"""Beside a packed checkpoint: the scales of its modalities, which may be measured after it was packed."""

_SCALE = "@scale"
_SMALLEST = 2048  # elements; smaller tensors are kept as they are
LEVELS = 127
"""The largest magnitude of an int8 weight; fewer levels take fewer bits once compressed."""

_MAX_HEADER = 16 << 20
_MAX_RATIO = 200  # of what is unpacked to the file, beyond the header's limit: weights have less than 5
_MAX_BODY = 128 << 20  # in 8 bits; in memory it is five times that
_MAX_DICTIONARY = 128 << 20  # xz -9 takes half of it
_MAX_AXES = 8
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
        return parse(unpack(read_regular(path)))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable packed checkpoint ({error}).", "Copy it again.") from error


def unpack(content: bytes) -> bytes:
    """A packed checkpoint's content decompressed: a safetensors file, of which no more is unpacked than it says it has.

    Raises:
        ValueError: it is no such file, or says that it has more than such a file can hold.
    """
    try:
        decompressor = lzma.LZMADecompressor(memlimit=_MAX_DICTIONARY)
        begin = _exactly(decompressor, 8, content)
        length = int.from_bytes(begin, "little")
        if length > _MAX_HEADER:
            raise ValueError("its header is too long")
        header = _exactly(decompressor, length)
        size = max((entry.end for entry in _entries(header)[0].values()), default=0)
        if size > min(_MAX_BODY, max(_MAX_HEADER, _MAX_RATIO * len(content))):
            raise ValueError(f"it says that it holds {size >> 20} MiB")
        body = _exactly(decompressor, size)
        more = b"" if decompressor.eof else decompressor.decompress(b"", max_length=1)
        if more or not decompressor.eof or decompressor.unused_data:
            raise ValueError("it holds more than its header says")
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from error
    return b"".join([begin, header, body])


def _exactly(decompressor: lzma.LZMADecompressor, count: int, content: bytes = b"") -> bytes:
    """So many bytes more."""
    parts, left = [], count
    while left:
        if decompressor.eof:
            raise ValueError("it ends early")
        part = decompressor.decompress(content, max_length=left)
        if not part and decompressor.needs_input:
            raise ValueError("it ends early")
        content, left = b"", left - len(part)
        parts.append(part)
    return b"".join(parts)


def parse(content: bytes) -> tuple[Arrays, dict[str, str]]:
    """The tensors (those in 8 bits as float32 again) and the metadata of an unpacked checkpoint.

    Raises:
        ValueError: it is no such file.
    """
    length = int.from_bytes(content[:8], "little")
    if length > min(_MAX_HEADER, len(content) - 8):
        raise ValueError("its header is too long")
    entries, metadata = _entries(content[8 : 8 + length])
    body = memoryview(content)[8 + length :]
    stored: Arrays = {}
    for name, entry in entries.items():
        if entry.end > len(body):
            raise ValueError(f"{name} lies outside the file")
        stored[name] = np.frombuffer(body[entry.begin : entry.end], entry.dtype).reshape(entry.shape)
    scales = {name for name in stored if name.endswith(_SCALE)}
    arrays = {name: value for name, value in stored.items() if name not in scales}
    for name in scales:
        whole = name.removesuffix(_SCALE)
        if whole not in arrays or not stored[name].shape == arrays[whole].shape[:1] != ():
            raise ValueError(f"{name} belongs to nothing")
        arrays[whole] = _restore(arrays[whole], stored[name])
    return arrays, metadata


def read_scales(folder: Path) -> dict[str, Scale]:
    """The scales that lie in the folder of a packed checkpoint, by modality; none need to.

    Raises:
        UserError: the file is damaged.
    """
    try:
        found = json.loads((folder / SCALES).read_text())
        return {name: Scale.model_validate(value) for name, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / SCALES} is damaged.", "Install the package again.", exit_code=1) from error


def plain_sha256(arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> str:
    """The hash of what ``write_plain`` writes of them."""
    return hashlib.sha256(_serialise(arrays, metadata)).hexdigest()


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


class _Entry(NamedTuple):
    """A tensor in the header: its type and shape, and where it is behind the header."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    begin: int
    end: int


def _entries(header: bytes) -> tuple[dict[str, _Entry], dict[str, str]]:
    """The tensors by name, each of as many bytes as its shape and type say and one behind the other, and the metadata.

    Raises:
        ValueError: the header is none.
    """
    table = read_json(header)
    try:
        metadata = {str(key): str(value) for key, value in dict(table.pop("__metadata__", {})).items()}
        entries = {}
        for name, entry in table.items():
            begin, end = entry["data_offsets"]
            dtype, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
            if len(shape) > _MAX_AXES or any(type(size) is not int or size < 0 for size in (begin, end, *shape)):
                raise ValueError(f"{name} has no size")
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has another size than its shape says")
            entries[name] = _Entry(dtype, shape, begin, end)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its header is none ({error})") from error
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != reached:  # what lies in one place twice is held twice
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        reached = entry.end
    return entries, metadata
