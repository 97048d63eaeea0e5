"""The ONNX Runtime backend, and the choice of a backend, on graphs that are right and wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_bundles import save_toy_bundle, save_toy_graph

from espmedsam_edge.bundle import Bundle, Manifest, Weights, write_bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.backends import backend as backends
from espmedsam_edge.runtime.backends import onnxruntime_backend
from espmedsam_edge.runtime.backends.backend import AUTO, BACKENDS, BackendUnavailable, load_backend, unavailable


def bundle_around(path: Path, write_graph: Callable[[Path], object]) -> Bundle:
    """A bundle whose manifest says 64x64 and batch 1 of whatever file is written."""
    with write_bundle(path) as draft:
        write_graph(draft.new_file("fp32.onnx"))
        graph = draft.graph("fp32.onnx", modality="fundus", precision="fp32", image_size=64)
        weights = Weights(checkpoint_sha256="0" * 64, origin="trained")
        draft.manifest = Manifest(preset="toy", weights=weights, graphs=[graph])
    return Bundle.open(path)


def load(bundle: Bundle, name: str = "auto", **options: Any) -> backends.Choice:
    return load_backend(bundle, bundle.graph(), name, **options)


def expected_logits(image: np.ndarray) -> np.ndarray:
    """What the toy graph computes, in plain NumPy."""
    weighted = np.einsum("bchw,c->bhw", image.astype(np.float64), [1.0, -0.5, 0.25])
    batch, height, width = weighted.shape
    return weighted.reshape(batch, 1, height // 4, 4, width // 4, 4).mean(axis=(3, 5))


@pytest.mark.parametrize("batch", [1, 3])
def test_it_computes_the_graph(tmp_path: Path, batch: int) -> None:
    choice = load(save_toy_bundle(tmp_path / "b", batch=batch))
    image = np.random.default_rng(0).standard_normal((batch, 3, 64, 64)).astype(np.float32)
    logits = choice.backend.run(image)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(image), atol=1e-5)  # float32 sums of 48 values


def test_each_run_returns_an_array_of_its_own(toy_bundle: Bundle) -> None:
    backend = load(toy_bundle).backend
    random = np.random.default_rng(1)
    images = [random.standard_normal((1, 3, 64, 64)).astype(np.float32) for _ in range(3)]
    results = [backend.run(image) for image in images]
    for image, logits in zip(images, results, strict=True):
        np.testing.assert_allclose(logits, expected_logits(image), atol=1e-5)


def test_auto_takes_onnxruntime_and_says_so(toy_bundle: Bundle) -> None:
    choice = load(toy_bundle, threads=1)
    assert choice.backend.name == "onnxruntime"
    assert str(choice).startswith("onnxruntime (")
    assert choice.backend.graph.modality == "fundus"


def test_the_cpu_can_be_insisted_on(toy_bundle: Bundle) -> None:
    assert str(load(toy_bundle, "onnxruntime-cpu", threads=1)) == "onnxruntime-cpu (CPU, 1 thread)"


def test_a_backend_that_cannot_run_is_passed_over_by_auto_and_fails_by_name(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_backend, "available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(backends, "AUTO", ("onnxruntime-cuda", "onnxruntime"))
    choice = load(toy_bundle, threads=1)
    assert choice.backend.name == "onnxruntime"
    assert len(choice.passed_over) == 1
    assert "not onnxruntime-cuda: " in str(choice)
    assert "no CUDA provider" in str(choice)
    with pytest.raises(BackendUnavailable, match="backend onnxruntime-cuda cannot run here") as caught:
        load(toy_bundle, "onnxruntime-cuda")
    assert caught.value.exit_code == 1


def test_no_backend_at_all_is_one_line(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espmedsam_edge.runtime.onnx_session.installed", lambda _: False)
    with pytest.raises(UserError, match=r"no backend can run .*onnxruntime is not installed.*doctor"):
        load(toy_bundle)


def test_names_are_checked(toy_bundle: Bundle) -> None:
    with pytest.raises(UserError, match=r"unknown backend 'onnxruntim'\. Did you mean 'onnxruntime'"):
        load(toy_bundle, "onnxruntim")
    with pytest.raises(UserError, match="0 threads"):
        load(toy_bundle, threads=0)


def test_every_registered_backend_can_be_asked() -> None:
    assert set(AUTO) <= set(BACKENDS)
    assert unavailable("onnxruntime") is None
    for name in BACKENDS:
        reason = unavailable(name)
        assert reason is None or reason.strip()


@pytest.mark.parametrize("content", [b"", b"this is no graph", bytes(5000), b"\x08\x08" + b"\xff" * 500])
def test_a_file_that_is_no_graph_is_one_line(tmp_path: Path, content: bytes) -> None:
    bundle = bundle_around(tmp_path / "b", lambda file: file.write_bytes(content))
    words = r"cannot load .*fp32\.onnx|does not fit its manifest|is not an ONNX graph"
    with pytest.raises(UserError, match=words) as caught:
        load(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.99])
def test_a_cut_off_graph_is_one_line(tmp_path: Path, kept: float) -> None:
    def write(file: Path) -> None:
        save_toy_graph(file)
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * kept)])

    with pytest.raises(UserError):
        load(bundle_around(tmp_path / "b", write))


def test_a_graph_of_another_shape_is_refused(tmp_path: Path) -> None:
    bundle = bundle_around(tmp_path / "b", lambda file: save_toy_graph(file, image_size=128))
    with pytest.raises(UserError, match=r"its input is 'image' tensor\(float\) 1x3x128x128, not .* 1x3x64x64"):
        load(bundle)


def edited(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        onnx = pytest.importorskip("onnx")
        save_toy_graph(file)
        model = onnx.load(file)
        change(model.graph)
        onnx.save(model, file)

    return write


def rename_output(graph: Any) -> None:
    graph.output[0].name = graph.node[-1].output[0] = "mask"


def another_output(graph: Any) -> None:
    graph.output.append(graph.output[0].__class__(name="sum"))


def rename_input(graph: Any) -> None:
    graph.input[0].name = graph.node[0].input[0] = "pixels"


def free_batch(graph: Any) -> None:
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_output, "its output is 'mask'"),
        (another_output, "its output is .* and 'sum'"),
        (rename_input, "its input is 'pixels'"),
        (free_batch, "its input has no static shape"),
    ],
)
def test_a_graph_that_is_not_the_manifests_is_refused(
    tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    with pytest.raises(UserError, match=f"does not fit its manifest: {words}|{words}"):
        load(bundle_around(tmp_path / "b", edited(change)))


def test_weights_outside_the_bundle_are_not_read(tmp_path: Path) -> None:
    """ONNX can keep weights in another file, at a path the graph names."""
    onnx = pytest.importorskip("onnx")

    def point_outside(graph: Any) -> None:
        tensor = graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "../secret.bin", "offset": "0", "length": "12"}.items():
            tensor.external_data.add(key=key, value=value)

    def write(file: Path) -> None:
        save_toy_graph(file)
        model = onnx.load(file)
        point_outside(model.graph)
        file.write_bytes(model.SerializeToString())

    (tmp_path / "secret.bin").write_bytes(np.ones(3, np.float32).tobytes())
    with pytest.raises(UserError, match="keeps weights outside the file"):
        load(bundle_around(tmp_path / "b", write))


def test_a_wrong_array_is_a_bug_not_a_crash(toy_bundle: Bundle) -> None:
    backend = load(toy_bundle).backend
    good = np.zeros((1, 3, 64, 64), np.float32)
    for bad in (
        good.astype(np.float64),
        good[:, :2],
        np.asfortranarray(np.ones((1, 3, 64, 64), np.float32)[..., ::-1]),
    ):
        with pytest.raises(ValueError, match="float32"):
            backend.run(bad)


def test_closing_twice_is_fine(toy_bundle: Bundle) -> None:
    backend = load(toy_bundle).backend
    backend.close()
    backend.close()


# Providers by name.


@pytest.mark.parametrize("name", ["CPU", "cpu", "CPUExecutionProvider"])
def test_a_provider_is_taken_by_name(toy_bundle: Bundle, name: str) -> None:
    choice = load(toy_bundle, f"onnxruntime:{name}", threads=1)
    assert str(choice) == f"onnxruntime:{name} (CPU, 1 thread)"


@pytest.fixture
def with_providers(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An ONNX Runtime that says it has DirectML and CoreML; the sessions' providers that were asked for."""
    there = ["DmlExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime_backend, "available_providers", lambda: there)
    asked: list[list[str]] = []
    true = onnxruntime_backend.open_session

    def open_session(content: bytes, threads: int, *, providers: Any, where: Any) -> Any:
        asked.append(list(providers))
        return true(content, threads, where=where)

    monkeypatch.setattr(onnxruntime_backend, "open_session", open_session)
    return asked


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("dml", "DmlExecutionProvider"),
        ("DirectML", "DmlExecutionProvider"),
        ("coremlexecutionprovider", "CoreMLExecutionProvider"),
    ],
)
def test_a_provider_that_does_not_start_is_no_silent_cpu(
    toy_bundle: Bundle, with_providers: list[list[str]], name: str, provider: str
) -> None:
    short = provider.removesuffix("ExecutionProvider")
    with pytest.raises(BackendUnavailable, match=f"onnxruntime's {short} provider did not start"):
        load(toy_bundle, f"onnxruntime:{name}")
    assert with_providers == [[provider]]


