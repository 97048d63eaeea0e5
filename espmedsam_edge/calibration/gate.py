"""The accuracy gate: masks of a lowered graph against the FP32 graph's, and against the truth, on held-out images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from espmedsam_edge.bundle import Bundle, Graph, Precision
from espmedsam_edge.calibration.emulation import emulate
from espmedsam_edge.calibration.images import CalibrationImages, Picture
from espmedsam_edge.calibration.request import Listener
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Tensor, mask_from_logits, preprocess
from espmedsam_edge.imaging.masks import read_mask
from espmedsam_edge.metrics import dice
from espmedsam_edge.runtime.onnx_session import check_signature, open_session

DEFAULT_BUDGET: dict[Precision, float] = {"fp16": 0.1, "int8": 0.5}
"""Dice points that a lowered graph may lose on average."""

DISAGREEMENT_LIMIT = 20.0
"""With true masks the masks themselves may still differ by at most so many times the budget: equal scores by chance
(a network that is always wrong) prove nothing."""

_TRACE = 1e-3  # of the frame: a mask smaller than that, or leaving out less, may vanish

Mask = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A held-out image as the gate uses it.

    Attributes:
        tensor: (1, 3, S, S), preprocessed as in the runtime.
        size: (H, W) of the frame, at which masks are compared.
        logits: the FP32 graph's, (S/4, S/4).
        truth: (H, W) mask, where there is one.
    """

    tensor: Tensor
    size: tuple[int, int]
    logits: Tensor
    truth: Mask | None = None

    def mask(self, logits: Tensor, threshold: float) -> Mask:
        """The mask at frame size."""
        return mask_from_logits(logits, self.size, threshold)


@dataclass(frozen=True)
class ImageResult:
    """One image's outcome, in Dice points (0..100).

    Attributes:
        disagreement: 100 minus the Dice between the lowered graph's mask and the FP32 graph's.
        drop: Dice of the FP32 graph's mask with the truth minus the lowered one's; None without truth.
        finite: whether every logit is a number.
        vanished: the mask is all empty or all full and the FP32 graph's is far from it.
        logit_error: root mean square of the logits' change over their standard deviation.
    """

    disagreement: float
    drop: float | None
    finite: bool
    vanished: bool
    logit_error: float


@dataclass(frozen=True)
class GateResult:
    """The gate's verdict over the held-out images."""

    budget: float
    images: tuple[ImageResult, ...]

    @cached_property
    def mean_disagreement(self) -> float:
        """Dice points between the two graphs' masks, on average."""
        return float(np.mean([image.disagreement for image in self.images]))

    @cached_property
    def mean_drop(self) -> float | None:
        """Dice points lost against the truth on average over the images that have one; None without."""
        drops = [image.drop for image in self.images if image.drop is not None]
        return float(np.mean(drops)) if drops else None

    @property
    def loss(self) -> float:
        """What counts against the budget: the drop against the truth where there is one, else the disagreement."""
        return self.mean_disagreement if self.mean_drop is None else self.mean_drop

    @cached_property
    def worst(self) -> int:
        """Index of the worst image."""
        return max(range(len(self.images)), key=lambda i: (not self.images[i].finite, self.images[i].disagreement))

    @property
    def worst_loss(self) -> float:
        """The worst single image's loss."""
        if self.mean_drop is None:
            return max(image.disagreement for image in self.images)
        return max(image.drop for image in self.images if image.drop is not None)

    @cached_property
    def logit_error(self) -> float:
        """Mean logit error: tells sets apart that the masks do not."""
        return float(np.mean([image.logit_error for image in self.images]))

    @property
    def not_finite(self) -> int:
        """Images with a logit that is not a number or infinite."""
        return sum(not image.finite for image in self.images)

    @property
    def vanished(self) -> int:
        """Images whose mask became all empty or all full."""
        return sum(image.vanished for image in self.images)

    @property
    def passed(self) -> bool:
        """Within the budget, finite, and no mask vanished."""
        alike = self.mean_disagreement <= DISAGREEMENT_LIMIT * self.budget
        return not self.not_finite and not self.vanished and alike and self.loss <= self.budget

    def __str__(self) -> str:
        against = "the FP32 masks" if self.mean_drop is None else "the true masks, against FP32's"
        text = (
            f"{self.loss:+.3f} Dice points on average ({self.worst_loss:+.3f} at worst) on {against}, "
            f"budget {self.budget:g}, {len(self.images)} images"
        )
        if self.mean_drop is not None:
            text += f"; {self.mean_disagreement:.3f} points between the two graphs' masks"
        if self.not_finite:
            text += f"; NaN or infinite on {self.not_finite}"
        if self.vanished:
            text += f"; all empty or all full on {self.vanished}"
        return text


