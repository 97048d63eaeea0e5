"""Training batches: the device's preprocessing, threads that change nothing, a cache within its budget, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra train)")
pytest.importorskip("torchvision", reason="needs torchvision (extra train)")

from espmedsam_edge.bundle import Normalization  # noqa: E402
from espmedsam_edge.errors import UserError  # noqa: E402
from espmedsam_edge.imaging.dataset import DatasetFolder  # noqa: E402
from espmedsam_edge.imaging.geometry import preprocess  # noqa: E402
from espmedsam_edge.imaging.masks import resize_mask  # noqa: E402
from espmedsam_edge.phantoms import phantom  # noqa: E402
from espmedsam_edge.training.data.augmentation import Augmentation, default_augmentation  # noqa: E402
from espmedsam_edge.training.data.dataset import Batch, FolderSource, PhantomSource, TrainingSet  # noqa: E402
from espmedsam_edge.training.data.loader import BatchLoader  # noqa: E402
from espmedsam_edge.training.data.sampler import BatchPlan, Draw, ModalityBatchSampler  # noqa: E402


def _folder(path: Path, count: int = 3, labelled: bool = True) -> DatasetFolder:
    (path / "images").mkdir(parents=True)
    if labelled:
        (path / "masks").mkdir()
    for seed in range(count):
        image, mask = phantom("fundus", seed, (70, 90))
        cv2.imwrite(str(path / "images" / f"{seed}.png"), image)
        if labelled:
            cv2.imwrite(str(path / "masks" / f"{seed}.png"), mask)
    return DatasetFolder.open(path)


def _phantoms(cache_bytes: int = 1 << 30, counts: dict[str, int] | None = None) -> TrainingSet:
    counts = counts or {"fundus": 5, "xray": 9}
    return TrainingSet(
        {name: [PhantomSource(name, count, size=80)] for name, count in counts.items()},
        64,
        augmentations={name: default_augmentation(name) for name in counts},
        cache_bytes=cache_bytes,
    )


def _same(first: Batch, second: Batch) -> bool:
    assert first.masks is not None
    assert second.masks is not None
    return (
        first.modality == second.modality
        and first.names == second.names
        and torch.equal(first.images, second.images)
        and torch.equal(first.masks, second.masks)
    )


def test_unaugmented_images_are_the_devices_input(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "set")
    normalization = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    images = TrainingSet({"fundus": [FolderSource(folder, "all")]}, 64, normalization)
    for _ in range(2):  # read, then from the cache
        batch = images.batch(BatchPlan("fundus", (Draw(0, 1), Draw(2, 2))))
        assert batch.names == (str(folder.path / "images" / "0.png"), str(folder.path / "images" / "2.png"))
        assert batch.masks is not None
        for row, id_ in enumerate(("0", "2")):
            sample = folder.load(id_)
            expected = preprocess(sample.image, 64, normalization)
            # The same formula with its constants multiplied out in another order: a few float32 rounding steps.
            np.testing.assert_allclose(batch.images[row : row + 1].numpy(), expected, atol=2e-6)
            assert np.array_equal(batch.masks[row, 0].numpy() * 255, resize_mask(sample.mask, (64, 64)))


def test_windows_are_parts_of_the_stretched_image_with_their_masks() -> None:
    sources = {"fundus": [PhantomSource("fundus", 1, size=256)], "xray": [PhantomSource("xray", 1, size=80)]}
    images = TrainingSet(sources, 64, image_sizes={"fundus": 192}, windows={"fundus": 96})
    whole = TrainingSet(sources, 192).batch(BatchPlan("fundus", (Draw(0, 1),)))
    assert whole.masks is not None
    places = set()
    for seed in range(6):
        window = images.batch(BatchPlan("fundus", (Draw(0, seed),)))
        assert window.masks is not None
        assert window.images.shape == (1, 3, 96, 96)
        spots = [
            (top, left)
            for top in range(97)
            for left in range(97)
            if torch.equal(whole.images[..., top : top + 96, left : left + 96], window.images)
        ]
        assert len(spots) == 1
        top, left = spots[0]
        assert torch.equal(whole.masks[..., top : top + 96, left : left + 96], window.masks)
        places.add(spots[0])
    assert len(places) > 3  # not always the same window
    assert images.batch(BatchPlan("xray", (Draw(0, 1),))).images.shape == (1, 3, 64, 64)


def test_a_cut_takes_the_same_place_of_images_and_masks() -> None:
    batch = _phantoms().batch(BatchPlan("fundus", (Draw(0, 1), Draw(1, 2))))
    assert batch.masks is not None
    marked = Batch("fundus", batch.masks.expand(-1, 3, -1, -1), batch.masks, batch.names)
    torch.manual_seed(3)
    cuts = [marked.cut(32) for _ in range(8)]
    for cut in cuts:
        assert cut.masks is not None
        assert cut.images.shape == (2, 3, 32, 32)
        assert torch.equal(cut.images[:, :1], cut.masks)
    assert len({cut.masks.numpy().tobytes() for cut in cuts if cut.masks is not None}) > 3
    assert torch.equal(marked.cut(128).images, marked.images)


def test_sources_of_a_modality_are_numbered_through(tmp_path: Path) -> None:
    first, second = _folder(tmp_path / "one", 3), _folder(tmp_path / "two", 2)
    images = TrainingSet({"fundus": [FolderSource(first, "all", limit=2), FolderSource(second, "all")]}, 64)
    assert images.sizes == {"fundus": 4}
    assert images.name("fundus", 1).endswith("one/images/1.png")
    assert images.name("fundus", 3).endswith("two/images/1.png")
    with pytest.raises(IndexError):
        images.name("fundus", 4)


def test_in_order_shows_every_image_once() -> None:
    plans = _phantoms().in_order("xray", 4)
    assert [[draw.index for draw in plan.draws] for plan in plans] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("cache_bytes", [0, 40_000, 1 << 30])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_neither_threads_nor_cache_change_a_batch(cache_bytes: int, workers: int) -> None:
    reference = _phantoms()
    sampler = ModalityBatchSampler(reference.sizes, 3, seed=4, batches=9)
    expected = [reference.batch(plan) for plan in sampler]
    loader = BatchLoader(_phantoms(cache_bytes), sampler, workers=workers)
    got = list(loader)
    assert len(got) == len(expected) == 9
    assert all(_same(a, b) for a, b in zip(got, expected, strict=True))
    assert len(loader) == 0
    assert loader.waited > 0


def test_large_images_come_out_the_same_from_one_core_and_from_several() -> None:
    # Large enough for torch to share an image's pixels out over its threads.
    settings = Augmentation(blur=1, noise=0.1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    images = TrainingSet({"fundus": [PhantomSource("fundus", 2, size=300)]}, 320, augmentations={"fundus": settings})
    sampler = ModalityBatchSampler(images.sizes, 2, batches=3)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        several = [images.batch(plan) for plan in sampler]
    finally:
        torch.set_num_threads(before)
    alone = list(BatchLoader(images, sampler, workers=1))
    assert all(_same(a, b) for a, b in zip(several, alone, strict=True))


def test_the_cache_keeps_to_its_budget() -> None:
    reads: list[int] = []

    class Counting(PhantomSource):
        def load(self, index: int):  # type: ignore[no-untyped-def]
            reads.append(index)
            return super().load(index)

    one = 64 * 64 * 3 + 64 * 64 // 8
    images = TrainingSet({"fundus": [Counting("fundus", 6, size=64)]}, 64, cache_bytes=4 * one + 10)
    for _ in range(3):
        for plan in images.in_order("fundus", 2):
            images.batch(plan)
    assert [reads.count(index) for index in range(6)] == [1, 1, 1, 1, 3, 3]


def test_a_run_resumed_in_mid_epoch_sees_the_same_batches() -> None:
    images = _phantoms()
    sampler = ModalityBatchSampler(images.sizes, 2, seed=8, batches=11)
    whole = list(BatchLoader(images, sampler, workers=0))

    broken = ModalityBatchSampler(images.sizes, 2, seed=8, batches=11)
    first = []
    for number, batch in enumerate(BatchLoader(images, broken, workers=2)):
        first.append(batch)
        if number == 3:
            state = broken.state_dict()  # threads have made batches beyond this one; they do not count
            break
    resumed = ModalityBatchSampler(images.sizes, 2, seed=8, batches=11)
    resumed.load_state_dict(state)
    rest = list(BatchLoader(_phantoms(), resumed, workers=2))
    assert all(_same(a, b) for a, b in zip(whole, first + rest, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_vanishes_stops_at_its_batch_with_the_file_named(tmp_path: Path, workers: int) -> None:
    folder = _folder(tmp_path / "set", 8)
    images = TrainingSet({"fundus": [FolderSource(folder, "all")]}, 64, cache_bytes=0)
    batches = iter(BatchLoader(images, ModalityBatchSampler(images.sizes, 2, batches=40), workers=workers))
    next(batches)
    folder.path.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"set/(images|masks)/\d\.png"):
        list(batches)


def test_unlabelled_photographs_make_batches_without_masks(tmp_path: Path) -> None:
    images = TrainingSet({"natural": [FolderSource(_folder(tmp_path / "set", labelled=False), "all")]}, 64)
    batch = images.batch(images.in_order("natural", 2)[0])
    assert batch.masks is None
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.to("cpu").masks is None


def test_a_batch_with_and_without_masks_names_the_bare_image(tmp_path: Path) -> None:
    sources = [
        FolderSource(_folder(tmp_path / "one", 1), "all"),
        FolderSource(_folder(tmp_path / "two", 1, labelled=False), "all"),
    ]
    images = TrainingSet({"fundus": sources}, 64)
    with pytest.raises(UserError, match=r"two/images/0\.png has no mask"):
        images.batch(images.in_order("fundus", 2)[0])


def test_a_mask_through_jpeg_is_noted_once(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "set", 1)
    mask = folder.load("0").mask
    (folder.path / "masks" / "0.png").unlink()
    cv2.imwrite(str(folder.path / "masks" / "0.jpg"), mask)
    images = TrainingSet({"fundus": [FolderSource(DatasetFolder.open(folder.path), "all")]}, 64, cache_bytes=0)
    for _ in range(2):
        images.batch(images.in_order("fundus", 1)[0])
    assert len(images.notes) == 1
    assert images.notes[0].startswith("0.jpg:")


def test_loading_threads_compute_alone_and_leave_the_trainings_threads_as_they_are() -> None:
    seen: list[int] = []

    class Watching(PhantomSource):
        def load(self, index: int):  # type: ignore[no-untyped-def]
            seen.append(torch.get_num_threads())
            return super().load(index)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        images = TrainingSet({"fundus": [Watching("fundus", 4, size=64)]}, 64, cache_bytes=0)
        for _ in BatchLoader(images, ModalityBatchSampler(images.sizes, 2, batches=6), workers=2):
            assert torch.get_num_threads() == 3
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_leaving_an_epoch_early_leaves_no_thread_behind() -> None:
    import threading

    images = _phantoms()
    batches = iter(BatchLoader(images, ModalityBatchSampler(images.sizes, 2, batches=30), workers=2))
    next(batches)
    close: Callable[[], None] = batches.close  # type: ignore[attr-defined]
    close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch")]
