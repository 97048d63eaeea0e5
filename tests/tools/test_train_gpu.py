"""tools/train_gpu.py on a processor: what is brought home, whole and from a run that was cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
from safetensors import safe_open
from safetensors.torch import load

from espmedsam_edge.phantoms import phantom

TOOL = Path(__file__).parents[2] / "tools" / "train_gpu.py"


def _data(root: Path) -> Path:
    folder = root / "data" / "fundus" / "drive"
    for seed in range(6):
        image, mask = phantom("fundus", seed, (64, 64))
        for kind, picture in (("images", image), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / kind / f"{seed}.png"), picture)
    (folder / "split.json").write_text(json.dumps({"train": list("0123"), "valid": list("45"), "test": []}))
    return root / "data"


def test_a_rehearsal_brings_home_weights_and_curves(tmp_path: Path) -> None:
    changes = [
        "model.preset=espmedsam-tiny", "model.image_size=64", "model.image_sizes={}", "data.windows={}",
        'data.only=["fundus"]', "run.batch_size=2", "run.steps_per_epoch=2", "run.validate_every=1",
        "run.minutes=0.002", "run.batch_norm_fraction=0.05",
    ]  # fmt: skip
    options = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, TOOL, "--data", _data(tmp_path), "--out", tmp_path / "home", "--work", tmp_path / "work"]
    command += ["--init", "scratch", "--part-mb", "1", "--seconds", "500", *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    home = tmp_path / "home"
    assert {"log.txt", "recipe.json", "train.csv", "valid.csv", "weights16-00"} <= {
        path.name for path in home.iterdir()
    }
    parts = sorted(home.glob("weights16-*"))
    assert all(part.stat().st_size <= 1 << 20 for part in parts)
    (best,) = (tmp_path / "work").glob("run-*/weights.safetensors")
    tensors = load(b"".join(part.read_bytes() for part in parts))
    with safe_open(best, framework="pt") as file:
        assert set(tensors) == set(file.keys())
        for name, tensor in tensors.items():
            original = file.get_tensor(name)
            assert tensor.equal(original.half() if original.is_floating_point() else original)


def test_what_fails_is_told_with_its_log(tmp_path: Path) -> None:
    command = [
        sys.executable,
        TOOL,
        "--data",
        tmp_path / "nothing",
        "--out",
        tmp_path / "home",
        "--work",
        tmp_path / "w",
    ]
    done = subprocess.run(
        [*map(str, command), "--init", "scratch"], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 2
    assert "nothing" in done.stdout
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"log.txt"}  # no run began
