"""A run killed at any moment and resumed ends with the very weights of a run that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# One process imports everything once and forks a child a run; a child is killed a random moment after one of its
# saves, in whatever it is doing: a step, a save, a validation, writing a log.
_DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import lightning_fabric, monai.losses, torch, torch.utils.tensorboard
from espmedsam_edge.training.recipe import load_recipe
from espmedsam_edge.training.stages import run_stage

torch.set_num_threads(1)
folder, changes = Path(sys.argv[1]), sys.argv[2:]
recipe = load_recipe("smoke", changes)


def child(name, resume):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run_stage("segment", recipe, folder / name, resume=resume)
            code = 0
        finally:
            os._exit(code)
    return pid


assert os.waitpid(child("whole", False), 0)[1] == 0
rng = random.Random(5)
state = folder / "killed" / "state.safetensors"
kills = 0
while True:
    pid, before, saves = child("killed", True), None, 0
    target, delay = rng.randint(1, 3), rng.uniform(0, 0.05)
    while saves < target:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        now = state.stat().st_mtime_ns if state.exists() else None
        saves += now != before
        before = now
        time.sleep(0.001)
    else:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        continue
    assert status == 0
    break
print(kills)
"""

_CHANGES = [
    "model.image_size=64",
    "model.drop_path=0.2",  # draws from torch's random state
    "data.phantoms=4",
    "data.workers=1",
    "run.batch_size=2",
    "run.epochs=2",
    "run.ema=0.9",
    "run.accumulate=2",
    "run.steps_per_epoch=4",
    "run.save_minutes=1e-6",
    "run.sheet_images=1",
    "run.batch_norm_fraction=0.5",
    "run.accelerator=cpu",
    "optimizer.gradient_clip=1",
    "optimizer.name=adamw",
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(tmp_path), *_CHANGES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills = int(done.stdout)
    assert kills >= 3, "the run was not interrupted"
    for name in ("weights.safetensors", "state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name

    def steps(folder: str, file: str) -> list[str]:
        """All columns but the speed."""
        lines = (tmp_path / folder / file).read_text().splitlines()
        return [line.rsplit(",", 1)[0] for line in lines] if file == "train.csv" else lines

    for file in ("train.csv", "valid.csv"):
        assert steps("whole", file) == steps("killed", file)
    assert len(steps("whole", "train.csv")) == 1 + 2 * 4
    leftovers = [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    assert all(name.endswith((".safetensors", ".csv", ".json")) for name in leftovers)  # a killed save's temporary
