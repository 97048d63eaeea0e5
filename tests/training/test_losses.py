"""The objectives against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from espmedsam_edge.model.esp_medsam import ModelOutput
from espmedsam_edge.training.losses import MaskLoss, feature_distance, patch_loss, segmentation_loss


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_feature_distance_is_eq_1() -> None:
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2).requires_grad_()
    teacher = torch.tensor([[1.0, 0.0], [3.0, 5.0]]).reshape(1, 1, 2, 2).requires_grad_()
    distance = feature_distance(student, teacher)
    assert distance.item() == pytest.approx((0 + 4 + 0 + 1) / 4)
    distance.backward()
    assert teacher.grad is None  # the teacher only teaches
    assert student.grad is not None
    assert student.grad.flatten().tolist() == pytest.approx([0, 2 * 2 / 4, 0, 2 * -1 / 4])


def test_patch_loss_is_eq_5_on_the_max_pooled_mask() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, 1, 1] = 1  # one pixel makes its whole patch foreground
    logits = torch.tensor([[logit(0.9), logit(0.2)], [logit(0.3), logit(0.6)]]).reshape(1, 1, 2, 2)
    by_hand = -(math.log(0.9) + math.log(0.8) + math.log(0.7) + math.log(0.4)) / 4
    assert patch_loss(logits, mask).item() == pytest.approx(by_hand, rel=1e-6)


def test_focal_and_dice_are_eq_8() -> None:
    p = [0.9, 0.2, 0.6, 0.3]
    y = [1, 0, 0, 1]
    logits = torch.tensor([logit(v) for v in p]).reshape(1, 1, 2, 2)
    mask = torch.tensor(y, dtype=torch.float32).reshape(1, 1, 2, 2)
    focal = sum(
        -(0.25 * (1 - a) ** 2 * math.log(a)) if b else -(0.75 * a**2 * math.log(1 - a))
        for a, b in zip(p, y, strict=True)
    )
    dice = 1 - (2 * (0.9 + 0.3) + 1) / (sum(p) + 2 + 1)
    pixel, overlap = MaskLoss()(logits, mask)
    assert pixel.item() == pytest.approx(focal / 4, rel=1e-5)
    assert overlap.item() == pytest.approx(dice, rel=1e-5)
    cross_entropy, _ = MaskLoss("bce")(logits, mask)
    by_hand = -(math.log(0.9) + math.log(0.8) + math.log(0.4) + math.log(0.3)) / 4
    assert cross_entropy.item() == pytest.approx(by_hand, rel=1e-5)


def test_dice_is_the_mean_over_images_not_over_their_pixels() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 1, 8, 8)
    mask = (torch.rand(3, 1, 8, 8) > torch.tensor([0.1, 0.5, 0.95]).reshape(3, 1, 1, 1)).float()
    single = [MaskLoss()(logits[i : i + 1], mask[i : i + 1]) for i in range(3)]
    pixel, dice = MaskLoss()(logits, mask)
    torch.testing.assert_close(dice, torch.stack([d for _, d in single]).mean())
    torch.testing.assert_close(pixel, torch.stack([f for f, _ in single]).mean())


def test_logits_are_resized_to_the_mask() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(1, 1, 4, 4), (torch.rand(1, 1, 16, 16) > 0.5).float()
    large = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    for small_value, large_value in zip(MaskLoss()(logits, mask), MaskLoss()(large, mask), strict=True):
        torch.testing.assert_close(small_value, large_value)


def test_total_weighs_its_terms() -> None:
    torch.manual_seed(0)
    output = ModelOutput(torch.randn(2, 1, 16, 16), torch.randn(2, 1, 2, 2), torch.zeros(1))
    mask = (torch.rand(2, 1, 64, 64) > 0.5).float()
    loss = segmentation_loss(output, mask, MaskLoss(weight=20), patch_weight=0.5)
    torch.testing.assert_close(loss.total, 20 * loss.pixel + loss.dice + 0.5 * loss.patch)
    without = segmentation_loss(output, mask, MaskLoss(weight=20), patch_weight=0)
    torch.testing.assert_close(without.total, 20 * loss.pixel + loss.dice)
    assert without.patch.item() == 0


def test_reduced_precision_logits_are_computed_in_float32() -> None:
    logits = torch.tensor([60.0, -60.0, 30.0, -30.0], dtype=torch.float16).reshape(1, 1, 2, 2)
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0]).reshape(1, 1, 2, 2)
    pixel, dice = MaskLoss()(logits, mask)
    assert pixel.dtype == dice.dtype == torch.float32
    assert pixel.item() == pytest.approx((0.75 * 60 + 0.25 * 60) / 4, rel=1e-4)


def test_an_image_without_target_is_taught_by_the_pixel_loss_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    mask = (torch.rand(2, 1, 8, 8) > 0.5).float()
    mask[1] = 0
    pixel, dice = MaskLoss("bce")(logits, mask)
    _, first = MaskLoss("bce")(logits[:1], mask[:1])
    torch.testing.assert_close(dice, first / 2)  # counts as 0 in the mean of two
    (gradient,) = torch.autograd.grad(dice, logits, retain_graph=True)
    assert float(gradient[1].abs().max()) == 0
    (gradient,) = torch.autograd.grad(pixel, logits)
    assert float(gradient[1].min()) > 0  # less of everything
    _, nothing = MaskLoss("bce")(logits, torch.zeros_like(mask))
    assert nothing.item() == 0
