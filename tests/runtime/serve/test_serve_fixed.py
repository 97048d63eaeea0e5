"""A run that writes files keeps its modality: viewers cannot make its files say the wrong thing."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs starlette (extra serve)")
pytest.importorskip("uvicorn", reason="needs uvicorn (extra serve)")

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.run.controls import Adjustable
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.segmenter_pool import SegmenterPool, loader
from espmedsam_edge.runtime.serve import serving
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.panel import Panel


def test_a_pool_gives_only_what_may_be_asked_for(toy_bundle_of_two: Bundle) -> None:
    load = loader(toy_bundle_of_two, None, "auto", threads=1)
    with SegmenterPool(toy_bundle_of_two, load, ["fundus"]) as pool:
        assert pool.get("fundus").modality == "fundus"
        with pytest.raises(UserError, match="no modality 'colonoscopy' here"):
            pool.get("colonoscopy")
    with SegmenterPool(toy_bundle_of_two, load) as pool:
        assert pool.get("colonoscopy").modality == "colonoscopy"


@pytest.mark.parametrize("writes", [True, False])
def test_a_run_that_writes_offers_its_own_modality_alone(
    toy_bundle_of_two: Bundle, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    panels: list[Panel] = []

    def kept(*arguments: Any, **options: Any) -> Panel:
        panels.append(Panel(*arguments, **options))
        return panels[-1]

    monkeypatch.setattr(serving, "Panel", kept)
    with (
        Segmenter.load(toy_bundle_of_two, "fundus", threads=1) as segmenter,
        serving.serve_run(ServeOptions("0"), segmenter, Adjustable(), threads=1, writes=writes),
    ):
        offered = [entry["name"] for entry in panels[0].greeting()["modalities"]]
    assert offered == (["fundus"] if writes else ["fundus", "colonoscopy"])
