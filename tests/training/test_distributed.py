"""Two processes under torchrun compute the gradients of one process with the doubled batch, and train to its end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from espmedsam_edge.model.checkpoint import load_checkpoint
from espmedsam_edge.training import loop
from espmedsam_edge.training.recipe import Recipe
from espmedsam_edge.training.stages import run_stage

# Writes the gradients of the first optimiser step, then trains on.
_DRIVER = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from espmedsam_edge.training import loop
from espmedsam_edge.training.recipe import load_recipe
from espmedsam_edge.training.stages import run_stage

torch.set_num_threads(1)
folder, changes = Path(sys.argv[1]), sys.argv[2:]
step, rank = torch.optim.Adam.step, os.environ["RANK"]


def record(self, *arguments, **options):
    if not (folder / f"gradients-{rank}").exists():
        network = running[0].network
        save_file(
            {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None},
            folder / f"gradients-{rank}",
        )
    return step(self, *arguments, **options)


running = []
start = loop.TrainingLoop.run
loop.TrainingLoop.run = lambda self: (running.append(self), start(self))[1]
torch.optim.Adam.step = record
run_stage("segment", load_recipe("smoke", changes), folder / "run")
"""


def test_two_processes_are_one_with_the_doubled_batch(
    tmp_path: Path, small_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Statistics of half batches are not those of whole ones, so batch normalisation uses the running ones. With two
    # batches a step both modalities meet in one step; each bag's gradient comes from one of them.
    common = ["run.batch_norm_fraction=0", "run.accumulate=2", "run.epochs=2", "data.phantoms=8"]
    changes = [*_small(), *common, "run.batch_size=2"]
    (tmp_path / "driver.py").write_text(_DRIVER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
            str(tmp_path / "driver.py"), str(tmp_path), *changes,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    gradients: dict[str, torch.Tensor] = {}
    step = torch.optim.Adam.step

    def record(self: torch.optim.Adam) -> None:
        if not gradients:
            names = {id(p): name for name, p in networks[0].named_parameters()}
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        gradients[names[id(p)]] = p.grad.clone()
        step(self)

    networks: list[torch.nn.Module] = []
    run = loop.TrainingLoop.run
    monkeypatch.setattr(loop.TrainingLoop, "run", lambda self: (networks.append(self.network), run(self))[1])
    monkeypatch.setattr(torch.optim.Adam, "step", record)
    whole, _ = run_stage("segment", small_recipe(*common, "run.batch_size=4"), tmp_path / "one")

    two = [load_file(tmp_path / f"gradients-{rank}") for rank in (0, 1)]
    assert set(gradients) == set(two[0]) == set(two[1])
    assert any(name.startswith("controller.fundus.") for name in gradients)
    assert any(name.startswith("controller.dermoscopy.") for name in gradients)
    for name, gradient in gradients.items():
        assert torch.equal(two[0][name], two[1][name]), name
        worst = (gradient - two[0][name]).abs().max().item()
        assert worst <= 1e-5 * max(1.0, gradient.abs().max().item()), (name, worst)  # the required bound
    assert sum(g.abs().sum() for g in gradients.values()) > 1  # they are not all zero
    # Adam turns rounding of tiny gradients into whole steps of the learning rate, so the weights agree only roughly.
    one, many = load_checkpoint(whole)[0].state_dict(), load_checkpoint(tmp_path / "run" / "weights.safetensors")[0]
    difference = torch.cat(
        [(one[k] - v).abs().flatten() for k, v in many.state_dict().items() if v.is_floating_point()]
    )
    assert difference.mean() < 1e-3
    assert len((tmp_path / "run" / "train.csv").read_text().splitlines()) == 1 + 2 * 2  # one process writes


def _small() -> list[str]:
    return [
        "model.image_size=64",
        "data.workers=0",
        "run.sheet_images=1",
        "run.accelerator=cpu",
    ]
