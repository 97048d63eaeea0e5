"""``espmedsam-edge infer`` on live sources and DICOM: ends, results, clear failures, nothing of the patient."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_files import BIRTH_DATE, PATIENT, PATIENT_ID, ramp, save_dicom
from stream_servers import MjpegServer
from toy_bundles import save_toy_bundle
from video_files import clip_frame, save_clip

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks import background
from espmedsam_edge.runtime.sinks.measurements import JsonLines
from espmedsam_edge.runtime.sources.source import SourceFrame
from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.reading import open_video

Outcome = tuple[int, str, str]
SMALL = "size=64x48&fps=100"


@pytest.fixture(autouse=True)
def _machine_may_be_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that wait for a core are not left out: when they are is test_background's matter."""
    monkeypatch.setattr(background, "_LAG_SECONDS", 60.0)


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_live_source_ends_after_its_frames(infer: Callable[..., Outcome]) -> None:
    code, out, err = infer(f"test://fundus?{SMALL}", "--frames", "5", "--out", "o.mp4", "--jsonl", "r.jsonl")
    assert (code, err) == (0, "")
    assert len(list(open_video(Path("o.mp4")))) == 5
    lines = lines_of(Path("r.jsonl"))
    assert {line["source"] for line in lines} == {"test://fundus"}
    numbers = [line["frame"] for line in lines]
    assert numbers == sorted(numbers)  # type: ignore[type-var]
    assert "test://fundus: 5 frames, " in out
    assert "latency p50 " in out


@pytest.mark.parametrize("source", ["test://", "test://?size=64x48&frames=3"])
def test_the_test_source_shows_what_the_bundle_segments(infer: Callable[..., Outcome], source: str) -> None:
    code, out, err = infer(source, "--frames", "3", "--jsonl", "r.jsonl")
    assert (code, err) == (0, "")
    assert "test://histopathology: " in out
    assert {line["source"] for line in lines_of(Path("r.jsonl"))} == {"test://histopathology"}


def test_a_restarted_recorder_keeps_what_it_has(infer: Callable[..., Outcome]) -> None:
    arguments = [f"test://fundus?{SMALL}", "--frames", "3", "--out", "rec.mkv", "--jsonl", "r.jsonl", "--csv", "r.csv"]
    assert infer(*arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    code, out, err = infer(*arguments)
    assert (code, err) == (0, "rec.mkv exists and is kept; this run writes rec-2.mkv.\n")
    assert "overlays: rec-2.mkv\n" in out
    assert {name: Path(name).read_bytes() for name in before} == before
    assert sorted(path.name for path in Path().iterdir()) == sorted(
        [*("rec.mkv", "r.jsonl", "r.csv"), *("rec-2.mkv", "r-2.jsonl", "r-2.csv")]
    )
    code, _, err = infer(*arguments, "--no-overwrite")
    assert code == 2
    assert "exists" in err


def test_several_live_sources_beside_a_file(infer: Callable[..., Outcome]) -> None:
    save_clip(Path("c.avi"), 6)
    sources = [f"test://fundus?{SMALL}", "c.avi", f"test://fundus?{SMALL}&seed=3"]
    code, _, err = infer(*sources, "--frames", "6", "--out", "o", "--masks", "m")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in Path("o").iterdir()) == ["c.mp4", "test-fundus-2.mp4", "test-fundus.mp4"]
    assert [path.name for path in sorted(Path("m/c").iterdir())] == [f"{number:06d}.png" for number in range(6)]
    assert len(list(Path("m/test-fundus-2").iterdir())) == 6


