"""The calls made to TensorRT, asserted on a double cut to each published API; progress, memory limits, read-back."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_surface
from hand_graphs import hand_graph
from trt_fixtures import ORIN

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines import worker
from espmedsam_edge.runtime.engines.progress import EngineProgress
from espmedsam_edge.runtime.engines.request import Dla, EngineRequest
from espmedsam_edge.runtime.engines.tensorrt_api import TensorRT
from espmedsam_edge.runtime.engines.worker import MIB

Double = Callable[..., TensorRT]
GpuFixture = Callable[[str], None]
RELEASES = tensorrt_surface.RELEASES


def request(folder: Path, precision: str = "fp16", command: str = "build", **more: Any) -> EngineRequest:
    """A request for a graph file that the double takes for any graph of its precision."""
    file = folder / f"{precision}.onnx"
    content = more.pop("content", b"an ONNX file")
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    graph = Graph(modality="fundus", precision=precision, file=file.name, sha256=digest, image_size=64)  # type: ignore[arg-type]
    values = {"command": command, "graph": graph, "graph_path": file, "flavour": "tensorrt", **more}
    return EngineRequest(plan_path=folder / "fundus.plan", **values)


def calls(api: TensorRT, *kinds: str) -> list[list[Any]]:
    """The recorded calls whose class is one of these."""
    return [call for call in api.module.CALLS if call[0].split(".")[0] in kinds]


@pytest.mark.parametrize("release", RELEASES)
class TestCallsOfEachRelease:
    @pytest.fixture(autouse=True)
    def _orin(self, gpu: GpuFixture) -> None:
        gpu(ORIN)

    def test_a_build_makes_these_calls_and_no_others(self, release: str, tmp_path: Path, double: Double) -> None:
        api = double(release=release)
        worker.build(request(tmp_path, timing_cache=tmp_path / "t.cache"), lambda phase, fraction: True)
        strongly_typed = {"10.3.0": 2, "10.16.1.11": 2, "11.4.0.106": 1}[release]  # 1 << its value there
        assert calls(api, "Builder") == [
            ["Builder", "Logger"],
            ["Builder.create_network", strongly_typed],
            ["Builder.create_builder_config"],
            ["Builder.build_serialized_network", "INetworkDefinition", "IBuilderConfig"],
        ]
        assert calls(api, "OnnxParser") == [
            ["OnnxParser", "INetworkDefinition", "Logger"],
            ["OnnxParser.parse", "bytes", str(tmp_path / "fp16.onnx")],
        ]
        free, reserve, weights = 4_000_000_000, 512 * MIB, len(b"an ONNX file")
        assert calls(api, "IBuilderConfig") == [
            ["IBuilderConfig.set_memory_pool_limit", "WORKSPACE", (free - reserve - 2 * weights) // 2],
            ["IBuilderConfig.clear_flag", "TF32"],
            ["IBuilderConfig.profiling_verbosity =", "DETAILED"],
            ["IBuilderConfig.create_timing_cache", "bytes"],
            ["IBuilderConfig.set_timing_cache", "ITimingCache", False],
            ["IBuilderConfig.progress_monitor =", "Monitor"],
            ["IBuilderConfig.get_timing_cache"],
        ]
        assert calls(api, "Runtime", "EngineInspector") == [
            ["Runtime", "Logger"],
            ["Runtime.deserialize_cuda_engine", "IHostMemory"],
            ["EngineInspector.get_engine_information", "JSON"],
        ]

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_no_flag_ever_lowers_the_precision(
        self, release: str, precision: str, tmp_path: Path, double: Double
    ) -> None:
        """FP16 and INT8 flags exist in 10.x and are gone in 11.x: the graph's own types are all there is."""
        api = double(release=release)
        worker.build(request(tmp_path, precision), lambda phase, fraction: True)
        assert not [call for call in calls(api, "IBuilderConfig") if call[0].endswith(".set_flag")]
        assert hasattr(api.module.BuilderFlag, "FP16") == release.startswith("10.")

    def test_tf32_only_when_asked_for(self, release: str, tmp_path: Path, double: Double) -> None:
        api = double(release=release)
        worker.build(request(tmp_path, "fp32", tf32=True), lambda phase, fraction: True)
        flags = [call for call in calls(api, "IBuilderConfig") if "flag" in call[0]]
        assert flags == [["IBuilderConfig.set_flag", "TF32"]]

    def test_writes_the_plan_raw_and_reads_types_back(self, release: str, tmp_path: Path, double: Double) -> None:
        double(release=release)
        wanted = request(tmp_path)
        result = worker.build(wanted, lambda phase, fraction: True)
        assert wanted.plan_path is not None
        assert wanted.plan_path.read_bytes().startswith(json.dumps([release, "logits"]).encode())
        assert result.version == release
        assert result.arithmetic is not None
        assert result.arithmetic.layers == {"fp16": 1}
        assert result.arithmetic.macs == {"fp16": 16 * 16 * 3 * 4 * 4}
        assert result.arithmetic.inputs[0].dtype == result.arithmetic.outputs[0].dtype == "fp32"
        assert result.engine_loaded

    def test_a_graph_in_fp32_under_the_name_of_fp16_fails(self, release: str, tmp_path: Path, double: Double) -> None:
        """The trap of 11.x: with the old flags gone an FP32 graph builds silently in FP32."""
        double(release=release, dtype="FLOAT")
        with pytest.raises(UserError, match=r"fp16\.onnx is listed as fp16, but .* products are: 1 in fp32"):
            worker.build(request(tmp_path), lambda phase, fraction: True)

    def test_an_engine_of_other_types_than_its_network_fails(
        self, release: str, tmp_path: Path, double: Double
    ) -> None:
        inspected = {"Layers": [{"Name": "conv", "Outputs": [{"Format/Datatype": "Row major linear FP32 format"}]}]}
        double(release=release, inspector=json.dumps(inspected))
        with pytest.raises(UserError, match="has no fp16 layer, only 1 in fp32"):
            worker.build(request(tmp_path), lambda phase, fraction: True)

    def test_an_engine_with_other_inputs_fails(self, release: str, tmp_path: Path, double: Double) -> None:
        double(release=release, engine_dtype="HALF")
        with pytest.raises(UserError, match=r"the engine of fp16\.onnx has 'image' fp16 1x3x64x64"):
            worker.build(request(tmp_path), lambda phase, fraction: True)

    def test_refusals_are_all_found_though_the_parser_stops_at_one(
        self, release: str, tmp_path: Path, double: Double
    ) -> None:
        errors = [[4, "a", "Det", "false"], [9, "b", "Mod", "Assertion failed: fmod"]]
        api = double(release=release, errors=errors)
        result = worker.check(request(tmp_path, command="check"))
        assert [str(refusal) for refusal in result.refusals] == [
            "node 4 'a' (Det): this parser does not support Det",
            "node 9 'b' (Mod): Assertion failed: fmod",
        ]
        assert ["OnnxParser.supports_model_v2", "bytes", str(tmp_path / "fp16.onnx")] in calls(api, "OnnxParser")
        with pytest.raises(UserError, match=r"node 4 'a' \(Det\).*and 1 more; build --check lists all"):
            worker.build(request(tmp_path), lambda phase, fraction: True)

    def test_tensorrt_s_own_reason_is_in_the_error_and_its_log_is_kept(
        self, release: str, tmp_path: Path, double: Double
    ) -> None:
        lines = ["Error Code 2: OutOfMemory (Requested size was 4096 bytes.)", "Error Code 10: no implementation"]
        double(release=release, build_log=lines)
        log = tmp_path / "build.log"
        with pytest.raises(UserError, match=r"could not build fp16\.onnx: Error Code 2: OutOfMemory") as caught:
            worker.build(request(tmp_path, log_path=log), lambda phase, fraction: True)
        assert "ran out of memory" in caught.value.hint
        assert all(line in log.read_text() for line in lines)

    def test_a_log_that_cannot_be_written_neither_fails_a_build_nor_hides_why_it_failed(
        self, release: str, tmp_path: Path, double: Double
    ) -> None:
        log = tmp_path / "build.log"
        log.mkdir()
        double(release=release)
        assert worker.build(request(tmp_path, log_path=log), lambda phase, fraction: True).engine_loaded
        double(release=release, build_log=["Error Code 10: no implementation"])
        with pytest.raises(UserError, match=r"could not build fp16\.onnx: Error Code 10"):
            worker.build(request(tmp_path, log_path=log), lambda phase, fraction: True)

    def test_dla_is_reported_and_nothing_is_placed_there(self, release: str, tmp_path: Path, double: Double) -> None:
        api = double(release=release, dla=2)
        result = worker.build(request(tmp_path), lambda phase, fraction: True)
        assert result.dla == Dla(cores=2, layers=1, of=3)
        names = [call[0] for call in api.module.CALLS]
        built = names.index("Builder.build_serialized_network")
        assert "IBuilderConfig.default_device_type =" not in names[:built]

    def test_a_board_without_dla_reports_none(self, release: str, tmp_path: Path, double: Double) -> None:
        double(release=release)
        assert worker.check(request(tmp_path, command="check")).dla is None

    def test_a_timing_cache_is_kept_and_used_again(self, release: str, tmp_path: Path, double: Double) -> None:
        double(release=release)
        cache = tmp_path / "timings"
        worker.build(request(tmp_path, timing_cache=cache), lambda phase, fraction: True)
        assert cache.read_bytes() == b"timings of " + release.encode()
        api = double(release=release)
        worker.build(request(tmp_path, timing_cache=cache), lambda phase, fraction: True)
        assert len([call for call in calls(api, "IBuilderConfig") if "create_timing_cache" in call[0]]) == 1

    def test_a_damaged_timing_cache_begins_anew(self, release: str, tmp_path: Path, double: Double) -> None:
        api = double(release=release)
        cache = tmp_path / "timings"
        cache.write_bytes(b"of another GPU")
        worker.build(request(tmp_path, timing_cache=cache), lambda phase, fraction: True)
        assert len([call for call in calls(api, "IBuilderConfig") if "create_timing_cache" in call[0]]) == 2
        assert cache.read_bytes() == b"timings of " + release.encode()


