"""What a stage trains: which parameters get gradients, and which modules keep to inference behaviour."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from espmedsam_edge.errors import UserError
from espmedsam_edge.model.decoder import SHARED
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.model.teacher import PREFIXES, EspMedSamTeacher
from espmedsam_edge.training.recipe import Stage
from espmedsam_edge.training.sections import Part

Network = EspMedSam | EspMedSamTeacher

STUDENT_PREFIXES: dict[Part, str] = {
    "encoder": "encoder.",
    "controller": "controller.",
    "prompt": "prompt.",
    "decoder": "decoder.",
}
_OWN: Part = "modality"
"""The part that is not a prefix: what belongs to one modality alone, its bag, query and MLP."""
TEACHER_PREFIXES: dict[Part, str] = {
    "vit": PREFIXES["vit"],
    "additions": PREFIXES["additions"],
    "prompt": PREFIXES["prompt"],
    "decoder": PREFIXES["decoder"],
}
_OF_A_MODALITY = ("controller.", "decoder.queries.", "decoder.hypernetworks.")

_NAMED: dict[Stage, tuple[Part, ...]] = {
    "teacher": ("additions", "prompt", "decoder"),
    "distill-encoder": ("encoder",),
    "distill-controllers": ("controller",),
    "segment": ("prompt", "decoder"),
    "add-modality": (),
}


def default_parts(stage: Stage, fresh: Collection[str]) -> list[Part]:
    """The parts a stage trains: those it names, and in teacher and segment those that nothing was loaded for.

    Args:
        stage: teacher, distill-encoder, distill-controllers or segment.
        fresh: parts with random weights (all of them from scratch).
    """
    named = list(_NAMED[stage])
    prefixes = TEACHER_PREFIXES if stage == "teacher" else STUDENT_PREFIXES
    if stage in ("teacher", "segment"):
        return [part for part in prefixes if part in named or part in fresh]
    return named


def trainable_names(network: Network, parts: Iterable[Part], modalities: Collection[str]) -> set[str]:
    """The parameters of ``parts``; of what belongs to one modality, only that of ``modalities``.

    Raises:
        UserError: the network has no such part.
    """
    prefixes = TEACHER_PREFIXES if isinstance(network, EspMedSamTeacher) else STUDENT_PREFIXES
    parts = list(parts)
    for part in parts:
        if part not in {*prefixes, _OWN}:
            what = "teacher" if isinstance(network, EspMedSamTeacher) else "student"
            raise UserError(f"train: the {what} has no part '{part}'.", f"It has {', '.join([*prefixes, _OWN])}.")
    chosen = tuple(prefixes[part] for part in parts if part != _OWN)
    own = {name for modality in modalities for name in modality_names(network, modality)} if _OWN in parts else set()
    return own | {
        name
        for name, _ in network.named_parameters(remove_duplicate=False)
        if name.startswith(chosen) and _owner(name) in {None, *modalities}
    }


def modality_names(network: Network, modality: str) -> set[str]:
    """The parameters that belong to one modality: its bag, query and hypernetwork MLP."""
    return {name for name, _ in network.named_parameters(remove_duplicate=False) if _owner(name) == modality}


def select(network: nn.Module, names: Collection[str]) -> None:
    """Only the parameters named get gradients."""
    for name, parameter in network.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in names)


def set_training_mode(network: nn.Module, *, freeze_batch_norm: bool = False) -> None:
    """Training mode where something is trained, inference behaviour (running statistics, no drop path) elsewhere.

    Args:
        network: after ``select``.
        freeze_batch_norm: batch normalisation uses its running statistics everywhere, its weights still trained.
    """
    network.train()
    _eval_where_frozen(network)
    if freeze_batch_norm:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    encoder = getattr(network, "encoder", None)
    if isinstance(encoder, nn.Module) and getattr(encoder, "activation_checkpointing", False):
        encoder.training = True  # asked for by its checkpointing; its children keep their mode


def _eval_where_frozen(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _eval_where_frozen(child)


def _owner(name: str) -> str | None:
    for prefix in _OF_A_MODALITY:
        if name.startswith(prefix):
            owner = name.removeprefix(prefix).split(".")[0]
            return None if owner == SHARED else owner
    return None


def without_self_prompt(network: Network) -> None:
    """Table VI without SPPG: no patch is ever foreground, so the dense prompt is one learned vector everywhere.

    SAM's own "no mask" prompt is such a vector. The patch generator gives -1 for every image and is not to be trained.
    """
    last = network.prompt.patch_generator[-1]
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        last.weight.zero_()
        assert last.bias is not None
        last.bias.fill_(-1.0)


PATCH_GENERATOR = "prompt.patch_generator."


def share_decoding(network: Network) -> None:
    """Table VI without QDMD: every modality decodes with one query and one hypernetwork MLP, the first one's.

    The tie holds in training; a checkpoint holds the same values under every modality's name.

    Raises:
        UserError: the published variant, whose queries are rows of one table.
    """
    decoder = network.decoder
    if decoder.joint_queries is not None:
        raise UserError("ablation.qdmd=false needs model.variant=paper.", "The published variant has joint queries.")
    first = next(iter(decoder.queries))
    for name in decoder.queries:
        decoder.queries[name] = decoder.queries[first]
        if name in decoder.hypernetworks:
            decoder.hypernetworks[name] = decoder.hypernetworks[first]
