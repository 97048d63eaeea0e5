"""Lines of JSON and tables of areas: every frame's numbers, there as soon as they are written."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from sink_material import blob, result_of

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sinks.measurements import AREA_COLUMNS, AreaTable, JsonLines, LineForm
from espmedsam_edge.runtime.sources.source import SourceFrame

IMAGE = np.zeros((48, 64, 3), np.uint8)
AREA = int((blob((48, 64)) > 0).sum())


def frame(
    number: int = 0, time: float | None = None, path: str = "c.mp4", spacing: tuple[float, float] | None = None
) -> SourceFrame:
    return SourceFrame(IMAGE, Path(path), number, time, spacing=spacing)


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_json_and_there_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with JsonLines(file, LineForm({"weights": "random"})) as sink:
        sink.write(frame(0, 0.0), result_of(blob((48, 64))))
        assert len(lines_of(tmp_path / "a.partial.jsonl")) == 1
        sink.write(frame(1, 0.1), result_of(blob((48, 64))))
        assert not file.exists()
    lines = lines_of(file)
    assert [(line["source"], line["frame"], line["time"]) for line in lines] == [("c.mp4", 0, 0.0), ("c.mp4", 1, 0.1)]
    assert lines[0]["weights"] == "random"
    assert lines[0]["area"] == AREA
    assert lines[0]["bounding_box"] == [6, 4, 54, 42]
    for absent in ("area_mm2", "spacing_mm", "polygons", "rle", "skipped", "study_uid"):
        assert absent not in lines[0]


def test_areas_are_in_square_millimetres_where_the_spacing_is_known(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a.jsonl") as sink:
        sink.write(frame(spacing=(0.5, 0.25)), result_of(blob((48, 64))))
    (line,) = lines_of(tmp_path / "a.jsonl")
    assert line["area_mm2"] == AREA * 0.125
    assert line["spacing_mm"] == [0.5, 0.25]


def test_live_frames_say_what_was_skipped(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a.jsonl") as sink:
        sink.write(SourceFrame(IMAGE, Path("cam"), 3, 0.1, captured=5.0, skipped=2), result_of(blob((48, 64))))
    assert lines_of(tmp_path / "a.jsonl")[0]["skipped"] == 2


def test_contours_and_identifiers_where_asked_for(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a.jsonl", LineForm({}, "both", lambda path: {"study_uid": f"uid of {path}"})) as sink:
        sink.write(frame(), result_of(blob((48, 64))))
    (line,) = lines_of(tmp_path / "a.jsonl")
    assert line["study_uid"] == "uid of c.mp4"
    assert line["rle"]["size"] == [48, 64]  # type: ignore[index]
    assert len(line["polygons"]) == 2  # type: ignore[arg-type]


def test_lines_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with JsonLines(None) as sink:
        sink.write(frame(path="a.png"), result_of(blob((48, 64))))
    assert json.loads(capsys.readouterr().out)["time"] is None


def test_no_frames_are_an_empty_file(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a.jsonl"):
        pass
    assert (tmp_path / "a.jsonl").read_text() == ""


@pytest.mark.parametrize("keep", [False, True])
def test_interrupted_lines_are_kept_for_live_sources(tmp_path: Path, keep: bool) -> None:
    def interrupted() -> None:
        with JsonLines(tmp_path / "a.jsonl", keep_interrupted=keep) as sink:
            sink.write(frame(), result_of(blob((48, 64))))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == (["a.jsonl"] if keep else [])


def test_lines_on_a_full_disk_are_one_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    def fill() -> None:
        with JsonLines(tmp_path / "a.jsonl") as sink:
            sink.write(frame(), result_of(blob((48, 64))))
            sink._stream = Path("/dev/full").open("w")  # noqa: SIM115 (closed by the sink)
            sink.write(frame(1), result_of(blob((48, 64))))

    with pytest.raises(UserError, match=r"no space left.*what was written is in .*a\.partial\.jsonl"):
        fill()
    assert len(lines_of(tmp_path / "a.partial.jsonl")) == 1


def test_no_name_in_a_table_is_a_formula(tmp_path: Path) -> None:
    names = ["=cmd|' C calc'!A0.png", "+1.png", "-2+3.png", "@SUM(1).png", " =1.png", "\uff1d1.png"]
    kept = ["a=b.png", "1-2.png", "'=.png", '患者,"1".png', "a;b.png"]
    escaped = {"a\n=1.png": r"a\n=1.png", "\r=1.png": r"\r=1.png", "\t=1": r"\t=1", "a\x1b[2J": r"a\x1b[2J"}
    escaped |= {"a;=1;+2": "a;'=1;'+2", 'a; "=1': "a;' \"=1"}  # a cell of its own where commas are in numbers
    with AreaTable(tmp_path / "a.csv") as sink:
        for name in [*names, *kept, *escaped]:
            sink.write(frame(0, 0.0, name), result_of(blob((48, 64))))
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["source"] for row in rows] == [*(f"'{name}" for name in names), *kept, *escaped.values()]
    assert {row["area_px"] for row in rows} == {str(AREA)}


def test_a_table_of_areas(tmp_path: Path) -> None:
    with AreaTable(tmp_path / "a.csv") as sink:
        sink.write(frame(0, 0.0, 'a "b", c.mp4', (2.0, 0.5)), result_of(blob((48, 64))))
        sink.write(frame(1, 1 / 3, "b.mp4"), result_of(np.zeros((48, 64), np.uint8)))
        sink.write(frame(0, None, "c.png"), result_of(blob((48, 64))))
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == AREA_COLUMNS
    assert [list(row.values()) for row in rows] == [
        ['a "b", c.mp4', "0", "0.0000", str(AREA), f"{AREA / 3072:.6f}", f"{AREA:.4f}", "fundus", "", ""],
        ["b.mp4", "1", "0.3333", "0", "0.000000", "", "fundus", "", ""],
        ["c.png", "0", "", str(AREA), f"{AREA / 3072:.6f}", "", "fundus", "", ""],
    ]


def test_times_are_without_the_noise_of_floating_point(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a.jsonl") as sink:
        sink.write(frame(3, 0.1 + 0.2), result_of(blob((48, 64))))
        sink.write(frame(4, 1001 / 30000), result_of(blob((48, 64))))
    assert [text.split('"time":')[1].split(",")[0] for text in (tmp_path / "a.jsonl").read_text().splitlines()] == [
        "0.3",
        "0.033367",
    ]
