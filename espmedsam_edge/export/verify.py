"""Whether an exported graph computes what the checkpoint computes, on images that look like the modality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from espmedsam_edge.bundle import Graph, Normalization
from espmedsam_edge.export.graph import GraphError, Storage
from espmedsam_edge.imaging.geometry import preprocess
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.onnx_session import reference_logits


@dataclass(frozen=True)
class Bounds:
    """How far an export may be off: logits as a fraction of their range; the fraction of mask pixels to agree."""

    max_error: float
    mask_agreement: float


BOUNDS: dict[Storage, Bounds] = {
    "float32": Bounds(1e-3, 0.9999),  # float32 rounding over some sixty layers
    "float16": Bounds(2e-2, 0.999),  # weights rounded to 11 bits
}


@dataclass(frozen=True)
class ExportAgreement:
    """How far two implementations are apart over some images.

    Attributes:
        max_error: largest absolute difference of a logit over the range of the reference's logits.
        mask_agreement: fraction of mask pixels (logit ≥ 0) that agree, 0..1.
        images: how many images were compared.
    """

    max_error: float
    mask_agreement: float
    images: int

    def within(self, bounds: Bounds) -> bool:
        """Whether both are within bounds."""
        return self.max_error <= bounds.max_error and self.mask_agreement >= bounds.mask_agreement


def compare(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> ExportAgreement:
    """Agreement of logits of the same shape (images, 1, h, w)."""
    spread = float(reference.max() - reference.min()) or 1.0
    return ExportAgreement(
        max_error=float(np.abs(reference - candidate).max()) / spread,
        mask_agreement=float(((reference >= 0) == (candidate >= 0)).mean()),
        images=len(reference),
    )


def verify_graph(
    model: EspMedSam, content: bytes, graph: Graph, normalization: Normalization, storage: Storage = "float32"
) -> ExportAgreement:
    """Run the graph in ONNX Runtime and the unfused model in torch, on phantom images of the modality.

    Phantoms have the statistics of the real thing; flat noise would leave half of the network unused.

    Args:
        model: the checkpoint's network, in evaluation mode.
        content: the ONNX file's.
        graph: its manifest entry.
        normalization: of the input.
        storage: how the file's weights are stored; decides the bounds.

    Raises:
        GraphError: they differ by more than rounding.
    """
    size = graph.image_size
    images = np.concatenate(
        [preprocess(phantom(graph.modality, seed, (size, size))[0], size, normalization) for seed in range(graph.batch)]
    )
    with torch.inference_mode():
        expected = model(torch.from_numpy(images), graph.modality).low_res_logits.numpy()
    agreement = compare(expected, reference_logits(graph, content, images))
    bounds = BOUNDS[storage]
    if not agreement.within(bounds):
        raise GraphError(
            f"the {graph.modality} graph differs from the checkpoint: logits by {agreement.max_error:.2g} of their "
            f"range (at most {bounds.max_error}), {agreement.mask_agreement:.4%} of the mask agrees "
            f"(at least {bounds.mask_agreement:.2%})"
        )
    return agreement
