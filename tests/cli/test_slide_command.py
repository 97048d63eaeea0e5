"""``slide`` as docs/microscopy.md has it, on a slide that its script makes; and what goes wrong, a line each."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_slides import save_dicom_level, tissue_picture

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main

tifffile = pytest.importorskip("tifffile", reason="needs tifffile (extra slide)")
pytest.importorskip("imagecodecs", reason="needs imagecodecs (extra slide)")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["slide", *arguments])
    return int(left.value.code or 0)


def test_the_page_runs_as_written(here: Path, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "microscopy.md").read_text()
    (block,) = [block for block in re.findall(r"```\n(.*?)```", page, re.DOTALL) if "phantom_slide" in block]
    make, command = (shlex.split(line) for line in block.strip().splitlines())
    subprocess.run([sys.executable, str(ROOT / make[1]), *make[2:]], check=True, capture_output=True)
    (_, name, *rest) = command
    assert name == "slide"
    assert called(str(toy_bundle.path), *rest, "--tile", "1024", "--quiet") == 0  # the toy network is a fast one
    assert sorted(path.name for path in Path("results").iterdir()) == [
        "slide-mask.ome.tif",
        "slide-overview.jpg",
        "slide.geojson",
    ]
    assert all(str(Path("results") / file) in page for file in ("slide-mask.ome.tif", "slide.geojson"))
    with tifffile.TiffFile("results/slide-mask.ome.tif") as file:
        assert [level.shape for level in file.series[0].levels] == [(3000, 4000), (1500, 2000), (750, 1000)]
        assert 'PhysicalSizeX="0.5"' in file.ome_metadata
        mask = file.series[0].levels[0].asarray()
    features = json.loads(Path("results/slide.geojson").read_text())["features"]
    area = sum(feature["properties"]["measurements"]["Area µm^2"] for feature in features)
    assert area == pytest.approx(0.25 * np.count_nonzero(mask), rel=1e-3)
    out = capsys.readouterr().out
    assert "the rest is glass" in out
    assert called(str(toy_bundle.path), *rest, "--tile", "1024", "--quiet") == 0  # its own results are replaced


def test_what_cannot_be_read_is_a_line_and_the_rest_is_done(
    here: Path, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite("good.tif", np.full((300, 400, 3), 240, np.uint8), photometric="rgb", tile=(128, 128))
    Path("bad.tif").write_bytes(b"II*\0 no slide")
    assert called(str(toy_bundle.path), "bad.tif", "good.tif", "missing.tif", "--level", "0") == 1
    err = capsys.readouterr().err
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert failed[0].startswith("failed: cannot read bad.tif")
    assert failed[1].startswith("failed: no file missing.tif.")
    assert "Traceback" not in err
    assert Path("slides/good.geojson").is_file()
    assert called(str(toy_bundle.path), "good.tif", "--level", "3") == 1
    assert "has 1 levels, none of number 3" in capsys.readouterr().err


def test_a_strangers_file_stays(here: Path, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite("good.tif", np.full((300, 400, 3), 240, np.uint8), photometric="rgb", tile=(128, 128))
    Path("slides").mkdir()
    Path("slides/good.geojson").write_text("{}")
    assert called(str(toy_bundle.path), "good.tif") == 2
    assert "is no file of outlines of this program" in capsys.readouterr().err
    assert Path("slides/good.geojson").read_text() == "{}"


def begun_elsewhere(folder: Path, plan: str) -> None:
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(plan)
    (folder / "holiday-2024.png").write_bytes(b"mine")
    (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize("link", [False, True])
def test_a_strangers_folder_at_the_place_of_the_regions_stays(
    here: Path, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str], link: bool
) -> None:
    tifffile.imwrite("a.tif", np.full((300, 400, 3), 120, np.uint8), photometric="rgb", tile=(128, 128))
    begun_elsewhere(here / ("mine" if link else "slides/a.unfinished"), '{"mine": 1}')
    if link:
        Path("slides").mkdir()
        Path("slides/a.unfinished").symlink_to(here / "mine")
    before = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    assert called(str(toy_bundle.path), "a.tif", "--level", "0", "--overwrite") == 1
    assert "Traceback" not in capsys.readouterr().err
    assert {file: file.read_bytes() for file in before} == before


def test_beginning_anew_leaves_files_that_are_no_regions(here: Path, toy_bundle: Bundle) -> None:
    tifffile.imwrite("a.tif", np.full((300, 400, 3), 120, np.uint8), photometric="rgb", tile=(128, 128))
    begun_elsewhere(here / "slides/a.unfinished", '{"slide": [], "graph": ""}')
    Path("slides/a.unfinished/00000-00000.png").write_bytes(b"of that run")
    assert called(str(toy_bundle.path), "a.tif", "--level", "0", "--overwrite") == 1
    assert sorted(file.name for file in Path("slides/a.unfinished").iterdir()) == ["holiday-2024.png", "notes.txt"]


@pytest.mark.parametrize("name", ["a-mask.ome.tif", "a.geojson", "a-overview.jpg"])
def test_what_came_while_a_slide_was_segmented_stays(
    here: Path, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espmedsam_edge.runtime.slide import segmenting

    tifffile.imwrite("a.tif", np.full((300, 400, 3), 120, np.uint8), photometric="rgb", tile=(128, 128))
    run = segmenting._Work.run

    def slow(*arguments: Any) -> int:
        done = run(*arguments)
        Path("slides", name).write_text("my thesis")
        return done

    monkeypatch.setattr(segmenting._Work, "run", slow)
    assert called(str(toy_bundle.path), "a.tif", "--level", "0", "--everything") == 1
    assert "was put there meanwhile" in capsys.readouterr().err
    assert Path("slides", name).read_text() == "my thesis"


def test_a_dicom_slides_files_are_all_inputs(
    here: Path, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "case").mkdir()
    (here / "case2").mkdir()
    save_dicom_level(here / "case" / "case-mask.ome.tif", tissue_picture((128, 256)))
    save_dicom_level(here / "case" / "level.dcm", tissue_picture((256, 512)))
    (here / "case2" / "level-mask.ome.tif").hardlink_to(here / "case" / "case-mask.ome.tif")
    before = (here / "case" / "case-mask.ome.tif").read_bytes()
    assert called(str(toy_bundle.path), "case", "--out", "case", "--overwrite") == 2
    assert "would replace an input" in capsys.readouterr().err
    assert called(str(toy_bundle.path), "case/level.dcm", "--out", "case2", "--overwrite") == 2
    assert "would replace an input" in capsys.readouterr().err
    assert (here / "case" / "case-mask.ome.tif").read_bytes() == before


@pytest.mark.parametrize("folder", ["trials", "openvino", "inductor", "bundles"])
def test_results_do_not_go_into_the_cache(
    here: Path, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    from espmedsam_edge.machine.cache import cache_place

    tifffile.imwrite("a.tif", np.full((300, 400, 3), 120, np.uint8), photometric="rgb", tile=(128, 128))
    assert called(str(toy_bundle.path), "a.tif", "--out", str(cache_place() / folder)) == 2
    assert "is the program's own cache" in capsys.readouterr().err
