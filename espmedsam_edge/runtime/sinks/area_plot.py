"""The area of each source's masks over time, as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from types import TracebackType

from espmedsam_edge.destinations import Destination, check_again
from espmedsam_edge.errors import UserError, plot_safe
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.marks import MARK, PICTURE
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.measurements import area_in_mm2
from espmedsam_edge.runtime.sources.source import SourceFrame

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
_MOST_SOURCES = 24
_MOST_POINTS = 4096

Point = tuple[str, float | None, int, float | None]


class Curve:
    """Values over time in bounded memory: of neighbours that have to share a place, the lowest and highest are kept."""

    def __init__(self) -> None:
        self._bins: list[tuple[float, float, float]] = []  # time, lowest, highest
        self._each = 1  # values that share a bin
        self._open = 0  # values in the last bin

    def add(self, time: float, value: float) -> None:
        """Append a value; times come in order."""
        if self._open and self._open < self._each:
            start, low, high = self._bins[-1]
            self._bins[-1] = (start, min(low, value), max(high, value))
            self._open += 1
            return
        if len(self._bins) == _MOST_POINTS:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [(a[0], min(a[1], b[1]), max(a[2], b[2])) for a, b in pairs]
            self._each *= 2
        self._bins.append((time, value, value))
        self._open = 1

    def points(self) -> tuple[list[float], list[float], list[float]]:
        """Times, and at each the lowest and the highest value."""
        times, low, high = zip(*self._bins, strict=True) if self._bins else ((), (), ())
        return list(times), list(low), list(high)


class AreaPlot:
    """Draws a PNG of area over time when the run ends, one curve a source: videos by second, images by their number.

    Areas are in square millimetres if the spacing of every frame is known, else in pixels. The file is complete or
    absent.

    Args:
        path: the PNG.
        keep_interrupted: whether it is drawn when the run is interrupted, too.
        overwrite: what of that which came there meanwhile is replaced, see ``check_destinations``.

    Raises:
        UserError: matplotlib is missing.
    """

    def __init__(self, path: Path, *, keep_interrupted: bool = False, overwrite: bool | None = None) -> None:
        if (reason := why_missing("matplotlib", "bench")) is not None:
            raise UserError(f"cannot draw {path}: {reason}")
        self._path, self._keep_interrupted, self._overwrite = path, keep_interrupted, overwrite
        self._pixels: dict[str, Curve] = {}
        self._square: dict[str, Curve] = {}
        self._images = 0
        self._left_out: set[str] = set()
        self._spaced = True

    def __enter__(self) -> AreaPlot:
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        self.take(self.entry(frame, result))

    def entry(self, frame: SourceFrame, result: Segmentation) -> Point:
        """A frame's point: its source, its time if it has one, its area in pixels and, where known, mm²."""
        return frame.source, frame.time, result.area, area_in_mm2(result.area, frame.spacing)

    def take(self, entry: Point) -> None:
        """See ``resumed.Table``."""
        name, at = entry[:2]
        pixels, area = float(entry[2]), None if entry[3] is None else float(entry[3])  # a journal may be damaged
        if not isinstance(name, str):
            raise TypeError("no name")
        if at is None:
            name, at = "images", float(self._images)
            self._images += 1
        if name not in self._pixels and len(self._pixels) == _MOST_SOURCES:
            self._left_out.add(name)
            return
        self._pixels.setdefault(name, Curve()).add(float(at), pixels)
        self._spaced = self._spaced and area is not None
        self._square.setdefault(name, Curve()).add(float(at), area or 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pixels and (kind is None or self._keep_interrupted):
            drawn = self._draw()
            check_again(Destination(self._path, PICTURE), self._overwrite)
            atomic_write(self._path, drawn)

    def _draw(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        curves = self._square if self._spaced else self._pixels
        for number, (name, curve) in enumerate(curves.items()):
            times, low, high = curve.points()
            color, style = _COLORS[number % len(_COLORS)], ("-", "--", ":", "-.")[number // len(_COLORS)]
            lone = "." if len(times) == 1 or name == "images" else ""
            middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
            axes.plot(
                times, middle, style, color=color, marker=lone, linewidth=1.2, label=plot_safe(Path(name).name or name)
            )
            axes.fill_between(times, low, high, color=color, alpha=0.25, linewidth=0)
        seconds = any(name != "images" for name in curves)
        axes.set_xlabel("seconds" if seconds else "image")
        axes.set_ylabel("area in mm²" if self._spaced else "area in pixels")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(curves) > 1 or self._left_out:
            more = f" ({len(self._left_out)} sources more are not drawn)" if self._left_out else ""
            axes.legend(fontsize=8, title=f"{len(curves)} sources{more}", title_fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": MARK})
        return picture.getvalue()
