"""``espmedsam-edge bench`` as a user runs it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espmedsam_edge import cli
from espmedsam_edge.bench import benchmark
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.imaging.encode import write_image


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    write_image(path, np.random.default_rng(8).integers(0, 256, (60, 80, 3), np.uint8))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


def test_it_prints_a_table_and_writes_json_markdown_and_plot(
    toy_bundle: Bundle, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib (extra bench)")
    files = [tmp_path / "out" / name for name in ("bench.json", "bench.md", "bench.png")]
    code = run(
        "bench", toy_bundle.path, picture, "--compare", "onnxruntime-cpu,fp32", "--duration", "0.05",
        "--json", files[0], "--markdown", files[1], "--plot", files[2],
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "frame to mask and overlay" in out
    assert "takes this part of the other's time" in out
    assert "Roofline: " in out
    data = json.loads(files[0].read_text())
    assert [c["name"] for c in data["contenders"]] == [
        "onnxruntime fp32",
        "onnxruntime-cpu fp32",
        "onnxruntime fp32 (2)",
    ]
    assert data["encode_ms"]["samples"] == 1
    assert data["roofline"]["run_to_bound"] > 0
    assert data["left_out"] == []
    assert files[1].read_text().startswith("# Bench of toy.bundle")
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_is_left_out_with_a_notice(
    toy_bundle: Bundle,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "espmedsam_edge.machine.installation.find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    plot, markdown = tmp_path / "bench.png", tmp_path / "bench.md"
    code = run(
        "bench", toy_bundle.path, picture, "--duration", "0.05", "--no-roofline", "--plot", plot, "--markdown", markdown
    )
    assert code == 0
    assert "[bench]'" in capsys.readouterr().err
    assert markdown.exists()
    assert not plot.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--duration", "0"], "duration 0 s is not possible"),
        (["--compare", "tensorflow"], "'tensorflow' is nothing to compare with"),
        (["--precision", "int8"], "no int8 graph"),
        (["--backend", "cpu"], "unknown backend 'cpu'"),
        (["--modality", "xray"], "no modality 'xray'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    toy_bundle: Bundle, picture: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run("bench", toy_bundle.path, picture, *arguments) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_source_that_cannot_be_read_leaves_with_1(toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", toy_bundle.path, "nowhere.mp4", "--duration", "0.05") == 1
    assert "nowhere.mp4" in capsys.readouterr().err


def test_a_competitor_that_cannot_run_is_left_out_and_the_rest_is_done(
    toy_bundle: Bundle, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    file = tmp_path / "bench.json"
    code = run(
        "bench", toy_bundle.path, picture, "--compare", "onnxruntime-cuda,fp32", "--duration", "0.05",
        "--no-roofline", "--json", file,
    )  # fmt: skip
    assert code == 1
    assert "Left out: onnxruntime-cuda: " in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert len(data["contenders"]) == 2
    assert data["roofline"] is None
    assert "Install onnxruntime-gpu" in data["left_out"][0]


def test_what_takes_long_and_why_it_is_the_cpu_is_said_before_anything_is_measured(
    toy_bundle: Bundle,
    picture: Path,
    tmp_path: Path,
    announced_load: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured, said_before = benchmark.bench, list[str]()

    def bench(*arguments: Any) -> Any:
        said_before.extend(capsys.readouterr().err.splitlines())
        return measured(*arguments)

    monkeypatch.setattr(benchmark, "bench", bench)
    file, page = tmp_path / "bench.json", tmp_path / "bench.md"
    code = run(
        "bench", toy_bundle.path, picture, "--duration", "0.05", "--no-roofline", "--json", file, "--markdown", page
    )
    assert code == 0
    assert said_before[0] == announced_load
    assert said_before[1].startswith("Running on onnxruntime (CPU")
    assert said_before[2].startswith("not tensorrt or tensorrt-rtx: there is no NVIDIA driver here")
    for report in (capsys.readouterr().out, page.read_text()):
        assert "Backend: onnxruntime (CPU" in report
        assert "not tensorrt or tensorrt-rtx: " in report
    (reason,) = json.loads(file.read_text())["contenders"][0]["passed_over"]
    assert reason == said_before[2]
