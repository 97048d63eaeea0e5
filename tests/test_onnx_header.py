"""The header of a graph: the lowest version of the format, the operators in use, what it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from toy_bundles import TOY_SIZE, save_toy_bundle, toy_graph

from espmedsam_edge.bundle import MANIFEST, Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.graph_rules import OPSETS, check_graph
from espmedsam_edge.onnx_header import IR_VERSIONS, with_header

onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
from written_headers import check_header  # noqa: E402


@pytest.mark.parametrize("opset", OPSETS)
def test_the_lowest_version_of_the_format_is_onnxs_own(opset: int) -> None:
    assert IR_VERSIONS[opset] == onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def test_only_the_operators_in_use_are_stated_and_the_graph_is_untouched() -> None:
    before = onnx.load_from_string(toy_graph())
    before.graph.node[0].domain = "com.microsoft"
    before.opset_import.extend(onnx.helper.make_opsetid(f"foreign.{number}", 1) for number in range(8))
    before.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    before.ir_version, before.doc_string = 10, "/home/somebody/model.py"
    before.metadata_props.add(key="a", value="b")
    after = onnx.load_from_string(with_header(before.SerializeToString(), {"modality": "fundus", "target": "Gefäße"}))
    assert {opset.domain: opset.version for opset in after.opset_import} == {"": 17, "com.microsoft": 1}
    assert (after.ir_version, after.doc_string, after.producer_name) == (8, "", "espmedsam-edge")
    assert {entry.key: entry.value for entry in after.metadata_props} == {"modality": "fundus", "target": "Gefäße"}
    assert after.graph == before.graph


def _bundle_that_states(folder: Path, change: dict[str, str]) -> Bundle:
    """A toy bundle whose graph has the manifest's properties, but for ``change``."""
    bundle = save_toy_bundle(folder)
    properties = bundle.manifest.properties("fundus", "fp32") | change
    file = folder / "fp32.onnx"
    file.write_bytes(with_header(toy_graph(), properties))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["graphs"][0]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(folder)


@pytest.mark.parametrize("change", [{}, {"target": "another text"}, {"threshold": "0.4"}])
def test_a_graph_that_says_what_its_manifest_says_is_read(change: dict[str, str], tmp_path: Path) -> None:
    bundle = _bundle_that_states(tmp_path / "b", change)
    content = bundle.read_graph(bundle.graph())
    check_header(onnx.load_from_string(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modality": "xray"}, "it says that its modality is xray, and its manifest fundus"),
        ({"precision": "int8"}, "its precision is int8"),
        ({"checkpoint_sha256": "f" * 64}, "its checkpoint_sha256 is ffff"),
        ({"normalization": '{"mean":[0,0,0],"std":[1,1,1]}'}, "its normalization is"),
        ({"patient": "Doe"}, "it has the property 'patient', which no graph of this program has"),
    ],
)
def test_a_graph_that_says_otherwise_is_refused(change: dict[str, str], words: str, tmp_path: Path) -> None:
    bundle = _bundle_that_states(tmp_path / "b", change)
    with pytest.raises(UserError, match="is not run: ") as refused:
        bundle.read_graph(bundle.graph())
    assert words in refused.value.message


def test_a_property_twice_is_refused(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "b")
    model = onnx.load_from_string(with_header(toy_graph(), {"modality": "fundus"}))
    model.metadata_props.add(key="modality", value="fundus")
    with pytest.raises(UserError, match="not an ONNX graph"):
        check_graph(model.SerializeToString(), 1, TOY_SIZE, "g", bundle.manifest.properties("fundus", "fp32"))


def test_graphs_of_earlier_versions_still_run() -> None:
    """They state no properties, and those of ``weights`` all sets of operators that ONNX Runtime knows."""
    model = onnx.load_from_string(toy_graph())
    for domain in ("com.microsoft", "com.microsoft.nchwc", "ai.onnx.ml", "ai.onnx.training", "org.pytorch.aten"):
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    model.ir_version = 10
    check_graph(model.SerializeToString(), 1, TOY_SIZE, "g", {"modality": "fundus"})
