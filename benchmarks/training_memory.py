"""Peak memory of one training step of the student, measured by the process's own resident memory.

    python benchmarks/training_memory.py [--preset espmedsam-s] [--target 1024x4] [--json FILE] [SIZExBATCH...]

Each case is a process of its own: forward, backward and an Adam step of every parameter (training from scratch, the
heaviest stage) under bf16 autocast, with and without activation checkpointing. What grows with size x size x batch is
fitted by least squares and extrapolated to the target. On a GPU other kernels run: attention keeps less there,
convolutions may want workspace, so take the result as an estimate.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

GIB = 2**30
CASES = ("256x1", "512x1", "512x2", "1024x1")


def main() -> None:
    """Measure, fit, print and, with ``--json``, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--preset", default="espmedsam-s")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--target", default="1024x4")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "CHECKPOINTING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        case, checkpointing = arguments.one
        print(json.dumps(measure(arguments.preset, *parse(case), checkpointing == "1", arguments.precision)))
        return
    import numpy as np

    from espmedsam_edge.files import atomic_write
    from espmedsam_edge.machine.environment import collect_environment

    rows: list[dict[str, Any]] = []
    estimates = {}
    size, batch = parse(arguments.target)
    for checkpointing in (False, True):
        found = []
        for case in arguments.cases:
            command = [sys.executable, __file__, "--preset", arguments.preset, "--precision", arguments.precision]
            command += ["--one", case, str(int(checkpointing))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            found.append(row)
            print(f"{case:>8}  checkpointing {checkpointing!s:5}  {row['peak_gib']:.2f} GiB", flush=True)
        rows += found
        pixels = np.array([[row["size"] ** 2 * row["batch"], 1.0] for row in found])
        slope, fixed = np.linalg.lstsq(pixels, np.array([row["peak_gib"] for row in found]), rcond=None)[0]
        name = "with_checkpointing" if checkpointing else "without_checkpointing"
        estimates[name] = round(float(slope * size * size * batch + fixed), 2)
        print(f"{arguments.target:>8}  checkpointing {checkpointing!s:5}  {estimates[name]:.2f} GiB, extrapolated")
    if arguments.json:
        result = {
            "schema": 1,
            "kind": "training-memory",
            "preset": arguments.preset,
            "precision": arguments.precision,
            "measured": rows,
            "target": arguments.target,
            "estimated_gib": estimates,
            "environment": collect_environment(),
        }
        atomic_write(arguments.json, json.dumps(result, indent=2) + "\n")


def parse(case: str) -> tuple[int, int]:
    """Size and batch of a case: 512 and 2 of "512x2"."""
    size, _, batch = case.partition("x")
    return int(size), int(batch)


def measure(preset: str, size: int, batch: int, checkpointing: bool, precision: str) -> dict[str, Any]:
    """One step; ``peak_gib`` is what the process grew by, network and optimiser included."""
    import torch

    from espmedsam_edge.model.config import model_config
    from espmedsam_edge.model.esp_medsam import EspMedSam
    from espmedsam_edge.training.losses import MaskLoss, segmentation_loss

    torch.set_num_threads(1)
    loss = MaskLoss()
    _step(EspMedSam(model_config("espmedsam-tiny"), ["fundus"]), loss, segmentation_loss, 64, 1, precision)  # libraries
    before = resident()
    network = EspMedSam(model_config(preset), ["fundus"]).train()
    network.encoder.activation_checkpointing = checkpointing
    _step(network, loss, segmentation_loss, size, batch, precision)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / GIB
    return {"size": size, "batch": batch, "checkpointing": checkpointing, "peak_gib": round(peak, 3)}


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _step(network: Any, loss: Any, segmentation_loss: Any, size: int, batch: int, precision: str) -> None:
    import torch

    optimizer = torch.optim.Adam(network.parameters())
    images, masks = torch.randn(batch, 3, size, size), (torch.rand(batch, 1, size, size) > 0.9).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        output = network(images, "fundus")
    segmentation_loss(output, masks, loss).total.backward()
    optimizer.step()


if __name__ == "__main__":
    main()
