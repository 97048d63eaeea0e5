"""``espmedsam-edge evaluate``: a model and dataset folders in, the paper's metrics out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from espmedsam_edge.cli.messages import counting_bar, once, tell_failures
from espmedsam_edge.terminal import tell, terminal_console

if TYPE_CHECKING:
    from espmedsam_edge.evaluation.evaluate import Evaluation, Task


def command(
    model: Path = typer.Argument(..., help="A bundle, or a checkpoint (.safetensors; needs torch)."),
    data: list[Path] = typer.Argument(..., metavar="DATA...", help="Dataset folders: images/, masks/, split.json."),
    modality: str | None = typer.Option(None, help="Of all DATA. [default: from the folder's place or split.json]"),
    precision: str | None = typer.Option(None, help="Of a bundle: fp32, fp16 or int8. [default: fp32, else the best]"),
    backend: str = typer.Option("auto", help="What runs a bundle's graphs."),
    tta: bool = typer.Option(False, "--tta", help="Average over mirrored and turned copies, as infer --tta does."),
    split: str = typer.Option("test", help="train, valid, test or all."),
    size: int = typer.Option(
        1024, min=32, max=8192, help="Side of the square at which scores are taken; the paper's is 1024."
    ),
    native: bool = typer.Option(False, "--native", help="Also score at each image's own size."),
    json: Path | None = typer.Option(None, help="A file for the means by modality and dataset."),
    csv: Path | None = typer.Option(None, help="A file for the scores of every image."),
    worst: Path | None = typer.Option(None, help="A folder for pictures of the worst cases, one sheet a dataset."),
    worst_count: int = typer.Option(6, min=1, max=50, help="Cases on a sheet."),
    limit: int = typer.Option(0, min=0, help="At most so many images a dataset; 0: all."),
    sam: Path | None = typer.Option(None, help="SAM's checkpoint, for a teacher saved without it."),
    device: str = typer.Option("auto", help="Of a checkpoint: cpu, cuda or auto."),
    threads: int | None = typer.Option(None, min=1, help="CPU threads. [default: the cores there are]"),
    tile: str = typer.Option(
        "auto", metavar="auto|off|SIZE", help="Of a bundle: large images in tiles of SIZE pixels, whole, or as it says."
    ),
    overwrite: bool | None = typer.Option(
        None, "--overwrite/--no-overwrite", help="Replace files that exist, or none. [default: what this program wrote]"
    ),
) -> None:
    """Score a model on labelled images: Dice, IoU, HD and HD95, beside the paper's figures.

    An image that cannot be read is reported at the end and the rest is done (exit code 1).
    """
    from espmedsam_edge.destinations import Destination, held
    from espmedsam_edge.evaluation.candidates import open_candidate
    from espmedsam_edge.evaluation.evaluate import evaluate, plan_tasks
    from espmedsam_edge.evaluation.report import sheet_file, write_csv, write_json, write_sheets
    from espmedsam_edge.marks import MEANS, PICTURE, SCORES

    candidate = open_candidate(
        model,
        precision=precision,
        backend=backend,
        threads=threads,
        sam=sam,
        device=device,
        tta=tta,
        tile=tile,
    )
    tasks = plan_tasks(candidate, data, modality, split, limit)
    wanted = [Destination(path, kind) for path, kind in ((json, MEANS), (csv, SCORES)) if path is not None]
    if worst is not None:
        wanted += [Destination(sheet_file(worst, task.modality, task.folder.name), PICTURE) for task in tasks]
    read = [model, *([] if sam is None else [sam]), *(file for task in tasks for file in task.folder.files())]
    with held(wanted, read, overwrite) as unchanged:
        with once(), counting_bar("starting", sum(len(task.ids) for task in tasks)) as bar:

            def on_image(task: Task) -> None:
                if bar is not None:
                    bar(advance=1, description=f"{task.modality} {task.folder.name}")

            evaluation = evaluate(
                candidate,
                tasks,
                split=split,
                size=size,
                native=native,
                worst=worst_count if worst else 0,
                progress=on_image,
            )
        _show(evaluation, native)
        unchanged()
        if json is not None:
            write_json(json, evaluation)
        if csv is not None:
            write_csv(csv, evaluation)
        if worst is not None:
            for file in write_sheets(worst, evaluation):
                tell(f"worst cases: {file}")
    tell_failures([failure.message for failure in evaluation.failures])
    raise typer.Exit(1 if evaluation.failures else 0)


def _show(evaluation: Evaluation, native: bool) -> None:

    from espmedsam_edge.evaluation.paper import paper_tables
    from espmedsam_edge.evaluation.report import build_published_tables, build_table

    console = terminal_console(width=None if sys.stdout.isatty() else 140)
    if evaluation.results:
        console.print(build_table(evaluation))
        if native:
            console.print(build_table(evaluation, native=True))
        for table in build_published_tables(evaluation, console.width):
            console.print(table)
        console.print(f"paper: {evaluation.method}; {paper_tables().source}. Its images and splits are not these.")
    notes = sum(bool(result.note) for result in evaluation.results)
    if notes:
        console.print(
            f"{notes} masks were cut at half (grey values) or belong to a turned photograph; --csv says which."
        )
    if evaluation.untrained:
        console.print("These weights were never trained: the scores mean nothing.")
