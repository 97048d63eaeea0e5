"""What ``deploy triton`` writes, read by NVIDIA's own protocol; and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sink_material import result_of
from toy_bundles import save_toy_bundle, toy_graph

from espmedsam_edge.bundle import Bundle, write_bundle
from espmedsam_edge.cli import main
from espmedsam_edge.deploy.triton import write_repository
from espmedsam_edge.deploy.triton_config import Serving, Word, as_text
from espmedsam_edge.deploy.triton_model import boxes_of
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines.precision import Arithmetic
from espmedsam_edge.runtime.engines.sidecar import EngineGpu, Sidecar


def configuration(model: Path) -> Any:
    """A model's configuration as ``inference.ModelConfig``; fields that it does not know are an error."""
    protocol = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient and grpcio")
    from google.protobuf import text_format

    return text_format.Parse((model / "config.pbtxt").read_text(), protocol.ModelConfig())


@pytest.mark.parametrize(
    ("engine", "platform", "backend", "file"),
    [("onnxruntime", "onnxruntime_onnx", "", "model.onnx"), ("python", "", "python", "model.py")],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_networks_and_pictures_are_models(
    tmp_path: Path, engine: Any, platform: str, backend: str, file: str, batch: int
) -> None:
    bundle = save_toy_bundle(tmp_path / "toy.bundle", ("fundus", "colonoscopy"), batch=batch)
    models = write_repository([bundle], tmp_path / "models", engine=engine, serving=Serving(2, 3, 500))
    names = ["fundus_fp32", "colonoscopy_fp32", "fundus", "colonoscopy"]
    assert [model.name for model in models] == names
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(names)
    for graph in bundle.manifest.graphs:
        place = tmp_path / "models" / f"{graph.modality}_fp32"
        network = configuration(place)
        assert (network.name, network.platform, network.backend) == (place.name, platform, backend)
        assert [path.name for path in (place / "1").iterdir() if path.is_file()] == [file]
        whole = ([network.max_batch_size] if network.max_batch_size else []) + list(network.input[0].dims)
        assert tuple(whole) == graph.input_shape
        assert network.input[0].name == "image"
        assert network.output[0].name == "logits"
        gathers = engine == "python" and batch > 1  # else the batch is fixed in what the server runs
        assert network.HasField("dynamic_batching") == gathers
        pictures = configuration(tmp_path / "models" / graph.modality)
        assert (pictures.backend, pictures.max_batch_size) == ("python", batch)
        assert pictures.HasField("dynamic_batching") == (batch > 1)
        if batch > 1:
            assert list(pictures.dynamic_batching.preferred_batch_size) == [batch]
            assert pictures.dynamic_batching.max_queue_delay_microseconds == 500
        for config in (network, pictures):
            assert config.version_policy.latest.num_versions == 1
            assert [(group.count) for group in config.instance_group] == [2]
            assert len(config.model_warmup) == 1
            assert config.parameters["graph_sha256"].string_value == graph.sha256
            assert json.loads(config.parameters["normalization"].string_value)["mean"]
            assert config.parameters["threads"].string_value == "3"
        own = Bundle.open(tmp_path / "models" / graph.modality / "1" / "bundle")
        assert own.manifest.graphs == [graph]
        assert own.read_graph(graph) == bundle.read_graph(graph)
        if engine == "onnxruntime":
            assert (place / "1" / file).read_bytes() == bundle.read_graph(graph)
            assert network.parameters["intra_op_thread_count"].string_value == "3"


def test_texts_of_any_kind_survive_the_configuration() -> None:
    protocol = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient and grpcio")
    from google.protobuf import text_format

    odd = 'a "quoted" \\ back\nslash \t é ☃'
    fields = {"name": odd, "max_batch_size": 3, "instance_group": [{"kind": Word("KIND_CPU"), "count": 2}]}
    config = text_format.Parse(as_text(fields), protocol.ModelConfig())
    assert config.name == odd
    assert config.instance_group[0].kind == protocol.ModelInstanceGroup.KIND_CPU


def test_boxes_are_of_each_part_the_largest_first() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[2:5, 3:7] = 255
    mask[10:30, 20:50] = 255
    mask[39, 59] = 255
    assert boxes_of(result_of(mask)).tolist() == [[20, 10, 30, 20], [3, 2, 4, 3], [59, 39, 1, 1]]
    assert boxes_of(result_of(np.zeros((4, 4), np.uint8))).shape == (0, 4)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["deploy", "triton", *map(str, arguments)])
    return int(ended.value.code or 0), *capsys.readouterr()


