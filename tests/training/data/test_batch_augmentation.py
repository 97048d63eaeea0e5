"""Batches made on the training device are what the per-image path makes of the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra train)")
pytest.importorskip("torchvision", reason="needs torchvision (extra train)")
ndimage = pytest.importorskip("scipy.ndimage", reason="needs scipy (extra train)")

from espmedsam_edge.modalities import PAPER_MODALITIES  # noqa: E402
from espmedsam_edge.phantoms import phantom  # noqa: E402
from espmedsam_edge.training.data import image_augmentation  # noqa: E402
from espmedsam_edge.training.data.augmentation import (  # noqa: E402
    NO_AUGMENTATION,
    NOISE_VALUES,
    Augmentation,
    Box,
    Change,
    box_around,
    draw,
    strong_augmentation,
)
from espmedsam_edge.training.data.batch_augmentation import augment_batch  # noqa: E402
from espmedsam_edge.training.data.image_augmentation import apply as apply_in_place  # noqa: E402
from espmedsam_edge.training.data.image_augmentation import noise_bank, paste  # noqa: E402


def apply(image: np.ndarray, mask: np.ndarray, change: Change) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, S, S) and (1, S, S), as batches are."""
    pixels, target = apply_in_place(image, mask, change)
    return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(target)[None]


def _pictures(modality: str, count: int, size: int) -> tuple[list[np.ndarray], list[np.ndarray], torch.Tensor]:
    images, masks = [], []
    for seed in range(count):
        image, mask = phantom(modality, seed, (size, size))
        images.append(np.ascontiguousarray(image[..., ::-1]))
        masks.append(mask)
    stacked = np.stack([np.dstack(pair) for pair in zip(images, masks, strict=True)])
    return images, masks, torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("modality", PAPER_MODALITIES)
@pytest.mark.parametrize("windowed", [False, True])
def test_a_batch_is_its_images_one_by_one(modality: str, windowed: bool) -> None:
    whole = 288 if windowed else 96
    images, masks, stacked = _pictures(modality, 3, whole)
    settings = strong_augmentation(modality).model_copy(update={"blur": 0.5, "elastic": 0.05, "noise": 0.1})
    indices = [seed % 3 for seed in range(24)]
    changes = [draw(settings, whole, 96, np.random.default_rng(seed)) for seed in range(24)]
    pixels, targets = augment_batch(stacked, indices, changes, noise_bank())
    assert targets is not None
    assert pixels.shape == (24, 3, 96, 96)
    for row, (index, change) in enumerate(zip(indices, changes, strict=True)):
        expected, target = apply(images[index], masks[index], change)
        error = (pixels[row] - expected).abs()
        # Both look up in float32 at places in float32: off by 1e-5 pixels here (1e-7 of an image, and its size),
        # times at most 255 between neighbours; saturation, contrast and a gamma in the dark stretch that a few times.
        # Masks part where the interpolated mask is 128 to within that.
        assert float(error.max()) < 0.2
        assert float(error.mean()) < 2e-3
        assert float((targets[row] != target).float().mean()) < 1e-3


def test_untouched_images_and_windows_are_exact() -> None:
    stacked = _pictures("fundus", 2, 96)[2]
    changes = [draw(NO_AUGMENTATION, 96, 96, np.random.default_rng(seed)) for seed in range(2)]
    pixels, targets = augment_batch(stacked, [1, 0], changes, noise_bank())
    assert torch.equal(pixels, stacked[[1, 0], :3].float())
    assert targets is not None
    assert torch.equal(targets * 255, stacked[[1, 0], 3:].float())
    bare, nothing = augment_batch(stacked[:, :3], [1, 0], changes, noise_bank())
    assert torch.equal(bare, pixels)
    assert nothing is None


@pytest.mark.parametrize("exact", [True, False])
def test_geometry_is_where_the_numbers_say(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scipy's interpolation, at places computed pixel by pixel from what the numbers mean."""
    if exact and not image_augmentation._EXACT_REMAP:
        pytest.skip("this OpenCV rounds places")
    monkeypatch.setattr(image_augmentation, "_EXACT_REMAP", exact)
    rng = np.random.default_rng(5)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (80, 80, 3)), (4, 4, 0))
    image = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)
    empty = np.zeros((80, 80), np.uint8)
    for _ in range(6):
        box = Box(*(int(value) for value in rng.integers([-6, -6, 40, 40], [20, 20, 88, 88])))
        mirror = (bool(rng.integers(2)), bool(rng.integers(2)))
        angle = float(rng.uniform(-math.pi, math.pi))
        change = Change(48, box, mirror, angle)
        expected = np.empty((2, 48, 48))
        for i in range(48):
            for j in range(48):
                x, y = (j + 0.5) / 24 - 1, (i + 0.5) / 24 - 1
                x, y = (-x if mirror[0] else x), (-y if mirror[1] else y)
                x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
                expected[:, i, j] = (
                    box.top + (y + 1) / 2 * box.height - 0.5,
                    box.left + (x + 1) / 2 * box.width - 0.5,
                )
        reference = np.stack(
            [ndimage.map_coordinates(image[..., c].astype(float), expected, order=1, mode="reflect") for c in range(3)]
        )
        one, _ = apply(image, empty, change)
        batch, _ = augment_batch(torch.from_numpy(image).permute(2, 0, 1)[None], [0], [change], noise_bank())
        # float32 places: 80 pixels x 1e-7 x a slope of at most some 30 a pixel.
        assert np.abs(one.numpy() - reference).max() < 0.01
        assert np.abs(batch[0].numpy() - reference).max() < 0.01


