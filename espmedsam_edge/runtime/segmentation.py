"""The result of segmenting one frame: the mask and what can be measured on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.imaging.geometry import Frame, mask_from_logits, probability_from_logits
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay, write_notice
from espmedsam_edge.imaging.recognition import DOUBTFUL
from espmedsam_edge.objects.instance import Instances

Mask = NDArray[np.uint8]  # (H, W), 0 or 255
Logits = NDArray[np.float32]  # (S/4, S/4)


class DoesNotFit(UserError):
    """Frames too large for the GPU or for its memory; the CPU may still take them, and the GPU others."""


class DeviceLost(UserError):
    """The GPU gave up on this program: nothing runs on it until the program starts again."""


class NotFinite(UserError):
    """The network's output for a frame holds NaN or infinite numbers: there is no result that could be shown.

    Attributes:
        outcomes: of a group of frames, the results of those that have one, and such an error in place of the others'.
    """

    def __init__(
        self,
        message: str = "the network's output for this frame is not finite (NaN or infinite).",
        hint: str = "The weights or the precision are at fault: try --precision fp32, or export the bundle again.",
        *,
        exit_code: int = 1,
        outcomes: Sequence[Segmentation | NotFinite] = (),
    ) -> None:
        super().__init__(message, hint, exit_code=exit_code)
        self.outcomes = list(outcomes)


@dataclass(frozen=True)
class Timings:
    """Seconds that one frame spent in each stage. In a batch, inference is the group's time shared by its frames."""

    preprocess: float
    inference: float
    postprocess: float

    @property
    def total(self) -> float:
        """Frame in, mask out: the sum of the stages."""
        return self.preprocess + self.inference + self.postprocess


