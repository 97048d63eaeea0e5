"""``espmedsam-edge infer --serve`` through its command line: what it says, what it refuses, how it ends."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs uvicorn (extra serve)")

from video_files import save_clip
from websockets.sync.client import connect

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.imaging.overlay import color_of
from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.reading import open_video


@contextmanager
def started(folder: Path, *arguments: object, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, in a folder; killed if it is still there in the end."""
    command = [sys.executable, "-m", "espmedsam_edge", "infer", *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_with(process: subprocess.Popen[str], text: str) -> str:
    """The next line on standard error that holds a text."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return line.strip()
    raise AssertionError(f"'{text}' never came: {seen}")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that is refused."""
    with pytest.raises(SystemExit) as ended:
        main(["infer", *map(str, arguments)])
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_the_view_stays_after_a_file_until_ctrl_c(toy_bundle: Bundle, tmp_path: Path) -> None:
    save_clip(tmp_path / "clip.mp4")
    (tmp_path / "work").mkdir()
    with started(tmp_path / "work", toy_bundle.path, tmp_path / "clip.mp4", "--serve", 0) as process:
        url = line_with(process, "view: ").removeprefix("view: ")
        line_with(process, f"the view stays at {url}: Ctrl-C ends it.")
        with urllib.request.urlopen(url + "metrics") as answer:
            text = answer.read().decode()
        assert "clip" not in text
        assert "espmedsam_frames_total 0" not in text
        process.send_signal(signal.SIGINT)
        output, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    assert rest == ""
    assert " FPS " in output
    assert list((tmp_path / "work").iterdir()) == []  # nothing was asked to be written


def test_what_is_asked_for_is_written_beside_the_view(toy_bundle: Bundle, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    with started(tmp_path, toy_bundle.path, "a.png", "--serve", 0, "--masks", "m", "--jsonl", "l.jsonl") as process:
        line_with(process, "the view stays")
        assert (tmp_path / "m" / "a.png").is_file()
        assert json.loads((tmp_path / "l.jsonl").read_text())["modality"] == "histopathology"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_without_a_source_it_is_the_service(toy_bundle: Bundle, tmp_path: Path) -> None:
    _, picture = cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    token = "a-token-in-the-environment"
    with started(tmp_path, toy_bundle.path, "--serve", "0.0.0.0:0", ESPMEDSAM_TOKEN=token) as process:
        url = line_with(process, "service: ").removeprefix("service: ")
        warning = line_with(process, "encrypted")
        assert token not in url + warning
        port = url.rstrip("/").rpartition(":")[2]
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/segment", picture.tobytes(), {"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["modality"] == "histopathology"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_in_the_middle_of_a_picture_it_leaves_no_traceback(
    toy_bundle: Bundle, tmp_path: Path, number: signal.Signals
) -> None:
    stream = io.BytesIO()
    image = pytest.importorskip("PIL.Image")
    image.new("L", (6000, 6000), 90).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    costly = data[:-2] + data[last:-2] * 50 + b"\xff\xd9"  # seconds of decoding
    with started(tmp_path, toy_bundle.path, "--serve", 0) as process:
        port = int(line_with(process, "service: ").rstrip("/").rpartition(":")[2])
        clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(3)]
        for client in clients:
            client.request("POST", "/v1/segment", costly)
        time.sleep(0.7)
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == 0
        assert time.monotonic() - begin < 8
        assert process.stderr is not None
        assert process.stderr.read() == ""
        for client in clients:
            client.close()


def test_a_camera_that_is_missing_ends_the_run(toy_bundle: Bundle, tmp_path: Path) -> None:
    with started(tmp_path, toy_bundle.path, "v4l2:///dev/video99", "--serve", 0) as process:
        _, rest = process.communicate(timeout=60)  # nothing was shown, so no view stays: systemd may try again
    assert process.returncode == 1
    assert rest.splitlines()[-1].startswith("failed: no camera /dev/video99")


def test_further_names_are_allowed(toy_bundle: Bundle, tmp_path: Path) -> None:
    with started(tmp_path, toy_bundle.path, "--serve", 0, "--allow-host", "tower.example") as process:
        url = line_with(process, "service: ").removeprefix("service: ")

        def status(host: str) -> int:
            try:
                with urllib.request.urlopen(urllib.request.Request(f"{url}healthz", headers={"Host": host})) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        assert [status(host) for host in ("tower.example", "Tower.Example:443", "other.example")] == [200, 200, 421]


def test_a_live_source_ends_with_ctrl_c(toy_bundle: Bundle, tmp_path: Path) -> None:
    with started(tmp_path, toy_bundle.path, "test://fundus?fps=20&size=160x120", "--serve", 0) as process:
        url = line_with(process, "view: ").removeprefix("view: ")
        text = ""
        while "espmedsam_frames_total" not in text or "espmedsam_frames_total 0\n" in text:
            with urllib.request.urlopen(url + "metrics") as answer:
                text = answer.read().decode()
        process.send_signal(signal.SIGINT)
        output, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in rest
    assert "frames" in output


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video) to read a video that grows")
def test_viewers_change_the_look_of_a_recording_but_cannot_pause_it(toy_bundle: Bundle, tmp_path: Path) -> None:
    recording, color = tmp_path / "o.partial.mkv", color_of("histopathology")

    def grown(size: int) -> int:
        while not recording.exists() or os.path.getsize(recording) < size:
            time.sleep(0.01)
        return os.path.getsize(recording)

    with started(
        tmp_path, toy_bundle.path, "test://fundus?fps=50&size=160x120", "--serve", 0, "--out", "o.mkv"
    ) as process:
        url = line_with(process, "view: ").removeprefix("view: ").replace("http", "ws")
        with connect(f"{url}live") as viewer:
            grown(10_000)  # some frames as the command line says
            viewer.send(json.dumps({"type": "set", "paused": True, "opacity": 1.0}))
            for message in viewer:
                if isinstance(message, str) and json.loads(message).get("paused"):
                    break
            grown(grown(0) + 20_000)
        first, *_, last = [frame for frame, _ in open_video(recording)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    in_full_color = [(np.abs(frame.astype(int) - color).max(axis=2) < 30).sum() for frame in (first, last)]
    assert in_full_color[1] > 2 * in_full_color[0]


def test_wrong_use_is_one_line(toy_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = toy_bundle.path
    assert "is not a port" in refused(capsys, bundle, "test://fundus", "--serve", "eighty")
    assert "16 to 256" in refused(capsys, bundle, "test://fundus", "--serve", 0, "--token", "short")
    assert "--allow-host" in refused(capsys, bundle, "--serve", 0, "--allow-host", "http://x")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} is taken by another program. Choose another" in refused(capsys, bundle, "--serve", port)
    assert "nothing to segment" in refused(capsys)
    assert "nothing to segment" in refused(capsys, bundle)


def test_a_missing_extra_is_named(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("espmedsam_edge.runtime.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = refused(capsys, toy_bundle.path, "--serve", 0)
    assert "'infer' needs the package uvicorn" in error
    assert "pip install" in error
    assert "serve]" in error
