"""A training set on the device: the same batches as from the images one by one, whatever it holds."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra train)")
pytest.importorskip("torchvision", reason="needs torchvision (extra train)")

from espmedsam_edge.errors import UserError  # noqa: E402
from espmedsam_edge.imaging.dataset import DatasetFolder  # noqa: E402
from espmedsam_edge.phantoms import phantom  # noqa: E402
from espmedsam_edge.training.data.augmentation import strong_augmentation  # noqa: E402
from espmedsam_edge.training.data.dataset import (  # noqa: E402
    FolderSource,
    NegativeSource,
    PhantomSource,
    TrainingSet,
    TrainingSource,
)
from espmedsam_edge.training.data.loader import BatchLoader  # noqa: E402
from espmedsam_edge.training.data.sampler import BatchPlan, Draw, ModalityBatchSampler  # noqa: E402
from espmedsam_edge.training.data.stock import DeviceStock, fits, stock_bytes  # noqa: E402
from espmedsam_edge.training.sections import DataSection  # noqa: E402

CPU = torch.device("cpu")


def _images() -> TrainingSet:
    sources: dict[str, list[TrainingSource]] = {
        "fundus": [PhantomSource("fundus", 3, size=200)],
        "colonoscopy": [PhantomSource("colonoscopy", 5, size=70)],
    }
    settings = {name: strong_augmentation(name).model_copy(update={"negative": 0.3}) for name in sources}
    return TrainingSet(
        sources, 64, augmentations=settings, image_sizes={"fundus": 192}, windows={"fundus": 96}, cache_bytes=0
    )


def test_batches_are_those_of_the_training_set() -> None:
    images = _images()
    sampler = ModalityBatchSampler(images.sizes, 6, seed=3, batches=8)
    loader = BatchLoader(DeviceStock(images, CPU), sampler, workers=0)
    for plan, batch in zip(list(sampler), loader, strict=True):
        expected = images.batch(plan)
        assert (batch.modality, batch.names) == (expected.modality, expected.names)
        assert batch.masks is not None
        assert expected.masks is not None
        assert batch.images.shape == expected.images.shape
        # As in test_batch_augmentation, 0.2 of 255, divided by the normalisation's smallest deviation, 0.224.
        assert float((batch.images - expected.images).abs().max()) < 0.2 / 255 / 0.224
        assert float((batch.masks != expected.masks).float().mean()) < 1e-3
    assert len(loader) == 0


def test_a_batch_depends_on_its_plan_alone() -> None:
    plan = BatchPlan("colonoscopy", (Draw(1, 11), Draw(1, 12), Draw(4, 13)))
    first, second = (DeviceStock(_images(), CPU, workers).batch(plan) for workers in (1, 3))
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images[0], first.images[1])


def _folder(path: Path, masks: bool) -> DatasetFolder:
    for seed in range(2):
        image, mask = phantom("fundus", seed, (64, 64))
        for kind, picture in (("images", image), ("masks", mask))[: 2 if masks else 1]:
            (path / kind).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path / kind / f"{seed}.png"), picture)
    return DatasetFolder.open(path)


def test_pictures_without_masks_and_without_target(tmp_path: Path) -> None:
    bare, labelled = _folder(tmp_path / "bare", False), _folder(tmp_path / "labelled", True)
    plan = BatchPlan("fundus", (Draw(0, 1), Draw(2, 2)))
    photographs = TrainingSet({"fundus": [FolderSource(bare, "all"), FolderSource(bare, "all")]}, 64)
    assert DeviceStock(photographs, CPU).batch(plan).masks is None
    negatives = TrainingSet({"fundus": [FolderSource(labelled, "all"), NegativeSource(labelled, "all")]}, 64)
    for batch in (DeviceStock(negatives, CPU).batch(plan), negatives.batch(plan)):
        assert batch.masks is not None
        assert batch.masks[0].sum() > 0
        assert batch.masks[1].sum() == 0
    mixed = TrainingSet({"fundus": [FolderSource(labelled, "all"), FolderSource(bare, "all")]}, 64)
    with pytest.raises(UserError, match="has no mask but other fundus images have"):
        DeviceStock(mixed, CPU)


def test_what_does_not_fit_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    images, gpu = _images(), torch.device("cuda")
    assert stock_bytes(images) == 4 * (3 * 192**2 + 5 * 64**2)  # 0.5 MB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 << 20, 80 << 30))
    assert fits(images, gpu, DataSection())
    assert not fits(images, gpu, DataSection(device_gb=0.4 / 1024))
    assert not fits(images, gpu, DataSection(feeding="images"))
    assert not fits(images, CPU, DataSection())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900 << 10, 80 << 30))
    assert not fits(images, gpu, DataSection())  # the network needs some
