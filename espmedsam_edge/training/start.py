"""What a run starts from: networks built by a recipe, from scratch or from a file, and which parts are still random."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.modalities import Scale
from espmedsam_edge.model.checkpoint import (
    TEMPLATE,
    CheckpointInfo,
    check_modalities,
    check_sizes,
    load_state,
    read_hashed_checkpoint,
    read_hashed_foreign,
)
from espmedsam_edge.model.config import ModelConfig, model_config
from espmedsam_edge.model.decoder import QueryDecoupledModalityDecoder
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.model.published import is_published
from espmedsam_edge.model.sam import decoder_initialisation, import_mobilesam, import_sam
from espmedsam_edge.model.teacher import EspMedSamTeacher, load_sam_encoder, teacher_config
from espmedsam_edge.model.teacher_checkpoint import load_hashed_teacher
from espmedsam_edge.training.recipe import SCRATCH, Recipe
from espmedsam_edge.training.sections import Part
from espmedsam_edge.training.trainable import STUDENT_PREFIXES


@dataclass
class StudentStart:
    """A student to train.

    Attributes:
        network: on the CPU.
        fresh: the parts that nothing was loaded for.
        normalization: of the images it expects.
        template: SAM's mask token and MLP, to be handed on in the checkpoint, if the start has them.
        provenance: where the weights came from.
        scales: as far as the start states them.
    """

    network: EspMedSam
    fresh: set[Part]
    normalization: Normalization = field(default_factory=Normalization)
    template: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)


def student_config(recipe: Recipe) -> ModelConfig:
    """The student's configuration: the preset with the recipe's changes.

    Raises:
        UserError: unknown preset.
    """
    section = recipe.model
    config = model_config(section.preset, published=section.variant == "published")
    changes = {
        key: value
        for key in ("image_size", "image_sizes", "patch_layers", "bag_tokens", "bag_mlp_ratio")
        if (value := getattr(section, key)) is not None
    }
    encoder = config.encoder.model_copy(update={"drop_path_rate": section.drop_path})
    return ModelConfig.model_validate({**config.model_dump(), **changes, "encoder": encoder.model_dump()})


def start_student(recipe: Recipe, modalities: Iterable[str]) -> StudentStart:
    """The student that a recipe's ``init`` gives, with at least ``modalities``.

    Raises:
        UserError: the file is missing, of another preset, or needs converting first.
    """
    config = student_config(recipe)
    if recipe.init == SCRATCH:
        return StudentStart(EspMedSam(config, modalities), set(STUDENT_PREFIXES), provenance={"init": SCRATCH})
    path = Path(recipe.init)
    state, info, sha256 = _read(path)
    if info.complete:
        _require_same_function(info.config, config, path)
    network = EspMedSam(config, [*info.modalities, *(name for name in modalities if name not in info.targets)])
    template = {key: state.pop(key) for key in list(state) if key.startswith(f"{TEMPLATE}.")}
    own = network.state_dict()
    for key, value in state.items():
        if key not in own or own[key].shape != value.shape:
            raise UserError(
                f"{path} is not of preset '{config.preset}': {key} does not fit.",
                f"It says it is of '{info.config.preset}'; set model.preset to that, or give another file.",
            )
    network.load_state_dict({**own, **state})
    for name in network.modalities:
        if name not in info.targets:
            _start_modality(network.decoder, name, template)
    fresh = {part for part, prefix in STUDENT_PREFIXES.items() if not any(key.startswith(prefix) for key in state)}
    origin = {"init": path.name, "init_sha256": sha256}
    return StudentStart(network, fresh, info.normalization, template, origin, info.scales)


def start_new_modality(recipe: Recipe) -> StudentStart:
    """A complete checkpoint's network with one modality more, ``recipe.modality.name``.

    Raises:
        UserError: no name or no checkpoint given, the checkpoint is partial, or the name is taken.
    """
    name, like = recipe.modality.name, recipe.modality.like
    if name is None or recipe.init == SCRATCH:
        raise UserError(
            "a new modality needs a name and a checkpoint to add it to.",
            "espmedsam-edge train add-modality NAME DATA --init CHECKPOINT",
        )
    path = Path(recipe.init)
    state, info, sha256 = _read(path)
    if not info.complete:
        raise UserError(f"{path} is not a whole network.", "Train it first: espmedsam-edge train segment")
    template = {key: state.pop(key) for key in list(state) if key.startswith(f"{TEMPLATE}.")}
    size, sizes = recipe.model.image_size, recipe.model.image_sizes
    config = info.config if size is None else info.config.model_copy(update={"image_size": size})
    config = config.model_copy(update={"image_sizes": {**config.image_sizes, **sizes}})
    check_modalities(info.modalities, state, str(path))
    check_sizes(lambda: EspMedSam(config, info.modalities), state, str(path))
    network = EspMedSam(config, info.modalities)
    load_state(network, state, str(path))
    if like is not None:
        network.bag(like)  # raises with the nearest name
    network.add_modality(name, like=like)
    if like is None:
        _start_modality(network.decoder, name, template)
    origin = {"init": path.name, "init_sha256": sha256}
    return StudentStart(network, set(), info.normalization, template, origin, info.scales)


def start_teacher(recipe: Recipe, modalities: Iterable[str]) -> tuple[EspMedSamTeacher, set[Part], dict[str, str]]:
    """The teacher that a recipe describes: SAM's encoder and decoder where it names SAM's file, else random weights.

    Returns:
        The network, its fresh parts (the additions always are neutral, not fresh), and its provenance.

    Raises:
        UserError: the file is missing or of another size.
    """
    section = recipe.teacher
    config = teacher_config(section.preset).model_copy(
        update={"tokens": section.tokens, "mlp_ratio": section.mlp_ratio}
    )
    teacher = EspMedSamTeacher(config, student_config(recipe), modalities)
    if section.sam is None:
        return teacher, {"vit", "prompt", "decoder"}, {"sam": "none"}
    state, sha256 = read_hashed_foreign(section.sam)
    load_sam_encoder(teacher.encoder, state, str(section.sam))
    fresh: set[Part] = {"prompt", "decoder"}
    initial = decoder_initialisation(state)
    template = {key: initial.pop(key) for key in list(initial) if key.startswith(f"{TEMPLATE}.")}
    own = teacher.state_dict()
    if all(key in own and own[key].shape == value.shape for key, value in initial.items()):
        teacher.load_state_dict({**own, **initial})
        for name in teacher.modalities:
            _start_modality(teacher.decoder, name, template)
        fresh.discard("decoder")
    return teacher, fresh, {"sam": section.sam.name, "sam_sha256": sha256}


def trained_teacher(recipe: Recipe) -> tuple[EspMedSamTeacher, dict[str, str]]:
    """The teacher of the distillations, frozen, and the hashes of what it was read from.

    Raises:
        UserError: the recipe names none, or its files do not belong together.
    """
    section = recipe.teacher
    if section.checkpoint is None:
        raise UserError(
            "the recipe names no trained teacher (teacher.checkpoint).", "Train one: espmedsam-edge train teacher"
        )
    teacher, _, hashes = load_hashed_teacher(section.checkpoint, section.sam)
    return teacher, hashes


def sam_encoder(recipe: Recipe) -> tuple[EspMedSamTeacher, dict[str, str]]:
    """f_ViT-SAM for the first distillation: from SAM's file or, where the recipe names none, a trained teacher's; and
    the hashes of what it was read from.

    Raises:
        UserError: the recipe names neither.
    """
    if recipe.teacher.sam is None:
        if recipe.teacher.checkpoint is None:
            raise UserError("the recipe names no SAM checkpoint (teacher.sam).", "Give sam_vit_b.pth, _l or _h.")
        return trained_teacher(recipe)
    teacher, _, provenance = start_teacher(recipe, ())
    return teacher, {"sam_sha256": provenance["sam_sha256"]}


def _read(path: Path) -> tuple[dict[str, Tensor], CheckpointInfo, str]:
    """The tensors of what a run starts from, what they are, and the SHA-256 of the bytes they are from."""
    if path.suffix == ".safetensors":
        return read_hashed_checkpoint(path)
    state, sha256 = read_hashed_foreign(path)
    if is_published(state):
        raise UserError(f"{path} is a published checkpoint of one modality.", "First: espmedsam-edge import reference")
    if any(key.startswith("image_encoder.patch_embed.seq.") for key in state):
        return *import_mobilesam(state), sha256
    return *import_sam(state), sha256


def _start_modality(decoder: QueryDecoupledModalityDecoder, name: str, template: dict[str, Tensor]) -> None:
    """Copy SAM's mask token and hypernetwork MLP into a modality's query and MLP, as far as both have them."""
    query = template.get(f"{TEMPLATE}.query")
    prefix = f"{TEMPLATE}.hypernetwork."
    with torch.no_grad():
        if query is not None and name in decoder.queries and decoder.queries[name].shape == query.shape:
            decoder.queries[name].copy_(query)
    mlp = {key.removeprefix(prefix): value for key, value in template.items() if key.startswith(prefix)}
    if mlp:
        decoder.hypernetwork(name).load_state_dict(mlp)


def _require_same_function(theirs: ModelConfig, ours: ModelConfig, path: Path) -> None:
    before, now = _function(theirs), _function(ours)
    for key, value in now.items():
        if before[key] != value:
            raise UserError(
                f"{path} is of preset '{theirs.preset}' ({key} {before[key]}), the recipe asks for {value}.",
                "Set the recipe's [model] to the checkpoint's, or start from another.",
            )


def _function(config: ModelConfig) -> dict[str, object]:
    """What must agree for weights to mean the same; image size, drop path and the prompt's gradient may differ."""
    encoder = config.encoder.model_copy(update={"drop_path_rate": 0.0})
    values = config.model_copy(update={"encoder": encoder}).model_dump()
    return {
        key: value
        for key, value in values.items()
        if key not in ("preset", "image_size", "image_sizes", "prompt_gradient")
    }
