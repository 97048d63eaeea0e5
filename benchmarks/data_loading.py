"""How long training waits for its data: stages of one image, then epochs of the tiny preset with loading threads.

    python benchmarks/data_loading.py [DATA...] [--image-size 512] [--json benchmarks/results/data-loading-MACHINE.json]

Without DATA it writes phantoms as JPEGs of 768 pixels. Run it when nothing else does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.imaging.geometry import Frame, stretch
from espmedsam_edge.imaging.masks import Mask, resize_mask
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.training.data.augmentation import default_augmentation, strong_augmentation
from espmedsam_edge.training.data.dataset import FolderSource, Pair, TrainingSet
from espmedsam_edge.training.data.image_augmentation import augment
from espmedsam_edge.training.data.loader import BatchLoader, BatchMaker
from espmedsam_edge.training.data.sampler import ModalityBatchSampler
from espmedsam_edge.training.data.stock import DeviceStock
from espmedsam_edge.training.losses import MaskLoss, segmentation_loss


def main() -> None:
    """Measure, print and, with ``--json``, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", type=Path, help="dataset folders <modality>/<dataset> (default: phantoms)")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=24, help="batches an epoch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (0: as it chooses)")
    parser.add_argument("--feeding-alone", action="store_true", help="leave the network out")
    parser.add_argument("--note", default="", help="a sentence for the result")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    environment = collect_environment()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [DatasetFolder.open(path) for path in arguments.data] or _phantom_folders(Path(scratch))
        groups: dict[str, list[FolderSource]] = {}
        for folder in folders:
            groups.setdefault(folder.path.resolve().parent.name, []).append(FolderSource(folder, "train"))
        result = {
            "schema": 1,
            "kind": "data-loading",
            "command": "python benchmarks/data_loading.py " + " ".join(_without_paths(sys.argv[1:])),
            "environment": environment,
            "hints": ["busy-machine"] if (environment["load_average_1min"] or 0) > 0.5 else [],
            "settings": {
                key: str(value) for key, value in vars(arguments).items() if key not in ("json", "data", "note")
            },
            "note": arguments.note,
            "images": {name: sum(len(source) for source in group) for name, group in groups.items()},
            "torch_threads": torch.get_num_threads(),
            "stages_ms": _stages(groups, arguments.image_size),
            "epochs": _epochs(groups, arguments),
        }
    _show(result)
    if arguments.json:
        atomic_write(arguments.json, json.dumps(result, indent=2) + "\n")


def _without_paths(words: list[str]) -> list[str]:
    """The command's words, folders cut down to their last two names: results name no machine's directories."""
    return ["/".join(Path(word).parts[-2:]) for word in words]


def _phantom_folders(root: Path, images: int = 24) -> list[DatasetFolder]:
    folders = []
    for modality in PAPER_MODALITIES:
        folder = root / modality / "phantoms"
        for seed in range(images):
            image, mask = phantom(modality, seed, (576, 768))
            write_image(folder / "images" / f"{seed}.jpg", image)
            write_image(folder / "masks" / f"{seed}.png", mask)
        (folder / "split.json").write_text(json.dumps({"train": [str(seed) for seed in range(images)]}))
        folders.append(DatasetFolder.open(folder))
    return folders


