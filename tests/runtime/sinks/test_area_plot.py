"""The plot of areas: drawn at the end, in bounded memory."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sink_material import blob, result_of

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine import installation
from espmedsam_edge.machine.installation import installed
from espmedsam_edge.runtime.sinks import area_plot
from espmedsam_edge.runtime.sinks.area_plot import AreaPlot, Curve
from espmedsam_edge.runtime.sources.source import SourceFrame

IMAGE = np.zeros((48, 64, 3), np.uint8)
needs_matplotlib = pytest.mark.skipif(not installed("matplotlib"), reason="needs matplotlib (extra bench)")


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300))
@settings(deadline=None)
def test_a_curve_keeps_its_extremes(values: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(area_plot, "_MOST_POINTS", 16)
        curve = Curve()
        for number, value in enumerate(values):
            curve.add(float(number), value)
    times, low, high = curve.points()
    assert len(times) <= 16
    assert times[0] == 0
    assert times == sorted(times)
    assert (min(low), max(high)) == (min(values), max(values))
    if len(values) <= 16:
        assert low == high == values


@needs_matplotlib
@pytest.mark.parametrize("spacing", [None, (0.5, 0.5)])
def test_a_plot_is_a_picture_with_a_curve_a_source(tmp_path: Path, spacing: tuple[float, float] | None) -> None:
    with AreaPlot(tmp_path / "new" / "a.png") as sink:
        for number in range(20):
            for name in ("a.mp4", "b.mp4"):
                mask = blob((48, 64), number)
                sink.write(SourceFrame(IMAGE, Path(name), number, number / 10, spacing=spacing), result_of(mask))
        sink.write(SourceFrame(IMAGE, Path("c.png")), result_of(blob((48, 64))))
        assert os.listdir(tmp_path) == []
    picture = cv2.imread(str(tmp_path / "new" / "a.png"))
    assert picture.shape[1] == 1200
    for color in ((0xB2, 0x72, 0x00), (0x00, 0x5E, 0xD5)):  # of the first two curves, BGR
        assert (np.abs(picture.astype(int) - color).sum(axis=2) < 30).sum() > 50


@needs_matplotlib
def test_a_name_is_no_formula(tmp_path: Path) -> None:
    with AreaPlot(tmp_path / "a.png") as sink:
        for name in ("a$\\frac$.mp4", "$b$c$$\\$.mp4", "_d.mp4"):
            sink.write(SourceFrame(IMAGE, Path(name), 0, 0.0), result_of(blob((48, 64))))
    assert cv2.imread(str(tmp_path / "a.png")) is not None


@needs_matplotlib
@pytest.mark.parametrize("keep", [False, True])
def test_an_interrupted_run_draws_what_live_sources_gave(tmp_path: Path, keep: bool) -> None:
    def interrupted() -> None:
        with AreaPlot(tmp_path / "a.png", keep_interrupted=keep) as sink:
            sink.write(SourceFrame(IMAGE, Path("a.mp4"), 0, 0.0), result_of(blob((48, 64))))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == (["a.png"] if keep else [])


def test_without_matplotlib_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"matplotlib is not installed\. Install it"):
        AreaPlot(tmp_path / "a.png")