@dataclass(frozen=True)
class Measured:
    """What was measured on a mask.

    Attributes:
        area: foreground pixels.
        bounding_box: (x, y, width, height); None for an empty mask.
        centroid: (x, y), the mean of the foreground's pixel centres; None for an empty mask.
    """

    area: int
    bounding_box: tuple[int, int, int, int] | None
    centroid: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Drawn:
    """An overlay that came with the mask: (H, W, 3) uint8 BGR, and the style it was drawn in, without its notice."""

    image: Frame
    style: OverlayStyle


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What the segmenter found in one frame.

    Examples:
        >>> import cv2
        >>> from espmedsam_edge import Segmenter
        >>> with Segmenter.load("fundus.bundle") as segmenter:
        ...     result = segmenter.segment(cv2.imread("retina.png"))
        >>> result.mask.shape, result.mask.dtype, result.area == int((result.mask == 255).sum())
        ((120, 160), dtype('uint8'), True)
        >>> result.probability().shape
        (120, 160)

    Attributes:
        mask: (H, W) uint8 at the frame's size, 255 where the modality's target is, else 0.
        modality: the modality that was segmented.
        logits: (S/4, S/4) float32, the network's output before it is resized to the frame.
        threshold: the probability (0..1) from which a pixel is foreground.
        timings: seconds by stage.
        measured: what a backend on a GPU measured on its way; None: measured here when it is asked for.
        drawn: the overlay that such a backend drew, if the segmenter was told to.
        crop: the part of the frame that was segmented, which ``logits`` are of; None: all.
        find: finds the mask's objects when they are asked for; None: they were not wanted.
        finish: cleans the mask up and has its objects found, as was asked for; done again where the mask changes.
        confidence: 0 to 1, how much the frame is of the kind that the modality's network was made for; under
            ``recognition.DOUBTFUL`` it looks like something else, and the mask means nothing. None: it is not known.
        least: the confidence that was asked for; of a result under it the mask is empty.
    """

    mask: Mask
    modality: str
    logits: Logits
    threshold: float
    timings: Timings
    measured: Measured | None = None
    drawn: Drawn | None = None
    crop: Crop | None = None
    find: Callable[[Segmentation], Instances] | None = None
    finish: Callable[[Segmentation], Segmentation] | None = None
    confidence: float | None = None
    least: float | None = None

    @property
    def refused(self) -> bool:
        """Whether the confidence is less than was asked for."""
        return self.confidence is not None and self.least is not None and self.confidence < self.least

    def judged(self, likeness: Mapping[str, float] | None, least: float | None = None) -> Segmentation:
        """The result with its confidence; an empty one where that is less than ``least``.

        Args:
            likeness: of the frame by modality, as ``recognition.confidences`` gives it; None: it is not known.
            least: the confidence that is asked for, 0 to 1; None: any.
        """
        if likeness is None or self.modality not in likeness:
            return self
        known = replace(self, confidence=likeness[self.modality], least=least)
        return replace(known, mask=np.zeros_like(self.mask), measured=None, drawn=None) if known.refused else known

    @property
    def remark(self) -> str:
        """What has to be said beside the mask: that the frame is not of its kind, or that nothing was found; or ""."""
        if self.confidence is None:
            return ""
        if self.confidence < DOUBTFUL or self.refused:
            return f"unlike {self.modality} ({self.confidence:.2f})"
        return "" if self.area else "nothing found"

    def at(self, threshold: float) -> Segmentation:
        """The result at another threshold, from the same logits."""
        if self.refused:
            return replace(self, threshold=threshold)
        if self.crop is None:
            mask: Mask = mask_from_logits(self.logits, self.size, threshold)
        else:
            mask = np.zeros(self.size, np.uint8)
            self.crop.of(mask)[:] = mask_from_logits(self.logits, (self.crop.height, self.crop.width), threshold)
        changed = replace(self, mask=mask, threshold=threshold, measured=None, drawn=None)
        return changed if self.finish is None else self.finish(changed)

    def placed(self, crop: Crop, size: tuple[int, int]) -> Segmentation:
        """The result of a part as that of its whole frame: nothing outside, all places in the frame's pixels.

        What was drawn is given up: outlines end at a frame's edge, not at a crop's, and are as wide as the frame asks.

        Args:
            crop: what was segmented.
            size: (H, W) of the whole frame.
        """
        mask: Mask = np.zeros(size, np.uint8)
        crop.of(mask)[:] = self.mask
        measured = self.measured
        if measured is not None and measured.bounding_box is not None and measured.centroid is not None:
            (x, y, *sides), (across, down) = measured.bounding_box, measured.centroid
            box = (x + crop.x, y + crop.y, sides[0], sides[1])
            measured = Measured(measured.area, box, (across + crop.x, down + crop.y))
        return replace(self, mask=mask, measured=measured, drawn=None, crop=crop)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the frame and the mask, in pixels."""
        height, width = self.mask.shape
        return height, width

    def probability(self) -> NDArray[np.float32]:
        """Foreground probability at frame size, (H, W) float32 in 0..1 (0 outside a crop); computed anew, not kept."""
        if self.crop is None:
            return probability_from_logits(self.logits, self.size)
        whole = np.zeros(self.size, np.float32)
        self.crop.of(whole)[:] = probability_from_logits(self.logits, (self.crop.height, self.crop.width))
        return whole

    def overlay(self, frame: Frame, style: OverlayStyle) -> Frame:
        """The mask drawn on its frame, (H, W, 3) uint8 BGR: what the backend drew in this style, else drawn now.

        Where its objects are told apart, each has an outline, and their number is written above; so is the ``remark``.
        """
        style = self.counted(style)
        if self.instances is not None:
            return draw_overlay(frame, self.mask, style, self.instances.labels)
        if self.drawn is None or self.drawn.style != replace(style, notice=""):
            return draw_overlay(frame, self.mask, style)
        if not style.notice:
            return self.drawn.image
        image: Frame = self.drawn.image.copy()
        write_notice(image, style.notice)
        return image

    def counted(self, style: OverlayStyle) -> OverlayStyle:
        """The style with the number of objects, where they are told apart, and the remark in its notice."""
        count = ""
        if self.instances is not None:
            count = "1 object" if self.instances.count == 1 else f"{self.instances.count} objects"
        return replace(style, notice=", ".join(filter(None, (style.notice, count, self.remark))))

    @cached_property
    def instances(self) -> Instances | None:
        """The mask's objects, numbered and measured; None where they were not wanted (``ObjectOptions``)."""
        return None if self.find is None else self.find(self)

    @cached_property
    def area(self) -> int:
        """Foreground pixels."""
        if self.measured is not None:
            return self.measured.area
        return int(cv2.countNonZero(self.mask))

    @cached_property
    def bounding_box(self) -> tuple[int, int, int, int] | None:
        """(x, y, width, height) in pixels of the smallest box around the foreground; None for an empty mask."""
        if self.measured is not None:
            return self.measured.bounding_box
        x, y, width, height = cv2.boundingRect(self.mask)
        return (int(x), int(y), int(width), int(height)) if width and height else None

    @cached_property
    def centroid(self) -> tuple[float, float] | None:
        """(x, y) in pixels, the mean position of the foreground's pixel centres; None for an empty mask."""
        if self.measured is not None:
            return self.measured.centroid
        if self.bounding_box is None:
            return None
        x, y, width, height = self.bounding_box
        moments = cv2.moments(self.mask[y : y + height, x : x + width], binaryImage=True)
        return x + moments["m10"] / moments["m00"], y + moments["m01"] / moments["m00"]

    def contours(self) -> list[NDArray[np.int32]]:
        """Outlines of the foreground's 8-connected parts, holes left out: each (n, 2) int32 of (x, y)."""
        found, _ = cv2.findContours(self.mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        return [np.asarray(contour, np.int32).reshape(-1, 2) for contour in found]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a line of JSON: pixels for lengths and areas, milliseconds for times."""
        height, width = self.size
        return {
            "modality": self.modality,
            "width": width,
            "height": height,
            "threshold": self.threshold,
            "area": self.area,
            "area_fraction": round(self.area / (width * height), 6),
            "bounding_box": None if self.bounding_box is None else list(self.bounding_box),
            "centroid": None if self.centroid is None else [round(value, 2) for value in self.centroid],
            **({} if self.confidence is None else {"confidence": round(self.confidence, 4), "refused": self.refused}),
            "milliseconds": {
                "preprocess": round(1000 * self.timings.preprocess, 3),
                "inference": round(1000 * self.timings.inference, 3),
                "postprocess": round(1000 * self.timings.postprocess, 3),
            },
            **({} if self.instances is None else self.instances.to_dict()),
        }


def check_threshold(threshold: float) -> None:
    """Raise UserError unless it lies between 0 and 1; NaN does not."""
    if not 0 < threshold < 1:
        raise UserError(f"threshold {threshold} is not between 0 and 1.", "It is a probability; 0.5 is usual.")


def finite(results: Sequence[Segmentation]) -> list[Segmentation]:
    """The results, if the network's output for each of them is finite.

    Raises:
        NotFinite: it is not; carries what came of each.
    """
    outcomes = [result if np.isfinite(result.logits).all() else NotFinite() for result in results]
    if any(isinstance(outcome, NotFinite) for outcome in outcomes):
        raise NotFinite(outcomes=outcomes)
    return list(results)
