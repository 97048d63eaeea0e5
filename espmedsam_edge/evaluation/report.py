"""An evaluation on paper: summary, JSON, CSV, the table beside the paper's row, sheets of the worst cases."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from espmedsam_edge.errors import spreadsheet_safe
from espmedsam_edge.evaluation.evaluate import Case, Evaluation, ImageResult
from espmedsam_edge.evaluation.paper import PaperScore, paper_score, paper_scores
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.metrics import Scores

METRICS = ("dice", "hd", "hd95", "iou")
_PER_CENT = ("dice", "iou")
_METHOD_WIDTH = 32  # characters of a table's columns "method" and "prompt", and its frame
_PUBLISHED_WIDTH = 17  # of a column of "90.82 / 115.50"
_TILE = 320  # pixels a side of one picture on a sheet


def summary(evaluation: Evaluation) -> dict[str, dict[str, dict[str, Any]]]:
    """Modality -> dataset -> {"dice", "hd", "hd95", "iou", "images"}: means over images, Dice and IoU in per cent.

    With native scores there is also "native", the same without "images"; where images failed, "failed" counts them.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for (modality, dataset), results in evaluation.groups().items():
        entry: dict[str, Any] = {**means([result.scores for result in results]), "images": len(results)}
        own = [result.native for result in results if result.native is not None]
        if own:
            entry["native"] = means(own)
        failed = sum((failure.modality, failure.dataset) == (modality, dataset) for failure in evaluation.failures)
        if failed:
            entry["failed"] = failed
        table.setdefault(modality, {})[dataset] = entry
    return table


def means(values: Sequence[Scores]) -> dict[str, float]:
    """The mean of each metric; Dice and IoU in per cent, distances in pixels."""
    return {
        name: round(float(np.mean([getattr(value, name) for value in values])) * (100 if name in _PER_CENT else 1), 4)
        for name in METRICS
    }


def write_json(path: Path, evaluation: Evaluation) -> None:
    """``summary`` as a file."""
    atomic_write(path, json.dumps(summary(evaluation), indent=2) + "\n")


