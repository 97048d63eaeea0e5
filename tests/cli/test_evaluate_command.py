"""``espmedsam-edge evaluate``: exit codes, files, the table; and no torch for a bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge import cli
from espmedsam_edge.evaluation.candidates import BundleCandidate
from espmedsam_edge.evaluation.evaluate import evaluate, plan_tasks
from espmedsam_edge.evaluation.report import summary
from espmedsam_edge.phantoms import phantom


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["evaluate", *(str(argument) for argument in arguments)])
    return int(exit_.value.code or 0)


def _dataset(folder: Path, modality: str = "fundus", count: int = 3) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for seed in range(count):
        image, mask = phantom(modality, seed, (64, 80))
        cv2.imwrite(str(folder / "images" / f"{seed}.png"), image)
        cv2.imwrite(str(folder / "masks" / f"{seed}.png"), mask)
    (folder / "split.json").write_text(json.dumps({"test": [str(seed) for seed in range(count)]}))
    return folder


def test_a_bundle_is_scored_beside_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = save_toy_bundle(tmp_path / "b.bundle", ("fundus", "colonoscopy"), origin="random")
    drive, clinic = _dataset(tmp_path / "fundus" / "drive"), _dataset(tmp_path / "colonoscopy" / "clinicdb")
    out = tmp_path / "out"
    code = _run(
        bundle.path, drive, clinic, "--native",
        "--json", out / "e.json", "--csv", out / "e.csv", "--worst", out / "worst",
    )  # fmt: skip
    assert code == 0
    text = capsys.readouterr().out
    assert "72.55" in text
    assert "92.84" in text
    assert "arXiv 2407.14153" in text
    assert "never trained" in text
    assert "own size" in text
    found = json.loads((out / "e.json").read_text())
    assert {m: list(d) for m, d in found.items()} == {"fundus": ["drive"], "colonoscopy": ["clinicdb"]}
    entry = found["fundus"]["drive"]
    assert entry["images"] == 3
    assert {"dice", "hd", "hd95", "iou", "images"} <= set(entry)
    assert 0 <= entry["iou"] <= entry["dice"] <= 100
    assert sorted(file.name for file in (out / "worst").iterdir()) == ["colonoscopy-clinicdb.png", "fundus-drive.png"]


def test_tta_is_scored_as_it_predicts(tmp_path: Path) -> None:
    patch = np.arange(16, dtype=np.float32).reshape(4, 4) / 99
    bundle = save_toy_bundle(tmp_path / "b.bundle", ("tiles",), patch=patch)
    data = _dataset(tmp_path / "tiles" / "some")
    for tta in (False, True):
        assert _run(bundle.path, data, *(["--tta"] if tta else []), "--json", tmp_path / f"{tta}.json") == 0
        candidate = BundleCandidate(bundle, tta=tta)
        expected = summary(evaluate(candidate, plan_tasks(candidate, [data])))
        assert json.loads((tmp_path / f"{tta}.json").read_text()) == expected
    assert (tmp_path / "True.json").read_text() != (tmp_path / "False.json").read_text()


def test_a_bad_image_ends_with_code_1_and_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = save_toy_bundle(tmp_path / "b.bundle")
    data = _dataset(tmp_path / "fundus" / "drive")
    (data / "images" / "1.png").write_bytes(b"")
    assert _run(bundle.path, data, "--json", tmp_path / "e.json") == 1
    assert "1.png" in capsys.readouterr().err
    assert json.loads((tmp_path / "e.json").read_text())["fundus"]["drive"]["images"] == 2


def test_wrong_use_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = save_toy_bundle(tmp_path / "b.bundle", ("fundus", "teeth"))
    data = _dataset(tmp_path / "others" / "set")
    assert _run(bundle.path, data) == 2
    assert "--modality NAME" in capsys.readouterr().err
    assert _run(bundle.path, data, "--modality", "fundos") == 2
    assert "Did you mean 'fundus'" in capsys.readouterr().err
    assert _run(bundle.path, data, "--modality", "fundus", "--split", "tets") == 2
    assert "Did you mean 'test'" in capsys.readouterr().err
    assert _run(bundle.path, data, "--modality", "fundus", "--limit", "1") == 0


@pytest.mark.parametrize("size", [0, 100_000, 10**23])
def test_sizes_that_no_memory_holds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    assert _run(save_toy_bundle(tmp_path / "b.bundle").path, _dataset(tmp_path / "d"), "--size", size) == 2
    assert "--size" in capsys.readouterr().err


def test_grey_masks_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = save_toy_bundle(tmp_path / "b.bundle")
    data = _dataset(tmp_path / "fundus" / "drive", count=1)
    mask = cv2.imread(str(data / "masks" / "0.png"), cv2.IMREAD_GRAYSCALE)
    values = np.where(mask > 0, 253, 4).astype(np.uint8)
    values[0, 0] = 9  # two values alone would be a mask without doubt
    cv2.imwrite(str(data / "masks" / "0.png"), values)
    assert _run(bundle.path, data) == 0
    assert "cut at half" in capsys.readouterr().out


def test_a_bundle_is_evaluated_without_torch(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "b.bundle")
    data = _dataset(tmp_path / "fundus" / "drive", count=1)
    code = (
        "import sys\nfrom espmedsam_edge import cli\n"
        f"try: cli.main(['evaluate', {str(bundle.path)!r}, {str(data)!r}, '--worst', {str(tmp_path / 'w')!r}])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'onnx', 'torchvision', 'monai'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_takes_long_and_what_runs_it_is_said_once(
    tmp_path: Path, announced_load: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = save_toy_bundle(tmp_path / "b.bundle", ("fundus", "colonoscopy"))
    data = [_dataset(tmp_path / name / "set", count=1) for name in ("fundus", "colonoscopy")]
    assert _run(bundle.path, *data) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == announced_load
    assert said[1].startswith("Running on onnxruntime (CPU")
    assert said[2].startswith("not tensorrt or tensorrt-rtx: ")
    assert len(said) == 3
