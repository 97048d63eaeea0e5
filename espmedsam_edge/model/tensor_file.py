"""Safetensors files, read once: the tensors are those of the bytes that were hashed, whatever the path names later."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from espmedsam_edge.files import read_json, read_regular


class TensorFile(NamedTuple):
    """A safetensors file's tensors, metadata and SHA-256."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def read_tensor_file(path: Path) -> TensorFile:
    """Read a safetensors file.

    Raises:
        OSError: it cannot be read.
        SafetensorError: it is no such file, or truncated.
    """
    content = read_regular(path)
    tensors = load(content)  # checks the header: its size, its nesting, where its tensors are
    length = int.from_bytes(content[:8], "little")
    try:
        metadata = dict(read_json(content[8 : 8 + length]).get("__metadata__", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise SafetensorError(str(error)) from error
    return TensorFile(tensors, metadata, hashlib.sha256(content).hexdigest())