def test_quarter_turns_and_mirrors_are_numpys() -> None:
    image, mask = phantom("xray", 1, (40, 40))
    for quarters in range(4):
        for mirror in ((False, False), (True, False), (False, True), (True, True)):
            change = Change(24, Box(5, 9, 24, 24), mirror, quarters * math.pi / 2)
            pixels, target = apply(image, mask, change)
            expected = np.rot90(np.dstack([image, mask])[5:29, 9:33], quarters)
            expected = expected[:, ::-1] if mirror[0] else expected
            expected = expected[::-1] if mirror[1] else expected
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected[..., :3])
            assert np.array_equal(target[0].numpy() * 255, expected[..., 3])


def test_light_and_gamma_and_bending_do_what_they_say() -> None:
    grey = np.full((64, 64, 3), 64, np.uint8)
    empty = np.zeros((64, 64), np.uint8)
    whole = Box(0, 0, 64, 64)
    brighter, _ = apply(grey, empty, Change(64, whole, light=np.full((4, 4), math.log(2), np.float32)))
    assert torch.allclose(brighter, torch.tensor(128.0), atol=1e-3)
    darker, _ = apply(grey, empty, Change(64, whole, gamma=2.0))
    assert torch.allclose(darker, torch.tensor(64.0**2 / 255), atol=1e-3)
    # A bend that is the same everywhere moves the whole picture: by a quarter of half a side, 8 pixels.
    ramp = np.repeat(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 1, 1)), 3, axis=2)
    bend = np.zeros((2, 5, 5), np.float32)
    bend[0] = 0.25
    moved, _ = apply(ramp, empty, Change(64, whole, bend=bend))
    assert torch.allclose(moved[:, :, :50], torch.from_numpy(ramp).permute(2, 0, 1)[:, :, 8:58].float(), atol=1e-2)


def test_noise_is_normal_and_differs_from_image_to_image() -> None:
    grey = np.full((200, 200, 3), 127, np.uint8)
    seen = []
    for at in (0, 12_345, NOISE_VALUES - 1000):  # the last goes round the bank's end
        noisy, _ = apply(
            grey, np.zeros((200, 200), np.uint8), Change(200, Box(0, 0, 200, 200), noise=0.05, noise_at=at)
        )
        noise = (noisy - 127) / 255
        assert float(noise.mean()) == pytest.approx(0, abs=5 * 0.05 / math.sqrt(120_000))
        assert float(noise.std()) == pytest.approx(0.05, rel=0.02)
        seen.append(noise.flatten())
    assert abs(float(torch.corrcoef(torch.stack(seen))[0, 1])) < 0.02


def test_pasting_takes_the_image_before_with_its_mask() -> None:
    images = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 8, 8).clone()
    masks = torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 1, 8, 8).clone()
    paste(images, masks, [Box(0, 0, 2, 3), None, Box(4, 4, 4, 4)])
    assert float(images[0, 0, :2, :3].unique()) == 2  # the first takes the last
    assert float(images[0].sum()) == 3 * 6 * 2
    assert float(images[1].unique()) == 1
    assert float(images[2, :, 4:, 4:].unique()) == 1
    assert float(masks[2].sum()) == 16
    assert float(masks[0].sum()) == 0


def test_negative_crops_have_no_target_where_there_is_room() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[60:90, 10:95] = 255
    settings = NO_AUGMENTATION.model_copy(update={"negative": 1.0})
    for seed in range(20):
        change = draw(settings, 100, 100, np.random.default_rng(seed), box_around(mask))
        _, target = apply(np.zeros((100, 100, 3), np.uint8), mask, change)
        assert float(target.sum()) == 0
        assert min(change.box.height, change.box.width) >= 40
    mask[20:80] = 255  # no strip is wide enough any more
    assert draw(settings, 100, 100, np.random.default_rng(0), box_around(mask)).box == Box(0, 0, 100, 100)
    assert box_around(np.zeros((4, 4), np.uint8)) is None


def test_windows_cover_the_whole_image() -> None:
    changes = [draw(NO_AUGMENTATION, 10, 4, np.random.default_rng(seed)) for seed in range(300)]
    assert {change.box.top for change in changes} == {change.box.left for change in changes} == set(range(7))


def test_strong_settings_are_valid_and_stronger() -> None:
    for modality in (*PAPER_MODALITIES, "histopathology", "dental"):
        settings = strong_augmentation(modality)
        assert Augmentation.model_validate(settings.model_dump()) == settings
    assert strong_augmentation("colonoscopy").turn == 180
    assert strong_augmentation("xray").turn == 15
    assert strong_augmentation("xray").vertical_flip == 0
