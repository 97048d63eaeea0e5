"""The pieces that exact fusion is made of: constants, BatchNorm and LayerNorm folded into their neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.models.tiny_vit import ConvNorm, MBConv, PatchEmbed, PatchMerging
from torch import Tensor, nn


class Constant(nn.Module):
    """Base of fused modules: ``keep`` registers a detached copy as a buffer."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Buffers and submodules are made by name; torch's own type for them is a union nothing accepts."""

    def keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.detach().clone().contiguous())


class FoldedConvolution(Constant):
    """A convolution and the BatchNorm after it (with its running statistics) as one convolution with a bias."""

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        conv: Any = layer.conv
        norm: Any = layer.bn
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        self.keep("weight", conv.weight * scale[:, None, None, None])
        self.keep("bias", norm.bias - norm.running_mean * scale)
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


def fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """A LayerNorm's scale and shift folded into the Linear after it: weight (out, in) and bias of LN-without-affine."""
    assert linear.bias is not None
    weight = linear.weight * norm.weight
    return weight, linear.bias + linear.weight @ norm.bias


class FusedConvolutions(nn.Module):
    """PatchEmbed, MBConv or PatchMerging with BatchNorm folded; (B, C, H, W) in and out."""

    def __init__(self, module: PatchEmbed | MBConv | PatchMerging) -> None:
        super().__init__()
        layers = [module.conv1, module.conv2] + ([] if isinstance(module, PatchEmbed) else [module.conv3])
        self.convolutions = nn.ModuleList(FoldedConvolution(layer) for layer in layers)
        self.residual = isinstance(module, MBConv)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x if index == 0 else F.gelu(x))
        return F.gelu(x + shortcut) if self.residual else x


class ChannelsLastNorm(Constant):
    """SAM's LayerNorm2d on channels-last pixels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        parameters: Any = norm  # LayerNorm2d: weight, bias, eps
        self.keep("weight", parameters.weight)
        self.keep("bias", parameters.bias)
        self.eps = float(parameters.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
