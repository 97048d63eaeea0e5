"""Loading TensorRT, parsing and building; with the real TensorRT-RTX where its libraries are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engines_in_process import build_plan, check_parse
from hand_graphs import hand_graph

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines import tensorrt_api
from espmedsam_edge.runtime.engines.tensorrt_api import Log, Refusal, TensorRT, resolve_targets


@pytest.mark.usefixtures("unloaded")
class TestLoading:
    @pytest.mark.parametrize(("flavour", "extra"), [("tensorrt", "[trt]"), ("tensorrt-rtx", "[rtx]"), (None, "[rtx]")])
    def test_missing_says_how_to_install(
        self, flavour: str | None, extra: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tensorrt_api, "module_installed", lambda module: False)
        monkeypatch.setattr(tensorrt_api, "jetson", lambda: None)
        with pytest.raises(UserError, match=r"is installed|is not installed") as caught:
            tensorrt_api.load(flavour)
        assert "pip install" in caught.value.hint
        assert extra in caught.value.hint

    def test_missing_on_a_jetson_names_its_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from espmedsam_edge.machine.environment import Jetson

        monkeypatch.setattr(tensorrt_api, "module_installed", lambda module: False)
        monkeypatch.setattr(tensorrt_api, "jetson", lambda: Jetson("NVIDIA Jetson Orin Nano", "36.4.0"))
        with pytest.raises(UserError, match=r"sudo apt install tensorrt python3-libnvinfer"):
            tensorrt_api.load("tensorrt")
        with pytest.raises(UserError, match=r"does not run on a Jetson"):
            tensorrt_api.load("tensorrt-rtx")

    def test_unknown_backend_names_the_nearest(self) -> None:
        with pytest.raises(UserError, match=r"Did you mean 'tensorrt'"):
            tensorrt_api.load("tensort")

    @pytest.mark.rtx
    def test_bindings_without_libraries(self) -> None:
        pytest.importorskip("tensorrt_rtx_libs")
        code = (
            "import sys\n"
            "sys.modules['tensorrt_rtx_libs'] = None\n"
            "from espmedsam_edge.runtime.engines import tensorrt_api\n"
            "tensorrt_api.load('tensorrt-rtx')"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        line = ended.stderr.splitlines()[-1]
        assert "TensorRT-RTX is installed but does not load: libtensorrt_rtx.so.1: cannot open" in line
        assert "[rtx]" in line

    def test_broken_installation_carries_the_loader_s_words(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "tensorrt.py").write_text(
            "raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file or directory')"
        )
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(UserError, match=r"does not load: libnvinfer\.so\.10: cannot open"):
            tensorrt_api.load("tensorrt")

    def test_a_folder_of_type_stubs_is_not_tensorrt(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "tensorrt").mkdir()
        (tmp_path / "tensorrt" / "__init__.pyi").touch()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        assert not tensorrt_api.installed("tensorrt")


def test_one_process_loads_one_of_the_two(double: Callable[..., TensorRT]) -> None:
    double(release="10.3.0")
    assert tensorrt_api.load().version == "10.3.0"
    with pytest.raises(UserError, match=r"already runs TensorRT 10\.3\.0.*one process for each"):
        tensorrt_api.load("tensorrt-rtx")


def test_importing_loads_no_library() -> None:
    code = (
        "import sys, espmedsam_edge.runtime.engines.cache\n"
        "heavy = {'tensorrt', 'tensorrt_rtx_bindings', 'onnx', 'torch', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_log_keeps_errors_when_it_grows_too_long() -> None:
    log = Log()
    log.add("ERROR", "the first error")
    for index in range(20_000):
        log.add("INFO", f"line {index}")
    assert log.errors() == ["the first error"]
    assert log.lines[-1] == ("INFO", "line 19999")
    assert len(log.lines) <= 5000


@pytest.mark.rtx
class TestRtx:
    @pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
    def test_takes_and_builds_every_precision_without_a_gpu(
        self, precision: str, tmp_path: Path, rtx: TensorRT
    ) -> None:
        file = tmp_path / f"{precision}.onnx"
        file.write_bytes(hand_graph(precision))  # type: ignore[arg-type]
        assert check_parse(file) == []
        plan = build_plan(file, ["sm86", "12.0"])
        assert len(plan) > 10_000  # kernels for two generations

    def test_names_the_refused_node_and_why(self, tmp_path: Path, rtx: TensorRT) -> None:
        file = tmp_path / "graph.onnx"
        file.write_bytes(hand_graph("fp32", foreign="Det"))
        assert check_parse(file) == [Refusal(8, "Det_foreign", "Det", "this parser does not support Det")]
        with pytest.raises(UserError, match=r"refuses graph.onnx: node 8 'Det_foreign' \(Det\)"):
            build_plan(file)

    def test_a_graph_newer_than_the_parser(self, tmp_path: Path, rtx: TensorRT) -> None:
        file = tmp_path / "graph.onnx"
        file.write_bytes(hand_graph("fp32", foreign="HolographicNorm"))
        (refusal,) = check_parse(file)
        assert refusal.unknown_operator
        with pytest.raises(UserError, match=r"does not know the operator HolographicNorm.*newer than this parser"):
            build_plan(file)

    @pytest.mark.parametrize("content", [b"", b"not a graph at all" * 10, hand_graph("fp32")[:2000]])
    def test_a_file_that_is_no_graph_is_refused_whole(self, content: bytes, tmp_path: Path, rtx: TensorRT) -> None:
        file = tmp_path / "graph.onnx"
        file.write_bytes(content)
        (refusal,) = check_parse(file)
        assert refusal.node == -1
        assert str(refusal).startswith("the graph: ")

    def test_targets_in_any_spelling(self, rtx: TensorRT) -> None:
        assert resolve_targets(rtx, ["8.6", "SM86", "89", "sm_120"]) == ["sm86", "sm89", "sm120"]
        with pytest.raises(UserError, match=r"cannot build for 'sm87'.*Did you mean"):
            resolve_targets(rtx, ["sm87"])

    def test_where_its_engines_load(self, rtx: TensorRT) -> None:
        """As 1.7.1 says itself: "Supported: 8.0 8.6 8.9 12.0 12.1 >12.0"."""
        assert [rtx.not_for(sm) for sm in ("sm80", "sm86", "sm89", "sm120", "sm121", "sm130")] == [None] * 6
        for sm in ("sm70", "sm87", "sm90", "sm100", "sm103", "sm110"):
            assert f"not on SM {sm[2:-1]}.{sm[-1]}" in str(rtx.not_for(sm))

    def test_the_other_one_is_refused_after_it(self, rtx: TensorRT) -> None:
        with pytest.raises(UserError, match=r"already runs TensorRT-RTX"):
            tensorrt_api.load("tensorrt")


def test_tensorrt_takes_no_targets(double: Callable[..., TensorRT]) -> None:
    api = double(release="11.4.0.106")
    assert resolve_targets(api, []) == []
    assert api.not_for("sm90") is None
    with pytest.raises(UserError, match=r"builds for the GPU it runs on"):
        resolve_targets(api, ["sm86"])
