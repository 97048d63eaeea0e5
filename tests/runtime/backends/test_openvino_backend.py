"""The OpenVINO backend: what it computes, in which arithmetic, on which device, from which cache."""

from __future__ import annotations

import gc
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge import ModelOptions, Outputs, infer
from espmedsam_edge.bundle import Bundle, write_bundle
from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.backends import backend as backends
from espmedsam_edge.runtime.backends.backend import (
    BackendUnavailable,
    Candidate,
    OverlappingBackend,
    load_backend,
    load_first,
    unavailable,
)
from espmedsam_edge.runtime.backends.openvino_api import load_openvino
from espmedsam_edge.runtime.backends.openvino_backend import OpenVinoBackend
from espmedsam_edge.runtime.bundle_choice import choose_bundle
from espmedsam_edge.runtime.segmenter import Segmenter

if find_spec("openvino") is None:
    pytest.skip("needs the extra openvino", allow_module_level=True)
openvino = load_openvino()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled networks, empty, of this test alone."""
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def load(bundle: Bundle, name: str = "openvino", threads: int = 1) -> Any:
    """A loaded backend; OpenVINO's has run twice, so that its network is in the cache."""
    backend: Any = load_backend(bundle, bundle.graph(), name, threads).backend
    for _ in range(2 if isinstance(backend, OpenVinoBackend) else 0):
        backend.run(image_of(bundle))
    for thread in threading.enumerate():
        if thread.name == "espmedsam-keep":
            thread.join()
    return backend


