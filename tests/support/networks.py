"""Networks with weights and statistics far from their initialisation, so that a test cannot pass on zeros and ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from espmedsam_edge.model.config import ModelConfig, model_config
from espmedsam_edge.model.esp_medsam import EspMedSam


def scramble(module: nn.Module, seed: int = 0, spread: float = 0.05) -> None:
    """Disturb every parameter and BatchNorm statistic in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * spread
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.data = torch.randn(layer.num_features, generator=generator).to(layer.weight.dtype) * 0.1
            layer.running_var.data = torch.rand(layer.num_features, generator=generator).to(layer.weight.dtype) + 0.5
            layer.weight.data = torch.rand(layer.num_features, generator=generator).to(layer.weight.dtype) + 0.5


def scrambled_model(
    config: ModelConfig | str = "espmedsam-tiny",
    modalities: Iterable[str] = ("fundus", "xray"),
    *,
    published: bool = False,
    seed: int = 0,
) -> EspMedSam:
    """A model in evaluation mode whose patch prompt is on in some patches and off in others."""
    torch.manual_seed(seed)
    model = EspMedSam(
        model_config(config, published=published) if isinstance(config, str) else config, modalities
    ).eval()
    scramble(model, seed)
    centre_prompt(
        model, torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(seed)), model.modalities[0]
    )
    return model


def centre_prompt(model: EspMedSam, image: torch.Tensor, modality: str) -> None:
    """Shift the patch logits so that half of this image's patches are on, none of them on the edge."""
    score = model.prompt.patch_generator[-1]
    assert isinstance(score, nn.Conv2d)
    assert score.bias is not None
    with torch.no_grad():
        values = model(image, modality).patch_logits.flatten().sort().values
        score.bias -= values[len(values) // 2 - 1 : len(values) // 2 + 1].mean()