def write_csv(path: Path, evaluation: Evaluation) -> None:
    """A line an image: modality, dataset, id, the four scores (and the native four), what was assumed of its mask."""
    native = any(result.native is not None for result in evaluation.results)
    columns = [f"{name}_percent" if name in _PER_CENT else f"{name}_px" for name in METRICS]
    header = [
        "modality",
        "dataset",
        "id",
        *columns,
        *([f"native_{name}" for name in columns] if native else []),
        "note",
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for result in evaluation.results:
        numbers = _numbers(result.scores) + (_numbers(result.native) if native and result.native else [])
        *names, note = (spreadsheet_safe(text) for text in (result.modality, result.dataset, result.id, result.note))
        writer.writerow([*names, *numbers, note])
    atomic_write(path, text.getvalue())


def _numbers(values: Scores) -> list[str]:
    return [f"{getattr(values, name) * (100 if name in _PER_CENT else 1):.4f}" for name in METRICS]


def build_table(evaluation: Evaluation, *, native: bool = False) -> Table:
    """A row a dataset: our means and, at the common size, the paper's Dice and HD with what they were measured on."""
    at = "at each image's own size" if native else f"at {evaluation.size}x{evaluation.size}"
    table = Table(title=f"{evaluation.candidate}, {evaluation.split} images, {at}", title_justify="left")
    for name, justify in (("modality", "left"), ("dataset", "left"), ("images", "right"), ("Dice %", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("IoU %", "HD px", "HD95 px"):
        table.add_column(name, justify="right")
    if not native:
        for name, justify in (("paper: Dice %", "right"), ("HD px", "right"), ("measured on", "left")):
            table.add_column(name, justify=justify, style="dim")  # type: ignore[arg-type]
    for modality, datasets in summary(evaluation).items():
        for dataset, entry in datasets.items():
            values = entry["native"] if native else entry
            row = [modality, dataset, str(entry["images"]), f"{values['dice']:.2f}", f"{values['iou']:.2f}"]
            row += [f"{values['hd']:.2f}", f"{values['hd95']:.2f}"]
            if not native:
                row += _paper_cells(modality, dataset, evaluation)
            table.add_row(*row)
    return table


def _paper_cells(modality: str, dataset: str, evaluation: Evaluation) -> list[str]:
    published = paper_score(modality, dataset, evaluation.method) if evaluation.size == 1024 else None
    if published is None:
        return ["", "", ""]
    return [f"{published.dice:.2f}", f"{published.hd:.2f}", f"{published.dataset} (Table {published.table})"]


def build_published_tables(evaluation: Evaluation, width: int = 140) -> list[Table]:
    """A row a method that the paper compares, a column a dataset of ours, as many tables as ``width`` characters need.

    Methods with a point by hand come after those that need nothing, as ours does. Without published figures: none.
    """
    ours = {
        (modality, dataset): f"{entry['dice']:.2f} / {entry['hd']:.2f}"
        for modality, datasets in summary(evaluation).items()
        for dataset, entry in datasets.items()
    }
    published = [(group, scores) for group in ours if evaluation.size == 1024 and (scores := paper_scores(*group))]
    beside = max(1, (width - _METHOD_WIDTH) // _PUBLISHED_WIDTH)
    parts = [dict(published[start : start + beside]) for start in range(0, len(published), beside)]
    return [_published_table(ours, part) for part in parts]


def _published_table(ours: dict[tuple[str, str], str], published: dict[tuple[str, str], list[PaperScore]]) -> Table:
    table = Table(title="Published, Dice % / HD px", title_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("prompt", no_wrap=True)
    for group, scores in published.items():
        table.add_column("\n".join((*group, scores[0].dataset)), justify="right", min_width=_PUBLISHED_WIDTH - 3)
    table.add_row("this model", "none", *(ours[group] for group in published), style="bold", end_section=True)
    methods = dict.fromkeys((s.prompt, s.method) for scores in published.values() for s in scores)
    for prompt, method in sorted(methods, key=lambda pair: pair[0] == "point"):
        cells = (_published_cell(scores, prompt, method) for scores in published.values())
        table.add_row(method, prompt, *cells, style="dim")
    return table


def _published_cell(scores: Sequence[PaperScore], prompt: str, method: str) -> str:
    """The figures of a method; it has one row for each modality and kind of prompt."""
    found = [f"{s.dice:.2f} / {s.hd:.2f}" for s in scores if (s.prompt, s.method) == (prompt, method)]
    return " ".join(found)


def sheet_file(folder: Path, modality: str, dataset: str) -> Path:
    """Where the worst cases of a dataset are drawn."""
    return folder / f"{modality}-{dataset}.png"


def write_sheets(folder: Path, evaluation: Evaluation) -> list[Path]:
    """One PNG a dataset, its worst cases from the top: image, truth, prediction.

    Returns:
        The files written, ``<modality>-<dataset>.png``.
    """
    files = []
    for (modality, dataset), cases in evaluation.worst.items():
        path = sheet_file(folder, modality, dataset)
        write_image(path, np.vstack([_row(case) for case in cases]))
        files.append(path)
    return files


def _row(case: Case) -> NDArray[np.uint8]:
    """One case: three pictures and a line of text above them."""
    style = OverlayStyle(color_of(case.result.modality), opacity=0.3)
    image = _fit(case.image)
    pictures = [image]
    for mask in (case.truth, case.prediction):
        small = np.asarray(cv2.resize(mask, (_TILE, _TILE), interpolation=cv2.INTER_AREA), np.uint8)
        pictures.append(draw_overlay(image, np.where(small >= 128, np.uint8(255), np.uint8(0)), style))
    strip = np.full((26, 3 * _TILE, 3), 32, np.uint8)
    cv2.putText(strip, _line(case.result), (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
    return np.vstack([strip, np.hstack(pictures)])


def _fit(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(image, (_TILE, _TILE), interpolation=cv2.INTER_AREA), np.uint8)


def _line(result: ImageResult) -> str:
    values = result.scores
    name = result.id.encode("ascii", "replace").decode()[:60]
    return f"{name}   Dice {100 * values.dice:.1f} %   HD {values.hd:.0f} px   (image, truth, prediction)"