def checked_budget(asked: float | None, usual: float) -> float:
    """The Dice points that may be lost.

    Raises:
        UserError: a budget that nothing can be held to.
    """
    budget = usual if asked is None else asked
    if not 0 < budget <= 100:
        raise UserError(f"a budget of {budget:g} Dice points cannot be used.", "Use more than 0 and at most 100.")
    return budget


def open_gate(
    bundle: Bundle, graph: Graph, images: CalibrationImages, budget: float, threads: int, listener: Listener
) -> tuple[Gate, list[Picture]]:
    """Read the held-out images and run the FP32 graph on them.

    Args:
        bundle: where the graph is.
        graph: the FP32 one.
        images: their held-out part is used.
        budget: Dice points.
        threads: for ONNX Runtime.
        listener: is told.

    Returns:
        The gate, and the picture of each of its images.

    Raises:
        UserError: as ``Gate``, or a mask of another size than its image.
    """
    listener.phase("FP32 masks of the held-out images", len(images.held_out))
    found: list[tuple[Tensor, tuple[int, int], Mask | None]] = []
    pictures = []
    for picture, frame in images.read(images.held_out):
        size = (frame.shape[0], frame.shape[1])
        truth = None
        if picture.mask is not None:
            truth = read_mask(picture.mask).mask
            if truth.shape != size:
                raise UserError(
                    f"{picture.mask} is {truth.shape[1]}x{truth.shape[0]} pixels but its image is {size[1]}x{size[0]}.",
                    "Find the mask that belongs to it.",
                    exit_code=1,
                )
        found.append((preprocess(frame, graph.image_size, bundle.manifest.input.normalization), size, truth))
        pictures.append(picture)
    gate = Gate(
        bundle.read_graph(graph),
        graph,
        found,
        threshold=bundle.manifest.threshold,
        budget=budget,
        threads=threads,
        on_image=listener.step,
    )
    return gate, pictures


