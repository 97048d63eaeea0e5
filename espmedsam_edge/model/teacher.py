"""ESP-MedSAM-T: SAM's image encoder, frozen, with trained key/value tokens and a parallel MLP in every block.

Paper: ESP-MedSAM, Section III-B.1, arXiv 2407.14153. The encoder is segment-anything's own (https://github.com/facebookresearch/segment-anything),
under its own names, so a SAM checkpoint loads without renaming; SPPG and QDMD are the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, get_rel_pos, window_partition, window_unpartition
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.model.config import Heads, ModelConfig, Ratio, Tokens, Width
from espmedsam_edge.model.controller import BlockBag
from espmedsam_edge.model.decoder import QueryDecoupledModalityDecoder
from espmedsam_edge.model.esp_medsam import ModelOutput
from espmedsam_edge.model.prompt import SelfPatchPromptGenerator

PATCH = 16


class TeacherConfig(BaseModel, extra="forbid", frozen=True):
    """The sizes of a SAM image encoder and of what is trained beside it.

    Attributes:
        dim, depth, heads: of the ViT.
        global_blocks: which blocks attend over the whole image; the others over windows.
        window: side of a window in patches.
        position_grid: side, in patches, of the stored absolute positions (64: trained at 1024 x 1024).
        embed_dim: channels of the embedding behind the neck.
        tokens: extra keys and values a head in every block.
        mlp_ratio: hidden width of the parallel MLP over ``dim``. The paper gives no number; a quarter keeps the
            additions at 4 % of ViT-B.
    """

    preset: str
    dim: Width
    depth: Annotated[int, Field(ge=1, le=128)]
    heads: Heads
    global_blocks: Annotated[tuple[int, ...], Field(max_length=128)]
    window: Annotated[int, Field(ge=1, le=64)] = 14
    position_grid: Annotated[int, Field(ge=1, le=512)] = 64
    embed_dim: Width = 256
    tokens: Tokens = 1
    mlp_ratio: Ratio = 0.25


def _vit_b() -> TeacherConfig:
    return TeacherConfig(preset="vit_b", dim=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11))


def _vit_l() -> TeacherConfig:
    return TeacherConfig(preset="vit_l", dim=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))


def _vit_h() -> TeacherConfig:
    return TeacherConfig(preset="vit_h", dim=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31))


def _vit_tiny() -> TeacherConfig:
    """Four narrow blocks for tests and smoke runs; its embedding fits espmedsam-tiny."""
    return TeacherConfig(
        preset="vit_tiny", dim=64, depth=4, heads=2, global_blocks=(1, 3), window=5, position_grid=16, embed_dim=64
    )


_PRESETS: dict[str, Callable[[], TeacherConfig]] = {
    "vit_b": _vit_b,
    "vit_l": _vit_l,
    "vit_h": _vit_h,
    "vit_tiny": _vit_tiny,
}


def teacher_config(preset: str) -> TeacherConfig:
    """The sizes of a teacher.

    Raises:
        UserError: unknown preset; names the nearest.
    """
    if preset not in _PRESETS:
        raise UserError(f"unknown teacher '{preset}'.", nearest(preset, _PRESETS))
    return _PRESETS[preset]()


class TeacherEncoder(nn.Module):
    """SAM's image encoder (``vit``) and the additions beside its blocks: (B, 3, S, S) -> (B, D, S/16, S/16).

    One set of additions serves every modality: the paper fine-tunes one f_ViT-Med on all of them; only its
    queries and hypernetwork MLPs, on top, are a modality's own. Relative positions belong to pixels: the tokens have
    none, only a bias of their own. Absolute and relative positions are interpolated for other sizes than SAM's.
    """

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.vit = ImageEncoderViT(
            img_size=PATCH * config.position_grid,
            patch_size=PATCH,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=4.0,
            out_chans=config.embed_dim,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window,
            global_attn_indexes=config.global_blocks,
        )
        for value in (self.vit.pos_embed, *(p for name, p in self.vit.named_parameters() if ".rel_pos_" in name)):
            nn.init.trunc_normal_(value, std=0.02)  # zero in segment-anything, which only ever loads them
        self.additions = nn.ModuleList(
            BlockBag(config.dim, config.heads, config.tokens, config.mlp_ratio, shared_kv=False)
            for _ in range(config.depth)
        )

    def forward(self, images: Tensor, medical: bool = True) -> Tensor:
        """f_ViT-Med's features, or f_ViT-SAM's (``medical=False``: without the additions, SAM's own)."""
        x = self.vit.patch_embed(images)  # (B, H, W, C)
        x = x + self._positions(x.shape[1], x.shape[2]).to(x.dtype)
        for block, addition in zip(self.vit.blocks, self.additions, strict=True):
            assert isinstance(addition, BlockBag)
            used = addition if medical else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(_block, x, block, used, use_reentrant=False)
            else:
                x = _block(x, block, used)
        return self.vit.neck(x.permute(0, 3, 1, 2))

    def _positions(self, height: int, width: int) -> Tensor:
        stored: Tensor = self.vit.pos_embed  # (1, grid, grid, C)
        if stored.shape[1:3] == (height, width):
            return stored
        resized = F.interpolate(stored.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1)


def _block(x: Tensor, block: Block, addition: BlockBag | None) -> Tensor:
    """segment-anything's block with tokens in the attention and an MLP beside its MLP; (B, H, W, C) -> same."""
    height, width = x.shape[1:3]
    y = block.norm1(x)
    if block.window_size > 0:
        y, padded = window_partition(y, block.window_size)
        y = _attention(y, block.attn, addition)
        y = window_unpartition(y, block.window_size, padded, (height, width))
    else:
        y = _attention(y, block.attn, addition)
    x = x + y
    update: Tensor = block.mlp(block.norm2(x))
    if addition is not None:
        update = update + addition.mlp(x)
    return x + update


def _attention(x: Tensor, attention: Attention, addition: BlockBag | None) -> Tensor:
    """Multi-head attention with decomposed relative positions, eq. 2's tokens joined to keys and values."""
    windows, height, width, _ = x.shape
    pixels, heads = height * width, attention.num_heads
    q, k, v = attention.qkv(x).reshape(windows, pixels, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (windows, heads, N, d)
    rows = get_rel_pos(height, height, attention.rel_pos_h).to(q.dtype)
    columns = get_rel_pos(width, width, attention.rel_pos_w).to(q.dtype)
    grid = q.reshape(windows, heads, height, width, -1)
    bias = (
        torch.einsum("bnhwc,hkc->bnhwk", grid, rows)[..., :, None]
        + torch.einsum("bnhwc,wkc->bnhwk", grid, columns)[..., None, :]
    ).reshape(windows, heads, pixels, pixels)
    if addition is not None:
        k = torch.cat([k, addition.keys.to(k.dtype).expand(windows, -1, -1, -1)], dim=2)
        v = torch.cat([v, addition.values.to(v.dtype).expand(windows, -1, -1, -1)], dim=2)
        tokens = addition.bias.to(bias.dtype).expand(windows, heads, pixels, -1)
        bias = torch.cat([bias, tokens], dim=3)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    y = y.transpose(1, 2).reshape(windows, height, width, -1)
    return attention.proj(y)


class EspMedSamTeacher(nn.Module):
    """ESP-MedSAM-T. ``teacher(images, "fundus")`` decodes one modality a call, as the student does.

    Args:
        config: the image encoder and its additions.
        heads: what SPPG and QDMD are built from; its ``embed_dim`` must be the teacher's.
        modalities: names, each with its own query and MLP.
    """

    def __init__(self, config: TeacherConfig, heads: ModelConfig, modalities: Iterable[str] = ()) -> None:
        super().__init__()
        if heads.embed_dim != config.embed_dim:
            raise UserError(
                f"teacher '{config.preset}' gives {config.embed_dim} channels, preset '{heads.preset}' wants "
                f"{heads.embed_dim}.",
                "Use vit_b, vit_l or vit_h with espmedsam-s, vit_tiny with espmedsam-tiny.",
            )
        self.config = config
        self.heads = heads
        self.encoder = TeacherEncoder(config)
        self.prompt = SelfPatchPromptGenerator(heads)
        self.decoder = QueryDecoupledModalityDecoder(heads)
        self._modalities = list(modalities)
        for name in self._modalities:
            self.decoder.add_modality(name)

    @property
    def modalities(self) -> list[str]:
        """Names in the order they were added."""
        return list(self._modalities)

    def forward(self, images: Tensor, modality: str) -> ModelOutput:
        """Segment a batch of one modality: (B, 3, S, S) normalised RGB, S a multiple of 64.

        Raises:
            UserError: the teacher has no such modality.
        """
        if modality not in self._modalities:
            raise UserError(f"the teacher has no modality '{modality}'.", nearest(modality, self._modalities))
        embedding = self.encoder(images)
        patch_logits, dense_prompt = self.prompt(embedding)
        return ModelOutput(self.decoder(embedding + dense_prompt, modality), patch_logits, embedding)


def load_sam_encoder(encoder: TeacherEncoder, state: Mapping[str, Tensor], where: str) -> None:
    """Load ``image_encoder.*`` of a SAM checkpoint (``sam_vit_*.pth``) into the teacher's ``vit``.

    Raises:
        UserError: the state has no SAM image encoder, or one of another size; names the size.
    """
    prefix = "image_encoder."
    vit = {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}
    if "pos_embed" not in vit:
        raise UserError(f"{where} has no SAM image encoder (image_encoder.pos_embed).", "Give sam_vit_b.pth, _l or _h.")
    expected = {key: value.shape for key, value in encoder.vit.state_dict().items()}
    if expected != {key: value.shape for key, value in vit.items()}:
        dim = vit["pos_embed"].shape[-1]
        found = next((name for name in _PRESETS if _PRESETS[name]().dim == dim), f"one of width {dim}")
        raise UserError(
            f"{where} is another image encoder ({found}) than '{encoder.config.preset}'.",
            f"Set teacher.preset={found}." if found in _PRESETS and found != encoder.config.preset else "",
        )
    encoder.vit.load_state_dict(vit)


TeacherPart = Literal["vit", "additions", "prompt", "decoder"]
"""What a teacher consists of: SAM's own encoder, the additions, SPPG, QDMD."""

PREFIXES: dict[TeacherPart, str] = {
    "vit": "encoder.vit.",
    "additions": "encoder.additions.",
    "prompt": "prompt.",
    "decoder": "decoder.",
}
