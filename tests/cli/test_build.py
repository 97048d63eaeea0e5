"""``build`` and ``engines`` as a user runs them: on the double of TensorRT, and on the real TensorRT-RTX."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hand_graphs import hand_bundle, hand_graph
from once import exported_graph
from trt_fixtures import ORIN

from espmedsam_edge.bundle import MANIFEST, PRECISIONS, Bundle, Normalization, Precision
from espmedsam_edge.cli import main
from espmedsam_edge.imaging.geometry import preprocess
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.engines.tensorrt_api import TensorRT

Double = Callable[..., TensorRT]
TINY_SIZE = 128
PROGRAM = [sys.executable, "-m", "espmedsam_edge"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return hand_bundle(tmp_path / "fundus.bundle", {"fp32": hand_graph("fp32"), "fp16": hand_graph("fp16")})


def run(*arguments: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


class TestBuild:
    @pytest.fixture(autouse=True)
    def _orin(self, gpu: Callable[[str], None]) -> None:
        gpu(ORIN)

    def test_builds_every_precision_and_says_what_it_got(
        self, bundle: Bundle, double: Double, capsys: pytest.CaptureFixture[str]
    ) -> None:
        double(release="10.3.0", dla=2)
        assert run("build", bundle.path) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"TensorRT 10.3.0, 2 graphs of {bundle.path}\n")
        assert re.search(r"fundus fp16: built for Orin \(SM 8\.7, 8 SMs\) in [\d.]+ s, \d+ MiB of memory", said)
        assert "100.0 % of multiply-accumulates in fp16 (read from the network; the engine loads" in said
        assert "DLA: 1 of 3 layers could run on it; none is placed there" in said
        assert said.count("  mask of a phantom 100.00 % Dice to ONNX Runtime's\n") == 2
        assert "5.50 ms a run on Orin" in said
        assert run("build", bundle.path) == 0
        assert capsys.readouterr().out.count("in the cache, built for Orin") == 2
        assert run("engines", "list") == 0
        assert capsys.readouterr().out.count("mask of a phantom 100.00 % Dice to ONNX Runtime's") == 2

    def test_an_engine_whose_logits_are_no_numbers_fails(
        self, bundle: Bundle, double: Double, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        double(release="10.3.0", logits=float("nan"))
        assert run("build", bundle.path, "--precision", "fp16") == 1
        error = capsys.readouterr().err
        assert "fundus fp16: the engine of fp16.onnx is wrong: it gives logits that are not numbers." in error
        assert error.count("\n") == 1
        assert not list(tmp_path.glob("cache/engines/*.plan"))

    def test_one_bad_graph_does_not_stop_the_others(
        self, bundle: Bundle, double: Double, capsys: pytest.CaptureFixture[str]
    ) -> None:
        double(release="11.4.0.106", dtype="FLOAT")  # right for the fp32 graph alone
        assert run("build", bundle.path) == 1
        said = capsys.readouterr()
        assert "fundus fp32: built for" in said.out
        assert "error: fundus fp16: fp16.onnx is listed as fp16, but its" in said.err
        assert said.err.count("\n") == 1

    def test_check_lists_every_refused_node_and_builds_nothing(
        self, bundle: Bundle, double: Double, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        newer = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
        double(release="10.3.0", errors=[[7, "gelu_3", "Gelu", newer], [9, "det", "Det", "false"]])
        assert run("build", bundle.path, "--precision", "fp16", "--check") == 1
        assert capsys.readouterr().out.splitlines()[1:] == [
            "fundus fp16: TensorRT 10.3.0 refuses fp16.onnx (opset 20):",
            "  node 7 'gelu_3' (Gelu): this parser does not know the operator Gelu",
            "  node 9 'det' (Det): this parser does not support Det",
            "  The graph is newer than this parser: update TensorRT, or export it again for an older one.",
        ]
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--precision", "fp15"], "unknown precision 'fp15'. Did you mean 'fp16'?"),
            (["--precision", "int8"], "has no int8 graph for fundus"),
            (["--modality", "fundos"], "fundos"),
            (["--backend", "onnxruntime"], "'onnxruntime' does not build engines"),
            (["--target", "sm86"], "it takes no --target"),
        ],
    )
    def test_wrong_use_is_one_line(
        self,
        arguments: list[str],
        words: str,
        bundle: Bundle,
        double: Double,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        double(release="10.3.0")
        assert run("build", bundle.path, *arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1

    def test_ctrl_c_ends_the_build_and_leaves_nothing(self, bundle: Bundle, double: Double, tmp_path: Path) -> None:
        record = tmp_path / "calls"
        double(release="10.3.0", seconds=60, record=str(record))
        process = subprocess.Popen([*PROGRAM, "build", str(bundle.path)], stderr=subprocess.PIPE)
        _until(lambda: record.exists() and "build_serialized_network" in record.read_text())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        child = children.read_text().split()[0] if children.exists() else None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
        assert process.returncode != 0
        assert b"Traceback" not in error
        left = [path for path in (tmp_path / "cache" / "engines").iterdir() if path.suffix not in (".lock", ".log")]
        assert left == []
        assert child is None or not Path(f"/proc/{child}").exists()


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def exported() -> bytes:
    """The tiny preset's graph, with random weights."""
    pytest.importorskip("torch", reason="needs torch (extra export)")
    return exported_graph(TINY_SIZE).SerializeToString()


