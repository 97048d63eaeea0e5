"""What every graph that this program writes says of itself, read by onnx and by ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence

import onnx
import onnxruntime

from espmedsam_edge.bundle import PRECISIONS, Bundle

NEW_IN_IR_10 = "metadata_props"
"""Field of nodes, values and tensors."""


def check_header(model: onnx.ModelProto) -> None:
    """The sets of operators are those of its nodes, the version of the format is the lowest that carries it."""
    domains = [opset.domain for opset in model.opset_import]
    assert sorted(domains) == sorted({node.domain for node in model.graph.node})
    assert model.ir_version == onnx.helper.find_min_ir_version_for(list(model.opset_import))
    graph = model.graph
    for part in [*graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output, graph]:
        assert not getattr(part, NEW_IN_IR_10)
    assert model.producer_name == "espmedsam-edge"
    onnx.checker.check_model(model)


def check_bundle(bundle: Bundle, precisions: Sequence[str] = PRECISIONS) -> None:
    """Every graph of a bundle: its header, and its properties as in the manifest."""
    manifest = bundle.manifest
    for graph in (graph for graph in manifest.graphs if graph.precision in precisions):
        content = bundle.read_graph(graph)
        model = onnx.load_from_string(content)
        check_header(model)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        stated = session.get_modelmeta().custom_metadata_map
        assert stated == {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(stated.pop("normalization")) == manifest.input.normalization.model_dump(mode="json")
        assert float(stated.pop("threshold")) == manifest.threshold
        assert stated == {
            "modality": graph.modality,
            "target": manifest.targets.get(graph.modality, ""),
            "precision": graph.precision,
            "preset": manifest.preset,
            "bundle_schema": "1",
            "checkpoint_sha256": manifest.weights.checkpoint_sha256,
        }
