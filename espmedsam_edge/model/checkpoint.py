"""Checkpoints: safetensors with metadata, one LIE, one decoder and N bags; and reading of foreign files without code.

A checkpoint may be partial (say, an encoder and a decoder to start training from); ``info.parts`` says what it holds.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from espmedsam_edge.bundle import FormatVersion, Name, Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import read_json, read_regular
from espmedsam_edge.modalities import Scale, register, target_of
from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.model.tensor_file import read_tensor_file, write_tensor_file
from espmedsam_edge.shipped import packed

PARTS = ("encoder", "controller", "prompt", "decoder")
TEMPLATE = "template"
"""The part that holds a query and a hypernetwork MLP to start new modalities from (SAM's own mask token and MLP)."""

_KEY = "espmedsam"
_MOST_BYTES = 768 << 20  # of a file, which is in memory twice while it is read; six modalities take 116 MB
_MOST_FOREIGN_BYTES = 4 << 30  # SAM's largest network has 2.6 GB

Metadata = TypeVar("Metadata", bound=BaseModel)

Targets = Annotated[dict[Name, str], Field(max_length=256)]
"""Modality -> what its mask shows."""


class CheckpointInfo(BaseModel, extra="forbid"):
    """The metadata of a checkpoint.

    Attributes:
        scales: of the modalities whose training pictures are known; a bundle's come from it.
    """

    format_version: FormatVersion = 1
    config: ModelConfig
    targets: Targets = {}
    normalization: Normalization = Normalization()
    origin: Literal["random", "imported", "trained"]
    provenance: dict[str, str] = {}
    parts: list[str] = list(PARTS)
    scales: Annotated[dict[Name, Scale], Field(max_length=256)] = {}

    @property
    def modalities(self) -> list[str]:
        """The modalities with a bag, a query and an MLP."""
        return list(self.targets)

    @property
    def complete(self) -> bool:
        """Whether the checkpoint holds a whole network with at least one modality."""
        return set(PARTS) <= set(self.parts) and bool(self.targets)


def save_checkpoint(path: str | Path, model: EspMedSam | Mapping[str, Tensor], info: CheckpointInfo) -> None:
    """Write a checkpoint, complete or not at all.

    Args:
        path: ends in .safetensors.
        model: the network or its state.
        info: its ``targets`` are filled in for a network.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"a checkpoint's name must end in .safetensors, not '{path.name}'.")
    if isinstance(model, EspMedSam):
        info = info.model_copy(update={"targets": {name: target_of(name) for name in model.modalities}})
        state: Mapping[str, Tensor] = model.state_dict()
    else:
        state = model
    exclude = set() if info.scales else {"scales"}  # for programs that do not know it
    write_tensor_file(path, state, {_KEY: info.model_dump_json(exclude=exclude)})


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """A checkpoint's tensors (float32) and metadata, complete or partial; plain or packed (``.safetensors.xz``).

    Raises:
        UserError: missing, truncated, not ours, or from a newer program.
    """
    state, info, _ = read_hashed_checkpoint(path)
    return state, info


def read_hashed_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], CheckpointInfo, str]:
    """As ``read_checkpoint``, and the SHA-256 of the bytes that the tensors are from.

    Raises:
        UserError: as ``read_checkpoint``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}.", "Train one, or convert one: espmedsam-edge import")
    try:
        if path.name.endswith(packed.SUFFIX):
            content = read_regular(path, _MOST_BYTES)
            arrays, metadata = packed.parse(packed.unpack(content))
            state = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
            sha256 = hashlib.sha256(content).hexdigest()
        else:
            state, metadata, sha256 = read_tensor_file(path, _MOST_BYTES)
    except ValueError as error:
        raise UserError(f"{path} is not a readable packed checkpoint ({error}).", "Copy it again.") from error
    except (SafetensorError, OSError) as error:
        if path.suffix in (".pt", ".pth"):
            raise UserError(f"{path} is a foreign checkpoint.", "Convert it first: espmedsam-edge import") from error
        raise UserError(
            f"{path} is not a readable safetensors file ({_reason(error)}).", "It may be truncated; copy it again."
        ) from error
    if _KEY not in metadata:
        raise UserError(
            f"{path} is not a checkpoint of this project.", "Convert it first: espmedsam-edge import --help"
        )
    info = parse_metadata(CheckpointInfo, metadata[_KEY], path)
    if path.name.endswith(packed.SUFFIX) and not info.scales:
        info = info.model_copy(update={"scales": packed.read_scales(path.parent)})
    for name, target in info.targets.items():
        register(name, target)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}, info, sha256


def parse_metadata(kind: type[Metadata], text: str, path: Path) -> Metadata:
    """What a file's metadata says in JSON.

    Raises:
        UserError: it is none, nested without end, or has sizes that no such network has; names the first fault.
    """
    try:
        return kind.model_validate(read_json(text))
    except ValueError as error:  # pydantic's, too
        detail = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            detail = f"{'.'.join(str(part) for part in first['loc'])[:100]}: {first['msg']}"
        raise UserError(f"{path}: its metadata is not valid ({detail}).", "Was it made by a newer version?") from error


