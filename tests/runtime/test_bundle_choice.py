"""Which bundle runs: the one named, or those of the weights that came with the program."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime import bundle_choice
from espmedsam_edge.runtime.bundle_choice import Chosen, choose_bundle, means_a_bundle
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


def test_a_bundle_that_is_named_is_taken(toy_bundle: Bundle, shipped: list[str | None]) -> None:
    chosen = choose_bundle(str(toy_bundle.path), None)
    assert chosen.bundle is not None
    assert chosen.bundle.path == toy_bundle.path
    assert (chosen.modality, chosen.among, shipped) == ("fundus", (), [])
    assert choose_bundle(toy_bundle, "fundus") == Chosen(toy_bundle, "fundus")
    with pytest.raises(UserError, match="no int8 graph"):
        choose_bundle(toy_bundle, None, "int8")


def test_pictures_choose_among_what_there_is(toy_bundle_of_two: Bundle, shipped: list[str | None]) -> None:
    assert choose_bundle(None, None) == Chosen(None, None, ("fundus", "xray"))
    assert choose_bundle(toy_bundle_of_two, None) == Chosen(toy_bundle_of_two, None, ("fundus", "colonoscopy"))
    assert choose_bundle(toy_bundle_of_two, "colonoscopy") == Chosen(toy_bundle_of_two, "colonoscopy")
    assert shipped == []


def test_a_modality_that_no_picture_can_be_recognised_as_must_be_named(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "b.bundle", ("fundus", "teeth"))
    with pytest.raises(UserError, match="fundus, teeth"):
        choose_bundle(bundle, None)
    assert choose_bundle(bundle, "teeth").modality == "teeth"


def test_a_modality_that_is_named_is_not_questioned(shipped: list[str | None], said: list[str]) -> None:
    chosen = choose_bundle(None, "xray")
    assert (chosen, shipped) == (Chosen(None, "xray"), [])
    assert chosen.bundle_of("xray").manifest.modalities == ["xray"]
    assert shipped == ["xray"]


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
        choose_bundle(str(tmp_path / "b"), None)