def image_of(bundle: Bundle, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(bundle.graph().input_shape).astype(np.float32)


def frame_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (90, 120, 3), np.uint8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_it_computes_what_onnx_runtime_computes(tmp_path: Path, batch: int, cached: bool) -> None:
    bundle = save_toy_bundle(tmp_path / "b", batch=batch)
    if cached:
        load(bundle).close()
    backend, reference = load(bundle), load(bundle, "onnxruntime-cpu")
    for seed in range(3):
        image = image_of(bundle, seed)
        logits = backend.run(image)
        np.testing.assert_allclose(logits, reference.run(image), atol=1e-5)  # float32 sums of 48 values
        assert logits.flags.owndata


def test_a_real_network_gives_the_masks_of_onnx_runtime() -> None:
    bundle = choose_bundle(None, "microscopy").bundle_of("microscopy")
    from espmedsam_edge.phantoms import phantom

    picture, _ = phantom("microscopy", seed=2, size=(300, 400))
    with (
        Segmenter.load(bundle, "microscopy", "fp32", "openvino", threads=1) as segmenter,
        Segmenter.load(bundle, "microscopy", "fp32", "onnxruntime-cpu", threads=1) as reference,
    ):
        mask, expected = segmenter.segment(picture).mask, reference.segment(picture).mask
    assert 0 < np.count_nonzero(expected) < expected.size
    assert np.mean(mask == expected) >= 0.999


def test_what_it_computes_in_is_read_back_and_shown(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load(toy_bundle, threads=2)
    assert str(backends.Choice(backend)) == "openvino (CPU, 2 threads, fp32 arithmetic)"
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    reduced = load(toy_bundle, "openvino:bf16")
    assert reduced.name == "openvino:bf16"
    assert reduced.device == f"CPU, 1 thread, {'bf16' if 'BF16' in capabilities else 'fp32'} arithmetic"
    assert load(toy_bundle, "openvino:CPU:graph").device == "CPU, 1 thread, arithmetic as the graph has it"


def asked_of_the_network(monkeypatch: pytest.MonkeyPatch, type_name: str) -> None:
    """Let compiled networks answer that they compute in ``type_name``."""
    true = openvino.CompiledModel.get_property

    def answer(self: Any, name: str) -> Any:
        return getattr(openvino.Type, type_name) if name == "INFERENCE_PRECISION_HINT" else true(self, name)

    monkeypatch.setattr(openvino.CompiledModel, "get_property", answer)


def test_less_than_fp32_is_never_taken_for_it(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_of_the_network(monkeypatch, "f16")
    with pytest.raises(BackendUnavailable, match=r"CPU computes in fp16, not in fp32\. .*--arithmetic fp16"):
        load(toy_bundle)


def test_another_arithmetic_than_the_wanted_is_told(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    asked_of_the_network(monkeypatch, "f32")
    assert load(toy_bundle, "openvino:bf16").device.endswith("fp32 arithmetic")
    assert said == ["OpenVINO's CPU computes in fp32 here, not in bf16."]


def test_threads_are_those_asked_for_from_the_cache_too(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    make = openvino.CompiledModel.create_infer_request

    def create(self: Any) -> Any:
        used.append(self.get_property("INFERENCE_NUM_THREADS"))
        return make(self)

    monkeypatch.setattr(openvino.CompiledModel, "create_infer_request", create)
    for threads in (1, 2, 1):
        load(toy_bundle, threads=threads)
    assert set(used[:2]) == {1}
    assert set(used[2:4]) == {2}
    assert set(used[4:]) == {1}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("openvino:TPU", r"finds no device TPU here, only CPU"),
        ("openvino:gpu.7", r"finds no device GPU\.7 here.*Install Intel's driver of the GPU"),
        ("openvino:NPU:fp16", r"finds no device NPU here.*Install Intel's driver of the NPU"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU"])
    with pytest.raises(BackendUnavailable, match=words) as caught:
        load(toy_bundle, name)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that takes no graph, with a message such as OpenVINO's are."""

    def refuse(*_: object) -> None:
        raise RuntimeError("Exception from src/core.cpp:117:\nCheck 'x' failed at y.cpp:5:\n[GPU] no such layer\n\n")

    monkeypatch.setattr(openvino.Core, "compile_model", refuse)


@pytest.mark.usefixtures("refusing")
def test_a_refused_graph_fails_by_name_and_falls_back_under_auto(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendUnavailable, match=r"does not take .*fp32\.onnx on CPU: \[GPU\] no such layer") as caught:
        load(toy_bundle)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(backends, "AUTO", ("openvino", "onnxruntime-cpu"))
    choice = load_backend(toy_bundle, toy_bundle.graph(), "auto", 1)
    assert choice.backend.name == "onnxruntime-cpu"
    assert "not openvino: OpenVINO does not take" in str(choice)


def test_auto_goes_from_a_gpu_that_refuses_to_the_processor(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    true = openvino.Core.get_property

    def property_of(self: Any, device: str, name: str) -> Any:
        return true(self, "CPU" if device == "GPU" else device, name)

    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU", "GPU", "NPU"])
    monkeypatch.setattr(openvino.Core, "get_property", property_of)
    assert load(toy_bundle, "openvino:AUTO").device == "CPU, 1 thread, fp32 arithmetic"
    assert len(said) == 1
    assert "does not take" in said[0]
    assert "on GPU" in said[0]


@pytest.mark.parametrize(
    "error", [ImportError("libopenvino.so.2640: cannot open shared object file"), RuntimeError("no plugins.xml")]
)
def test_an_installation_that_is_broken_is_one_line_and_auto_goes_on(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr("espmedsam_edge.runtime.backends.openvino_backend.openvino_core", broken)
    with pytest.raises(BackendUnavailable, match=r"cannot be loaded: .*\[openvino\]") as caught:
        load(toy_bundle)
    assert str(error) in str(caught.value)
    assert "\n" not in str(caught.value)
    choice = load_first(
        toy_bundle, [Candidate(toy_bundle.graph(), name) for name in ("openvino", "onnxruntime-cpu")], 1
    )
    assert choice.backend.name == "onnxruntime-cpu"
    assert "not openvino: OpenVINO is installed and cannot be loaded" in str(choice)


def test_a_driver_that_is_too_old_is_one_line(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Intel's GPU plug-in puts it: the device is listed, and nothing compiles on it."""
    true = openvino.Core.get_property

    def property_of(self: Any, device: str, name: str) -> Any:
        return true(self, "CPU" if device == "NPU" else device, name)

    def refuse(*_: object) -> None:
        raise RuntimeError(
            "Exception from src/inference/src/cpp/core.cpp:109:\nException from src/plugin.cpp:5:\n"
            "[NPU] driver version 1000 is older than the 2465 that this compiler needs\n\n"
        )

    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU", "NPU"])
    monkeypatch.setattr(openvino.Core, "get_property", property_of)
    monkeypatch.setattr(openvino.Core, "compile_model", refuse)
    with pytest.raises(
        BackendUnavailable, match=r"on NPU: \[NPU\] driver version 1000 is older.*another --device"
    ) as c:
        load(toy_bundle, "openvino:NPU:fp16")
    assert "\n" not in str(c.value)


def test_without_the_package_the_extra_is_named(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espmedsam_edge.machine.installation.installed", lambda module: False)
    with pytest.raises(BackendUnavailable, match=r"openvino is not installed.*\[openvino\]"):
        load(toy_bundle)
    assert "openvino" in (unavailable("openvino") or "")


def test_words_that_do_not_fit_are_one_line(toy_bundle: Bundle) -> None:
    for name, words in (
        ("openvino:CPU:fp23", "unknown arithmetic 'fp23'. Did you mean 'fp32'"),
        ("openvino:CPU:bf16:x", "after openvino may come no more than device and arithmetic"),
        ("tensorrt:GPU", "after tensorrt may come nothing"),
        ("openvin", "Did you mean 'openvino'"),
    ):
        with pytest.raises(UserError) as caught:
            load(toy_bundle, name)
        assert words in str(caught.value)


def test_another_graph_than_the_manifests_is_one_line(toy_bundle: Bundle) -> None:
    with write_bundle(toy_bundle.path, extend=True) as draft:
        manifest = draft.manifest
        assert manifest is not None
        graph = manifest.graphs[0].model_copy(update={"image_size": 128})
        draft.manifest = manifest.model_copy(update={"graphs": [graph]})
    with pytest.raises(UserError, match=r"fp32\.onnx.*64.*128|fp32\.onnx.*128.*64"):
        load(Bundle.open(toy_bundle.path))


# The cache.


@pytest.mark.parametrize("after", ["closed", "a run, closed", "a second run", "a second"])
def test_a_network_is_kept_after_the_first_result(toy_bundle: Bundle, cache: Path, after: str) -> None:
    """Before that it would hold that up; of a program that leaves after one picture it is kept, too."""
    backend: Any = load_backend(toy_bundle, toy_bundle.graph(), "openvino", 1).backend
    for _ in range({"closed": 0, "a second run": 2}.get(after, 1)):
        assert not list(cache.glob("*.blob"))
        backend.run(image_of(toy_bundle))
    if "closed" in after:
        assert not list(cache.glob("*.blob"))
        backend.close()
    for thread in threading.enumerate():
        if thread.name == "espmedsam-keep":
            thread.join()
    assert len(list(cache.glob("*.blob"))) == 1


def test_a_second_start_compiles_nothing(
    toy_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    load(toy_bundle)
    (file,) = cache.glob("*.blob")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.delattr(openvino.Core, "compile_model")
    load(toy_bundle, threads=2)
    assert said == []


def test_it_computes_while_its_network_is_being_kept_and_closing_waits_for_that(
    toy_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    true, goes_on = openvino.CompiledModel.export_model, threading.Event()

    def slowly(self: Any) -> Any:
        assert goes_on.wait(60)
        return true(self)

    monkeypatch.setattr(openvino.CompiledModel, "export_model", slowly)
    backend = load_backend(toy_bundle, toy_bundle.graph(), "openvino", 1).backend
    image = image_of(toy_bundle)
    logits = backend.run(image)
    assert logits.any()
    assert list(cache.glob("*.blob")) == []
    goes_on.set()
    backend.close()
    assert len(list(cache.glob("*.blob"))) == 1
    np.testing.assert_array_equal(load(toy_bundle).run(image), logits)
    assert said == []


def test_a_network_that_cannot_be_exported_is_told_and_does_not_matter(
    toy_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def refuse(self: Any) -> Any:
        raise RuntimeError("Exception from a.cpp:1:\nno memory\n")

    monkeypatch.setattr(openvino.CompiledModel, "export_model", refuse)
    assert load(toy_bundle).run(image_of(toy_bundle)).any()
    assert said == ["The network that OpenVINO compiled is not kept: no memory"]
    assert list(cache.glob("*")) == []


def test_each_arithmetic_graph_and_version_has_its_own(
    toy_bundle: Bundle, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    load(toy_bundle)
    load(toy_bundle, "openvino:graph")
    assert len(list(cache.glob("*.blob"))) == 2
    load(save_toy_bundle(tmp_path / "other", batch=2))
    assert len(list(cache.glob("*.blob"))) == 3
    assert said == []
    version = openvino.get_version()
    monkeypatch.setattr(openvino, "get_version", lambda: "2031.1")
    for _ in range(2):  # told once, when it is compiled anew
        load(toy_bundle)
        assert len(list(cache.glob("*.blob"))) == 4
    (line,) = said
    assert line.startswith("fundus fp32: OpenVINO's network in the cache is not used, ")
    assert line.endswith(f"it is of openvino {version} and this is 2031.1; compiling anew.")


def test_a_network_in_the_cache_is_enough(toy_bundle: Bundle) -> None:
    """Its key has the graph's SHA-256, so the graph's file need not be read, and may be damaged."""
    image = image_of(toy_bundle)
    expected = load(toy_bundle).run(image)
    toy_bundle.graph_path(toy_bundle.graph()).write_bytes(b"something else")
    np.testing.assert_array_equal(load(toy_bundle).run(image), expected)
    with pytest.raises(UserError, match="SHA-256 differs"):
        load(toy_bundle, "openvino:graph")  # which is not in the cache


def test_a_plug_in_that_does_not_start_is_one_line(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError('Exception from src/core.cpp:117:\nDevice with "CPU" name is not registered\n')

    monkeypatch.setattr(openvino.Core, "get_property", fail)
    with pytest.raises(BackendUnavailable, match=r"OpenVINO's CPU does not start: Device with \"CPU\" name is not"):
        load(toy_bundle)


def test_the_processor_alone_is_looked_at_where_it_is_meant(toy_bundle: Bundle, tmp_path: Path) -> None:
    """Listing the devices loads the plug-ins of GPU and NPU, too."""
    code = (
        "from pathlib import Path; from espmedsam_edge import Segmenter\n"
        f"Segmenter.load({str(toy_bundle.path)!r}, backend='openvino', threads=1).close()\n"
        "maps = Path('/proc/self/maps').read_text()\n"
        "print('intel_cpu_plugin' in maps, 'intel_gpu_plugin' in maps, 'intel_npu_plugin' in maps)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split()[1:] == ["False", "False"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def open_to_all(file: Path) -> None:
    file.chmod(0o666)


def link(file: Path) -> None:
    file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(file.with_suffix(".elsewhere"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip, "it is damaged"),
        (cut, "it is damaged"),
        (empty, "it is damaged"),
        (open_to_all, "other users may write"),
        (link, "symbolic link"),
    ],
)
def test_what_is_damaged_or_foreign_is_compiled_anew_with_one_line(
    toy_bundle: Bundle, cache: Path, said: list[str], spoil: Any, words: str
) -> None:
    image = image_of(toy_bundle)
    expected = load(toy_bundle).run(image)
    (file,) = cache.glob("*.blob")
    spoil(file)
    np.testing.assert_array_equal(load(toy_bundle).run(image), expected)
    assert len(said) == 1
    assert said[0].startswith("fundus fp32: OpenVINO's network in the cache is not used, ")
    assert words in said[0]
    said.clear()
    load(toy_bundle)  # what was written in its place is used
    assert said == []


def test_what_is_imported_is_the_memory_that_was_checked_and_lives_as_long_as_the_network(
    toy_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = image_of(toy_bundle)
    expected = load(toy_bundle).run(image)
    (file,) = cache.glob("*.blob")
    content, true = np.frombuffer(file.read_bytes(), np.uint8), openvino.Core.import_model
    given: list[bool] = []

    def importing(self: Any, network: Any, *others: Any) -> Any:
        given.append(np.array_equal(network.data, content))
        return true(self, network, *others)

    monkeypatch.setattr(openvino.Core, "import_model", importing)
    backend = load(toy_bundle)
    assert given == [True]
    file.write_bytes(bytes(len(content)))  # a mapped file would change the network
    gc.collect()
    others = [np.full(len(content), 255, np.uint8) for _ in range(100)]  # would take memory that was freed too early
    np.testing.assert_array_equal(backend.run(image), expected)
    del others


def test_an_openvino_that_takes_no_tensors_is_given_the_same_as_bytes(
    toy_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """As it was up to 2025.3."""
    image = image_of(toy_bundle)
    expected = load(toy_bundle).run(image)
    true = openvino.Core.import_model

    def of_bytes(self: Any, network: Any, *others: Any) -> Any:
        if not isinstance(network, bytes):
            raise TypeError("`model_stream` must be an io.BytesIO object or bytes")
        return true(self, network, *others)

    monkeypatch.setattr(openvino.Core, "import_model", of_bytes)
    monkeypatch.delattr(openvino.Core, "compile_model")
    np.testing.assert_array_equal(load(toy_bundle).run(image), expected)
    assert said == []


def test_what_openvino_does_not_take_is_compiled_anew(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    load(toy_bundle)

    def refuse(*_: object) -> None:
        raise RuntimeError("Exception from a.cpp:1:\n[CPU] of another version\n")

    monkeypatch.setattr(openvino.Core, "import_model", refuse)
    load(toy_bundle)
    assert len(said) == 1
    assert "[CPU] of another version" in said[0]


def test_a_cache_that_cannot_be_written_is_told_and_does_not_matter(
    toy_bundle: Bundle, tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    load(toy_bundle)
    assert len(said) == 1
    assert "the compiled network is not kept" in said[0]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_engines_lists_verifies_and_cleans_what_openvino_compiled(
    toy_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load(toy_bundle)
    load(toy_bundle, "openvino:graph")
    (cache / "mine.blob").write_text("of the user's own")
    assert run("engines", "list") == 0
    out = capsys.readouterr().out
    version = openvino.get_version()
    assert f"fundus fp32, OpenVINO {version} for CPU, f32, " in out
    assert f"fundus fp32, OpenVINO {version} for CPU, dynamic, " in out
    assert re.search(r"2 networks that OpenVINO compiled, [\d.]+ MiB in .*openvino", out)
    assert run("engines", "verify") == 0
    assert run("engines", "clean") == 0
    assert len(list(cache.glob("*.blob"))) == 3
    flip(min(file for file in cache.glob("*-*.blob")))
    assert run("engines", "verify") == 1
    assert "damaged: fundus fp32, OpenVINO" in capsys.readouterr().out
    assert run("engines", "clean") == 0
    assert ": it is damaged\n" in capsys.readouterr().out
    assert len(list(cache.glob("*-*.blob"))) == 1
    monkeypatch.setattr(openvino, "get_version", lambda: "2031.1")
    assert run("engines", "clean", "--dry-run") == 0
    assert "would remove fundus fp32" in capsys.readouterr().out
    assert run("engines", "clean") == 0
    assert ": OpenVINO is 2031.1 now\n" in capsys.readouterr().out
    assert [file.name for file in cache.iterdir()] == ["mine.blob"]


def test_a_network_that_nothing_says_the_origin_of_is_cleaned_away(
    toy_bundle: Bundle, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(toy_bundle)
    (facts,) = cache.glob("*.json")
    facts.write_text("[]")
    load(toy_bundle)  # which does not hang on it
    assert run("engines", "clean") == 0
    assert "nothing says what it is of" in capsys.readouterr().out
    assert list(cache.glob("*")) == []


def test_two_processes_fill_one_cache(toy_bundle: Bundle, cache: Path) -> None:
    code = (
        "from espmedsam_edge.bundle import Bundle\n"
        "from espmedsam_edge.runtime.backends.backend import load_backend\n"
        f"bundle = Bundle.open({str(toy_bundle.path)!r})\n"
        "for _ in range(20): load_backend(bundle, bundle.graph(), 'openvino', 1).backend.close()\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for child in children:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors.decode()
        assert errors == b""
    assert len(list(cache.glob("*.blob"))) == 1


# Several at once, and the end.


def test_frames_overlap_and_come_in_order(toy_bundle: Bundle) -> None:
    frames = [frame_of(seed) for seed in range(7)]
    with (
        Segmenter.load(toy_bundle, backend="openvino", threads=1) as segmenter,
        Segmenter.load(toy_bundle, backend="onnxruntime-cpu", threads=1) as reference,
    ):
        assert isinstance(segmenter.choice.backend, OverlappingBackend)
        assert segmenter.in_flight == 2
        started = [segmenter.start([frame]) for frame in frames]  # more than overlap: the oldest is waited for
        for frame, group in zip(frames, started, strict=True):
            (result,) = group.results()
            expected = reference.segment(frame).mask
            assert 0 < np.count_nonzero(expected) < expected.size
            assert np.mean(result.mask == expected) >= 0.999
            assert group.results()[0] is result


def test_with_throughput_as_many_compute_at_once_as_threads_may(toy_bundle: Bundle) -> None:
    frames = [frame_of(seed) for seed in range(9)]
    with (
        Segmenter.load(toy_bundle, backend="openvino", threads=2, many=True) as segmenter,
        Segmenter.load(toy_bundle, backend="onnxruntime-cpu", threads=1) as reference,
    ):
        assert segmenter.choice.taken == "openvino (CPU, 2 threads, fp32 arithmetic, 2 frames at once)"
        assert segmenter.in_flight == 3
        for frame, group in zip(frames, [segmenter.start([frame]) for frame in frames], strict=True):
            assert np.mean(group.results()[0].mask == reference.segment(frame).mask) >= 0.999
    with Segmenter.load(toy_bundle, backend="openvino", threads=1, many=True) as segmenter:
        assert segmenter.choice.taken == "openvino (CPU, 1 thread, fp32 arithmetic)"
    with Segmenter.load(toy_bundle, backend="openvino", threads=64, many=True) as segmenter:
        assert segmenter.in_flight == 5


def test_one_compiled_network_serves_latency_and_throughput(
    toy_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(toy_bundle, threads=2)
    monkeypatch.delattr(openvino.Core, "compile_model")
    streams: list[int] = []
    make = openvino.CompiledModel.create_infer_request

    def create(self: Any) -> Any:
        streams.append(self.get_property("NUM_STREAMS"))
        return make(self)

    monkeypatch.setattr(openvino.CompiledModel, "create_infer_request", create)
    load(toy_bundle, "openvino:throughput", threads=2)
    load(toy_bundle, "openvino:latency", threads=2)
    assert streams == [2, 2, 2, 1, 1]
    assert len(list(cache.glob("*.blob"))) == 1


def test_several_files_ask_for_throughput_and_one_for_latency(toy_bundle: Bundle, tmp_path: Path) -> None:
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), frame_of(number))
    model, outputs = ModelOptions(toy_bundle, backend="openvino", threads=2), Outputs(masks=tmp_path / "masks")
    assert infer(str(tmp_path / "*.png"), model, outputs).backend.endswith(", 2 frames at once)")
    assert infer([tmp_path / "0.png", tmp_path / "1.png"], model, outputs).backend.endswith(", 2 frames at once)")
    assert infer(tmp_path / "0.png", model, outputs).backend.endswith("fp32 arithmetic)")


def test_a_run_that_fails_fails_alone(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load(toy_bundle)
    image = image_of(toy_bundle)
    expected = backend.run(image)
    wait = openvino.InferRequest.wait
    waits = iter([True, False, False])

    def fail_once(self: Any) -> None:
        wait(self)
        if next(waits):
            raise RuntimeError("Exception from a.cpp:1:\nno memory\n")

    monkeypatch.setattr(openvino.InferRequest, "wait", fail_once)
    first, second, third = (backend.start(image) for _ in range(3))
    with pytest.raises(UserError, match="openvino failed on the fundus fp32 graph: no memory"):
        first.logits()
    np.testing.assert_array_equal(second.logits(), expected)
    np.testing.assert_array_equal(third.logits(), expected)


def test_closing_waits_for_what_is_under_way(toy_bundle: Bundle) -> None:
    segmenter = Segmenter.load(toy_bundle, backend="openvino", threads=1)
    group = segmenter.start([frame_of(1)])
    segmenter.close()
    segmenter.close()
    assert group.results()[0].mask.shape == (90, 120)
    with pytest.raises(RuntimeError, match="closed"):
        segmenter.start([frame_of(1)])


def test_a_process_split_off_after_loading_is_told_so(toy_bundle: Bundle) -> None:
    backend = load(toy_bundle)
    image = image_of(toy_bundle)
    backend.run(image)
    started = backend.start(image)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # without the check it would wait for ever
        told = []
        for use in (lambda: backend.run(image), started.logits):
            try:
                use()
            except UserError as error:
                told.append(str(error))
        backend.close()
        os.write(writing, "\n".join(told).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        told = pipe.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0
    assert len(told) == 2
    assert all("split off (fork)" in line for line in told)
    assert started.logits().shape == backend.graph.output_shape  # the parent goes on


def test_its_use_is_reported_to_nobody(toy_bundle: Bundle, tmp_path: Path) -> None:
    """OpenVINO installs a package beside itself that its import would report its use with."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "openvino_telemetry.py").write_text("raise SystemExit('telemetry was imported')\n")
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys\n"
        "def refuse(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'subprocess.Popen'):\n"
        "        raise SystemExit(f'{event} {args}')\n"
        "sys.addaudithook(refuse)\n"
        f"sys.path.insert(0, {str(tmp_path / 'modules')!r})\n"
        "import numpy as np\n"
        "from espmedsam_edge import Segmenter\n"
        f"with Segmenter.load({str(toy_bundle.path)!r}, backend='openvino') as segmenter:\n"
        "    segmenter.segment(np.zeros((9, 9, 3), np.uint8))\n"
        "print('ran', 'openvino.tools.ovc' in sys.modules, flush=True)\n"
        "import openvino\n"
        "assert not hasattr(openvino, 'convert_modell')\n"
        "openvino.convert_model\n"  # it is there for who wants it, and so is telemetry: this test's own is found
    )
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("ran False\n", "telemetry was imported\n")
    assert list(home.rglob("*")) == []


def test_ctrl_c_is_python_s_whatever_was_loaded_and_closed(toy_bundle: Bundle) -> None:
    """OpenVINO's plug-in gives the thread a stack for signals that goes with it: a Ctrl-C after that crashed."""
    code = (
        "import gc, os, signal, threading\n"
        "from espmedsam_edge.bundle import Bundle\n"
        "from espmedsam_edge.runtime.backends.backend import load_backend\n"
        f"bundle = Bundle.open({str(toy_bundle.path)!r})\n"
        "backends = [load_backend(bundle, bundle.graph(), 'openvino', 1).backend for _ in range(3)]\n"
        "def close():\n"
        "    while backends:\n"
        "        backends.pop(0).close()\n"
        "        gc.collect()\n"
        "thread = threading.Thread(target=close)\n"
        "thread.start()\n"
        "thread.join()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    signal.pause()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_a_run_of_many_files_writes_the_masks_of_onnx_runtime(toy_bundle: Bundle, tmp_path: Path) -> None:
    pictures = [tmp_path / f"{number}.png" for number in range(6)]
    for number, picture in enumerate(pictures):
        cv2.imwrite(str(picture), frame_of(number))
    for name in ("openvino", "onnxruntime-cpu"):
        report = infer(pictures, ModelOptions(toy_bundle, backend=name, threads=1), Outputs(masks=tmp_path / name))
        assert report.frames == len(pictures)
    for picture in pictures:
        mask, expected = (
            cv2.imread(str(tmp_path / name / picture.name), cv2.IMREAD_UNCHANGED)
            for name in ("openvino", "onnxruntime-cpu")
        )
        assert np.mean(mask == expected) >= 0.999