def test_duration_ends_a_run(infer: Callable[..., Outcome]) -> None:
    code, _, err = infer(f"test://fundus?{SMALL}", "--duration", "0.3", "--jsonl", "r.jsonl")
    assert (code, err) == (0, "")
    assert len(lines_of(Path("r.jsonl"))) > 0


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("rtps://camera/1", 2, "Did you mean 'rtsp'?"),
        ("test://fundus?speed=3", 2, "no option 'speed'"),
        ("v4l2:///dev/video77", 1, "no camera /dev/video77"),
        ("77", 1, "no camera /dev/video77"),
    ],
)
def test_what_cannot_be_opened_is_one_line(infer: Callable[..., Outcome], source: str, code: int, words: str) -> None:
    found, _, err = infer(source)
    assert found == code
    assert words in err
    assert err.count("\n") == 1
    assert not [path for path in Path().iterdir() if path.stat().st_size == 0]


def test_old_frames_are_refused_and_counted(infer: Callable[..., Outcome]) -> None:
    source, limits = f"test://fundus?{SMALL}", ("--duration", "0.3", "--jsonl", "r.jsonl")
    code, out, err = infer(source, *limits, "--max-latency", "0")  # every frame is older than that
    assert (code, err) == (0, "")
    assert re.search(r"test://fundus: 0 frames, \d+ skipped, [1-9]\d* refused as too old\n", out)
    assert lines_of(Path("r.jsonl")) == []
    code, out, _ = infer(source, *limits, "--max-latency", "100")
    assert code == 0
    assert "refused as too old" not in out
    assert lines_of(Path("r-2.jsonl")) != []


