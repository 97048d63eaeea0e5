"""Everything that a bundle can be measured against is found by name, computes the same, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_bundles import save_toy_bundle, save_toy_graph

from espmedsam_edge.bench import torch_competitor
from espmedsam_edge.bench.benchmark import BenchRequest, run_benchmark
from espmedsam_edge.bench.competitors import load_competitor, load_first
from espmedsam_edge.bench.device import measure_device
from espmedsam_edge.bench.measure import BenchSettings
from espmedsam_edge.bench.report import as_text
from espmedsam_edge.bench.torch_competitor import TorchBackend
from espmedsam_edge.bundle import Bundle, Manifest, Weights, write_bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import sha256_file
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.runtime.backends.backend import BackendUnavailable
from espmedsam_edge.runtime.segmenter import Segmenter


@pytest.fixture
def first(toy_bundle: Bundle) -> Segmenter:
    return load_first(toy_bundle, None, None, "onnxruntime-cpu", 1).segmenter


def frame() -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (50, 70, 3), np.uint8)


def test_the_first_is_named_after_backend_and_precision(toy_bundle: Bundle) -> None:
    found = load_first(toy_bundle, None, None, "onnxruntime-cpu", 1)
    assert found.name == "onnxruntime-cpu fp32"
    assert found.graph_sha256 == toy_bundle.manifest.graphs[0].sha256
    assert found.load_seconds > 0


def test_a_backend_a_precision_and_a_bundle_are_loaded_by_name(first: Segmenter, tmp_path: Path) -> None:
    other = save_toy_bundle(tmp_path / "other.bundle")
    for what, name in {
        "onnxruntime": "onnxruntime fp32",
        "fp32": "onnxruntime-cpu fp32",
        str(other.path): "other.bundle",
    }.items():
        competitor = load_competitor(what, first, None, 1)
        assert competitor.name == name
        assert np.array_equal(competitor.segmenter.segment(frame()).logits, first.segment(frame()).logits)


def test_any_onnx_file_with_such_an_input_and_logits_takes_part_whatever_their_names(
    first: Segmenter, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    file = tmp_path / "straight.onnx"
    save_toy_graph(file)
    model = onnx.load(str(file))
    renamed = onnx.compose.add_prefix(model, "their_")
    patches = onnx.helper.make_tensor_value_info("their_sum", onnx.TensorProto.FLOAT, [1, 1, 64, 64])
    renamed.graph.output.insert(0, patches)  # an output that is not the logits comes first
    onnx.save(renamed, str(file))
    competitor = load_competitor(str(file), first, None, 1)
    assert competitor.name == "straight.onnx"
    assert competitor.graph_sha256 == sha256_file(file)
    assert np.array_equal(competitor.segmenter.segment(frame()).mask, first.segment(frame()).mask)


def test_an_onnx_file_of_another_size_is_refused(first: Segmenter, tmp_path: Path) -> None:
    save_toy_graph(tmp_path / "large.onnx", image_size=128)
    with pytest.raises(UserError, match=r"not one float tensor of \[1, 3, 64, 64\]"):
        load_competitor(str(tmp_path / "large.onnx"), first, None, 1)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("onnxruntme", "Did you mean 'onnxruntime'"),
        ("nowhere.onnx", "no file nowhere.onnx"),
        ("fp16", "no fp16 graph"),
        ("torch", "--checkpoint WEIGHTS.safetensors"),
    ],
)
def test_what_cannot_take_part_is_refused_with_the_remedy(first: Segmenter, what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_competitor(what, first, None, 1)


def test_a_checkpoint_of_other_weights_is_refused(first: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="is not the checkpoint"):
        load_competitor("torch", first, tmp_path / "other.safetensors", 1)


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch", reason="eager PyTorch needs torch (extra export)")
    from espmedsam_edge.model.checkpoint import CheckpointInfo, save_checkpoint
    from espmedsam_edge.model.config import model_config
    from espmedsam_edge.model.esp_medsam import EspMedSam

    torch.manual_seed(1)
    torch.set_num_threads(1)
    config = model_config("espmedsam-tiny").model_copy(update={"image_size": 64})
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, EspMedSam(config, ["fundus"]), CheckpointInfo(config=config, origin="random"))
    return path


def test_eager_torch_computes_what_its_checkpoint_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import torch

    from espmedsam_edge.imaging.geometry import preprocess
    from espmedsam_edge.model.checkpoint import load_checkpoint

    with write_bundle(tmp_path / "toy.bundle") as draft:
        save_toy_graph(draft.new_file("fp32.onnx"))
        graph = draft.graph("fp32.onnx", modality="fundus", precision="fp32", image_size=64)
        weights = Weights(checkpoint_sha256=sha256_file(tiny_checkpoint), origin="random")
        draft.manifest = Manifest(preset="toy", weights=weights, graphs=[graph])
    bundle = Bundle.open(tmp_path / "toy.bundle")
    own = load_first(bundle, None, None, "onnxruntime-cpu", 1).segmenter
    competitor = load_competitor("torch", own, tiny_checkpoint, 1)
    model, _ = load_checkpoint(tiny_checkpoint)
    image = torch.from_numpy(preprocess(frame(), 64, bundle.manifest.input.normalization))
    with torch.no_grad():
        expected = model.eval()(image, "fundus").low_res_logits[0, 0].numpy()
    found = competitor.segmenter.segment(frame()).logits
    # The same operations on the same input; inference mode may choose another kernel, hence not bit-equal.
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert competitor.name == "torch eager"

    picture = tmp_path / "picture.png"
    write_image(picture, frame())
    request = BenchRequest(bundle.path, str(picture), compare=["torch", "fp32"], checkpoint=tiny_checkpoint, threads=1)
    result = run_benchmark(request, BenchSettings(duration=0.05, warmup=0.0))
    assert [series.contender.name for series in result.series] == [
        "onnxruntime fp32",
        "torch eager",
        "onnxruntime fp32 (2)",
    ]
    assert result.comparisons[0].inference.value > 0


def test_what_pytorch_needs_besides_itself_is_named_where_it_is_missing(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_competitor, "find_spec", lambda name: None if name in ("timm", "safetensors") else name)
    with pytest.raises(BackendUnavailable, match=r"not installed: timm, safetensors\. .*\[export\]"):
        TorchBackend(tmp_path / "w.safetensors", toy_bundle.manifest.graphs[0], 1)


def exported_from(checkpoint: Path, path: Path) -> Bundle:
    with write_bundle(path) as draft:
        save_toy_graph(draft.new_file("fp32.onnx"))
        graph = draft.graph("fp32.onnx", modality="fundus", precision="fp32", image_size=64)
        weights = Weights(checkpoint_sha256=sha256_file(checkpoint), origin="random")
        draft.manifest = Manifest(preset="toy", weights=weights, graphs=[graph])
    return Bundle.open(path)


def test_compiled_torch_is_the_same_network(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    modes: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    own = load_first(exported_from(tiny_checkpoint, tmp_path / "b"), None, None, "onnxruntime-cpu", 1).segmenter
    compiled = load_competitor("torch-compile", own, tiny_checkpoint, 1)
    eager = load_competitor("torch-eager", own, tiny_checkpoint, 1)
    assert (compiled.name, eager.name, modes) == ("torch compile fp32", "torch eager", [None])
    np.testing.assert_array_equal(compiled.segmenter.segment(frame()).logits, eager.segmenter.segment(frame()).logits)
    assert measure_device(eager.segmenter, [frame()]) is None  # the CPU has no clock of its own
    for each in (compiled, eager):
        each.segmenter.close()


def test_a_compiler_that_fails_and_a_gpu_that_torch_lacks_are_left_out(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from torch._dynamo.exc import BackendCompilerFailed

    def failing(model: object, mode: object) -> object:
        def call(*_: object) -> None:
            raise BackendCompilerFailed(call, RuntimeError("no C++ compiler found"), None)  # type: ignore[arg-type]

        return call

    monkeypatch.setattr(torch, "compile", failing)
    bundle = exported_from(tiny_checkpoint, tmp_path / "b")
    picture = tmp_path / "picture.png"
    write_image(picture, frame())
    request = BenchRequest(
        bundle.path,
        str(picture),
        backend="onnxruntime-cpu",
        compare=["torch-compile", "onnxruntime-cuda", "fp32"],
        checkpoint=tiny_checkpoint,
        threads=1,
        roofline=False,
    )
    result = run_benchmark(request, BenchSettings(duration=0.05, warmup=0.0))
    assert [series.contender.name for series in result.series] == ["onnxruntime-cpu fp32", "onnxruntime-cpu fp32 (2)"]
    compiled, cuda = result.left_out
    assert compiled.startswith("torch-compile: torch.compile failed: ")
    assert "no C++ compiler found" in compiled
    assert cuda.startswith("onnxruntime-cuda: backend onnxruntime-cuda cannot run here: ")
    assert f"Left out: {cuda}" in as_text(result)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="finds no GPU, and the CPU would be no comparison"):
            TorchBackend(tiny_checkpoint, bundle.manifest.graphs[0], 1, on_gpu=True)
