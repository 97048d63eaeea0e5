"""What calibrate adds to a bundle's ``report.md``: sizes, precisions, the gate's results, sensitivity, pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bundle import REPORT_TITLE, Precision
from espmedsam_edge.calibration.gate import GateResult
from espmedsam_edge.calibration.histogram import Method
from espmedsam_edge.calibration.network import Network
from espmedsam_edge.calibration.request import Target
from espmedsam_edge.calibration.search import Sensitivity
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.machine.installation import installed

_PICTURE_HEIGHT = 360  # pixels
_DIFFERENCE = (0, 0, 255)  # red: where the two masks differ


@dataclass(frozen=True)
class CalibrationSummary:
    """What a calibrated graph is.

    Attributes:
        modality, precision: which.
        file: its name in the bundle.
        size, reference_size: bytes of it and of the FP32 graph with its weights in float32, however they are stored.
        macs: share of the multiply-accumulates in each type, 0..1.
        network: the graph.
        result: the gate's verdict.
        images: how many images the ranges come from.
        reused: whether ``calibration.json`` was reused.
        method: how activations are clipped; None in FP16.
        kept: nodes kept in FP32, by reason.
        raised: layer groups that the gate had moved up.
        ranking: every group's sensitivity, if it had to be measured.
        notes: warnings.
        target: what it is for; of INT8 graphs.
    """

    modality: str
    precision: Precision
    file: str
    size: int
    reference_size: int
    macs: dict[str, float]
    network: Network
    result: GateResult
    images: int
    reused: bool
    method: Method | None
    kept: dict[str, int]
    raised: tuple[str, ...]
    ranking: list[Sensitivity] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    target: Target = "gpu"

    def macs_text(self) -> str:
        """``93.8 % int8, 6.2 % fp16``."""
        shares = sorted(self.macs.items(), key=lambda item: -item[1])
        return ", ".join(f"{100 * share:.1f} % {name}" for name, share in shares)

    def to_manifest(self) -> dict[str, object]:
        """The entry of the manifest's ``accuracy``; Dice in points."""
        entry: dict[str, object] = {
            "against": "FP32 graph in ONNX Runtime, rounding emulated, held-out images",
            **gate_entry(self.result),
            "macs": {name: round(share, 4) for name, share in self.macs.items()},
            "size_of_fp32": round(self.size / self.reference_size, 4),
            "kept_higher": list(self.raised),
            "calibration_images": self.images,
        }
        if self.method:
            entry |= {"method": self.method, "target": self.target}
        return entry


def gate_entry(result: GateResult) -> dict[str, object]:
    """A gate's verdict for the manifest's ``accuracy``; Dice in points."""
    return {
        "images": len(result.images),
        "budget": result.budget,
        "dice_loss_mean": round(result.loss, 4),
        "dice_loss_worst": round(result.worst_loss, 4),
        "dice_to_fp32_mean": round(100 - result.mean_disagreement, 4),
        "dice_to_fp32_worst": round(100 - max(image.disagreement for image in result.images), 4),
        "against_true_masks": result.mean_drop is not None,
    }


def gate_lines(result: GateResult) -> list[str]:
    """A gate's verdict for the report."""
    lines = [
        f"Gate: {'passed' if result.passed else 'failed'}: {result}.",
        "",
        "| | mean | worst |",
        "|---|---|---|",
        f"| Dice to the FP32 mask | {100 - result.mean_disagreement:.3f} "
        f"| {100 - max(image.disagreement for image in result.images):.3f} |",
    ]
    if result.mean_drop is not None:
        lines.append(f"| Dice points lost on the true mask | {result.mean_drop:+.3f} | {result.worst_loss:+.3f} |")
    return lines