def _stages(groups: dict[str, list[FolderSource]], size: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each stage of one image, on the calling thread, by modality."""
    return {modality: _stages_of(modality, sources[0], size) for modality, sources in groups.items()}


def _stages_of(modality: str, source: FolderSource, size: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"read": [], "stretch": [], "augment": []}
    settings, rng = default_augmentation(modality), np.random.default_rng(0)

    def squares(pair: Pair) -> tuple[Frame, Mask]:
        assert pair.mask is not None
        return np.ascontiguousarray(stretch(pair.image, size)[..., ::-1]), resize_mask(pair.mask, (size, size))

    for index in range(min(12, len(source))):
        pair = _timed(times["read"], source.load, index)
        square, mask = _timed(times["stretch"], squares, pair)
        _timed(times["augment"], augment, square, mask, settings, rng)
    return {stage: round(1000 * float(np.median(values)), 2) for stage, values in times.items()}


def _timed(times: list[float], work: Callable[..., Any], *arguments: object) -> Any:
    begin = time.perf_counter()
    result = work(*arguments)
    times.append(time.perf_counter() - begin)
    return result


def _epochs(groups: dict[str, list[FolderSource]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Ways to train the same batches: read in the training thread or in others, cold and warm, and kept on the device.

    Last, batches alone without a network, made one image after the other and on the device.
    """
    size, rows = arguments.image_size, []
    torch.manual_seed(0)
    model = EspMedSam(model_config("espmedsam-tiny"), list(groups)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    loss_function = MaskLoss()
    augmentations = {name: default_augmentation(name) for name in groups}

    def train(loader: BatchLoader, network: bool = True) -> tuple[float, float, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        for batch in loader:
            if not network:
                continue
            assert batch.masks is not None
            loss = segmentation_loss(model(batch.images, batch.modality), batch.masks, loss_function, 1.0).total
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return time.perf_counter() - begin, loader.waited, time.process_time() - cpu

    def sampler(images: TrainingSet, epoch: int) -> ModalityBatchSampler:
        made = ModalityBatchSampler(images.sizes, arguments.batch_size, 0, batches=arguments.batches)
        made.set_epoch(epoch)
        return made

    warm = TrainingSet(groups, size, augmentations=augmentations)
    uncached = TrainingSet(groups, size, augmentations=augmentations, cache_bytes=0)
    train(BatchLoader(uncached, sampler(uncached, 9), workers=0), not arguments.feeding_alone)  # warm-up, not shown
    strong = TrainingSet(groups, size, augmentations={name: strong_augmentation(name) for name in groups})
    stocks = [DeviceStock(images, torch.device("cpu"), arguments.workers) for images in (warm, strong)]
    for epoch in (0, 1):  # the cache of what is fed alone is warm
        train(BatchLoader(strong, sampler(strong, epoch), workers=arguments.workers), network=False)
    threads = f"{arguments.workers} threads"
    plans: Sequence[tuple[str, BatchMaker, int, bool]] = (
        ("in the training thread, no cache", uncached, 0, True),
        (f"{threads}, no cache", uncached, arguments.workers, True),
        (f"{threads}, cache filling", warm, arguments.workers, True),
        (f"{threads}, cache warm", warm, arguments.workers, True),
        ("images on the device", stocks[0], 0, True),
        (f"feeding alone, {threads}", warm, arguments.workers, False),
        ("feeding alone, on the device", stocks[0], 0, False),
        (f"feeding alone, strong, {threads}", strong, arguments.workers, False),
        ("feeding alone, strong, on the device", stocks[1], 0, False),
    )
    for name, images, workers, network in plans:
        if network and arguments.feeding_alone:
            continue
        seconds, waited, cpu = train(BatchLoader(images, sampler(warm, 0), workers=workers), network)
        rows.append(
            {
                "loading": name,
                "epoch_s": round(seconds, 3),
                "waited_s": round(waited, 3),
                "waited_share": round(waited / seconds, 4),
                "cpu_ms_an_image": round(1000 * cpu / (arguments.batches * arguments.batch_size), 2),
                "images_per_s": round(arguments.batches * arguments.batch_size / seconds, 2),
            }
        )
    return rows


def _show(result: dict[str, Any]) -> None:
    if result["hints"]:
        print("busy-machine: other work was running; times are too long, shares of waiting roughly right")
    for modality, stages in result["stages_ms"].items():
        print(f"{modality:14}", "  ".join(f"{stage} {ms:6.2f} ms" for stage, ms in stages.items()))
    for row in result["epochs"]:
        print(
            f"{row['loading']:38} epoch {row['epoch_s']:7.2f} s  waited {row['waited_s']:6.2f} s "
            f"({100 * row['waited_share']:.1f} %)  {row['images_per_s']:.1f} images/s, "
            f"{row['cpu_ms_an_image']:.2f} ms of a core an image"
        )


if __name__ == "__main__":
    main()
