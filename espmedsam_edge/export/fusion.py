"""Exact fusion: shared encoder + one modality's bag, prompt generator and decoder as one plain network.

The steps and the algebra of each are in ``docs/architecture.md``. Pixels stay channels-last except around convolutions,
so LayerNorm and every 1x1 convolution is a plain matrix product.
"""

from __future__ import annotations

from torch import Tensor, nn

from espmedsam_edge.export.fused_decoder import FusedDecoder, FusedPrompt
from espmedsam_edge.export.fused_encoder import FusedEncoder
from espmedsam_edge.model.esp_medsam import EspMedSam


class FusedSegmenter(nn.Module):
    """One modality of an ``EspMedSam`` as a plain network of fixed shape; the model itself is left unchanged.

    Args:
        model: in evaluation mode, float32 or float64.
        modality: whose bag, query and MLP go in.
        image_size: S, a multiple of 64.
        batch: B.

    Raises:
        UserError: the model has no such modality.
    """

    def __init__(self, model: EspMedSam, modality: str, image_size: int, batch: int = 1) -> None:
        super().__init__()
        self.encoder = FusedEncoder(model.encoder, model.bag(modality), batch, image_size)
        self.prompt = FusedPrompt(model.prompt)
        self.decoder = FusedDecoder(model.decoder, modality, batch, image_size // 16)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) normalised RGB -> (B, 1, S/4, S/4) logits."""
        return self.decoder(self.prompt(self.encoder(image)))
