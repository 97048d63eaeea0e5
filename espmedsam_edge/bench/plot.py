"""A bench's result as one picture: where the time of a frame goes, and how it varied from run to run."""

from __future__ import annotations

import io
from statistics import median

from espmedsam_edge.bench.measure import STAGES, BenchResult
from espmedsam_edge.errors import plot_safe
from espmedsam_edge.marks import MARK

# Okabe and Ito's colours, told apart without colour vision.
_STAGE_COLORS = ("#56B4E9", "#0072B2", "#E69F00", "#009E73")
_SERIES_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def draw_plot(result: BenchResult) -> bytes:
    """A PNG: median stages of every contender as stacked bars, and the times of all runs in their order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(result.series)
    figure = Figure(figsize=(10, 3.2 + 0.45 * count), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    bars, runs = figure.subplots(1, 2, width_ratios=(1.15, 1))
    names = [series.contender.name for series in result.series]
    left = [0.0] * count
    for stage, color in zip(STAGES, _STAGE_COLORS, strict=True):
        widths = [1000 * median(series.stage(stage)) for series in result.series]
        bars.barh(names, widths, left=left, color=color, label=stage, height=0.55)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        bars.text(total, row, f" {total:.1f}", va="center", fontsize=9)
    bars.set_xlim(0, 1.15 * max(left))
    bars.set_ylim(count - 0.4, -0.6)
    bars.set_xlabel("milliseconds a run (medians)")
    bars.set_title("Frame to mask and overlay", fontsize=11)
    for series, color in zip(result.series, _SERIES_COLORS * count, strict=False):
        times = [1000 * total for total in series.totals]
        runs.plot(
            range(1, len(times) + 1), times, ".-", color=color, linewidth=0.8, markersize=4, label=series.contender.name
        )
        runs.axhline(1000 * series.latency.p50, color=color, linewidth=0.8, linestyle=":")
    runs.set_ylim(0, 1.1 * max(1000 * series.latency.maximum for series in result.series))
    runs.set_xlabel("run")
    runs.set_ylabel("milliseconds")
    runs.set_title("Run by run (dotted: median)", fontsize=11)
    below = 0.72 / figure.get_figheight()
    for axes in (bars, runs):
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -below), ncols=3 if axes is bars else 2, frameon=False, fontsize=9
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes is bars else "y", linewidth=0.4, alpha=0.6)
        axes.set_axisbelow(True)
    cpu = result.environment["cpu"]
    figure.suptitle(f"{plot_safe(result.bundle['name'])} on {cpu['model']}, {cpu['usable']} cores", fontsize=12)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": MARK})
    return picture.getvalue()
