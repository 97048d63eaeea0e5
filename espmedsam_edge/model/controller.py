"""Controller bags: what one modality adds to every attention block of the encoder.

Paper: ESP-MedSAM, Section III-B.3, arXiv 2407.14153 (eq. 2 and 3).
"""

from __future__ import annotations

import torch
from timm.models.tiny_vit import NormMlp
from torch import Tensor, nn

from espmedsam_edge.model.config import ModelConfig


class BlockBag(nn.Module):
    """One block's share of a bag: T key/value tokens a head with their bias, and a parallel MLP.

    A new bag leaves the encoder almost as it was: its MLP adds nothing and its values are zero.
    """

    def __init__(self, dim: int, heads: int, tokens: int, mlp_ratio: float, shared_kv: bool) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(heads, tokens, dim // heads))
        self.value = None if shared_kv else nn.Parameter(torch.zeros(heads, tokens, dim // heads))
        self.bias = nn.Parameter(torch.zeros(tokens))  # joins the attention bias, the same for all heads
        self.mlp = NormMlp(dim, int(dim * mlp_ratio))
        nn.init.normal_(self.key, std=0.02)
        nn.init.zeros_(self.mlp.fc2.weight)
        nn.init.zeros_(self.mlp.fc2.bias)

    @property
    def keys(self) -> Tensor:
        """W_k of eq. 2, (heads, T, head size)."""
        return self.key

    @property
    def values(self) -> Tensor:
        """W_v of eq. 2, (heads, T, head size); the key token itself where the published code shares it."""
        return self.key if self.value is None else self.value


class ControllerBag(nn.ModuleList):
    """A modality's parameters inside the encoder: a ``BlockBag`` for every attention block, in order."""

    def __init__(self, config: ModelConfig) -> None:
        encoder = config.encoder
        super().__init__(
            BlockBag(dim, heads, config.bag_tokens, config.bag_mlp_ratio, config.shared_kv_token)
            for dim, heads, depth in list(zip(encoder.dims, encoder.heads, encoder.depths, strict=True))[1:]
            for _ in range(depth)
        )
