"""Which bundle runs: the one named, or one of the weights that came with the program, by the picture."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime import bundle_choice
from espmedsam_edge.runtime.bundle_choice import choose_bundle, means_a_bundle
from espmedsam_edge.runtime.sources.anonymous import SourceNames
from espmedsam_edge.runtime.video.writing import open_writer
from espmedsam_edge.shipped.bundles import Score

SCORE = Score(dice=70, images=14, dataset="drive", required=65)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The modalities that bundles of shipped weights were asked for; each such bundle is a toy."""
    asked: list[str | None] = []

    def toy(modality: str | None) -> Bundle:
        asked.append(modality)
        assert modality is not None
        return save_toy_bundle(tmp_path / f"{modality}.bundle", (modality,))

    monkeypatch.setattr(bundle_choice, "shipped_scores", lambda: {"fundus": SCORE, "xray": SCORE})
    monkeypatch.setattr(bundle_choice, "shipped_bundle", toy)
    return asked


def _picture(path: Path, modality: str = "fundus") -> str:
    cv2.imwrite(str(path), phantom(modality, 3, (120, 160))[0])
    return str(path)


def test_a_bundle_that_is_named_is_taken(tmp_path: Path, toy_bundle: Bundle, shipped: list[str | None]) -> None:
    chosen = choose_bundle(str(toy_bundle.path), None, ["a.png", "b.png"])
    assert chosen.bundle.path == toy_bundle.path
    assert (chosen.modality, shipped) == (None, [])
    assert choose_bundle(toy_bundle, "fundus", []) == (toy_bundle, "fundus")


def test_without_a_bundle_the_picture_tells_the_modality(
    tmp_path: Path, shipped: list[str | None], said: list[str]
) -> None:
    picture = _picture(tmp_path / "retina.png")
    chosen = choose_bundle(None, None, [picture, "more.png"])
    assert (chosen.modality, shipped) == ("fundus", ["fundus"])
    assert any("looks like fundus" in line for line in said)


def test_a_picture_without_a_name_is_recognised_by_its_number(
    tmp_path: Path, shipped: list[str | None], said: list[str]
) -> None:
    picture = _picture(tmp_path / "DOE^JANE.png")
    assert choose_bundle(None, None, [picture], SourceNames()).modality == "fundus"
    assert any(line.startswith("source-1 looks like fundus") for line in said)
    assert "DOE" not in "".join(said)


def test_a_folder_and_a_video_are_sources_too(tmp_path: Path, shipped: list[str | None]) -> None:
    (tmp_path / "pictures").mkdir()
    _picture(tmp_path / "pictures" / "1.png")
    assert choose_bundle(None, None, [str(tmp_path / "pictures")]).modality == "fundus"
    writer = open_writer(tmp_path / "clip.mp4", (120, 160), Fraction(10))
    writer.write(phantom("fundus", 3, (120, 160))[0], 0.0)
    writer.finish()
    writer.close()
    assert choose_bundle(None, None, [str(tmp_path / "clip.mp4")]).modality == "fundus"


def test_a_modality_that_is_named_is_not_questioned(tmp_path: Path, shipped: list[str | None]) -> None:
    assert choose_bundle(None, "xray", [_picture(tmp_path / "a.png")]).modality == "xray"
    assert choose_bundle(None, "fundus", ["rtsp://host/stream"]).modality == "fundus"
    assert shipped == ["xray", "fundus"]


def test_what_is_not_clear_asks_for_the_modality(tmp_path: Path, shipped: list[str | None]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "noise.png"), noise)
    with pytest.raises(UserError, match=r"none of the modalities.*--modality fundus\|xray"):
        choose_bundle(None, None, [str(tmp_path / "noise.png")])
    with pytest.raises(UserError, match="cannot be told"):
        choose_bundle(None, None, ["test://fundus"])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"broken\.png"):
        choose_bundle(None, None, [str(tmp_path / "broken.png")])
    with pytest.raises(UserError, match=r"no bundle and no modality is named\. Name one: --modality fundus\|xray"):
        choose_bundle(None, None, [])
    assert shipped == []


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("my.bundle", True),
        ("bundles/fundus", True),
        ("a.png", False),
        ("rtsp://host/x", False),
        ("0", False),
        ("images/*.png", False),
    ],
)
def test_names_that_do_not_exist_are_told_apart(argument: str, expected: bool) -> None:
    assert means_a_bundle(argument) is expected


def test_a_folder_with_graphs_but_no_manifest_is_a_broken_bundle(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "fp32.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        choose_bundle(str(tmp_path / "b"), None, ["a.png"])
