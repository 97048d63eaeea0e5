"""A U-Net and ESP-MedSAM-S from random weights, on the same lists, by the same recipe, for the same minutes.

    python benchmarks/unet.py --data ../shared/data --minutes 30 --name unet-MACHINE
    python benchmarks/peers.py page peers-MACHINE

The U-Net is MONAI's BasicUNet with its own defaults, an output a modality, trained in the package's own loop: the same
batches, augmentations, loss, optimiser, schedule and choice by validation. Both are then scored on the test lists at
1024 x 1024 as ``evaluate`` does it, and timed in turn. ``--minutes`` are of training steps, for each of the two, and
count the process's own processor time divided by the cores: neither loses by what else the machine does. With
validation and scoring about twice ``--minutes`` and a quarter of an hour, on two cores that nobody else uses. Stopped
(Ctrl-C, SIGTERM), the same command with ``--resume`` goes on; ``--times`` measures the times alone again, on a quiet
machine. A rehearsal in a minute:

    python benchmarks/unet.py --data ../shared/data --minutes 0.05 --limit 1 --rounds 1 --out runs --name unet-tiny \\
        --set model.preset=espmedsam-tiny --set model.image_size=64 --set 'model.image_sizes={}' \\
        --set 'data.windows={}' --set data.limit=4 --set run.batch_size=2 --set run.steps_per_epoch=4
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.basic_unet import BasicUNet
from processors import in_turn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.evaluation.candidates import TorchCandidate
from espmedsam_edge.evaluation.evaluate import PAPER_SIZE, evaluate, plan_tasks
from espmedsam_edge.evaluation.report import summary
from espmedsam_edge.export.fusion import FusedSegmenter
from espmedsam_edge.export.graph import build_graph
from espmedsam_edge.files import atomic_path, atomic_write
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.model.checkpoint import load_checkpoint
from espmedsam_edge.model.costs import parameters, products
from espmedsam_edge.model.esp_medsam import EspMedSam, ModelOutput
from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.onnx_session import INPUT, open_session
from espmedsam_edge.training import pace
from espmedsam_edge.training.collection import labelled_images, modalities_of
from espmedsam_edge.training.loop import TrainingLoop
from espmedsam_edge.training.losses import MaskLoss
from espmedsam_edge.training.objectives import SegmentationObjective
from espmedsam_edge.training.recipe import Recipe, load_recipe
from espmedsam_edge.training.run_folder import WEIGHTS, prepare_folder
from espmedsam_edge.training.stages import make_fabric, run_stage
from espmedsam_edge.training.start import student_config
from espmedsam_edge.training.state import TrainingProgress

RESULTS = Path(__file__).parent / "results"
RECIPE, UNET, OURS = "segment-s-cpu", "U-Net", "ESP-MedSAM-S"


class UNet(nn.Module):
    """MONAI's BasicUNet, a channel of its output a modality, called as the student is.

    Args:
        modalities: in the order of the channels.
    """

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__()
        self.modalities = list(modalities)
        self.net = BasicUNet(spatial_dims=2, in_channels=3, out_channels=len(self.modalities))

    def forward(self, images: Tensor, modality: str) -> ModelOutput:
        """Logits at the images' own size, (B, 1, S, S); there are no patches and no embedding."""
        channel = self.modalities.index(modality)
        logits = self.net(images)[:, channel : channel + 1]
        return ModelOutput(logits, logits, logits)


def count_processor_time() -> None:
    """Let the minutes of a recipe be those of the processor, all cores at work, instead of the clock's."""
    cores = usable_cores()
    pace.monotonic = lambda: time.process_time() / cores


def train_unet(recipe: Recipe, folder: Path, *, resume: bool) -> tuple[Path, TrainingProgress]:
    """As ``run_stage`` trains the student."""
    fabric = make_fabric(recipe.run)
    prepare_folder(folder, recipe, resume=resume, overwrite=not resume)
    torch.manual_seed(recipe.run.seed)
    network = UNet(modalities_of(recipe))
    # Without a patch generator there is nothing for eq. 5 to teach.
    objective = SegmentationObjective(network, MaskLoss(recipe.loss.pixel, recipe.loss.weight), 0.0)  # type: ignore[arg-type]

    def write(state: dict[str, Tensor], progress: TrainingProgress) -> None:
        with atomic_path(folder / WEIGHTS) as temporary:
            tensors = {name: value.contiguous() for name, value in state.items()}
            save_file(tensors, temporary, {"espmedsam-unet": json.dumps({"step": progress.step})})

    images = labelled_images(recipe, student_config(recipe), Normalization())
    loop = TrainingLoop(fabric, "segment", recipe, objective, images, folder, write)
    if resume:
        loop.resume()
    return folder / WEIGHTS, loop.run()


def score(network: nn.Module, name: str, recipe: Recipe, limit: int) -> dict[str, Any]:
    """Modality -> data set -> means over the test images, as ``evaluate --json`` has them."""
    sizes = student_config(recipe)
    candidate = TorchCandidate(name, network.eval(), sizes.size_of, Normalization(), OURS, untrained=False)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for modality, folders in recipe.data_folders().items():
        tasks = plan_tasks(candidate, folders, modality, "test", limit)
        found |= summary(evaluate(candidate, tasks, size=PAPER_SIZE))
        print(f"    {name} {modality}: {found.get(modality)}", flush=True)
    return found


