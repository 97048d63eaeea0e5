"""The folder of a run: what a run writes there, and what may be replaced in it."""

from __future__ import annotations

import os
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write
from espmedsam_edge.training.recipe import Recipe

STATE = "state.safetensors"
WEIGHTS = "weights.safetensors"
_DRAWN = ("sheets/epoch-*.jpg", "tensorboard/events.out.tfevents.*")
_WRITTEN = {
    "recipe.json": b"{",
    "train.csv": b"step,epoch,modality,",
    "valid.csv": b"step,epoch,modality,",
}
"""What a run writes beside its state and weights, and how each begins."""


def check_foreign(folder: Path) -> None:
    """Refuse a folder in which a run would replace a file that no run wrote.

    Raises:
        UserError: names the file.
    """
    for name in (STATE, WEIGHTS, *_WRITTEN):
        file = folder / name
        if not os.path.lexists(file):
            continue
        try:
            with file.open("rb") as stream:
                head = stream.read(1 << 16)
        except OSError:
            head = b""
        ours = b'"__metadata__":{"espmedsam' in head if name in (STATE, WEIGHTS) else head.startswith(_WRITTEN[name])
        if not ours:
            raise UserError(f"{file} is not of a training run, and would be replaced.", "Choose another --out.")


def prepare_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make the run's folder and note its recipe.

    Raises:
        UserError: it holds a run and neither ``resume`` nor ``overwrite`` was asked for.
    """
    if (folder / STATE).exists():
        if resume:
            return
        if not overwrite:
            raise UserError(f"{folder} already holds a run.", "Go on with it: --resume; or start anew: --overwrite")
        check_foreign(folder)
        for name in (STATE, WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        for pattern in _DRAWN:
            for file in folder.glob(pattern):
                file.unlink()
    else:
        check_foreign(folder)
        if (folder / WEIGHTS).exists() and not overwrite:
            raise UserError(f"{folder} already holds {WEIGHTS}.", "Choose another --out, or start anew: --overwrite")
    atomic_write(folder / "recipe.json", recipe.model_dump_json(indent=2, exclude_unset=True) + "\n")
