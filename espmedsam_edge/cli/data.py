"""``espmedsam-edge data``: images with masks into dataset folders, dataset folders checked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from espmedsam_edge.cli.messages import counting_bar, tell_failures
from espmedsam_edge.terminal import tell, terminal_console

app = typer.Typer(no_args_is_help=True, help="Convert images and masks into dataset folders, and check such folders.")


def _counted(bar: Callable[..., None] | None) -> Callable[[int, int], None] | None:
    return None if bar is None else lambda done, total: bar(completed=done, total=total)


_OF_TOOLS = "Of coco, labelme and yolo"
_PAIRS, _OWN = "Of pairs", "Of pairs, coco, labelme and yolo"


@app.command("prepare")
def prepare_command(
    name: str = typer.Argument(
        ...,
        help="pairs (your own images and masks); coco, labelme or yolo (annotations); or a published data set, as "
        "'espmedsam-edge data layouts' lists them.",
    ),
    paths: list[Path] = typer.Argument(
        ...,
        metavar="SRC DST | IMAGES MASKS DST",
        help="The folder of the unpacked archive or of the annotations (of pairs: those of the images and of the "
        "masks), and the dataset folder to make, <modality>/<dataset>.",
    ),
    long_side: int = typer.Option(0, min=0, help="Shrink images whose longer side has more pixels; 0: leave them."),
    split: Path | None = typer.Option(None, help="A split.json to use. [default: the publisher's, else 70/10/20]"),
    keep_empty: bool = typer.Option(False, "--keep-empty", help="Keep images whose mask is empty or missing."),
    images_named: str = typer.Option(
        "{id}", help="What images are called, without the ending; * is anything.", rich_help_panel=_PAIRS
    ),
    masks_named: str = typer.Option(
        "{id}", help="What an image's mask is called: {id}_gt, or {id}_mask* for several.", rich_help_panel=_PAIRS
    ),
    positive: str | None = typer.Option(
        None,
        help="The values that are the target: 1,2 or #ff0000 or any (all but 0). [default: the higher of two values]",
        rich_help_panel=_PAIRS,
    ),
    patient: str | None = typer.Option(
        None,
        metavar="PATTERN",
        help="The patient in images' names: {patient}_*, so that each is in one list. [default: each image its own]",
        rich_help_panel=_OWN,
    ),
    modality: str | None = typer.Option(None, help="What the images are, for split.json.", rich_help_panel=_OWN),
    seed: int = typer.Option(0, min=0, help="Deals the lists otherwise.", rich_help_panel=_OWN),
    labels: str | None = typer.Option(
        None, metavar="NAME,...", help="The labels that are the target. [default: all]", rich_help_panel=_OF_TOOLS
    ),
    images: Path | None = typer.Option(
        None, help="The folder of the pictures. [default: that of the annotations]", rich_help_panel=_OF_TOOLS
    ),
) -> None:
    """Convert images and masks into images/, masks/ and split.json, which train and evaluate read.

    A file that cannot be read is reported at the end and the rest is done (exit code 1).
    """
    from espmedsam_edge.destinations import claimed
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.imaging.dataset import read_split
    from espmedsam_edge.modalities import check_name
    from espmedsam_edge.training.data.annotated import READERS, find_annotated
    from espmedsam_edge.training.data.layouts import layout
    from espmedsam_edge.training.data.pairs import Positive, find_pairs
    from espmedsam_edge.training.data.prepare import Found, of_layout, prepare

    *sources, target = paths
    count = 2 if name == "pairs" else 1
    if len(sources) != count:
        form = "IMAGES MASKS DST" if count == 2 else "SRC DST"
        raise UserError(f"data prepare {name} takes {form}.", f"{len(paths)} places were given.")
    kind = None if modality is None else check_name(modality)

    def listed() -> Found:
        if name == "pairs":
            values = None if positive is None else Positive.parse(positive)
            return find_pairs(
                *sources,
                images_named=images_named,
                masks_named=masks_named,
                patient=patient,
                positive=values,
                modality=kind,
                seed=seed,
            )
        if name in READERS:
            wanted = [] if labels is None else [label.strip() for label in labels.split(",")]
            return find_annotated(
                name, sources[0], images=images, labels=wanted, patient=patient, modality=kind, seed=seed
            )
        return of_layout(layout(name), sources[0])

    given = read_split(split) if split else None
    with claimed([target]), counting_bar("converting") as bar:
        found = listed()
        done = prepare(found, target, long_side=long_side, split=given, keep_empty=keep_empty, progress=_counted(bar))
    made = done.split
    counts = f"train {len(made.train)}, valid {len(made.valid)}, test {len(made.test)} ({made.origin})"
    tell(f"{target}: {done.images} images of {found.title}; {counts}")
    unlisted = done.images - len(made.train) - len(made.valid) - len(made.test)
    if unlisted:
        tell(f"{unlisted} images are in none of the given lists.")
    if done.unmasked:
        tell(f"{len(done.unmasked)} images without a mask were left out, the first: {done.unmasked[0]}")
    if done.unmatched:
        tell(f"{len(done.unmatched)} masks belong to no image, the first: {done.unmatched[0]}")
    tell_failures(done.failures)
    raise typer.Exit(1 if done.failures else 0)


@app.command("layouts")
def layouts_command() -> None:
    """List the data sets that ``prepare`` converts and the files it expects."""
    from espmedsam_edge.training.data.layouts import LAYOUTS

    for entry in LAYOUTS.values():
        tell(f"{entry.name}: {entry.title} ({entry.modality or 'unlabelled'})\n    {entry.form}")


@app.command("check")
def check_command(
    folder: Path = typer.Argument(..., help="A dataset folder."),
    similarity: float = typer.Option(0.95, min=0, max=1, help="Likeness of near duplicates; 1: only exact copies."),
    all_cases: bool = typer.Option(False, "--all", help="List every case, not the first three of each kind."),
) -> None:
    """Report unpaired, misaligned, empty, grey, duplicated and leaking images; exit code 1 if there are any."""
    from rich.markup import escape
    from rich.table import Table

    from espmedsam_edge.imaging.dataset import DatasetFolder
    from espmedsam_edge.training.data.check import check

    with counting_bar("checking") as bar:
        report = check(
            DatasetFolder.open(folder), similarity=similarity, threads=os.cpu_count() or 1, progress=_counted(bar)
        )
    lists = ", ".join(f"{name} {count}" for name, count in report.lists.items())
    tell(f"{folder}: {report.images} images; {lists}")
    if not report.findings:
        tell("Nothing is wrong.")
        return
    table = Table(show_lines=True)
    table.add_column("what")
    table.add_column("cases", justify="right")
    table.add_column("which")
    table.add_column("what to do")
    for finding in report.findings:
        shown = finding.examples if all_cases else finding.examples[:3]
        more = len(finding.examples) - len(shown)
        which = "\n".join([*shown, *([f"... and {more} more (--all)"] if more else [])])
        table.add_row(finding.kind, str(len(finding.examples)), escape(which), finding.advice)
    terminal_console(width=None if sys.stdout.isatty() else 140).print(table)
    raise typer.Exit(1)
