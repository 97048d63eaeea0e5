"""LIE, the lightweight image encoder: TinyViT at stride 16 with SAM's neck, driven by a controller bag.

TinyViT: https://arxiv.org/abs/2207.10666 (blocks from timm). MobileSAM's layout, whose last merging keeps
its stride at 1: https://arxiv.org/abs/2306.14289. The bag: ESP-MedSAM eq. 2 and 3, arXiv 2407.14153.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import Attention, ConvLayer, PatchEmbed, PatchMerging, TinyVitBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.model.controller import BlockBag, ControllerBag


class ControlledAttention(Attention):
    """TinyViT's window attention with a bag's tokens joined to keys and values (eq. 2)."""

    def forward(self, x: Tensor, bag: BlockBag | None = None) -> Tensor:
        """(windows, N, C) -> (windows, N, C), N pixels a window."""
        windows, pixels, _ = x.shape
        bias = self.get_attention_biases(x.device)  # (heads, N, N)
        qkv = self.qkv(self.norm(x)).view(windows, pixels, self.num_heads, 3 * self.key_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.split(self.key_dim, dim=3))  # (windows, heads, N, d)
        if bag is not None:
            tokens = bag.keys.shape[1]
            k = torch.cat([k, bag.keys.to(k.dtype).expand(windows, -1, -1, -1)], dim=2)
            v = torch.cat([v, bag.values.to(v.dtype).expand(windows, -1, -1, -1)], dim=2)
            bias = torch.cat([bias, bag.bias.expand(self.num_heads, pixels, tokens)], dim=2)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(x.transpose(1, 2).reshape(windows, pixels, self.out_dim))


class ControlledBlock(TinyVitBlock):
    """TinyViT's block (window attention, local convolution, MLP) with a bag beside attention and MLP."""

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__(dim, heads, window, mlp_ratio, drop_path=drop_path)
        self.attn = ControlledAttention(dim, dim // heads, heads, attn_ratio=1, resolution=(window, window))

    def forward(self, x: Tensor, bag: BlockBag | None = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        height, width = x.shape[1:3]
        windows, padded = partition(x, self.window_size)
        attended = merge(self.attn(windows, bag), self.window_size, padded)[:, :height, :width]
        x = x + self.drop_path1(attended)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        update = self.mlp(x) if bag is None else self.mlp(x) + bag.mlp(x)  # eq. 3
        return x + self.drop_path2(update)


def partition(x: Tensor, window: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Cut (B, H, W, C), zero-padded to whole windows, into (B·windows, window², C); also (B, padded H, padded W)."""
    batch, height, width, channels = x.shape
    pad_h, pad_w = -height % window, -width % window
    x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (height + pad_h) // window, (width + pad_w) // window
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return x.reshape(-1, window * window, channels), (batch, rows * window, columns * window)


def merge(x: Tensor, window: int, padded: tuple[int, int, int]) -> Tensor:
    """The inverse of ``partition``, padding still on: (B, padded H, padded W, C)."""
    batch, height, width = padded
    x = x.view(batch, height // window, width // window, window, window, -1).transpose(2, 3)
    return x.reshape(batch, height, width, -1)


class Stage(nn.Module):
    """Patch merging, then controlled blocks."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        heads: int,
        window: int,
        mlp_ratio: float,
        stride: int,
        drop: list[float],
    ) -> None:
        super().__init__()
        self.downsample = PatchMerging(dim, out_dim, nn.GELU)
        self.downsample.conv2.conv.stride = (stride, stride)
        self.blocks = nn.ModuleList(ControlledBlock(out_dim, heads, window, mlp_ratio, rate) for rate in drop)


class LightweightImageEncoder(nn.Module):
    """Image to embedding: (B, 3, S, S) normalised RGB -> (B, D, S/16, S/16).

    ``activation_checkpointing`` trades time for memory in training: block activations are computed again backwards.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        encoder = config.encoder
        dims, depths = encoder.dims, encoder.depths
        total = sum(depths)
        drop = [encoder.drop_path_rate * index / max(1, total - 1) for index in range(total)]
        self.activation_checkpointing = False
        self.patch_embed = PatchEmbed(3, dims[0], nn.GELU)
        self.stem = ConvLayer(dims[0], depths[0], nn.GELU, drop[: depths[0]])
        self.stages = nn.ModuleList()
        for index in (1, 2, 3):
            start = sum(depths[:index])
            self.stages.append(
                Stage(
                    dims[index - 1],
                    dims[index],
                    encoder.heads[index],
                    encoder.windows[index],
                    encoder.mlp_ratio,
                    1 if index == 3 else 2,
                    drop[start : start + depths[index]],
                )
            )
        self.neck = nn.Sequential(
            nn.Conv2d(dims[3], config.embed_dim, 1, bias=False),
            LayerNorm2d(config.embed_dim),
            nn.Conv2d(config.embed_dim, config.embed_dim, 3, padding=1, bias=False),
            LayerNorm2d(config.embed_dim),
        )
        self.apply(_initialise)

    def forward(self, image: Tensor, bag: ControllerBag | None = None) -> Tensor:
        """(B, 3, S, S) -> (B, D, S/16, S/16); without a bag it is the plain TinyViT of MobileSAM."""
        x = self.patch_embed(image)
        x = self._run(self.stem, x)
        parts = iter(bag) if bag is not None else None
        for stage in self.stages:
            assert isinstance(stage, Stage)
            x = self._run(stage.downsample, x).permute(0, 2, 3, 1)  # (B, H, W, C)
            for block in stage.blocks:
                x = self._run(block, x, next(parts) if parts is not None else None)
            x = x.permute(0, 3, 1, 2)
        return self.neck(x)

    def _run(self, module: nn.Module, x: Tensor, *more: nn.Module | None) -> Tensor:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(module, x, *more, use_reentrant=False)
        return module(x, *more)


def _initialise(module: nn.Module) -> None:
    """TinyViT's own initialisation: truncated normal for Linear; convolutions as torch does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# MobileSAM's and the published ESP-MedSAM's names of the same layers.
_FOREIGN = [
    (re.compile(r"^patch_embed\.seq\.0\.(c|bn)\."), r"patch_embed.conv1.\1."),
    (re.compile(r"^patch_embed\.seq\.2\.(c|bn)\."), r"patch_embed.conv2.\1."),
    (re.compile(r"^layers\.0\.blocks\.(\d+)\.(conv\d)\.(c|bn)\."), r"stem.blocks.\1.\2.\3."),
    (re.compile(r"^layers\.0\.downsample\.(conv\d)\.(c|bn)\."), r"stages.0.downsample.\1.\2."),
    (re.compile(r"^layers\.1\.downsample\.(conv\d)\.(c|bn)\."), r"stages.1.downsample.\1.\2."),
    (re.compile(r"^layers\.2\.downsample\.(conv\d)\.(c|bn)\."), r"stages.2.downsample.\1.\2."),
    (re.compile(r"^layers\.1\.blocks\."), "stages.0.blocks."),
    (re.compile(r"^layers\.2\.blocks\."), "stages.1.blocks."),
    (re.compile(r"^layers\.3\.blocks\."), "stages.2.blocks."),
    (re.compile(r"\.local_conv\.c\."), ".local_conv.conv."),
]
# A classifier head that nothing uses, and index tables that are computed here.
_UNUSED = re.compile(r"^(head|norm_head)\.|\.attention_bias_idxs$|\.attn\.ab$")


def rename_tinyvit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MobileSAM's TinyViT state in this encoder's names, the unused classifier head left out."""
    renamed = {}
    for key, value in state.items():
        if _UNUSED.search(key):
            continue
        for pattern, replacement in _FOREIGN:
            key = pattern.sub(replacement, key)
        key = re.sub(r"\.(conv\d)\.c\.", r".\1.conv.", key)
        renamed[key] = value
    return renamed
