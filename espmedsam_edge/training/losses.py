"""The paper's objectives: eq. 1 (distillation), eq. 5 (SPPG) and eq. 8 (mask), all computed in float32.

Focal and Dice loss are MONAI's with SAM's constants (alpha 0.25, gamma 2, smoothing 1): the same formulas.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss
from torch import Tensor, nn

from espmedsam_edge.model.esp_medsam import ModelOutput
from espmedsam_edge.model.prompt import patch_target

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
DICE_SMOOTHING = 1.0

PixelLoss = Literal["focal", "bce"]


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 1's squared L2 distance of two image embeddings, (B, D, h, w) each, as a mean over elements.

    The mean differs from the paper's norm by a constant factor and makes the value independent of the image size.
    """
    return F.mse_loss(student.float(), teacher.detach().float())


def patch_loss(patch_logits: Tensor, mask: Tensor) -> Tensor:
    """Eq. 5: binary cross-entropy of the SPPG's patches against the max-pooled mask.

    Args:
        patch_logits: (B, 1, h, w), before the sigmoid.
        mask: (B, 1, S, S) of 0 and 1, S a multiple of h.
    """
    size = mask.shape[-1] // patch_logits.shape[-1]
    return F.binary_cross_entropy_with_logits(patch_logits.float(), patch_target(mask.float(), size))


class MaskLoss(nn.Module):
    """Eq. 8: ``weight`` · pixel loss + Dice loss.

    Args:
        pixel: "focal" (the paper) or "bce" (an easier start from random weights).
        weight: lambda of eq. 8; 20 as in SAM.
    """

    def __init__(self, pixel: PixelLoss = "focal", weight: float = 20.0) -> None:
        super().__init__()
        self.pixel = pixel
        self.weight = weight
        self.focal = FocalLoss(gamma=FOCAL_GAMMA, alpha=FOCAL_ALPHA)
        self.dice = DiceLoss(sigmoid=True, smooth_nr=DICE_SMOOTHING, smooth_dr=DICE_SMOOTHING, reduction="none")

    def forward(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The pixel loss (unweighted) and the Dice loss (mean over the images).

        Dice is not defined for an image without target, and its smoothed form has no gradient where the prediction is
        large. Such an image counts as 0 in the mean; the pixel loss alone teaches it.

        Args:
            logits: (B, 1, h, w), resized bilinearly to the mask's size first, as the runtime does.
            mask: (B, 1, S, S) of 0 and 1.
        """
        logits, mask = logits.float(), mask.float()
        if logits.shape[-2:] != mask.shape[-2:]:
            logits = F.interpolate(logits, mask.shape[-2:], mode="bilinear", align_corners=False)
        if self.pixel == "focal":
            pixel: Tensor = self.focal(logits, mask)
        else:
            pixel = F.binary_cross_entropy_with_logits(logits, mask)
        dice: Tensor = self.dice(logits, mask).flatten()  # (B,)
        return pixel, (dice * mask.flatten(1).amax(1)).mean()


class SegmentationLoss(NamedTuple):
    """A segmentation step's loss and its terms, each a scalar."""

    total: Tensor
    pixel: Tensor
    dice: Tensor
    patch: Tensor


def segmentation_loss(
    output: ModelOutput, mask: Tensor, mask_loss: MaskLoss, patch_weight: float = 1.0
) -> SegmentationLoss:
    """Eq. 8 plus ``patch_weight`` times eq. 5 (the paper adds the two without naming a weight).

    Args:
        output: of the student or the teacher.
        mask: (B, 1, S, S) of 0 and 1.
        mask_loss: eq. 8.
        patch_weight: 0 leaves the SPPG unsupervised.
    """
    pixel, dice = mask_loss(output.low_res_logits, mask)
    total = mask_loss.weight * pixel + dice
    if patch_weight:
        patch = patch_loss(output.patch_logits, mask)
        total = total + patch_weight * patch
    else:
        patch = torch.zeros_like(total)
    return SegmentationLoss(total, pixel, dice, patch)
