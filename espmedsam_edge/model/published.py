"""The authors' published single-modality checkpoints: names, sizes read from the shapes, and merging.

The code they come from accompanies arXiv 2407.14153; how it differs from the paper is in ``ModelConfig``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from espmedsam_edge.errors import UserError
from espmedsam_edge.modalities import published_query
from espmedsam_edge.model.config import PUBLISHED_QUERY_ROWS, EncoderConfig, ModelConfig, check_image_size
from espmedsam_edge.model.decoder import SHARED
from espmedsam_edge.model.encoder import rename_tinyvit

_BAG = re.compile(
    r"^layers\.(\d)\.blocks\.(\d+)\.(attn\.deep_QKV_embeddings_med|attn\.med_attention_biases|med_dah)(.*)$"
)
_BAG_NAMES = {"attn.deep_QKV_embeddings_med": "key", "attn.med_attention_biases": "bias", "med_dah": "mlp"}
_PARTS = (
    ("patch_decoder.", "prompt.patch_generator."),
    ("dense_prompter.", "prompt.dense_prompt."),
    ("mask_decoder.transformer.", "decoder.transformer."),
    ("mask_decoder.output_upscaling.", "decoder.upscaling."),
    ("mask_decoder.output_hypernetworks_mlps.0.", f"decoder.hypernetworks.{SHARED}."),
    ("prompt_encoder.pe_layer.", "decoder.positional_encoding."),
)
_IGNORED = (
    "prompt_encoder.",
    "mask_decoder.iou_",
    "mask_decoder.mask_tokens",
    "mask_decoder.output_hypernetworks_mlps.",
)


def strip_module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the ``module.`` that DataParallel puts before every key."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict looks like the authors' own."""
    return any(key.startswith("SemiTViT.") for key in strip_module(state))


def rename_published(state: Mapping[str, Tensor], modality: str) -> dict[str, Tensor]:
    """One published checkpoint in ``EspMedSam``'s names, its bag filed under ``modality``.

    Raises:
        UserError: a key that this layout does not have, or the modality has no published query.
    """
    if published_query(modality) is None:
        raise UserError(f"the published code has no query for '{modality}'.", "Name one of its six modalities.")
    encoder: dict[str, Tensor] = {}
    bag: list[tuple[tuple[int, int], str, Tensor]] = []
    renamed: dict[str, Tensor] = {}
    for key, value in strip_module(state).items():
        value = value.float() if value.is_floating_point() else value
        if key.startswith("SemiTViT."):
            key = key.removeprefix("SemiTViT.")
            if match := _BAG.match(key):
                block = (int(match[1]), int(match[2]))
                bag.append((block, _BAG_NAMES[match[3]] + match[4], value))
            else:
                encoder[key] = value
        elif key == "mask_query.weight":
            renamed["decoder.joint_queries"] = value
        else:
            for theirs, ours in _PARTS:
                if key.startswith(theirs):
                    renamed[ours + key.removeprefix(theirs)] = value
                    break
            else:
                if not key.startswith(_IGNORED):
                    raise UserError(f"unexpected key '{key}': not a published ESP-MedSAM checkpoint.")
    order = {block: index for index, block in enumerate(sorted({block for block, _, _ in bag}))}
    for block, name, value in bag:
        renamed[f"controller.{modality}.{order[block]}.{name}"] = value
    renamed.update({f"encoder.{key}": value for key, value in rename_tinyvit(encoder).items()})
    return renamed