def test_a_result_that_waits_for_a_slow_disk_too_long_is_refused(
    infer: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four frames come within 0.1 s, and the disk takes half a second for the first."""
    write = JsonLines.write

    def slow(lines: JsonLines, frame: SourceFrame, result: Segmentation) -> None:
        write(lines, frame, result)
        time.sleep(0.5)

    monkeypatch.setattr(JsonLines, "write", slow)
    source = "test://fundus?size=64x48&fps=50"
    _, out, _ = infer(source, "--frames", "4", "--jsonl", "r.jsonl", "--csv", "r.csv", "--max-latency", "0.25")
    assert re.search(r", [1-3] refused as too old", out)
    assert len(lines_of(Path("r.jsonl"))) < 4
    slowest = re.search(r"to the mask, p50 (\d+) ms, p99 \d+ ms to r\.jsonl", out)
    assert slowest is not None
    assert int(slowest[1]) >= 500


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")
def test_a_source_that_stays_away_is_given_up(infer: Callable[..., Outcome]) -> None:
    with MjpegServer(lambda number: clip_frame(number, (96, 128)), fps=100) as server:

        def shown(number: int) -> np.ndarray:
            if number == 20:
                server.refusing.set()
                server.drop()
            return clip_frame(number, (96, 128))

        server._picture = shown
        code, _, err = infer(server.url, "--out", "o.mkv", "--give-up", "0.2")
    assert code == 1
    dropped, failed = err.splitlines()
    assert "dropped out" in dropped
    assert f"failed: {server.url} did not come back in 0.2 s" in failed
    assert len(list(open_video(Path("o.mkv")))) >= 1


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")
def test_the_decoder_is_chosen(infer: Callable[..., Outcome]) -> None:
    with MjpegServer(lambda number: clip_frame(number, (96, 128)), fps=100) as server:
        assert infer(server.url, "--decoder", "software", "--frames", "3", "--jsonl", "r.jsonl")[0] == 0
        code, _, err = infer(server.url, "--decoder", "hardware", "--frames", "3")
    assert (code, err) == (
        2,
        f"error: {server.url} cannot be decoded in hardware. Only rtsp:// streams can: --decoder auto\n",
    )


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")
def test_the_overlay_is_sent_on(infer: Callable[..., Outcome]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        port = receiver.getsockname()[1]
        source = "test://fundus?size=160x120&fps=20"
        code, out, err = infer(source, "--duration", "2", "--stream", f"udp://127.0.0.1:{port}")
        assert (code, err) == (0, "")
        with Path("got.ts").open("wb") as file, contextlib.suppress(BlockingIOError):
            while True:
                file.write(receiver.recv(65536))
    assert f"ms to udp://127.0.0.1:{port}\n" in out
    frames = [frame for frame, _ in open_video(Path("got.ts"))]
    assert len(frames) >= 1
    assert frames[0].shape == (120, 160, 3)
    assert os.listdir() == ["got.ts"]  # nothing else is written


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sigkill_leaves_a_recording_that_plays(toy_bundle: Bundle, tmp_path: Path, suffix: str) -> None:
    arguments = ["test://fundus?size=160x120&fps=50", "--out", f"o{suffix}", "--jsonl", "r.jsonl"]
    command = [sys.executable, "-m", "espmedsam_edge", "infer", str(toy_bundle.path), *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        recording = tmp_path / f"o.partial{suffix}"
        while not recording.exists() or recording.stat().st_size < 20_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == [recording.name, "r.partial.jsonl", toy_bundle.path.name]
    reader = open_video(recording)
    assert sum(1 for _ in reader) >= 5
    reader.close()
    numbers = [line["frame"] for line in lines_of(tmp_path / "r.partial.jsonl")]
    assert numbers == sorted(numbers)  # type: ignore[type-var]
    assert len(numbers) >= 5


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")
def test_a_stream_that_drops_out_is_recorded_on(infer: Callable[..., Outcome]) -> None:
    with MjpegServer(lambda number: clip_frame(number, (96, 128)), fps=100) as server:

        def shown(number: int) -> np.ndarray:
            if number == 10 and len(server.requests) == 1:
                server.drop()
            return clip_frame(number, (96, 128))

        server._picture = shown
        url = f"http://user:s3cret@127.0.0.1:{server.port}/video?key=k3y"
        code, out, err = infer(url, "--frames", "20", "--out", "o", "--jsonl", "r.jsonl")
    assert code == 0
    assert len(server.requests) >= 2
    assert "dropped out 1 times" in out
    assert [line.partition(" (")[0].partition(" after")[0] for line in err.splitlines()] == [
        f"http://127.0.0.1:{server.port}/video dropped out",
        f"http://127.0.0.1:{server.port}/video is back",
    ]
    (recording,) = Path("o").iterdir()
    assert len(list(open_video(recording))) == 20
    for secret in ("s3cret", "k3y"):
        assert secret not in out + err + Path("r.jsonl").read_text() + recording.name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_a_playable_recording(toy_bundle: Bundle, tmp_path: Path, number: signal.Signals) -> None:
    arguments = [f"test://fundus?{SMALL}", "--out", tmp_path / "o.mp4", "--jsonl", "-"]
    command = [sys.executable, "-m", "espmedsam_edge", "infer", str(toy_bundle.path), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    for _ in range(10):
        assert "area" in json.loads(process.stdout.readline())
    process.send_signal(number)
    out, err = process.stdout.read(), process.stderr.read()  # to their ends
    assert process.wait(60) == 0, err
    assert "Traceback" not in err
    assert "test://fundus: " in err
    frames = len(list(open_video(tmp_path / "o.mp4")))
    assert frames >= 10
    assert frames == 10 + len(out.splitlines())
    assert os.listdir(tmp_path).count("o.mp4") == 1


@pytest.mark.parametrize("left", [False, True])
def test_a_full_disk_ends_a_live_run_that_writes_nothing_else(toy_bundle: Bundle, tmp_path: Path, left: bool) -> None:
    """On a file system of a few kB, where this user may make one; ``left``: lines go elsewhere, and go on."""
    disk, saved, lines = tmp_path / "disk", tmp_path / "saved", tmp_path / "r.jsonl"
    disk.mkdir()
    call = [sys.executable, "-m", "espmedsam_edge", "infer", str(toy_bundle.path), f"'test://fundus?{SMALL}'"]
    call += ["--out", f"{disk}/o.mkv", *(["--jsonl", str(lines), "--frames", "600"] if left else [])]
    mount = f"mount -t tmpfs -o size=64k none {disk} || exit 77; "
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} {' '.join(call)}; code=$?; cp -r {disk} {saved}; exit $code"],
        capture_output=True,
        text=True,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("needs the right to mount a small file system (user namespaces)")
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert [line.partition(" no space left to write ")[0] for line in said] == ["warning:"] * left + ["failed:"]
    assert said[0].endswith("The rest goes on without it.") == left
    if left:
        assert len(lines_of(lines)) == 600
    if has_pyav():
        assert [path.name for path in saved.iterdir()] == ["o.partial.mkv"]
        assert len(list(open_video(saved / "o.partial.mkv"))) >= 3


def test_ctrl_c_before_the_camera_answers(toy_bundle: Bundle, tmp_path: Path) -> None:
    if not has_pyav():
        pytest.skip("needs PyAV (extra video)")
    with MjpegServer(lambda number: clip_frame(number), fps=50) as server:
        server.stalled.set()
        command = [sys.executable, "-m", "espmedsam_edge", "infer", str(toy_bundle.path), server.url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        deadline = time.monotonic() + 60
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1, 130)
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["toy.bundle"]


# DICOM.


def test_dicom_results_hold_nothing_of_the_patient(infer: Callable[..., Outcome]) -> None:
    save_dicom(Path("one.dcm"), ramp(), PixelSpacing=[0.5, 0.5])
    loop = np.stack([ramp(high=40 * number) for number in range(1, 5)])
    save_dicom(Path("loop.dcm"), loop, FrameTime=40)
    code, out, err = infer("one.dcm", "loop.dcm", "--out", "o", "--masks", "m", "--jsonl", "r.jsonl")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in Path("o").iterdir()) == ["loop.mp4", "one.png"]
    lines = lines_of(Path("r.jsonl"))
    assert [(line["source"], line["frame"], line["time"]) for line in lines] == [
        ("one.dcm", 0, None), *[("loop.dcm", number, pytest.approx(0.04 * number)) for number in range(4)]
    ]  # fmt: skip
    written = b"".join(path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.suffix != ".dcm")
    for secret in (PATIENT, PATIENT_ID, BIRTH_DATE):
        assert secret not in out + err
        assert secret.encode() not in written
        assert not [path for path in Path().rglob("*") if secret in path.name]


def test_a_folder_of_dicom_with_bad_files(infer: Callable[..., Outcome]) -> None:
    whole = save_dicom(Path("work.dcm"), ramp())
    folder = Path("in")
    folder.mkdir()
    (folder / "IM1").write_bytes(whole.read_bytes())
    (folder / "cut.dcm").write_bytes(whole.read_bytes()[:-50])
    (folder / "text.dcm").write_text("none" * 99)
    (folder / "empty.dcm").touch()
    code, _, err = infer("in", "--masks", "m")
    assert code == 1
    assert [path.name for path in Path("m").iterdir()] == ["IM1.png"]
    lines = err.splitlines()
    assert len(lines) == 3
    for name, words in (("cut", "cut off or damaged"), ("text", "is not DICOM"), ("empty", "is empty")):
        assert any(f"in/{name}.dcm" in line and words in line for line in lines)


@pytest.mark.data
def test_development_dicom_files_and_clips(infer: Callable[..., Outcome], data_root: Path, tmp_path: Path) -> None:
    toy = save_toy_bundle(tmp_path / "ultrasound.bundle", ("ultrasound",))
    code, _, err = infer(data_root / "dicom", data_root / "video", "--out", "o", bundle=toy.path)
    assert code == 0
    told = "clinicdb_seq_001_025.mp4 looks like colonoscopy (100 %) and is segmented as ultrasound."
    assert told in err  # the one network is the wrong one for the clips, and that is said once
    assert err.count("\n") == 2  # before it, that a heart is no breast
    assert "us_echo_cine_30f_jpegbaseline.dcm looks unlike ultrasound" in err
    written = sorted(path.suffix for path in Path("o").iterdir())
    assert written == [".mp4"] * 8 + [".png"] * 4
