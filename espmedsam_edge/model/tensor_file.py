"""Safetensors files, written whole, and read once: what was hashed is what was read, whatever the path names later."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from espmedsam_edge.files import atomic_path, read_json, read_regular

_MOST_TENSORS = 20_000  # SAM's largest network has 600; each takes its time, empty ones too


class TensorFile(NamedTuple):
    """A safetensors file's tensors, metadata and SHA-256."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of any device, complete or not at all; those that share memory get a copy each.

    Raises:
        UserError: no space left, or nowhere to write.
    """
    stored = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(stored, temporary, metadata)
        except SafetensorError as error:
            full = "os error 28" in str(error).lower()
            raise OSError(errno.ENOSPC, str(error)) if full else error from None


def read_tensor_file(path: Path, limit: int | None = None) -> TensorFile:
    """Read a safetensors file, of at most ``limit`` bytes.

    Raises:
        OSError: it cannot be read.
        SafetensorError: it is no such file, truncated, or of tensors that no network has.
    """
    content = read_regular(path, limit, holes=False)
    length = int.from_bytes(content[:8], "little")
    if content.count(b'"data_offsets"', 8, 8 + length) > _MOST_TENSORS:
        raise SafetensorError(f"it lists over {_MOST_TENSORS} tensors")
    try:
        tensors = load(content)  # checks the header: its size, its nesting, where its tensors are
    except KeyError as error:
        raise SafetensorError(f"its tensors are of a type that torch does not have: {error}") from error
    try:
        metadata = dict(read_json(content[8 : 8 + length]).get("__metadata__", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise SafetensorError(str(error)) from error
    return TensorFile(tensors, metadata, hashlib.sha256(content).hexdigest())