def test_what_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save_toy_bundle(tmp_path / "one.bundle"), save_toy_bundle(tmp_path / "two.bundle")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    out = tmp_path / "models"
    for arguments, line in (
        ((one.path, "--out", tmp_path / "full"), "full exists."),
        ((one.path, "--out", tmp_path / "full" / "mine.txt"), "exists."),
        ((one.path, two.path, "--out", out), "both have fundus"),
        ((one.path, "--out", out, "--modality", "x"), "no bundle has x."),
        ((one.path, "--out", out, "--precision", "int8"), "has no int8 graph"),
        ((one.path, "--out", out, "--engine", "tensorrt", "--cache", tmp_path / "none"), "no engine of fundus fp32"),
        ((tmp_path / "nowhere", "--out", out), "no bundle at"),
    ):
        code, _, error = run(capsys, *arguments)
        assert code in (1, 2)
        assert line in error
        assert error.count("\n") == 1
        assert not out.exists()
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    code, printed, _ = run(capsys, one.path, "--out", out)
    assert code == 0
    assert "fundus_fp32: fp32 64x64, onnxruntime" in printed
    assert "take one picture a run" in printed
    assert run(capsys, one.path, "--out", out)[0] == 2  # it is there now


def test_graphs_of_two_sizes_are_no_model(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "toy.bundle")
    with write_bundle(bundle.path, extend=True) as draft:
        draft.new_file("fp16.onnx").write_bytes(toy_graph(image_size=128))
        graph = draft.graph("fp16.onnx", modality="fundus", precision="fp16", image_size=128)
        assert draft.manifest is not None
        draft.manifest = draft.manifest.model_copy(update={"graphs": [*draft.manifest.graphs, graph]})
    bundle = Bundle.open(bundle.path)
    with pytest.raises(UserError, match=r"different sizes: fp32 64 .*fp16 128"):
        write_repository([bundle], tmp_path / "models")
    models = write_repository([bundle], tmp_path / "models", precisions=["fp16"])
    assert [(model.name, model.graph.image_size) for model in models] == [("fundus_fp16", 128), ("fundus", 128)]


def test_engines_of_the_cache_are_served_as_they_are(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "toy.bundle", batch=2)
    graph, plan = bundle.graph(), np.random.default_rng(0).bytes(5000)
    folder = tmp_path / "cache" / "engines"
    folder.mkdir(parents=True, mode=0o700)
    kept = {"a": ("tensorrt-rtx", plan), "b": ("tensorrt", b"damaged"), "c": ("tensorrt", plan)}
    for stem, (flavour, content) in kept.items():
        sidecar = Sidecar(
            plan=f"fundus-fp32-{stem}.plan", plan_sha256=hashlib.sha256(plan).hexdigest(), plan_bytes=len(plan),
            graph=graph, bundle=str(bundle.path), flavour=flavour, version="10.9.0", cuda=None,  # type: ignore[arg-type]
            gpu=EngineGpu(name="Orin", sm="sm87", sm_count=8), targets=(), tf32=False,
            arithmetic=Arithmetic(inputs=(), outputs=(), layers={}, macs={}, tensors={}),
            engine_loaded=True, engine_layers={}, dla=None, workspace_bytes=None, build_seconds=1.0, median_ms=None,
            peak_memory_bytes=None, built="2026-01-01", built_by="test",
        )  # fmt: skip
        for file, data in ((sidecar.plan, content), (f"fundus-fp32-{stem}.json", sidecar.model_dump_json().encode())):
            (folder / file).write_bytes(data)
            (folder / file).chmod(0o600)
    model, _ = write_repository([bundle], tmp_path / "models", engine="tensorrt", cache=tmp_path / "cache")
    assert model.needs == "TensorRT 10.9.0 and Orin (SM 8.7, 8 SMs)"
    network = configuration(tmp_path / "models" / "fundus_fp32")
    assert (network.platform, network.max_batch_size) == ("tensorrt_plan", 0)
    assert tuple(network.input[0].dims) == graph.input_shape
    assert network.instance_group[0].kind == network.instance_group[0].KIND_GPU
    assert (tmp_path / "models" / "fundus_fp32" / "1" / "model.plan").read_bytes() == plan
