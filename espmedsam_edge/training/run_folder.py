"""The folder of a run: what a run writes there, and what may be replaced in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, identity, read_json, read_regular
from espmedsam_edge.marks import PICTURE
from espmedsam_edge.training.recipe import SCRATCH, Recipe

STATE = "state.safetensors"
WEIGHTS = "weights.safetensors"
EVENTS_SUFFIX = ".espmedsam-edge"
"""How the names of a run's TensorBoard events end; others may lie beside them."""
_RECIPE = "recipe.json"
_TABLES = {"train.csv": b"step,epoch,modality,", "valid.csv": b"step,epoch,modality,"}
"""Name -> how it begins."""
_SHEET = re.compile(r"epoch-\d{4,}\.jpg")
_MOST_RECIPE_BYTES = 16 << 20


def check_foreign(folder: Path) -> None:
    """Refuse a folder in which a run would replace a file that no run wrote.

    Raises:
        UserError: names the file.
    """
    for file in (*(folder / name for name in (STATE, WEIGHTS, _RECIPE, *_TABLES)), *_sheets(folder)):
        if os.path.lexists(file) and not _is_ours(file):
            raise UserError(
                f"{file} is not of a training run that this version knows, and would be replaced.",
                "Choose another --out; a run's of an earlier version can be moved away.",
            )


def _is_ours(file: Path) -> bool:
    if not file.is_file():  # opening a pipe would wait for its writer
        return False
    try:
        if file.name == _RECIPE:
            values = read_json(read_regular(file, _MOST_RECIPE_BYTES))
            return isinstance(values, dict) and values.keys() <= Recipe.model_fields.keys()
        if file.suffix == ".jpg":
            return PICTURE.wrote(file)
        with file.open("rb") as stream:
            head = stream.read(1 << 16)
    except (OSError, ValueError):
        return False
    if (begin := _TABLES.get(file.name)) is not None:
        return head.startswith(begin) or begin.startswith(head)  # as a kill may leave it
    return b'"__metadata__":{"espmedsam' in head


def _sheets(folder: Path) -> Iterator[Path]:
    return (file for file in folder.glob("sheets/*") if _SHEET.fullmatch(file.name))


def check_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that a run must not write to, before any work; nothing in it changes.

    Raises:
        UserError: it holds a run and neither ``resume`` nor ``overwrite`` was asked for, a file that no run wrote where
            one of a run goes, or what the recipe starts or learns from.
    """
    check_inputs(folder, recipe)
    begun = (folder / STATE).exists()
    if begun and not (resume or overwrite):
        raise UserError(f"{folder} already holds a run.", "Go on with it: --resume; or start anew: --overwrite")
    check_foreign(folder)
    if not begun and (folder / WEIGHTS).exists() and not overwrite:
        raise UserError(f"{folder} already holds {WEIGHTS}.", "Choose another --out, or start anew: --overwrite")


def check_inputs(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder in which a run would replace the weights that its recipe names.

    Raises:
        UserError: names the file.
    """
    named = (None if recipe.init == SCRATCH else Path(recipe.init), recipe.teacher.sam, recipe.teacher.checkpoint)
    read = {identity(file) for file in named if file is not None} - {None}
    for file in (folder / STATE, folder / WEIGHTS):
        if identity(file) in read:
            raise UserError(f"{file} is what the run reads, and would be replaced.", "Choose another --out.")


def prepare_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make the run's folder and note its recipe, once all that the run reads was found good: an old run goes.

    Raises:
        UserError: as ``check_folder``.
    """
    check_folder(folder, recipe, resume=resume, overwrite=overwrite)
    if (folder / STATE).exists():
        if resume:
            return
        for name in (STATE, WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        for file in (*_sheets(folder), *folder.glob(f"tensorboard/events.out.tfevents.*{EVENTS_SUFFIX}")):
            file.unlink()
    atomic_write(folder / _RECIPE, recipe.model_dump_json(indent=2, exclude_unset=True) + "\n")