def section(summary: CalibrationSummary, pictures: Sequence[str]) -> str:
    """The report's section on one graph; ``pictures`` are file names in the bundle."""
    lines = [
        _heading(summary.modality, summary.precision),
        "",
        f"{summary.file}: {summary.size / 1e6:.1f} MB, {summary.size / summary.reference_size:.3f} of the FP32 graph "
        f"with float32 weights ({summary.reference_size / 1e6:.1f} MB).",
        f"Multiply-accumulates: {summary.macs_text()}.",
        f"Ranges from {summary.images} images"
        + (" (calibration.json, reused)" if summary.reused else "")
        + (f", clipped by {summary.method}." if summary.method else "."),
        *(["For processors: what is not INT8 is FP32."] if summary.target == "cpu" else []),
        "",
    ]
    lines += [f"Warning: {note}\n" for note in summary.notes]
    lines += gate_lines(summary.result)
    lines += ["", "| operator | " + " | ".join(_TYPES) + " |", "|---" * (len(_TYPES) + 1) + "|"]
    for operator, counts in sorted(summary.network.nodes_by_type().items()):
        cells = " | ".join(str(counts[name]) if counts[name] else "" for name in _TYPES)
        if any(counts[name] for name in _TYPES):
            lines.append(f"| {operator} | {cells} |")
    if summary.kept:
        lines += ["", "Nodes kept in FP32 because:", ""]
        lines += [f"- {reason} ({count})" for reason, count in sorted(summary.kept.items())]
    if summary.raised:
        higher = "FP16" if summary.precision == "int8" and summary.target == "gpu" else "FP32"
        lines += ["", f"Layer groups kept in {higher} to meet the budget: {', '.join(summary.raised)}."]
    if summary.ranking:
        lines += ["", "Each layer group lowered alone:", "", "| group | Dice points | logit error | share of work |"]
        lines.append("|---|---|---|---|")
        lines += [
            f"| {s.group} | {s.loss:+.3f}{'' if s.finite else ' (not finite)'} | {s.logit_error:.4f} | {s.share:.1%} |"
            for s in sorted(summary.ranking, key=lambda s: s.harm, reverse=True)
        ]
        if not installed("matplotlib"):
            lines += ["", "The plot was left out: no matplotlib (pip install 'espmedsam-edge[calibrate]')."]
    for picture in pictures:
        lines += ["", f"![{picture}]({picture})"]
    return "\n".join(lines) + "\n"


_TYPES = ("int8", "fp16", "fp32")


def _heading(modality: str, precision: str) -> str:
    return f"## Calibrate: {modality} {precision}"


def with_section(report: str, text: str) -> str:
    """A report with a section added, or put in place of the one with the same heading."""
    heading = text.partition("\n")[0]
    pattern = re.compile(rf"^{re.escape(heading)}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    without = pattern.sub("", report).rstrip() or REPORT_TITLE
    return f"{without}\n\n{text}"


def worst_picture(
    modality: str, frame: Frame, reference: NDArray[np.uint8], lowered: NDArray[np.uint8], precision: Precision
) -> bytes:
    """A JPEG: the frame, the FP32 mask, the lowered mask, and where they differ, side by side.

    Args:
        modality: for the colour.
        frame: (H, W, 3) uint8 BGR.
        reference, lowered: (H, W) uint8, 0 or 255.
        precision: the lowered graph's.
    """
    style = OverlayStyle(color_of(modality))
    difference = np.where(reference != lowered, 255, 0).astype(np.uint8)
    views = {
        "image": frame,
        "FP32": draw_overlay(frame, reference, style),
        precision.upper(): draw_overlay(frame, lowered, style),
        "difference": draw_overlay(frame, difference, OverlayStyle(_DIFFERENCE, opacity=0.8, outline=False)),
    }
    width = max(1, round(frame.shape[1] * _PICTURE_HEIGHT / frame.shape[0]))
    tiles = []
    for title, view in views.items():
        tile = np.asarray(cv2.resize(view, (width, _PICTURE_HEIGHT), interpolation=cv2.INTER_AREA), np.uint8)
        cv2.putText(tile, title, (8, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0, 0, 0), 4, cv2.LINE_AA)
        cv2.putText(tile, title, (8, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (255, 255, 255), 1, cv2.LINE_AA)
        tiles.append(tile)
    return encode_image(np.hstack(tiles), ".jpg")


def plot_sensitivity(path: Path, ranking: Sequence[Sensitivity], raised: Sequence[str], title: str) -> bool:
    """A bar a group, those kept higher marked; False where matplotlib is not installed."""
    if not ranking or not installed("matplotlib"):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.22 * len(ranking)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [s.group for s in ranking][::-1]
    colors = ["tab:orange" if name in raised else "tab:blue" for name in names]
    axes.barh(names, [min(s.logit_error, 10.0) for s in ranking][::-1], color=colors)
    axes.set_xlabel("logit error when lowered alone (of the logits' standard deviation); orange: kept higher")
    axes.set_title(title)
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=110)
    return True
