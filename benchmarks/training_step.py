"""Where the time of one training step goes on a processor, by kind of operation, and what is predicted.

    python benchmarks/training_step.py [--preset espmedsam-s] [--image-size 448] [--batch-size 2]
        [--modality colonoscopy] [--precision bf16-mixed] [--parts encoder,controller,prompt,decoder] [--json FILE]

Every operation is counted as torch runs it, forward and backward: its multiply-adds, the bytes of what it reads and
writes, and the processor time of this thread, which other programs lengthen but do not interrupt. Predicted is
operations / rate + bytes / rate, both rates measured here on a large product and a large copy. Shares mean something on
a busy machine; seconds do not. Where an operation takes a larger share than predicted, its kernel is what is slow.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.training.averaging import WeightAverage
from espmedsam_edge.training.losses import MaskLoss
from espmedsam_edge.training.objectives import SegmentationObjective
from espmedsam_edge.training.optimizer import make_optimizer
from espmedsam_edge.training.sections import OptimizerSection
from espmedsam_edge.training.trainable import select, set_training_mode, trainable_names

Sums = dict[str, dict[str, float]]
KINDS = {
    "attention: products and softmax": (
        "bmm",
        "baddbmm",
        "_softmax",
        "_softmax_backward_data",
        "_safe_softmax",
        "_scaled_dot_product",
    ),
    "linear layers": ("mm", "addmm"),
    "layer and batch normalisation": (
        "native_layer_norm",
        "native_batch_norm",
        "cudnn_batch_norm",
        "_native_batch_norm",
    ),
    "GELU": ("gelu",),
    "copies, casts and padding": (
        "clone",
        "copy_",
        "_to_copy",
        "constant_pad_nd",
        "cat",
        "stack",
        "index",
        "roll",
        "_index_put",
    ),
}
REST = "element by element, sums, the rest"


def kind_of(name: str, arguments: Sequence[Any]) -> str:
    """The row of the table that an operation belongs to; convolutions by whether each channel has its own kernel."""
    if name.startswith("convolution"):
        backward = name == "convolution_backward"
        depthwise = arguments[2 if backward else 1].shape[1] == 1
        return f"{'depthwise' if depthwise else 'dense'} convolutions, {'backward' if backward else 'forward'}"
    for kind, names in KINDS.items():
        if any(name == known or (len(known) > 4 and name.startswith(known)) for known in names):
            return kind
    return REST


def convolution_flop(arguments: Sequence[Any], result: Any) -> float:
    """Of a convolution or its gradients (input, weights); torch's own count of the latter forgets groups."""
    if isinstance(result, Tensor):
        image, weight, transposed, wanted, output = arguments[0], arguments[1], arguments[6], 1, result
    else:
        output, image, weight, transposed = arguments[0], arguments[1], arguments[2], arguments[7]
        wanted = sum(arguments[10][:2])
    places = image if transposed else output
    return 2.0 * wanted * places.numel() * weight[0].numel()


