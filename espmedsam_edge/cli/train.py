"""``espmedsam-edge train``: one command a stage, a recipe in, a checkpoint out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from espmedsam_edge.terminal import tell

if TYPE_CHECKING:
    from espmedsam_edge.training.recipe import Stage

app = typer.Typer(no_args_is_help=True, help="Train the teacher and the student: a recipe in, a checkpoint out.")

_RECIPE = typer.Argument(..., help="A TOML file, or the name of a recipe that comes with the package.")
_SET = typer.Option([], "--set", metavar="KEY=VALUE", help="Change a key of the recipe, e.g. run.epochs=50.")
_INIT = typer.Option(None, "--init", help="What to start from: 'scratch' or a checkpoint; short for --set init=...")
_DATA = typer.Option(None, "--data", help="What the recipe's relative folders start from; --set data.root=...")
_OUT = typer.Option(None, "--out", help="The run's folder; default runs/STAGE.")
_RESUME = typer.Option(False, "--resume", help="Go on where an interrupted run in that folder stopped.")
_OVERWRITE = typer.Option(False, "--overwrite", help="Throw away the run in that folder.")


def _say(path: Path, best: float | None, epoch: int) -> None:
    when = f"in epoch {epoch}" if epoch else "before the first step: it holds what the run started from"
    score = f", best score {best:.4f} {when}" if best is not None else ""
    tell(f"{path}{score}")


def _command(stage: Stage | Literal["all"]) -> Callable[..., None]:
    def command(
        recipe: str = _RECIPE,
        changes: list[str] = _SET,
        init: str | None = _INIT,
        data: Path | None = _DATA,
        out: Path | None = _OUT,
        resume: bool = _RESUME,
        overwrite: bool = _OVERWRITE,
    ) -> None:
        from espmedsam_edge.training.recipe import load_recipe
        from espmedsam_edge.training.stages import run_all, run_stage

        shortcuts = [f"{key}={value}" for key, value in (("init", init), ("data.root", data)) if value is not None]
        loaded, folder = load_recipe(recipe, [*changes, *shortcuts]), out or Path("runs") / stage
        if stage == "all":
            path, progress = run_all(loaded, folder, resume=resume, overwrite=overwrite)
        else:
            path, progress = run_stage(stage, loaded, folder, resume=resume, overwrite=overwrite)
        _say(path, progress.best, progress.best_epoch)

    return command


_STAGES: dict[Stage | Literal["all"], str] = {
    "teacher": "Train ESP-MedSAM-T: tokens and MLPs beside SAM's frozen encoder, prompt generator, decoder.",
    "distill-encoder": "Teach the light encoder SAM's features of photographs (eq. 1, first term).",
    "distill-controllers": "Teach each modality's bag the medical teacher's features (eq. 1, second term).",
    "segment": "Train the student on masks: prompt generator and decoder, or all of it from scratch.",
    "all": "Run the recipe's stages one after the other.",
}
for _stage, _line in _STAGES.items():
    app.command(_stage, help=_line)(_command(_stage))


@app.command("add-modality")
def add_modality(
    name: str = typer.Argument(..., help="What to call it: lower-case letters, digits and '_'."),
    folders: list[Path] = typer.Argument(..., help="Its dataset folders."),
    init: Path = typer.Option(..., "--init", help="The checkpoint to add it to; nothing in it changes."),
    target: str | None = typer.Option(None, "--target", help="What its masks show, in words."),
    like: str | None = typer.Option(None, "--like", help="Start from this modality's bag, query and MLP."),
    recipe: str = typer.Option("add-modality", "--recipe", help="A TOML file or the name of a recipe."),
    changes: list[str] = _SET,
    out: Path | None = _OUT,
    resume: bool = _RESUME,
    overwrite: bool = _OVERWRITE,
) -> None:
    """Add a modality to a trained checkpoint and train only its bag, query and MLP (Table V)."""
    from espmedsam_edge.training.recipe import load_recipe, with_new_modality
    from espmedsam_edge.training.stages import run_stage

    loaded = with_new_modality(load_recipe(recipe, changes), name, folders, init, target=target, like=like)
    path, progress = run_stage(
        "add-modality", loaded, out or Path("runs") / f"add-{name}", resume=resume, overwrite=overwrite
    )
    _say(path, progress.best, progress.best_epoch)
