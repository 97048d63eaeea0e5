"""A teacher's file: what was trained, in safetensors. SAM's frozen encoder stays in SAM's file, known by its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from torch import Tensor

from espmedsam_edge.bundle import FormatVersion
from espmedsam_edge.errors import UserError
from espmedsam_edge.modalities import register, target_of
from espmedsam_edge.model.checkpoint import Targets, check_sizes, load_state, parse_metadata, read_hashed_foreign
from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.model.teacher import PREFIXES, EspMedSamTeacher, TeacherConfig, load_sam_encoder
from espmedsam_edge.model.tensor_file import read_tensor_file, write_tensor_file

_KEY = "espmedsam-teacher"


class TeacherInfo(BaseModel, extra="forbid"):
    """The metadata of a teacher's file.

    Attributes:
        config, heads: what the network is built from.
        targets: modality -> what its mask shows.
        vit_sha256: hash of the encoder that the additions belong to (``hash_state``).
        vit_stored: whether the file holds that encoder too (it must where no SAM file does).
    """

    format_version: FormatVersion = 1
    config: TeacherConfig
    heads: ModelConfig
    targets: Targets
    vit_sha256: str
    vit_stored: bool
    provenance: dict[str, str] = {}


def hash_state(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names and float32 values of a state's tensors."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_teacher(
    path: str | Path,
    teacher: EspMedSamTeacher,
    *,
    store_vit: bool,
    state: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write a teacher, complete or not at all.

    Args:
        path: ends in .safetensors.
        teacher: the network.
        store_vit: also store SAM's encoder; leave it out where a SAM file holds it.
        state: other weights than the network's own (an average, say), under the same names.
        provenance: how it came about.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"a teacher's name must end in .safetensors, not '{path.name}'.")
    weights = dict(teacher.state_dict() if state is None else state)
    prefix = PREFIXES["vit"]
    vit = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    info = TeacherInfo(
        config=teacher.config,
        heads=teacher.heads,
        targets={name: target_of(name) for name in teacher.modalities},
        vit_sha256=hash_state(vit),
        vit_stored=store_vit,
        provenance=dict(provenance or {}),
    )
    stored = {key: value for key, value in weights.items() if store_vit or not key.startswith(prefix)}
    write_tensor_file(path, stored, {_KEY: info.model_dump_json()})


def load_teacher(path: str | Path, sam: str | Path | None = None) -> tuple[EspMedSamTeacher, TeacherInfo]:
    """A teacher in evaluation mode, float32, on the CPU, nothing in it trainable.

    Args:
        path: written by ``save_teacher``.
        sam: the ``sam_vit_*.pth`` it was trained on; needed where the file does not hold the encoder.

    Raises:
        UserError: missing or foreign file, no SAM file where one is needed, or another SAM file than it was trained on.
    """
    teacher, info, _ = load_hashed_teacher(path, sam)
    return teacher, info


def load_hashed_teacher(
    path: str | Path, sam: str | Path | None = None
) -> tuple[EspMedSamTeacher, TeacherInfo, dict[str, str]]:
    """As ``load_teacher``, and the SHA-256 of the bytes it is from: ``teacher_sha256``, and of SAM's file, if it was
    read, ``sam_sha256``.

    Raises:
        UserError: as ``load_teacher``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no teacher at {path}.", "Train one: espmedsam-edge train teacher")
    try:
        tensors, metadata, sha256 = read_tensor_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}).", "Copy it again.") from error
    if _KEY not in metadata:
        raise UserError(f"{path} is not a teacher of this project.", "espmedsam-edge train teacher writes one.")
    info = parse_metadata(TeacherInfo, metadata[_KEY], path)
    state, hashes = {key: value.float() for key, value in tensors.items()}, {"teacher_sha256": sha256}
    for name, target in info.targets.items():
        register(name, target)
    if info.vit_stored:
        check_sizes(lambda: EspMedSamTeacher(info.config, info.heads, info.targets), state, str(path))
    teacher = EspMedSamTeacher(info.config, info.heads, info.targets)
    if not info.vit_stored:
        if sam is None:
            raise UserError(
                f"{path} holds what was trained beside SAM's encoder, not the encoder itself.",
                f"Set teacher.sam to the {info.config.preset} file of SAM it was trained on.",
            )
        encoder, hashes["sam_sha256"] = read_hashed_foreign(sam)
        load_sam_encoder(teacher.encoder, encoder, str(sam))
        vit = teacher.encoder.vit.state_dict()
        if hash_state(vit) != info.vit_sha256:
            raise UserError(f"{sam} is not the SAM checkpoint that {path} was trained on.", "Give that very file.")
        state.update({PREFIXES["vit"] + key: value for key, value in vit.items()})
    load_state(teacher, state, str(path))
    return teacher.eval().requires_grad_(False), info, hashes


def teacher_heads(teacher: EspMedSamTeacher) -> dict[str, torch.Tensor]:
    """The teacher's SPPG and QDMD weights under the student's names: where the student's own start from."""
    return {
        key: value.clone() for key, value in teacher.state_dict().items() if key.startswith(("prompt.", "decoder."))
    }
