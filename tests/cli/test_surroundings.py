"""What a command is started in: closed standard files, no threads, a home that others watch."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.phantoms import phantom


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / "in" / f"{number}.png"), phantom("fundus", number, (96, 128))[0])
    return tmp_path / "in"


def infer(bundle: Bundle, pictures: Path, out: Path) -> list[str]:
    results = ["--masks", str(out / "masks"), "--csv", str(out / "t.csv"), "--jsonl", str(out / "t.jsonl")]
    return ["infer", str(bundle.path), str(pictures), "--backend", "onnxruntime-cpu", *results]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files_lose_nothing(toy_bundle: Bundle, pictures: Path, tmp_path: Path, closed: str) -> None:
    arguments = infer(toy_bundle, pictures, tmp_path / "out")
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "espmedsam_edge", *arguments]
    done = subprocess.run(command, env=os.environ | {"HOME": str(tmp_path / "home")}, check=False, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert len((tmp_path / "out" / "t.csv").read_text().splitlines()) == 4
    assert len((tmp_path / "out" / "t.jsonl").read_text().splitlines()) == 3
    for number in range(3):
        assert np.asarray(cv2.imread(str(tmp_path / "out" / "masks" / f"{number}.png"), 0)).shape == (96, 128)


@pytest.mark.parametrize("place", ["-", "/dev/stdout", "/dev/fd/1"])
def test_what_goes_to_a_closed_standard_output_is_an_error(toy_bundle: Bundle, pictures: Path, place: str) -> None:
    arguments = ["infer", str(toy_bundle.path), str(pictures), "--backend", "onnxruntime-cpu", "--jsonl", place]
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "espmedsam_edge", *arguments]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == 1
    assert done.stderr in (
        b"error: whoever read standard output has gone.\n",
        b"error: nobody reads /dev/fd/1. Start its reader first, and let it read.\n",
    )


def test_the_libraries_keep_and_report_nothing(toy_bundle: Bundle, pictures: Path, tmp_path: Path) -> None:
    """ONNX Runtime keeps an identifier below the home folder, and a queue of what it reports to its maker."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    for number, arguments in enumerate((infer(toy_bundle, pictures, tmp_path / "out"), ["doctor"])):
        home = tmp_path / f"home{number}"
        home.mkdir()
        command = [sys.executable, "-m", "espmedsam_edge", *arguments]
        subprocess.run(command, env=environment | {"HOME": str(home)}, check=number == 0, capture_output=True)
        kept = [path.relative_to(home).parts for path in home.rglob("*") if path.is_file()]
        own = {("espmedsam-edge",), ("gstreamer-1.0",)}  # the latter a list of GStreamer's own plug-ins
        assert all(parts[0] == ".cache" and parts[1:2] in own for parts in kept), kept


@pytest.mark.parametrize("name", ["run", "infer", "read", "write"])
def test_where_no_thread_can_be_started_it_is_said(
    toy_bundle: Bundle,
    pictures: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == f"espmedsam-{name}":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(SystemExit) as ended:
        main(infer(toy_bundle, pictures, tmp_path / "out"))
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "no more threads can be started here" in said
    assert "Traceback" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of Linux")
def test_libraries_without_memory_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [
        "sh",
        "-c",
        'ulimit -v 400000; exec "$@"',
        "sh",
        sys.executable,
        "-m",
        "espmedsam_edge",
        "train",
        "segment",
        "smoke",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True)
    said = done.stderr.decode()
    assert (done.returncode, len(said.splitlines()), said[:7]) == (1, 1, "error: "), said
    assert "memory" in said


def test_a_package_that_finds_no_memory_is_not_called_missing(
    toy_bundle: Bundle, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")

    def refused(name: str) -> None:
        raise ImportError("libtorch_cuda.so: failed to map segment from shared object")

    monkeypatch.setattr("espmedsam_edge.calibration.modelopt_tools.version", lambda: "0")
    monkeypatch.setattr("espmedsam_edge.calibration.modelopt_tools.import_module", refused)
    options = ["--precision", "int8", "--images", "2", "--held-out", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", str(toy_bundle.path), str(pictures), *options])
    said = capsys.readouterr().err.splitlines()[-1]
    assert (ended.value.code, said[:22]) == (1, "error: memory ran out.")
