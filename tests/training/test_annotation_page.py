"""docs/annotation.md, run as written: pre-labels, a correction, a dataset folder, a trained modality, a bundle."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from markdown_it import MarkdownIt  # rich's
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.imaging.dataset import DatasetFolder

pytest.importorskip("skimage", reason="needs scikit-image (extra demo)")
pytest.importorskip("pycocotools", reason="needs pycocotools (extra annotations)")
PAGE = (Path(__file__).parents[2] / "docs" / "annotation.md").read_text()
SMALL = ("--set", "run.epochs=1", "--set", "run.batch_size=2", "--set", "schedule.warmup_epochs=0")
SMALL += ("--set", "run.accelerator=cpu", "--set", "data.workers=0")


def blocks(language: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(PAGE)
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def correct(folder: Path) -> None:
    """What a person does in the tool: an object that was missed is drawn, and one that is none is taken out."""
    for file in folder.glob("*.json"):
        value = json.loads(file.read_text())
        value["shapes"] = value["shapes"][1:]
        square = [[20, 20], [60, 20], [60, 50], [20, 50]]
        value["shapes"].append({"label": "cell nuclei", "shape_type": "polygon", "points": square})
        file.write_text(json.dumps(value))


def test_the_page_runs_as_written(
    trained_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_recipe: Callable[..., object]
) -> None:
    """With a toy for the network, small weights, and one epoch of training."""
    monkeypatch.chdir(tmp_path)
    toy = save_toy_bundle(tmp_path / "toy.bundle", ("microscopy",))
    for code in blocks("python"):
        exec(compile(code, "docs/annotation.md", "exec"), {})
    lines = [line for block in blocks("") for line in block.strip().splitlines()]
    assert len(lines) == 7
    for line in lines:
        program, command, *words = shlex.split(line)
        assert program == "espmedsam-edge"
        if command == "infer" and words[0] == "scans":
            assert called("infer", str(toy.path), *words) == 0
            correct(Path("to-correct"))
        elif command == "weights":
            shutil.copy(trained_student, words[words.index("--checkpoint") + 1])
        elif command == "train":
            words[words.index("--like") + 1] = "fundus"  # the small weights have no microscopy
            assert called("train", *words, *SMALL) == 0
        elif command == "data" and words[0] == "check":
            assert called("data", *words) in (0, 1)  # the toy's masks are odd
        else:
            assert called(command, *words) == 0, line
    made = DatasetFolder.open("data/immunostain/first")
    assert made.split is not None
    assert set(made.split.patient.values()) == {"slide0", "slide1", "slide2"}
    for id_ in made.ids():
        assert made.load(id_).mask[20:51, 20:61].all()
    assert set(Bundle.open("immunostain.bundle").manifest.modalities) == {"immunostain"}
    again = json.loads(Path("next/slide1_1.json").read_text())
    assert (again["imageHeight"], again["imageWidth"]) == cv2.imread("scans/slide1_1.png").shape[:2]
    assert {shape["label"] for shape in again["shapes"]} <= {"cell nuclei"}