class OneModality(nn.Module):
    """A network of several, asked for one."""

    def __init__(self, network: nn.Module, modality: str) -> None:
        super().__init__()
        self.network, self.modality = network, modality

    def forward(self, image: Tensor) -> Tensor:
        """Logits, (B, 1, h, w)."""
        logits: Tensor = self.network(image, self.modality).low_res_logits
        return logits


def runtimes(network: nn.Module, modality: str, size: int, threads: int) -> dict[str, Callable[[], object]]:
    """One modality's network on an image of ``size`` pixels: eager in PyTorch; in ONNX Runtime, ours fused."""
    image, one = torch.randn(1, 3, size, size), OneModality(network, modality).eval()
    exported = FusedSegmenter(network, modality, size) if isinstance(network, EspMedSam) else one
    session = open_session(build_graph(exported, size).SerializeToString(), threads)
    array = image.numpy()

    def eager() -> None:
        with torch.inference_mode():
            one(image)

    return {"PyTorch": eager, "ONNX Runtime": lambda: session.run(None, {INPUT: array})}


def time_in_turn(networks: dict[str, nn.Module], recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Side in pixels -> network and runtime -> milliseconds, and multiply-accumulates."""
    config, threads, found = student_config(recipe), usable_cores(), {}
    torch.set_num_threads(threads)
    for network in networks.values():
        network.eval().requires_grad_(False)
    sizes = {config.size_of(modality): modality for modality in modalities_of(recipe)}
    for size, modality in sorted(sizes.items()):
        runs = {
            f"{name}, {runtime}": run
            for name, network in networks.items()
            for runtime, run in runtimes(network, modality, size, threads).items()
        }
        series = in_turn(runs, rounds)
        image = torch.zeros(1, 3, size, size)
        found[str(size)] = {
            "ms": {name: Latency.of(times).milliseconds() for name, times in series.items()},
            "mac": {n: products(lambda n=n: networks[n](image, modality)) for n in networks},  # noqa: B023
        }
    return found


def load(name: str, path: Path, recipe: Recipe) -> nn.Module:
    """One of both, as its training wrote it."""
    if name == OURS:
        return load_checkpoint(path)[0]
    network = UNet(modalities_of(recipe))
    network.load_state_dict(load_file(path))
    return network.eval()


def train_and_score(options: argparse.Namespace, recipe: Recipe, changes: list[str], place: Path) -> dict[str, Any]:
    """The result without times, as it is written to ``place``."""
    if options.minutes <= 0:
        raise UserError(f"--minutes {options.minutes:g} is no time to train.", "Give more than 0.")
    for folders in recipe.data_folders().values():  # before an hour of training: what it will be scored on is there
        for folder in folders:
            DatasetFolder.open(folder).ids("test")
    result: dict[str, Any] = {
        "schema": 1, "kind": "unet", "environment": collect_environment(), "recipe": RECIPE,
        "changes": changes, "minutes": options.minutes, "networks": {},
    }  # fmt: skip
    count_processor_time()
    print(f"{UNET}, {options.minutes:g} minutes", flush=True)
    unet_file, unet_progress = train_unet(recipe, options.work / "unet", resume=options.resume)
    print(f"{OURS}, {options.minutes:g} minutes", flush=True)
    our_file, our_progress = run_stage(
        "segment", recipe, options.work / "ours", resume=options.resume, overwrite=not options.resume
    )
    for name, file, progress in ((UNET, unet_file, unet_progress), (OURS, our_file, our_progress)):
        network = load(name, file, recipe)
        result["networks"][name] = {
            "parameters": parameters(network), "steps": progress.step, "minutes": round(progress.spent / 60, 2),
            "validation_dice": progress.best, "scores": score(network, name, recipe, options.limit),
        }  # fmt: skip
    atomic_write(place, json.dumps(result, indent=1) + "\n")
    return result


def run(options: argparse.Namespace) -> None:
    """Train and score, unless that is there; time; the result is written as far as it is."""
    changes = [f"data.root={json.dumps(str(options.data.resolve()))}", f"run.minutes={options.minutes}"]
    changes += [f"schedule.warmup_minutes={options.minutes / 27:.4f}", *options.changes]  # the recipe's 1 of 27 epochs
    recipe = load_recipe(RECIPE, changes).for_stage("segment")
    place = options.out / f"{options.name}.json"
    result = json.loads(place.read_text()) if options.times else train_and_score(options, recipe, changes[1:], place)
    networks = {
        UNET: load(UNET, options.work / "unet" / WEIGHTS, recipe),
        OURS: load(OURS, options.work / "ours" / WEIGHTS, recipe),
    }
    result["times"] = time_in_turn(networks, recipe, options.rounds)
    atomic_write(place, json.dumps(result, indent=1) + "\n")
    print(place)


def main() -> None:
    """The command."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with MODALITY/DATASET as in docs/data.md")
    parser.add_argument("--name", required=True, help="of the result, without its ending: unet-MACHINE")
    parser.add_argument("--minutes", type=float, default=30, help="of training steps, for each network")
    parser.add_argument("--work", type=Path, default=Path("runs/unet"), help="where the two runs are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit", type=int, default=0, help="at most so many test images a set; 0: all")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--times", action="store_true", help="only measure the times of an earlier result again")
    try:
        run(parser.parse_args())
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
