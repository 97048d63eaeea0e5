"""The registry of modalities."""

from __future__ import annotations

import pytest

from espmedsam_edge import modalities
from espmedsam_edge.errors import UserError
from espmedsam_edge.modalities import PAPER_MODALITIES, check_name, choose, published_query, register, target_of


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modalities, "_REGISTRY", dict(modalities._REGISTRY))


def test_the_papers_six_have_the_published_queries() -> None:
    # The order of the published mask_query: DESIGN of the authors' code, not of the paper's Table I.
    published = ["dermoscopy", "xray", "ultrasound", "fundus", "microscopy", "colonoscopy"]
    assert [published_query(name) for name in published] == list(range(6))
    assert sorted(published) == sorted(PAPER_MODALITIES)


def test_a_user_adds_a_modality() -> None:
    register("histopathology", "nuclei")
    assert target_of("histopathology") == "nuclei"
    assert published_query("histopathology") is None
    register("histopathology", "glands")  # the last word counts
    assert target_of("histopathology") == "glands"


def test_a_known_modality_keeps_its_published_query() -> None:
    register("microscopy", "white blood cell nuclei")
    assert target_of("microscopy") == "white blood cell nuclei"
    assert published_query("microscopy") == 4


def test_an_unregistered_modality_is_its_own_target() -> None:
    assert target_of("retina_oct") == "retina_oct"


@pytest.mark.parametrize("name", ["", "Fundus", "1st", "../fundus", "a b", "a" * 41, "fundus\n", "ü"])
def test_names_that_cannot_be_file_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a modality"):
        check_name(name)


def test_choosing() -> None:
    assert choose(None, ["fundus"], "bundle b") == "fundus"
    assert choose("xray", ["fundus", "xray"], "bundle b") == "xray"
    with pytest.raises(UserError, match=r"bundle b holds 2 modalities: fundus, xray\. Pick one with --modality"):
        choose(None, ["fundus", "xray"], "bundle b")
    with pytest.raises(UserError, match=r"no modality 'fundos'\. Did you mean 'fundus'\?"):
        choose("fundos", ["fundus", "xray"], "bundle b")
