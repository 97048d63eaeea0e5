"""QDMD, the query-decoupled modality decoder: SAM's two-way transformer with one query and one MLP a modality.

Paper: ESP-MedSAM, Section III-D, arXiv 2407.14153 (eq. 6 and 7). Transformer, MLP and positional encoding are
segment-anything's.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from segment_anything.modeling.transformer import TwoWayTransformer
from torch import Tensor, nn

from espmedsam_edge.modalities import published_query
from espmedsam_edge.model.config import PUBLISHED_QUERY_ROWS, ModelConfig

SHARED = "shared"  # the name of the one hypernetwork MLP where it serves every modality


class PositionalEncoding(PositionEmbeddingRandom):  # type: ignore[misc]  # untyped package
    """SAM's random Fourier features of pixel positions, in the precision of its matrix but never under float32."""

    def forward(self, size: tuple[int, int]) -> Tensor:
        """(D, h, w) for a map of ``size`` = (h, w)."""
        matrix: Tensor = self.positional_encoding_gaussian_matrix
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        rows, columns = ((torch.arange(n, dtype=dtype, device=matrix.device) + 0.5) / n * 2 - 1 for n in size)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (h, w, 2): x, y
        angles = 2 * torch.pi * (grid @ matrix.to(dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)


class QueryDecoupledModalityDecoder(nn.Module):
    """Embedding and prompt to low-resolution logits of one modality."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.transformer = TwoWayTransformer(config.decoder_depth, dim, config.decoder_heads, config.decoder_mlp)
        self.positional_encoding = PositionalEncoding(dim // 2)
        self.upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            nn.GELU(),
        )
        self.queries = nn.ParameterDict()  # modality -> (1, D)
        self.joint_queries = nn.Parameter(torch.randn(PUBLISHED_QUERY_ROWS, dim)) if config.joint_queries else None
        self.hypernetworks = nn.ModuleDict()
        if config.shared_hypernetwork:
            self.hypernetworks[SHARED] = self.new_hypernetwork()

    def new_hypernetwork(self) -> MLP:
        """The MLP of eq. 7: a query (D) to the weights of a 1x1 convolution (D/8)."""
        return MLP(self.config.embed_dim, self.config.embed_dim, self.config.embed_dim // 8, 3)

    def add_modality(self, name: str) -> None:
        """Give a modality its query and, unless one serves all, its MLP."""
        if self.joint_queries is None:
            self.queries[name] = nn.Parameter(torch.randn(1, self.config.embed_dim))
        if not self.config.shared_hypernetwork:
            self.hypernetworks[name] = self.new_hypernetwork()

    def tokens(self, modality: str) -> tuple[Tensor, int]:
        """The query tokens that enter the transformer, (tokens, D), and which of them is the modality's own."""
        if self.joint_queries is None:
            return self.queries[modality], 0
        row = published_query(modality)
        assert row is not None, modality
        return self.joint_queries, row

    def hypernetwork(self, modality: str) -> nn.Module:
        """The MLP of eq. 7 that serves the modality."""
        return self.hypernetworks[SHARED if self.config.shared_hypernetwork else modality]

    def forward(self, embedding: Tensor, modality: str) -> Tensor:
        """Low-resolution logits of eq. 7, before sigmoid and interpolation.

        Args:
            embedding: E + dense prompt, (B, D, h, w).
            modality: whose query decodes.

        Returns:
            (B, 1, 4h, 4w).
        """
        batch, dim, height, width = embedding.shape
        tokens, own = self.tokens(modality)
        position = self.positional_encoding((height, width)).to(embedding.dtype)
        queries, keys = self.transformer(
            embedding, position.expand(batch, -1, -1, -1), tokens.to(embedding.dtype).expand(batch, -1, -1)
        )
        upscaled = self.upscaling(keys.transpose(1, 2).reshape(batch, dim, height, width))
        weights = self.hypernetwork(modality)(queries[:, own])  # (B, D/8)
        return torch.einsum("bc,bchw->bhw", weights, upscaled).unsqueeze(1)
