"""Checkpoints: safetensors with metadata, one LIE, one decoder and N bags; and reading of foreign files without code.

A checkpoint may be partial (say, an encoder and a decoder to start training from); ``info.parts`` says what it holds.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from espmedsam_edge.bundle import FormatVersion, Name, Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path
from espmedsam_edge.modalities import register, target_of
from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.shipped import packed

PARTS = ("encoder", "controller", "prompt", "decoder")
TEMPLATE = "template"
"""The part that holds a query and a hypernetwork MLP to start new modalities from (SAM's own mask token and MLP)."""

_KEY = "espmedsam"


class CheckpointInfo(BaseModel):
    """The metadata of a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    format_version: FormatVersion = 1
    config: ModelConfig
    targets: dict[Name, str] = {}
    normalization: Normalization = Normalization()
    origin: Literal["random", "imported", "trained"]
    provenance: dict[str, str] = {}
    parts: list[str] = list(PARTS)

    @property
    def modalities(self) -> list[str]:
        """The modalities with a bag, a query and an MLP."""
        return list(self.targets)

    @property
    def complete(self) -> bool:
        """Whether the checkpoint holds a whole network with at least one modality."""
        return set(PARTS) <= set(self.parts) and bool(self.targets)


def save_checkpoint(
    path: str | Path, model: EspMedSam | Mapping[str, Tensor], info: CheckpointInfo, dtype: torch.dtype | None = None
) -> None:
    """Write a checkpoint, complete or not at all.

    Args:
        path: ends in .safetensors.
        model: the network or its state.
        info: its ``targets`` are filled in for a network.
        dtype: floating-point weights are stored so (None: as they are); computing stays in float32.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"a checkpoint's name must end in .safetensors, not '{path.name}'.")
    if isinstance(model, EspMedSam):
        info = info.model_copy(update={"targets": {name: target_of(name) for name in model.modalities}})
        state: Mapping[str, Tensor] = model.state_dict()
    else:
        state = model
    stored = {
        key: value.detach().cpu().to(dtype if dtype and value.is_floating_point() else value.dtype).contiguous()
        for key, value in state.items()
    }
    with atomic_path(path) as temporary:
        try:
            save_file(stored, temporary, metadata={_KEY: info.model_dump_json()})
        except SafetensorError as error:
            raise OSError(28, str(error)) if "os error 28" in str(error).lower() else error from None


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """A checkpoint's tensors (float32) and metadata, complete or partial; plain or packed (``.safetensors.xz``).

    Raises:
        UserError: missing, truncated, not ours, or from a newer program.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}.", "Train one, or convert one: espmedsam-edge import")
    try:
        if path.name.endswith(packed.SUFFIX):
            arrays, metadata = packed.read_packed(path)
            if _KEY not in metadata:
                raise UserError(f"{path} is not a checkpoint of this project.", "See docs/bundle-format.md.")
            state = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
            return _registered(state, CheckpointInfo.model_validate(json.loads(metadata[_KEY])))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise UserError(
                    f"{path} is not a checkpoint of this project.", "Convert it first: espmedsam-edge import --help"
                )
            info = CheckpointInfo.model_validate(json.loads(metadata[_KEY]))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        if path.suffix in (".pt", ".pth"):
            raise UserError(f"{path} is a foreign checkpoint.", "Convert it first: espmedsam-edge import") from error
        raise UserError(
            f"{path} is not a readable safetensors file ({error}).", "It may be truncated; copy it again."
        ) from error
    except (ValidationError, ValueError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{path}: its metadata is not valid ({detail}).", "Was it made by a newer version?") from error
    return _registered(state, info)


def _registered(state: dict[str, Tensor], info: CheckpointInfo) -> tuple[dict[str, Tensor], CheckpointInfo]:
    for name, target in info.targets.items():
        register(name, target)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}, info


def load_checkpoint(path: str | Path) -> tuple[EspMedSam, CheckpointInfo]:
    """The whole network of a checkpoint, in evaluation mode, float32, on the CPU.

    Raises:
        UserError: as ``read_checkpoint``; or the checkpoint is partial, or its tensors do not fit its configuration.
    """
    state, info = read_checkpoint(path)
    if not info.complete:
        raise UserError(
            f"{path} holds only {', '.join(info.parts)} and modalities: {', '.join(info.modalities) or 'none'}.",
            "Train from it first: espmedsam-edge train",
        )
    model = EspMedSam(info.config, info.modalities)
    load_state(model, {key: value for key, value in state.items() if not key.startswith(TEMPLATE)}, str(path))
    return model.eval(), info


def load_state(model: torch.nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state that must fit exactly.

    Raises:
        UserError: missing, unexpected or misshapen tensors; names the first.
    """
    expected = model.state_dict()
    wrong = sorted(set(expected) ^ set(state)) or sorted(
        key for key, value in expected.items() if value.shape != state[key].shape
    )
    if wrong:
        key = wrong[0]
        what = "is missing" if key not in state else "does not belong" if key not in expected else "has another shape"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{where} does not fit its configuration: {key} {what}{more}.", "Is it of another preset?")
    model.load_state_dict(state)


def read_foreign(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a foreign ``.pt``/``.pth``/``.safetensors`` file; no code in it is ever run.

    Raises:
        UserError: missing, truncated, a pickle with code in it, or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than weights (pickled code or objects) and was not loaded.",
            "Ask its author for a file of tensors only.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({error}).", "It may be truncated; copy it again."
        ) from error
    for nested in ("model", "state_dict", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(nested), dict):
            loaded = loaded[nested]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"{path} holds no state dict of tensors.", "Give a file saved with torch.save(model.state_dict())."
        )
    return {str(key): value for key, value in loaded.items()}