class Ledger(TorchDispatchMode):
    """Adds up calls, seconds, multiply-adds and bytes by kind while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Sums = defaultdict(lambda: dict.fromkeys(("calls", "seconds", "flop", "bytes"), 0.0))
        self.phase = ""  # what everything belongs to, in place of its kind

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and note it."""
        begin = time.thread_time()
        result = func(*args, **(kwargs or {}))
        seconds = time.thread_time() - begin
        name = func._overloadpacket.__name__
        entry = self.sums[self.phase or kind_of(name, args)]
        entry["calls"] += 1
        entry["seconds"] += seconds
        if name.startswith("convolution"):
            entry["flop"] += convolution_flop(args, result)
        elif count := flop_registry.get(func._overloadpacket):
            entry["flop"] += count(*args, **(kwargs or {}), out_val=result)
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            entry["bytes"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def best(work: Callable[[], object], amount: float, repeats: int = 7) -> float:
    """How much of something a second, at the best of a few runs."""
    times = []
    for _ in range(repeats):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return amount / min(times)


def rates(dtype: torch.dtype) -> dict[str, float]:
    """Floating-point operations and bytes a second of this thread."""
    side, large = 1024, torch.empty(1 << 26, dtype=torch.uint8)
    matrix, other = torch.ones(side, side, dtype=dtype), torch.empty_like(large)
    return {
        "flop_per_s": best(lambda: matrix @ matrix, 2 * side**3),
        "bytes_per_s": best(lambda: other.copy_(large), 2 * large.numel()),
    }


def counted(arguments: argparse.Namespace) -> Sums:
    """A step's operations; of several steps the least seconds of each kind, which others disturbed least."""
    torch.manual_seed(0)
    config = model_config(arguments.preset).model_copy(update={"image_size": arguments.image_size})
    network = EspMedSam(config, [arguments.modality])
    select(network, trainable_names(network, arguments.parts.split(","), [arguments.modality]))
    objective = SegmentationObjective(network, MaskLoss("bce", 1.0), 1.0)
    optimizer = make_optimizer(network, OptimizerSection(name="adamw"), fused=True)
    average = WeightAverage(network, 0.999)
    set_training_mode(network, freeze_batch_norm=True)
    shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    masks = (torch.rand(arguments.batch_size, 1, *shape[2:]) > 0.8).float()
    sums: Sums = {}
    for number in range(1 + arguments.steps):
        ledger = Ledger()
        with ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16-mixed"):
                loss = objective(images, masks, arguments.modality)["loss"]
            loss.backward()
            ledger.phase = "optimiser, clipping and average"
            torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            average.update(number)
        optimizer.zero_grad(set_to_none=True)
        if number:  # the first warms up
            for kind, entry in ledger.sums.items():
                entry["seconds"] = min(entry["seconds"], sums.get(kind, entry)["seconds"])
            sums = ledger.sums
    return sums


def shares(sums: Sums, rate: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row a kind, the slowest first: its share of the time, and the one predicted."""
    predicted = {kind: e["flop"] / rate["flop_per_s"] + e["bytes"] / rate["bytes_per_s"] for kind, e in sums.items()}
    all_measured, all_predicted = sum(e["seconds"] for e in sums.values()), sum(predicted.values())
    rows = [
        {
            "kind": kind,
            "calls": int(entry["calls"]),
            "gflop": round(entry["flop"] / 1e9, 2),
            "gigabytes": round(entry["bytes"] / 1e9, 3),
            "predicted_percent": round(100 * predicted[kind] / all_predicted, 1),
            "measured_percent": round(100 * entry["seconds"] / all_measured, 1),
            "times_as_predicted": round(entry["seconds"] / predicted[kind], 2) if predicted[kind] else None,
        }
        for kind, entry in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["measured_percent"])


def main() -> None:
    """Measure, print and, with ``--json``, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="espmedsam-s")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--modality", default="colonoscopy")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    parser.add_argument("--parts", default="encoder,controller,prompt,decoder", help="what learns")
    parser.add_argument("--steps", type=int, default=5, help="that are counted")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that this thread's time is all of it
    rate = rates(torch.bfloat16 if arguments.precision == "bf16-mixed" else torch.float32)
    sums = counted(arguments)
    result = {
        "schema": 1,
        "kind": "training-step",
        "environment": collect_environment(),
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "rates": {key: float(f"{value:.3g}") for key, value in rate.items()},
        "seconds": round(sum(entry["seconds"] for entry in sums.values()), 2),
        "operations": shares(sums, rate),
    }
    for row in result["operations"]:
        print(
            f"{row['kind']:40} {row['calls']:5} calls  {row['gflop']:8.2f} GFLOP  {row['gigabytes']:7.3f} GB  "
            f"predicted {row['predicted_percent']:5.1f} %  measured {row['measured_percent']:5.1f} %"
        )
    if arguments.json:
        atomic_write(arguments.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
