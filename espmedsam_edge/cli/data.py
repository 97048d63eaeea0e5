"""``espmedsam-edge data``: publishers' files into dataset folders, dataset folders checked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from espmedsam_edge.cli.messages import counting_bar, tell_failures
from espmedsam_edge.terminal import tell, terminal_console

app = typer.Typer(
    no_args_is_help=True, help="Convert published data sets into dataset folders, and check such folders."
)


def _counted(bar: Callable[..., None] | None) -> Callable[[int, int], None] | None:
    return None if bar is None else lambda done, total: bar(completed=done, total=total)


@app.command("prepare")
def prepare_command(
    name: str = typer.Argument(..., help="The data set's layout; 'espmedsam-edge data layouts' lists them."),
    source: Path = typer.Argument(..., metavar="SRC", help="The folder of the unpacked archive."),
    target: Path = typer.Argument(..., metavar="DST", help="The dataset folder to make, <modality>/<dataset>."),
    long_side: int = typer.Option(0, min=0, help="Shrink images whose longer side has more pixels; 0: leave them."),
    split: Path | None = typer.Option(None, help="A split.json to use. [default: the publisher's, else 70/10/20]"),
    keep_empty: bool = typer.Option(False, "--keep-empty", help="Keep images whose mask is empty or missing."),
) -> None:
    """Convert a data set from its publisher's layout into images/, masks/ and split.json.

    A file that cannot be read is reported at the end and the rest is done (exit code 1).
    """
    from espmedsam_edge.destinations import claimed
    from espmedsam_edge.imaging.dataset import read_split
    from espmedsam_edge.training.data.layouts import layout
    from espmedsam_edge.training.data.prepare import prepare

    chosen = layout(name)
    given = read_split(split) if split else None
    with claimed([target]), counting_bar("converting") as bar:
        done = prepare(
            chosen, source, target, long_side=long_side, split=given, keep_empty=keep_empty, progress=_counted(bar)
        )
    made = done.split
    counts = f"train {len(made.train)}, valid {len(made.valid)}, test {len(made.test)} ({made.origin})"
    tell(f"{target}: {done.images} images of {chosen.title}; {counts}")
    unlisted = done.images - len(made.train) - len(made.valid) - len(made.test)
    if unlisted:
        tell(f"{unlisted} images are in none of the given lists.")
    if done.unmasked:
        tell(f"{len(done.unmasked)} images without a mask were left out, the first: {done.unmasked[0]}")
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
