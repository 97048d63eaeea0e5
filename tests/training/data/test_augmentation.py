"""Augmentation keeps image and mask together, depends on its generator alone, and agrees with torchvision."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra train)")
v2 = pytest.importorskip("torchvision.transforms.v2.functional", reason="needs torchvision (extra train)")

from espmedsam_edge.modalities import PAPER_MODALITIES  # noqa: E402
from espmedsam_edge.phantoms import phantom  # noqa: E402
from espmedsam_edge.training.data.augmentation import (  # noqa: E402
    NO_AUGMENTATION,
    Augmentation,
    default_augmentation,
)
from espmedsam_edge.training.data.image_augmentation import augment as augment_and_tell  # noqa: E402


def augment(
    image: np.ndarray, mask: np.ndarray, settings: Augmentation, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, target, _ = augment_and_tell(image, mask, settings, rng)
    return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(target)[None]


def _pair(modality: str = "dermoscopy", size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    image, mask = phantom(modality, 3, (size, size))
    return np.ascontiguousarray(image[..., ::-1]), mask


def test_without_augmentation_nothing_changes() -> None:
    image, mask = _pair()
    pixels, target = augment(image, mask, NO_AUGMENTATION, np.random.default_rng(0))
    assert torch.equal(pixels, torch.from_numpy(image).permute(2, 0, 1).float())
    assert torch.equal(target[0], torch.from_numpy(mask).float() / 255)


@pytest.mark.parametrize("modality", [*PAPER_MODALITIES, "histopathology", "dental"])
def test_results_are_binary_in_range_and_repeat_with_the_generator(modality: str) -> None:
    image, mask = _pair(modality)
    settings = default_augmentation(modality)
    seen = []
    for seed in range(12):
        pixels, target = augment(image, mask, settings, np.random.default_rng(seed))
        assert pixels.shape == (3, 64, 64)
        assert target.shape == (1, 64, 64)
        assert pixels.dtype == target.dtype == torch.float32
        assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 255
        assert set(target.unique().tolist()) <= {0.0, 1.0}
        seen.append(pixels)
        again = augment(image, mask, settings, np.random.default_rng(seed))
        assert torch.equal(again[0], pixels)
        assert torch.equal(again[1], target)
    assert not torch.equal(seen[0], seen[1])


def test_global_random_state_is_neither_used_nor_moved() -> None:
    image, mask = _pair()
    before = torch.random.get_rng_state()
    first = augment(image, mask, Augmentation(blur=1, noise=0.5), np.random.default_rng(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  # the point is that it does not matter
    second = augment(image, mask, Augmentation(blur=1, noise=0.5), np.random.default_rng(1))
    assert torch.equal(first[0], second[0])


def test_the_mask_moves_with_the_image() -> None:
    # The image is its own mask: after any geometry they must still be the same, but for interpolation at edges.
    mask = _pair()[1]
    image = np.repeat(mask[..., None], 3, axis=2)
    geometry = NO_AUGMENTATION.model_copy(
        update={"horizontal_flip": 0.5, "vertical_flip": 0.5, "quarter_turns": True, "smallest_crop": 0.5}
    )
    places = set()
    for seed in range(40):
        pixels, target = augment(image, mask, geometry, np.random.default_rng(seed))
        assert torch.equal((pixels[:1] >= 128).float(), target)
        y, x = np.nonzero(target[0].numpy())
        places.add((round(float(y.mean())), round(float(x.mean()))))
    assert len(places) > 10


def test_films_and_fans_stay_upright() -> None:
    image, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    image[:8], mask[:8] = 200, 255
    for modality in ("xray", "ultrasound"):
        for seed in range(20):
            _, target = augment(image, mask, default_augmentation(modality), np.random.default_rng(seed))
            assert target[:, 28:].sum() == 0


@pytest.mark.parametrize(
    ("setting", "function"),
    [
        ("brightness", v2.adjust_brightness),
        ("contrast", v2.adjust_contrast),
        ("saturation", v2.adjust_saturation),
    ],
)
def test_colour_matrix_is_torchvisions_adjustment(setting: str, function: object) -> None:
    image, mask = _pair()
    image = (image // 4 + 90).astype(np.uint8)  # away from the ends, where torchvision clamps between steps
    settings = NO_AUGMENTATION.model_copy(update={setting: 0.3})
    pixels, _ = augment(image, mask, settings, np.random.default_rng(5))
    straight = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    factors = torch.linspace(0.7, 1.3, 601)
    errors = [float((function(straight, float(f)) * 255 - pixels).abs().max()) for f in factors]  # type: ignore[operator]
    # The factor drawn lies between two of the grid (0.001 apart); torchvision's luma is 0.2989, 0.587, 0.114.
    assert min(errors) < 0.15


def test_hue_turns_colour_and_keeps_brightness() -> None:
    image = np.full((8, 8, 3), (180, 120, 90), np.uint8)
    settings = NO_AUGMENTATION.model_copy(update={"hue": 0.1})
    turned, _ = augment(image, np.zeros((8, 8), np.uint8), settings, np.random.default_rng(2))
    luma = torch.tensor([0.299, 0.587, 0.114])
    # The published inverse of YIQ has three digits; ours is computed, so the luma stays to float32.
    assert float(luma @ turned[:, 0, 0]) == pytest.approx(float(luma @ torch.tensor([180.0, 120, 90])), abs=1e-3)
    assert float((turned[:, 0, 0] - torch.tensor([180.0, 120, 90])).abs().max()) > 3


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"brightness": 1.5}, {"smallest_crop": 0}, {"blur": 2}, {"zoom": 1}):
        with pytest.raises(ValueError):
            Augmentation.model_validate(wrong)
