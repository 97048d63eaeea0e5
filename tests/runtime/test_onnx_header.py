"""The two version numbers of an ONNX file, against the onnx package, and on bytes that are no ONNX file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espmedsam_edge.runtime.onnx_header import OnnxHeader, read_header


@pytest.mark.parametrize("domains", [["", "com.microsoft"], ["com.microsoft", ""], ["ai.onnx"], ["com.microsoft"], []])
def test_reads_what_onnx_wrote(domains: list[str], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    import numpy as np

    weights = onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal(10_000).astype(np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [weights])
    versions = {domain: 21 if domain in ("", "ai.onnx") else 1 for domain in domains}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
    model = onnx.helper.make_model(graph, ir_version=10, producer_name="someone")
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    file = tmp_path / "graph.onnx"
    file.write_bytes(model.SerializeToString())
    assert read_header(file) == OnnxHeader(10, 21 if {"", "ai.onnx"} & set(domains) else None)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read_header(tmp_path / "empty") == OnnxHeader(None, None)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_answered(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.onnx"
    file.write_bytes(content)
    found = read_header(file)
    assert found is None or isinstance(found, OnnxHeader)
