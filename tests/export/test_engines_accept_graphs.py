"""TensorRT-RTX parses and builds the exported graphs, on this machine, with or without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines_in_process import build_plan, check_parse
from once import exported_graph

from espmedsam_edge.export.graph import save_graph
from espmedsam_edge.runtime.engines import tensorrt_api

pytestmark = pytest.mark.rtx


@pytest.mark.parametrize(
    ("preset", "size", "batch", "published"),
    [("espmedsam-tiny", 128, 2, False), ("espmedsam-tiny", 128, 2, True), ("espmedsam-s", 256, 1, False)],
)
def test_tensorrt_rtx_parses_and_builds(preset: str, size: int, batch: int, published: bool, tmp_path: Path) -> None:
    if not tensorrt_api.installed("tensorrt-rtx"):
        pytest.skip("TensorRT-RTX is not installed (extra rtx)")
    path = tmp_path / "fp32.onnx"
    save_graph(exported_graph(size, batch, preset=preset, published=published), path, {})
    assert check_parse(path, "tensorrt-rtx") == []
    plan = build_plan(path, ["sm86"], "tensorrt-rtx")
    assert len(plan) > 100_000  # an engine with its weights, not an empty shell
