"""``espmedsam-edge demo`` and ``doctor`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge import cli
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.demo import demo as demo_module


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "CLIP_FRAMES", 2)
    monkeypatch.setattr(demo_module, "PICTURE_SIZE", (96, 128))


def test_it_prints_a_table_and_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, out = save_toy_bundle(tmp_path / "b.bundle"), tmp_path / "demo"
    assert run("demo", "--bundle", bundle.path, "--out", out) == 0
    text = capsys.readouterr().out
    assert "retinal vessels" in text
    assert "Dice" in text
    assert "untrained" not in text
    assert str(out / "contact-sheet.png") in text
    assert (out / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")


def test_untrained_weights_are_named_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = save_toy_bundle(tmp_path / "random.bundle", origin="random")
    assert run("demo", "--bundle", bundle.path, "--out", tmp_path / "demo") == 0
    assert "The weights are untrained (random): the masks are meaningless." in capsys.readouterr().out


def test_a_missing_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--bundle", tmp_path / "none", "--out", tmp_path / "demo") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_doctor_leaves_with_0_in_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    assert "This machine can:" in capsys.readouterr().out
    assert run("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1


def test_a_package_that_is_missing_is_named_with_the_command_that_adds_it(
    toy_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(demo_module, "demo_bundles", lambda path: missing())
    assert run("demo", "--bundle", toy_bundle.path) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 'demo' needs the package torch. Install it: ")
    assert err.strip().endswith("[export]'")


def test_what_takes_long_and_what_runs_it_is_said(
    toy_bundle_of_two: Bundle, tmp_path: Path, announced_load: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("demo", "--bundle", toy_bundle_of_two.path, "--out", tmp_path / "demo") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == announced_load
    assert said[1].startswith("Running on onnxruntime (CPU")
    assert said[2].startswith("not tensorrt or tensorrt-rtx: ")
    assert len(said) == 3
