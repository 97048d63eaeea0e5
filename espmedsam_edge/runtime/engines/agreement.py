"""Whether an engine computes what its graph says: its masks of phantoms beside ONNX Runtime's of the same graph."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from espmedsam_edge.bundle import Graph, Normalization

DOUBTFUL_DICE = 0.99  # as the tests ask of FP16 engines; the budgets of calibrate, over many images, are narrower
_TRACE = 1e-3  # of the mask: less than that, or all but that, may vanish


class Agreement(BaseModel, extra="forbid", frozen=True):
    """An engine's masks of phantoms, one an image of the batch, beside ONNX Runtime's; all numbers are 0..1.

    Attributes:
        finite: whether every logit of the engine is a number.
        dice: Dice between its masks and ONNX Runtime's; 1 where both are empty.
        foreground: the part of its masks that is foreground.
        expected_foreground: the same of ONNX Runtime's.
    """

    finite: bool
    dice: float
    foreground: float
    expected_foreground: float

    @property
    def fault(self) -> str | None:
        """What no engine may do, as a clause; None where it does not."""
        if not self.finite:
            return "it gives logits that are not numbers"
        if self.foreground in (0.0, 1.0) and abs(self.foreground - self.expected_foreground) > _TRACE:
            kind, expected = "a full" if self.foreground else "an empty", f"{100 * self.expected_foreground:.1f} %"
            return f"it gives {kind} mask of a phantom, where ONNX Runtime finds {expected} foreground"
        return None

    def __str__(self) -> str:
        if self.foreground == self.expected_foreground and self.foreground in (0.0, 1.0):  # which says little
            return f"mask of a phantom {'full' if self.foreground else 'empty'}, as ONNX Runtime's"
        return f"mask of a phantom {100 * self.dice:.2f} % Dice to ONNX Runtime's"


def agree(
    graph: Graph,
    content: bytes,
    run: Callable[[bytes], bytes],
    *,
    normalization: Normalization,
    threshold: float,
) -> Agreement:
    """Run an engine and ONNX Runtime on phantoms of the graph's modality and compare their masks.

    Args:
        graph: the manifest's entry.
        content: the graph as ONNX.
        run: the engine: the bytes of ``image`` in, those of ``logits`` out.
        normalization: of the bundle's input.
        threshold: probability from which a pixel is foreground.

    Raises:
        UserError: ONNX Runtime does not run the graph, or the GPU does not run the engine.
    """
    # Here, so that a build's own process has none of it in memory.
    import numpy as np

    from espmedsam_edge.imaging.geometry import logit, preprocess
    from espmedsam_edge.metrics import dice
    from espmedsam_edge.phantoms import phantom
    from espmedsam_edge.runtime.onnx_session import reference_logits

    size = graph.image_size
    images = np.concatenate(
        [preprocess(phantom(graph.modality, seed, (size, size))[0], size, normalization) for seed in range(graph.batch)]
    )
    expected = reference_logits(graph, content, images)
    logits = np.frombuffer(run(images.tobytes()), np.float32).reshape(graph.output_shape)
    # All masks of the batch under each other, as the network gives them: a quarter of the image's size.
    masks = [found.reshape(-1, size // 4) >= logit(threshold) for found in (logits, expected)]
    return Agreement(
        finite=bool(np.isfinite(logits).all()),
        dice=round(dice(*masks), 6),
        foreground=float(masks[0].mean()),
        expected_foreground=float(masks[1].mean()),
    )