@pytest.fixture(scope="module")
def known_types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mypy's cache: all but TensorRT's own types is read once."""
    return tmp_path_factory.mktemp("known")


@pytest.mark.xdist_group("types")
@pytest.mark.parametrize("release", RELEASES)
def test_the_code_has_types_that_fit_each_release(release: str, tmp_path: Path, known_types: Path) -> None:
    """mypy, strict, against stubs with exactly the members that the release has."""
    stubs = tmp_path / "stubs" / "tensorrt"
    stubs.mkdir(parents=True)
    (stubs / "__init__.pyi").write_text(tensorrt_surface.stub(release))
    _check_types(stubs.parent, known_types)


@pytest.mark.xdist_group("types")
def test_the_code_has_types_that_fit_tensorrt_stubs(tmp_path: Path, known_types: Path) -> None:
    """The same against the community's package tensorrt-stubs (10.13), where it is installed.

    Its releases do not parse: a parameter is called ``in``, one without a default follows one with. Both are mended.
    """
    places = [Path(folder) for folder in [*sys.path, f"{sys.prefix}/typings"]]
    source = next((place for place in places if (place / "tensorrt_bindings" / "tensorrt.pyi").is_file()), None)
    if source is None:
        pytest.skip("needs tensorrt-stubs: pip install --no-deps --target VENV/typings tensorrt-stubs")
    text = (source / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    text = text.replace(" in: ", " in_: ").replace("channel_axis: int)", "channel_axis: int = ...)")
    stubs = tmp_path / "stubs" / "tensorrt"
    stubs.mkdir(parents=True)
    (stubs / "__init__.pyi").write_text(text)
    _check_types(stubs.parent, known_types)


def _check_types(stubs: Path, cache: Path) -> None:
    pytest.importorskip("mypy", reason="needs mypy (extra dev)")
    root = Path(__file__).parents[3]
    names = ("tensorrt_api", "precision", "progress", "trial", "worker")
    files = [f"espmedsam_edge/runtime/engines/{name}.py" for name in names]
    config = stubs.parent / "mypy.ini"
    config.write_text(
        f"[mypy]\nstrict = True\nfollow_imports = silent\nmypy_path = {stubs}\nplugins = pydantic.mypy\n"
        "[mypy-tensorrt]\nignore_errors = True\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(cache), *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    ours = [line for line in done.stdout.splitlines() if line.startswith("espmedsam_edge/") or "syntax" in line]
    assert not ours, "\n".join(ours)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 2: mypy itself failed


class TestMemory:
    def test_no_memory_at_all(self, gpu: GpuFixture, tmp_path: Path, double: Double) -> None:
        gpu("Orin|8|7|8|7990000000|0|0|1")
        double(release="10.3.0")
        with pytest.raises(
            UserError,
            match=r"on Orin failed: out of memory\. Other programs hold the GPU's memory",
        ):
            worker.build(request(tmp_path), lambda phase, fraction: True)

    def test_too_little_says_how_much_is_needed(self, gpu: GpuFixture, tmp_path: Path, double: Double) -> None:
        gpu("Orin|8|7|8|7990000000|300000000|0|1")
        double(release="10.3.0")
        with pytest.raises(UserError, match="Orin has 286 MiB free; building 0 MiB of weights needs 512 MiB"):
            worker.build(request(tmp_path), lambda phase, fraction: True)

    def test_a_board_that_shares_memory_counts_the_system_s(
        self, gpu: GpuFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from espmedsam_edge.machine.environment import Memory
        from espmedsam_edge.runtime.cuda import gpu as gpu_module

        gpu("Orin|8|7|8|7990000000|1000000|1|1")  # the driver's figure leaves out what the kernel can reclaim
        monkeypatch.setattr(gpu_module, "memory", lambda: Memory(8 << 30, 5 << 30))
        found = gpu_module.find_gpu()
        assert found is not None
        assert worker.workspace_limit(found, 50 * MIB) == ((5 << 30) - 512 * MIB - 100 * MIB) // 2

    def test_without_a_gpu_it_fits_small_cards(self) -> None:
        assert worker.workspace_limit(None, 50 * MIB) == 2048 * MIB


class TestProgress:
    def test_nested_phases_make_one_fraction(self) -> None:
        seen: list[tuple[str, float]] = []
        progress = EngineProgress(lambda phase, fraction: seen.append((phase, fraction)) is None, interval_s=0)
        progress.start("all", None, 4)
        assert progress.step("all", 0)
        progress.start("part", "all", 2)
        progress.start("piece", "part", 5)
        progress.step("piece", 0)  # a fifth of a half of a quarter
        assert seen[-1] == ("piece", pytest.approx((1 + (0 + 1 / 5) / 2) / 4))
        progress.step("piece", 4)
        progress.finish("piece")
        progress.step("part", 1)
        assert seen[-1] == ("part", pytest.approx(2 / 4))

    def test_never_goes_back_and_never_passes_one(self) -> None:
        seen: list[float] = []
        progress = EngineProgress(lambda phase, fraction: seen.append(fraction) is None, interval_s=0)
        for _ in range(3):  # the same phase again, and steps beyond those announced
            progress.start("all", None, 2)
            for step in range(5):
                progress.step("all", step)
            progress.finish("all")
        progress.step("unheard of", 3)
        assert seen == sorted(seen)
        assert seen[-1] == 1.0

    def test_phases_that_name_each_other_as_parents_end(self) -> None:
        progress = EngineProgress(lambda phase, fraction: True, interval_s=0)
        progress.start("a", "b", 2)
        progress.start("b", "a", 2)
        assert progress.step("a", 0)

    def test_gives_up_when_nobody_listens(self) -> None:
        progress = EngineProgress(lambda phase, fraction: False, interval_s=0)
        progress.start("all", None, 2)
        assert not progress.step("all", 0)


@pytest.mark.rtx
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("precision", "types"), [("fp32", {"fp32"}), ("fp16", {"fp16"}), ("int8", {"int8", "fp16"})])
def test_rtx_builds_and_reads_its_types_back(precision: str, types: set[str], tmp_path: Path, rtx: TensorRT) -> None:
    content = hand_graph(precision)  # type: ignore[arg-type]
    wanted = request(tmp_path, precision, flavour="tensorrt-rtx", targets=("sm86", "sm120"), content=content)
    seen: list[float] = []
    result = worker.build(wanted, lambda phase, fraction: seen.append(fraction) is None)
    assert result.arithmetic is not None
    assert set(result.arithmetic.layers) == types
    assert not result.engine_loaded
    assert seen
    assert wanted.plan_path is not None
    assert wanted.plan_path.stat().st_size > 10_000