class Gate:
    """Held-out images with the FP32 graph's answers, ready to judge candidates.

    Args:
        reference: the FP32 graph as ONNX.
        graph: its manifest entry.
        pictures: (tensor, frame size, true mask or None) of each held-out image.
        threshold: the manifest's, a probability.
        budget: Dice points.
        threads: for ONNX Runtime.
        on_image: called after each image that any graph is run on.

    Raises:
        UserError: no image, or the FP32 graph's logits are not finite.
    """

    def __init__(
        self,
        reference: bytes,
        graph: Graph,
        pictures: Sequence[tuple[Tensor, tuple[int, int], Mask | None]],
        *,
        threshold: float,
        budget: float,
        threads: int,
        on_image: Callable[[], None] = lambda: None,
    ) -> None:
        if not pictures:
            raise UserError("none of the held-out images could be read.", "Give readable images.", exit_code=1)
        self.graph, self.threshold, self.budget, self.threads = graph, threshold, budget, threads
        self._on_image = on_image
        session = open_session(reference, threads, where=graph.file)
        check_signature(session, graph, graph.file)
        self.images: list[HeldOut] = []
        for tensor, size, truth in pictures:
            logits = self._logits(session, tensor)
            if not np.isfinite(logits).all():
                raise UserError("the FP32 graph's logits are not finite.", "The weights are broken.", exit_code=1)
            self.images.append(HeldOut(tensor, size, logits, truth))

    def blind(self) -> bool:
        """Whether every FP32 mask is all empty or all full, so that nothing can be compared."""
        return all(_uniform(image.mask(image.logits, self.threshold)) for image in self.images)

    def judge(self, model: ModelProto) -> GateResult:
        """Compare a lowered graph with the FP32 graph on all images, rounding where a GPU rounds."""
        return self.judge_emulated(emulate(model))

    def judge_runs(self, run: Callable[[Tensor], Tensor]) -> GateResult:
        """Compare what a backend computes with the FP32 graph on all images; ``run``: as ``Backend.run``."""
        results = []
        for image in self.images:
            logits = run(np.ascontiguousarray(np.repeat(image.tensor, self.graph.batch, axis=0)))
            results.append(self._compare(image, logits[0, 0]))
            self._on_image()
        return GateResult(self.budget, tuple(results))

    def judge_emulated(self, model: ModelProto, count: int | None = None, *, hasty: bool = False) -> GateResult:
        """Compare an emulation (of ``emulate`` or ``simulate``) with the FP32 graph.

        Args:
            model: all in FP32.
            count: how many of the images (None: all).
            hasty: stop where a failure is certain; the result then covers only the images run.
        """
        session = self._open(model)
        results: list[ImageResult] = []
        lost, images = 0.0, self.images[:count]
        for image in images:
            results.append(self._compare(image, self._logits(session, image.tensor)))
            lost += results[-1].disagreement
            hopeless = image.truth is None and lost > self.budget * len(images)
            if hasty and (hopeless or not results[-1].finite or results[-1].vanished):
                break
        return GateResult(self.budget, tuple(results))

    def lowered_logits(self, model: ModelProto, index: int) -> Tensor:
        """A lowered graph's logits on one image, (S/4, S/4), rounded where a GPU rounds."""
        return self._logits(self._open(emulate(model)), self.images[index].tensor)

    def _open(self, model: ModelProto) -> Any:
        return open_session(model.SerializeToString(), self.threads, where="the emulated graph")

    def _compare(self, image: HeldOut, logits: Tensor) -> ImageResult:
        finite = bool(np.isfinite(logits).all())
        usable = np.nan_to_num(logits, nan=0.0, posinf=6e4, neginf=-6e4)
        reference, lowered = image.mask(image.logits, self.threshold), image.mask(usable, self.threshold)
        drop = None
        if image.truth is not None:
            drop = 100 * (dice(reference, image.truth) - dice(lowered, image.truth))
        spread = float(image.logits.std()) or 1.0
        with np.errstate(over="ignore"):
            error = float(np.sqrt(np.mean((usable - image.logits).astype(np.float64) ** 2))) / spread
        return ImageResult(
            disagreement=100 * (1 - dice(lowered, reference)),
            drop=drop,
            finite=finite,
            vanished=_uniform(lowered) and _TRACE < (reference != 0).mean() < 1 - _TRACE,
            logit_error=error,
        )

    def _logits(self, session: Any, tensor: Tensor) -> Tensor:
        batch = np.repeat(tensor, self.graph.batch, axis=0)
        (logits,) = session.run(None, {"image": batch})
        self._on_image()
        return np.asarray(logits[0, 0], np.float32)

    def check_written(self, content: bytes, graph: Graph) -> None:
        """Load what was written as the runtime does and run it on one image.

        Raises:
            UserError: it does not load, or its input or output is not what the manifest will say.
        """
        session = open_session(content, self.threads, where=graph.file)
        check_signature(session, graph, graph.file)
        self._logits(session, self.images[0].tensor)


def _uniform(mask: Mask) -> bool:
    return bool(mask.min() == mask.max())