def merge_published(states: Mapping[str, Mapping[str, Tensor]], sources: Mapping[str, str]) -> dict[str, Tensor]:
    """Merge single-modality checkpoints (modality -> published state) into one state of N bags.

    Everything outside the bags must agree to the bit: it serves every modality, so the merged model gives for each
    modality exactly what its own file gave.

    Args:
        states: modality -> published state dict.
        sources: modality -> file name, for the message.

    Raises:
        UserError: shared parts differ; names the keys.
    """
    merged: dict[str, Tensor] = {}
    first = next(iter(states))
    for modality, state in states.items():
        renamed = rename_published(state, modality)
        shared = {key: value for key, value in renamed.items() if not key.startswith("controller.")}
        if modality != first:
            ours = {key for key in merged if not key.startswith("controller.")}
            differing = sorted(ours ^ set(shared)) + sorted(
                key for key in ours & set(shared) if not torch.equal(merged[key], shared[key])
            )
            if differing:
                shown = ", ".join(differing[:4]) + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
                raise UserError(
                    f"{sources[first]} and {sources[modality]} do not share their network outside the bags: {shown}.",
                    "Import them into separate files, one run each.",
                )
        merged.update(renamed)
    return merged


def infer_config(state: Mapping[str, Tensor], preset: str | None = None, image_size: int | None = None) -> ModelConfig:
    """Sizes of a published network read off a renamed state's shapes.

    Raises:
        UserError: a key is missing, its shape fits no network of this family, or the image size fits none.
    """
    if image_size is not None:
        check_image_size(image_size)
    try:
        return _infer_config(state, preset, image_size)
    except (KeyError, StopIteration, ZeroDivisionError, IndexError) as error:
        raise UserError(
            f"the checkpoint is incomplete or of another architecture (missing: {error}).",
            "Give a whole checkpoint of the published code.",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "sizes"
        raise UserError(
            f"the checkpoint's shapes fit no network of this family ({where}: {first['msg']}).",
            "Give a whole checkpoint of the published code.",
        ) from error


def _infer_config(state: Mapping[str, Tensor], preset: str | None, image_size: int | None) -> ModelConfig:
    stem = state["encoder.patch_embed.conv2.conv.weight"].shape[0]
    dims, depths, heads, windows = [stem], [_count(state, "encoder.stem.blocks.")], [max(1, stem // 32)], [7]
    for index in range(3):
        prefix = f"encoder.stages.{index}."
        dims.append(state[prefix + "downsample.conv3.conv.weight"].shape[0])
        depths.append(_count(state, prefix + "blocks."))
        biases = state[prefix + "blocks.0.attn.attention_biases"]
        heads.append(biases.shape[0])
        windows.append(round(biases.shape[1] ** 0.5))
    first = "encoder.stages.0.blocks.0.mlp.fc1.weight"
    modality = next(key.split(".")[1] for key in state if key.startswith("controller."))
    bag = f"controller.{modality}.0."
    bag_hidden = state[bag + "mlp.fc1.weight"].shape[0]
    merging = [key for key in state if re.fullmatch(r"prompt\.patch_generator\.\d+\.weight", key)]
    config = ModelConfig(
        preset="espmedsam-s",
        encoder=EncoderConfig(
            dims=_four(dims),
            depths=_four(depths),
            heads=_four(heads),
            windows=_four(windows),
            mlp_ratio=state[first].shape[0] / dims[1],
        ),
        embed_dim=state["encoder.neck.0.weight"].shape[0],
        bag_tokens=state[bag + "key"].shape[1],
        bag_mlp_ratio=bag_hidden / dims[1],
        patch_layers=len(merging) // 2,
        patch_width=state["prompt.patch_generator.0.weight"].shape[0],
        decoder_depth=_count(state, "decoder.transformer.layers."),
        decoder_mlp=state["decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
    ).as_published()
    if state["decoder.joint_queries"].shape[0] != PUBLISHED_QUERY_ROWS:
        raise UserError("the checkpoint's mask_query does not have 7 rows.", "Give a checkpoint of the published code.")
    standard = ModelConfig(preset="espmedsam-s").as_published()
    name = preset or ("espmedsam-s" if config == standard else "custom")
    size = config.image_size if image_size is None else image_size
    return config.model_copy(update={"preset": name, "image_size": size})


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    indices = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    if not indices:
        raise KeyError(prefix)
    return len(indices)


def _four(values: list[int]) -> tuple[int, int, int, int]:
    one, two, three, four = values
    return one, two, three, four
