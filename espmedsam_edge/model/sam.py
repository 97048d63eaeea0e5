"""What MobileSAM's and SAM's checkpoints give this model: an encoder, a decoder, a template for new modalities."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from espmedsam_edge.errors import UserError
from espmedsam_edge.model.checkpoint import TEMPLATE, CheckpointInfo, load_state
from espmedsam_edge.model.config import ModelConfig, model_config
from espmedsam_edge.model.decoder import QueryDecoupledModalityDecoder
from espmedsam_edge.model.encoder import LightweightImageEncoder, rename_tinyvit

_DECODER = (
    ("mask_decoder.transformer.", "decoder.transformer."),
    ("mask_decoder.output_upscaling.", "decoder.upscaling."),
    ("prompt_encoder.pe_layer.", "decoder.positional_encoding."),
    ("mask_decoder.output_hypernetworks_mlps.0.", f"{TEMPLATE}.hypernetwork."),
)


def decoder_initialisation(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAM's mask decoder in this model's names; its first mask token and MLP become the template of a modality.

    Raises:
        UserError: the state has no SAM mask decoder.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for theirs, ours in _DECODER:
            if key.startswith(theirs):
                renamed[ours + key.removeprefix(theirs)] = value.float()
    tokens = state.get("mask_decoder.mask_tokens.weight")
    if tokens is None or not renamed:
        raise UserError("the file has no SAM mask decoder (mask_decoder.*).", "Give sam_vit_*.pth or mobile_sam.pt.")
    renamed[f"{TEMPLATE}.query"] = tokens[:1].float()
    return renamed


def import_sam(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """SAM's ``sam_vit_*.pth``: a decoder initialisation (the teacher reads the image encoder from the same file)."""
    config = model_config("espmedsam-s")
    renamed = decoder_initialisation(state)
    _check(config, renamed)
    return renamed, CheckpointInfo(config=config, origin="imported", parts=["decoder", TEMPLATE])


def import_mobilesam(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """MobileSAM's ``mobile_sam.pt``: a distilled LIE and a decoder initialisation.

    Raises:
        UserError: it has no TinyViT encoder (``image_encoder.*``) of MobileSAM's size.
    """
    config = model_config("espmedsam-s")
    encoder = {
        key.removeprefix("image_encoder."): value.float() if value.is_floating_point() else value
        for key, value in state.items()
        if key.startswith("image_encoder.")
    }
    if not any(key.startswith("patch_embed.seq.") for key in encoder):
        raise UserError("the file has no TinyViT image encoder.", "Give mobile_sam.pt; for SAM's own use: import sam")
    renamed = decoder_initialisation(state)
    renamed.update({f"encoder.{key}": value for key, value in rename_tinyvit(encoder).items()})
    _check(config, renamed)
    return renamed, CheckpointInfo(config=config, origin="imported", parts=["encoder", "decoder", TEMPLATE])


def _check(config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Each part must fit this model exactly, or the file is of another size."""
    decoder = QueryDecoupledModalityDecoder(config)
    load_state(decoder, _part(state, "decoder."), "the decoder")
    load_state(decoder.new_hypernetwork(), _part(state, f"{TEMPLATE}.hypernetwork."), "the hypernetwork MLP")
    if encoder := _part(state, "encoder."):
        load_state(LightweightImageEncoder(config), encoder, "the image encoder")


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