def test_a_provider_that_is_not_there_is_one_line(toy_bundle: Bundle, with_providers: list[list[str]]) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"no provider CorML\. Did you mean 'coreml'\? Known: dml, coreml, cpu"
    ):
        load(toy_bundle, "onnxruntime:CorML")
    assert with_providers == []


def of_precision(bundle: Bundle, *precisions: str) -> Bundle:
    """A bundle whose toy graph is there under several precisions."""
    with write_bundle(bundle.path, extend=True) as draft:
        assert draft.manifest is not None
        (graph,) = draft.manifest.graphs
        content = (draft.folder / graph.file).read_bytes()
        graphs = []
        for precision in precisions:
            draft.new_file(f"{precision}.onnx").write_bytes(content)
            graphs.append(graph.model_copy(update={"precision": precision, "file": f"{precision}.onnx"}))
        draft.manifest = draft.manifest.model_copy(update={"graphs": graphs})
    return Bundle.open(bundle.path)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_reduced_graph_on_a_processor_is_told(toy_bundle: Bundle, said: list[str], precision: str) -> None:
    bundle = of_precision(toy_bundle, "fp32", precision)
    load_backend(bundle, bundle.graph(None, precision), "onnxruntime-cpu", 1)
    assert said == [
        f"On a processor ONNX Runtime takes longer for {precision} graphs than for fp32. Use --precision fp32 here."
    ]
    said.clear()
    assert load(bundle, threads=1).backend.graph.precision == "fp32"  # what is taken where nothing was said
    assert said == []


def test_no_fp32_is_advised_where_there_is_none(toy_bundle: Bundle, said: list[str]) -> None:
    load(of_precision(toy_bundle, "int8"), threads=1)
    assert said == ["On a processor ONNX Runtime takes longer for int8 graphs than for fp32."]


def test_a_provider_that_fails_as_it_starts_is_one_line(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such device\nat provider.cc:12")

    there = ["DmlExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime_backend, "available_providers", lambda: there)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(
        BackendUnavailable, match=r"onnxruntime's Dml provider: .*no such device.* Its libraries or its"
    ) as told:
        load(toy_bundle, "onnxruntime:directml")
    assert "\n" not in str(told.value)
    assert capfd.readouterr() == ("", "")
