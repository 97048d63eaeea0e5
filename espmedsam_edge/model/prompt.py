"""SPPG, the self-patch prompt generator: patch logits, binary patch prompt, dense prompt embedding.

Paper: ESP-MedSAM, Section III-C, arXiv 2407.14153 (eq. 4 and 5).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from espmedsam_edge.model.config import ModelConfig


class SelfPatchPromptGenerator(nn.Module):
    """Predicts which patches of the image hold foreground and turns them into a dense prompt."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = config.patch_layers
        self.gradient = config.prompt_gradient
        widths = [config.embed_dim] + [config.patch_width] * config.patch_layers
        merging: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            merging += [nn.Conv2d(before, after, 2, stride=2), LayerNorm2d(after), nn.GELU()]
        self.patch_generator = nn.Sequential(*merging, nn.Conv2d(widths[-1], 1, 1))
        self.dense_prompt = nn.Sequential(nn.Conv2d(1, config.embed_dim, 1), LayerNorm2d(config.embed_dim), nn.GELU())

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Patch logits and the dense prompt of an image embedding.

        Args:
            embedding: E, (B, D, h, w).

        Returns:
            Patch logits (B, 1, h/2^L, w/2^L), before the sigmoid of eq. 4, and the dense prompt (B, D, h, w).
        """
        patch_logits: Tensor = self.patch_generator(embedding)
        return patch_logits, self.encode(self.binarise(patch_logits))

    def binarise(self, patch_logits: Tensor) -> Tensor:
        """The patch prompt: 1 where the probability is at least one half, else 0; its gradient as configured."""
        prompt = (patch_logits >= 0).to(patch_logits.dtype)
        if self.gradient == "straight-through" and torch.is_grad_enabled():
            probability = patch_logits.sigmoid()
            prompt = prompt + probability - probability.detach()
        return prompt

    def encode(self, prompt: Tensor) -> Tensor:
        """The dense prompt embedding (B, D, h, w) of a patch prompt (B, 1, h/2^L, w/2^L)."""
        upsampled = F.interpolate(prompt, scale_factor=float(2**self.layers), mode="nearest")
        return self.dense_prompt(upsampled)


def patch_target(mask: Tensor, patch_size: int) -> Tensor:
    """The SPPG's target p of eq. 5: 1 for each patch with any foreground. (B, 1, S, S) -> (B, 1, S/patch, S/patch)."""
    return F.max_pool2d(mask, patch_size)