def lowered(exported: bytes, precision: Precision) -> tuple[bytes, dict[str, float]]:
    """The graph as calibrate lowers it, without its gate, and which part of the work is in which type."""
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt (extra calibrate)")
    onnx = pytest.importorskip("onnx")
    from espmedsam_edge.calibration.lowering import lower
    from espmedsam_edge.calibration.network import Network
    from espmedsam_edge.calibration.plan import lowest_plan, quantised_tensors
    from espmedsam_edge.calibration.ranges import measure_ranges

    network = Network.of(onnx.load_from_string(exported))
    size = (TINY_SIZE, TINY_SIZE)
    images = [preprocess(phantom("fundus", seed, size)[0], TINY_SIZE, Normalization()) for seed in range(2)]
    ranges = measure_ranges(network, images, quantised_tensors(network), threads=1)
    thresholds = {name: values["percentile"] for name, values in ranges.thresholds.items()}
    model = lower(network, lowest_plan(network, ranges, precision), thresholds, images[0])
    macs = Network.of(model).macs_by_type()
    return model.SerializeToString(), {name: count / sum(macs.values()) for name, count in macs.items()}


@pytest.mark.rtx
@pytest.mark.usefixtures("no_gpu", "rtx")
class TestRtx:
    def test_every_precision_without_a_gpu(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        graphs = {precision: hand_graph(precision) for precision in ("fp32", "fp16", "int8")}
        made = hand_bundle(tmp_path / "b", graphs)
        assert run("build", made.path, "--backend", "tensorrt-rtx", "--target", "sm86,8.9,sm120") == 0
        said = capsys.readouterr().out
        assert said.count("built for sm86, sm89, sm120 in") == 3
        assert "98.5 % of multiply-accumulates in int8, 1.5 % in fp16" in said
        assert said.count("no GPU here has loaded the engine") == 3

    def test_a_graph_is_held_to_the_work_that_calibrate_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = hand_bundle(tmp_path / "b", {"int8": hand_graph("int8")})
        manifest = json.loads((made.path / MANIFEST).read_text())
        arguments = ("build", made.path, "--backend", "tensorrt-rtx", "--target", "sm86")
        for counted, code in (({"int8": 0.985, "fp16": 0.015}, 0), ({"int8": 1.0}, 0), ({"int8": 0.5, "fp16": 0.5}, 1)):
            manifest["accuracy"] = {"fundus/int8": {"macs": counted}}
            (made.path / MANIFEST).write_text(json.dumps(manifest))
            assert run(*arguments, "--check") == code
            error = capsys.readouterr().err
        assert "int8.onnx has 1.5 % of its multiply-accumulates in fp16, and its manifest says 50.0 %" in error
        assert run(*arguments) == 1
        assert "its manifest says 50.0 %" in capsys.readouterr().err

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_an_exported_graph(
        self, precision: Precision, exported: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A real network, within the limits that a small board and a CI machine set."""
        content, macs = (exported, {"fp32": 1.0}) if precision == "fp32" else lowered(exported, precision)
        made = hand_bundle(tmp_path / "tiny.bundle", {precision: content}, image_size=TINY_SIZE)
        manifest = json.loads((made.path / MANIFEST).read_text())
        manifest["accuracy"] = {f"fundus/{precision}": {"macs": macs}}
        (made.path / MANIFEST).write_text(json.dumps(manifest))
        assert run("build", made.path, "--backend", "tensorrt-rtx") == 0
        capsys.readouterr()
        assert run("engines", "list", "--json") == 0
        (sidecar,) = json.loads(capsys.readouterr().out)
        assert sidecar["targets"] == ["sm86", "sm89", "sm120"]
        assert set(sidecar["arithmetic"]["macs"]) == set(macs)
        assert macs[precision] > 0.2  # at this size much of the work is in attention, which stays in FP16
        assert sidecar["build_seconds"] < 60  # takes seconds, in a third of the memory, where nothing is wrong
        assert sidecar["peak_memory_bytes"] < 3e9

    def test_of_two_processes_one_builds(self, bundle: Bundle) -> None:
        command = [*PROGRAM, "build", str(bundle.path), "--backend", "tensorrt-rtx", "--precision", "fp16"]
        command += ["--target", "sm86"]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert sum("built for sm86 in" in output for output in outputs) == 1
        assert sum("in the cache, built for sm86" in output for output in outputs) == 2

    def test_the_cache_from_list_to_clean(self, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
        build = ("build", bundle.path, "--backend", "tensorrt-rtx", "--precision", "fp16", "--target", "sm86")
        assert run(*build) == 0
        capsys.readouterr()
        assert run("engines", "list", "--json") == 0
        (listed,) = json.loads(capsys.readouterr().out)
        assert listed["graph"]["precision"] == "fp16"
        assert run("engines", "list") == 0
        assert "fundus fp16 64x64 batch 1, TensorRT-RTX" in capsys.readouterr().out
        assert run("engines", "verify") == 0
        plan = Path(os.environ["ESPMEDSAM_CACHE"], "engines", listed["plan"])
        content = bytearray(plan.read_bytes())
        content[len(content) // 2] ^= 1
        plan.write_bytes(content)
        capsys.readouterr()
        assert run("engines", "verify") == 1
        assert "damaged: fundus fp16" in capsys.readouterr().out
        assert run(*build) == 0
        said = capsys.readouterr().err
        assert "the engine in the cache is not used, its plan is damaged (SHA-256 differs); building anew." in said
        assert run("engines", "clean") == 0
        assert "removed 0 things" in capsys.readouterr().out
        assert run("engines", "clean", "--all") == 0
        assert not plan.exists()

    def test_a_crash_free_line_for_a_file_that_is_no_graph(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        noise = b"\x3a\x66\x5a\x64" + random.Random(0).randbytes(100)  # in place of a graph's description of its input
        made = hand_bundle(tmp_path / "b", {"fp16": noise})
        assert run("build", made.path, "--backend", "tensorrt-rtx", "--target", "sm86") == 1
        error = capsys.readouterr().err
        assert re.search(r"fp16\.onnx is not run: it is not an ONNX graph", error)
        assert error.count("\n") == 1


def test_engines_of_an_empty_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verb in ("list", "verify", "clean"):
        assert run("engines", verb) == 0
    assert f"No engines in {tmp_path / 'cache' / 'engines'}." in capsys.readouterr().out


@pytest.mark.gpu
def test_on_the_gpu_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For real: the engine is built by the TensorRT that is installed, loaded, compared and timed."""
    from espmedsam_edge.runtime.cuda.gpu import find_gpu
    from espmedsam_edge.runtime.engines.tensorrt_api import FLAVOURS, installed

    found = find_gpu()
    if found is None or not any(installed(flavour) for flavour in FLAVOURS):
        pytest.skip("needs an NVIDIA GPU, and TensorRT or TensorRT-RTX")
    made = hand_bundle(tmp_path / "b", {precision: hand_graph(precision) for precision in ("fp32", "fp16", "int8")})
    command = [*PROGRAM, "build", str(made.path)]  # a process of its own: this one may have loaded the other TensorRT
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run("engines", "list", "--json") == 0
    sidecars = json.loads(capsys.readouterr().out)
    assert all(sidecar["engine_loaded"] for sidecar in sidecars)
    assert all(sidecar["median_ms"] > 0 for sidecar in sidecars)
    assert all(sidecar["agreement"]["finite"] for sidecar in sidecars)
    assert all(sidecar["gpu"]["name"] == found.name for sidecar in sidecars)
