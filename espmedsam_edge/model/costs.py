"""What a model costs: parameters and multiply-accumulates, counted without running it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.model.esp_medsam import EspMedSam


def parameters(module: nn.Module) -> int:
    """Trainable numbers of a module; BatchNorm statistics and positional tables are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def products(run: Callable[[], object]) -> int:
    """Multiply-accumulates of the convolutions and matrix products that one call of ``run`` does, on any device.

    Element-wise work (normalisation, softmax, GELU, interpolation) is not counted.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernel hides its products
        run()
    return int(counter.get_total_flops()) // 2


def multiply_accumulates(config: ModelConfig, image_size: int | None = None) -> int:
    """``products`` of one image of one modality, as the paper's Table III, traced on torch's meta device."""
    size = image_size or config.image_size
    with torch.device("meta"):
        model = EspMedSam(config, ["fundus"]).eval().requires_grad_(False)
        image = torch.zeros(1, 3, size, size)
    return products(lambda: model(image, "fundus"))
