"""LIE and one controller bag as one network without a trace of either: windows, tokens and MLPs fused exactly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espmedsam_edge.export.fused_layers import (
    ChannelsLastNorm,
    Constant,
    FoldedConvolution,
    FusedConvolutions,
    fold_layer_norm,
)
from espmedsam_edge.model.controller import BlockBag
from espmedsam_edge.model.encoder import ControlledBlock, LightweightImageEncoder


class FusedMlp(Constant):
    """LIE's MLP and the bag's as one (eq. 3): normalise once, d -> both hidden widths, GELU, back to d."""

    def __init__(self, mlp: Any, bag: Any) -> None:
        super().__init__()
        parts = [mlp] if bag is None else [mlp, bag]
        folded = [fold_layer_norm(part.norm, part.fc1) for part in parts]
        self.eps = mlp.norm.eps
        self.keep("up", torch.cat([weight for weight, _ in folded]).T)
        self.keep("up_bias", torch.cat([bias for _, bias in folded]))
        self.keep("down", torch.cat([part.fc2.weight for part in parts], dim=1).T)
        self.keep("down_bias", torch.stack([part.fc2.bias for part in parts]).sum(0))
        self.dim = mlp.norm.normalized_shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), the residual not yet added."""
        x = F.layer_norm(x, self.dim, eps=self.eps)
        return F.gelu(x @ self.up + self.up_bias) @ self.down + self.down_bias


class FusedWindowAttention(Constant):
    """Window attention with the bag's tokens as constants (eq. 2), on a (B, H, W, C) map of known size.

    The keys, values and queries of zero padding are the projection's bias, so padding comes after the projection and
    before its bias: no product is computed for a padded pixel.
    """

    def __init__(self, block: ControlledBlock, bag: BlockBag | None, batch: int, size: int) -> None:
        super().__init__()
        attention: Any = block.attn
        self.heads, self.head_dim, self.window = attention.num_heads, attention.key_dim, block.window_size
        self.batch, self.size, self.pad = batch, size, -size % block.window_size
        self.dim, self.eps = attention.norm.normalized_shape, attention.norm.eps
        weight, bias = fold_layer_norm(attention.norm, attention.qkv)
        # timm keeps q, k and v side by side within a head; here all heads of q (scaled) come first, then k, then v.
        factor = torch.tensor([attention.scale, 1, 1], dtype=weight.dtype).view(3, 1, 1)
        weight = weight.view(self.heads, 3, self.head_dim, -1).transpose(0, 1) * factor[..., None]
        bias = bias.view(self.heads, 3, self.head_dim).transpose(0, 1) * factor
        self.keep("qkv", weight.reshape(3 * self.dim[0], -1).T)
        self.keep("qkv_bias", bias.reshape(-1))
        self.keep("proj", attention.proj.weight.T)
        self.keep("proj_bias", attention.proj.bias)
        position = attention.attention_biases[:, attention.attention_bias_idxs]  # (heads, N, N)
        self.windows = batch * ((size + self.pad) // self.window) ** 2
        self.has_bag = bag is not None
        if bag is not None:
            position = torch.cat([position, bag.bias.expand(self.heads, position.shape[1], -1)], dim=2)
            self.keep("keys", bag.keys.expand(self.windows, -1, -1, -1))
            self.keep("values", bag.values.expand(self.windows, -1, -1, -1))
        self.keep("position", position)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), the residual not yet added."""
        channels, window, size, padded = self.dim[0], self.window, self.size, self.size + self.pad
        qkv = F.layer_norm(x, self.dim, eps=self.eps) @ self.qkv
        if self.pad:
            qkv = F.pad(qkv, (0, 0, 0, self.pad, 0, self.pad))
        q, k, v = (self.to_windows(part) for part in (qkv + self.qkv_bias).split(channels, dim=3))
        if self.has_bag:
            k, v = torch.cat([k, self.keys], dim=2), torch.cat([v, self.values], dim=2)
        weights = torch.softmax(q @ k.transpose(2, 3) + self.position, dim=3)
        x = (weights @ v).view(-1, padded // window, self.heads, window, window, self.head_dim)
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(self.batch, padded, padded, channels)
        if self.pad:
            x = x[:, :size, :size]
        return x @ self.proj + self.proj_bias

    def to_windows(self, x: Tensor) -> Tensor:
        """(B, padded, padded, C) -> (windows, heads, window², d)."""
        side = x.shape[1] // self.window
        x = x.view(-1, self.window, side, self.window, self.heads, self.head_dim).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(self.windows, self.heads, self.window**2, self.head_dim)


class FusedBlock(nn.Module):
    """One attention block with its bag."""

    def __init__(self, block: ControlledBlock, bag: BlockBag | None, batch: int, size: int) -> None:
        super().__init__()
        self.attention = FusedWindowAttention(block, bag, batch, size)
        self.local_conv = FoldedConvolution(block.local_conv)
        self.mlp = FusedMlp(block.mlp, None if bag is None else bag.mlp)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.attention(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)


class FusedEncoder(Constant):
    """LIE with one bag (or none): (B, 3, S, S) -> (B, S/16, S/16, D), channels last."""

    def __init__(
        self, encoder: LightweightImageEncoder, bag: nn.ModuleList | None, batch: int, image_size: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*(FusedConvolutions(m) for m in [encoder.patch_embed, *encoder.stem.blocks]))
        self.downsamples, self.stages = nn.ModuleList(), nn.ModuleList()
        stages: list[Any] = list(encoder.stages)
        parts: list[Any] = list(bag) if bag is not None else [None] * sum(len(s.blocks) for s in stages)
        size = image_size // 4
        for stage in stages:
            size //= stage.downsample.conv2.conv.stride[0]
            self.downsamples.append(FusedConvolutions(stage.downsample))
            blocks = [
                FusedBlock(block, parts.pop(0) if bag is not None else None, batch, size) for block in stage.blocks
            ]
            self.stages.append(nn.Sequential(*blocks))
        reduce, first, smooth, second = encoder.neck
        assert isinstance(reduce, nn.Conv2d)
        assert isinstance(smooth, nn.Conv2d)
        self.keep("reduce", reduce.weight[:, :, 0, 0].T)
        self.first, self.second = ChannelsLastNorm(first), ChannelsLastNorm(second)
        self.smooth = smooth

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for downsample, stage in zip(self.downsamples, self.stages, strict=True):
            x = stage(downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.first(x.permute(0, 2, 3, 1) @ self.reduce)
        x = self.smooth(x.permute(0, 3, 1, 2))
        return self.second(x.permute(0, 2, 3, 1))
