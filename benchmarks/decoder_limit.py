"""The best Dice that low-resolution logits can draw: the logits themselves are fitted to masks, with no network at all.

    python benchmarks/decoder_limit.py [DATASET...] [--sizes 256 512 1024] [--count 4] [--json FILE]

The network's logits have a quarter of its input's side and are resized bilinearly. Without DATASET: phantoms.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.masks import Mask, resize_mask
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.phantoms import phantom

STEPS = 150


def main() -> None:
    """Fit, print and, with ``--json``, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024])
    parser.add_argument("--count", type=int, default=4, help="masks a data set")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    environment = collect_environment()
    rows = []
    for size in arguments.sizes:
        for name, masks in sources(arguments.data, arguments.count, size):
            score = limit(
                torch.stack([torch.from_numpy(resize_mask(mask, (size, size)) > 0).float() for mask in masks])
            )
            rows.append({"data": name, "size": size, "masks": len(masks), "dice": round(score, 4)})
            print(f"{name:<28} {size:>5}  {score:.4f}", flush=True)
    if arguments.json:
        result = {"schema": 1, "kind": "decoder-limit", "rows": rows, "environment": environment}
        atomic_write(arguments.json, json.dumps(result, indent=2) + "\n")


def sources(folders: list[Path], count: int, size: int) -> list[tuple[str, list[Mask]]]:
    """The masks of each data set, at their own size; phantoms at ``size``."""
    if not folders:
        return [
            (f"phantom {name}", [phantom(name, i, (size, size))[1] for i in range(count)]) for name in PAPER_MODALITIES
        ]
    opened = [DatasetFolder.open(path) for path in folders]
    return [(folder.name, [folder.load(id_).mask for id_ in folder.ids("train")[:count]]) for folder in opened]


def limit(masks: torch.Tensor) -> float:
    """Mean Dice of the best logits found for (N, S, S) masks of 0 and 1."""
    truth = masks[:, None]
    logits = (F.avg_pool2d(truth, 4) * 8 - 3).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.4)
    for _ in range(STEPS):
        drawn = F.interpolate(logits, truth.shape[-2:], mode="bilinear", align_corners=False)
        inside = drawn.sigmoid()
        overlap = (2 * (inside * truth).sum((1, 2, 3)) + 1) / (inside.sum((1, 2, 3)) + truth.sum((1, 2, 3)) + 1)
        loss = F.binary_cross_entropy_with_logits(drawn, truth) + 1 - overlap.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = (F.interpolate(logits, truth.shape[-2:], mode="bilinear", align_corners=False) >= 0).float()
    dice = 2 * (found * truth).sum((1, 2, 3)) / (found.sum((1, 2, 3)) + truth.sum((1, 2, 3)))
    return float(np.mean(dice.detach().numpy()))


if __name__ == "__main__":
    main()
