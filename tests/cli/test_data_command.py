"""``espmedsam-edge data``: what it prints and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge import cli
from espmedsam_edge.phantoms import phantom


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", *(str(argument) for argument in arguments)])
    return int(ended.value.code or 0)


def _udiat(root: Path, count: int = 6) -> Path:
    for folder in ("original", "GT"):
        (root / "BUS" / folder).mkdir(parents=True)
    for number in range(count):
        image, mask = phantom("ultrasound", number, (48, 64))
        cv2.imwrite(str(root / "BUS" / "original" / f"{number:06d}.png"), image)
        cv2.imwrite(str(root / "BUS" / "GT" / f"{number:06d}.png"), mask)
    return root


def test_prepare_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, made = _udiat(tmp_path / "source"), tmp_path / "ultrasound" / "udiat"
    assert _run("prepare", "udiat", source, made, "--long-side", "40") == 0
    assert "6 images of UDIAT" in capsys.readouterr().out
    assert _run("check", made) == 0
    assert "Nothing is wrong." in capsys.readouterr().out


def test_prepare_reports_bad_files_and_leaves_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _udiat(tmp_path / "source")
    (source / "BUS" / "original" / "000002.png").write_bytes(b"")
    cv2.imwrite(str(source / "BUS" / "GT" / "000003.png"), np.zeros((48, 64), np.uint8))
    (tmp_path / "split.json").write_text(json.dumps({"train": ["000000", "000001"], "test": ["000004"]}))
    assert _run("prepare", "udiat", source, tmp_path / "made", "--split", tmp_path / "split.json") == 1
    captured = capsys.readouterr()
    assert "000002.png" in captured.err
    assert "4 images" in captured.out
    assert "1 images are in none of the given lists" in captured.out
    assert "1 images without a mask were left out, the first: 000003" in captured.out


def test_wrong_use_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("prepare", "udait", tmp_path, tmp_path / "made") == 2
    assert "Did you mean 'udiat'" in capsys.readouterr().err
    assert _run("prepare", "udiat", tmp_path, tmp_path / "made") == 2
    assert "Expected: original/ and GT/" in capsys.readouterr().err
    assert _run("check", tmp_path / "nowhere") == 2


def test_check_lists_what_is_wrong_and_leaves_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, made = _udiat(tmp_path / "source", 9), tmp_path / "made"
    _run("prepare", "udiat", source, made)
    for number in range(5):
        (made / "masks" / f"{number:06d}.png").unlink()
    capsys.readouterr()
    assert _run("check", made) == 1
    text = capsys.readouterr().out
    assert "image without mask" in text
    assert "... and 2 more (--all)" in text
    assert "000004" not in text
    assert _run("check", made, "--all") == 1
    assert "000004" in capsys.readouterr().out


def test_layouts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    _run("layouts")
    text = capsys.readouterr().out
    assert "isic2018: ISIC-2018 task 1 (dermoscopy)" in text
    assert "photographs: SA-1B, or any folder of photographs (unlabelled)" in text


def test_pairs_become_a_folder_that_is_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        image, mask = phantom("ultrasound", number, (48, 64))
        for folder, name, picture in (("a", f"{number}.png", image), ("b", f"{number}_gt.png", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / name), picture)
    made = tmp_path / "ultrasound" / "mine"
    assert _run("prepare", "pairs", tmp_path / "a", tmp_path / "b", made, "--masks-named", "{id}_gt") == 0
    assert "6 images of your own; train 4, valid 1, test 1 (derived)" in capsys.readouterr().out
    assert _run("check", made) == 0
    assert _run("prepare", "pairs", tmp_path / "a", tmp_path / "made") == 2
    assert "takes IMAGES MASKS DST. 2 places were given." in capsys.readouterr().err