def load_checkpoint(path: str | Path) -> tuple[EspMedSam, CheckpointInfo]:
    """The whole network of a checkpoint, in evaluation mode, float32, on the CPU.

    Raises:
        UserError: as ``read_checkpoint``; or the checkpoint is partial, or its tensors do not fit its configuration.
    """
    model, info, _ = load_hashed_checkpoint(path)
    return model, info


def load_hashed_checkpoint(path: str | Path) -> tuple[EspMedSam, CheckpointInfo, str]:
    """As ``load_checkpoint``, and the SHA-256 of the bytes that the network is from.

    Raises:
        UserError: as ``load_checkpoint``.
    """
    state, info, sha256 = read_hashed_checkpoint(path)
    if not info.complete:
        raise UserError(
            f"{path} holds only {', '.join(info.parts)} and modalities: {', '.join(info.modalities) or 'none'}.",
            "Train from it first: espmedsam-edge train",
        )
    state = {key: value for key, value in state.items() if not key.startswith(TEMPLATE)}
    check_modalities(info.modalities, state, str(path))
    check_sizes(lambda: EspMedSam(info.config, info.modalities), state, str(path))
    model = EspMedSam(info.config, info.modalities)
    load_state(model, state, str(path))
    return model.eval(), info, sha256


def check_modalities(modalities: Iterable[str], state: Mapping[str, Tensor], where: str) -> None:
    """Refuse a checkpoint that lists modalities without tensors: each costs time before it is found missing.

    Raises:
        UserError: names the first.
    """
    there = {key.split(".")[1] for key in state if key.startswith("controller.")}
    for name in modalities:
        if name not in there:
            raise UserError(f"{where} does not fit its configuration: it holds nothing of {name}.", "Copy it again.")


def check_sizes(make: Callable[[], torch.nn.Module], state: Mapping[str, Tensor], where: str) -> None:
    """Compare the sizes of a network with a file's own tensors before any memory is taken for it.

    Raises:
        UserError: missing, unexpected or misshapen tensors; names the first.
    """
    with torch.device("meta"):  # shapes without numbers
        _compare(make().state_dict(), state, where)


def load_state(model: torch.nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state that must fit exactly.

    Raises:
        UserError: missing, unexpected or misshapen tensors; names the first.
    """
    _compare(model.state_dict(), state, where)
    model.load_state_dict(state)


def _compare(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    wrong = sorted(set(expected) ^ set(state)) or sorted(
        key for key, value in expected.items() if value.shape != state[key].shape
    )
    if wrong:
        key = wrong[0]
        what = "is missing" if key not in state else "does not belong" if key not in expected else "has another shape"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{where} does not fit its configuration: {key} {what}{more}.", "Is it of another preset?")


def read_foreign(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a foreign ``.pt``/``.pth``/``.safetensors`` file; no code in it is ever run.

    Raises:
        UserError: missing, truncated, a pickle with code in it, or no state dict.
    """
    return read_hashed_foreign(path)[0]


def read_hashed_foreign(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """As ``read_foreign``, and the SHA-256 of the bytes that the tensors are from.

    Raises:
        UserError: as ``read_foreign``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}.")
    try:
        if path.suffix == ".safetensors":
            found = read_tensor_file(path, _MOST_FOREIGN_BYTES)
            return found.tensors, found.sha256
        content = read_regular(path, _MOST_FOREIGN_BYTES, holes=False)
        sha256, size = hashlib.sha256(content).hexdigest(), len(content)
        _check_costs(content)
        loaded = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
        del content
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than weights (pickled code or objects) and was not loaded.",
            "Ask its author for a file of tensors only.",
        ) from error
    except Exception as error:  # torch's reader of pickles stumbles over damage in many ways
        raise UserError(
            f"{path} is not a readable checkpoint ({_reason(error)}).", "It may be truncated; copy it again."
        ) from error
    for nested in ("model", "state_dict", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(nested), dict):
            loaded = loaded[nested]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"{path} holds no state dict of tensors.", "Give a file saved with torch.save(model.state_dict())."
        )
    if any(not _is_stored(value, size) for value in loaded.values()):
        raise UserError(f"{path} holds tensors that are larger than the file.", "Ask its author for a plain one.")
    return {str(key): value for key, value in loaded.items()}, sha256


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _check_costs(content: bytes) -> None:
    """Refuse what makes torch take much memory for a small file: compressed parts, and objects of any size.

    Raises:
        ValueError: it has such.
    """
    pickled = content
    if zipfile.is_zipfile(BytesIO(content)):
        with zipfile.ZipFile(BytesIO(content)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(content) for entry in entries):
                raise ValueError("its parts are compressed")
            pickled = b"".join(archive.read(entry) for entry in entries if entry.filename.endswith(".pkl"))
    if b"bytearray" in pickled:  # the one type of any size that torch makes for what counts as weights alone
        raise ValueError("it holds other things than tensors")


def _is_stored(value: Tensor, size: int) -> bool:
    """Whether a tensor's numbers stand in a file of ``size`` bytes, as many as its shape says."""
    dense = value.layout == torch.strided and value.device.type == "cpu"
    return dense and value.numel() * value.element_size() <= size
