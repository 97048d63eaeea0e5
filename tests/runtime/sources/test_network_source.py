"""Streams over loopback: frames arrive, drop-outs mend, nothing secret shows."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from listening import listening
from stream_servers import MjpegServer, RtspServer, rtsp_server_missing
from video_files import clip_frame, number_of, save_clip

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sources import network
from espmedsam_edge.runtime.sources.gstreamer import GStreamerFeed, rtsp_feed
from espmedsam_edge.runtime.sources.live import BackOff, Feed, FirstThatOpens, LiveOptions, LiveSource
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.uris import Uri, parse_uri
from espmedsam_edge.runtime.video.gstreamer import has_element, has_gstreamer

pytest.importorskip("av", reason="needs PyAV (extra video)")
QUICK = BackOff(first=0.01, longest=0.05)


def opened(text: str, decoder: Any = "auto") -> LiveSource:
    (source,), failures = open_sources([text], LiveOptions(QUICK, decoder))
    assert failures == []
    assert isinstance(source, LiveSource)
    return source


@pytest.fixture
def server() -> Iterator[MjpegServer]:
    with MjpegServer(lambda number: clip_frame(number, (96, 128)), fps=200) as running:
        yield running


def test_motion_jpeg_over_http(server: MjpegServer) -> None:
    got = []
    with opened(server.url) as source:
        for frame in source:
            got.append(number_of(frame.image))
            if len(got) == 20:
                break
    assert frame.image.shape == (96, 128, 3)
    assert source.name == server.url
    steps = np.diff(got) % 12
    assert ((steps >= 1) & (steps <= 11)).all()


def test_every_forced_disconnect_is_recovered(server: MjpegServer, said: list[str]) -> None:
    with opened(server.url) as source:
        frames = iter(source)
        for count in range(10):
            before = next(frames).index
            assert server.connected.acquire(timeout=30)
            assert server.drop() == 1
            while source.reconnects == count:
                assert next(frames).index > before
    assert source.reconnects == 10
    assert sum("dropped out" in line for line in said) == 10
    assert sum("is back" in line for line in said) == 10


def test_a_server_that_stalls_counts_as_dropped_out(server: MjpegServer) -> None:
    with opened(f"{server.url}#timeout=0.3") as source:
        frames = iter(source)
        next(frames)
        server.stalled.set()
        while source.waiting or len(server.requests) < 2:  # a second connection, because the first gave nothing
            source.poll()
        server.stalled.clear()
        while source.reconnects == 0:
            next(frames)


def test_a_server_that_is_starting_is_awaited(server: MjpegServer) -> None:
    with opened(server.url) as source:
        frames = iter(source)
        next(frames)
        server.refusing.set()
        server.drop()
        server.refusing.clear()
        while source.reconnects == 0:
            next(frames)


def test_a_password_is_used_and_not_shown(server: MjpegServer, said: list[str]) -> None:
    with opened(f"http://doctor:s3cret@127.0.0.1:{server.port}/video?key=k3y") as source:
        frames = iter(source)
        frame = next(frames)
        server.drop()
        while source.reconnects == 0:
            next(frames)
    assert b"key=k3y" in server.requests[0]
    shown = [*said, source.name, frame.source, str(frame.path)]
    for secret in ("doctor", "s3cret", "k3y"):
        assert not any(secret in text for text in shown)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.mark.parametrize("scheme", ["rtsp", "http", "tcp"])
def test_an_unreachable_host_is_one_line(scheme: str) -> None:
    with pytest.raises(UserError) as caught, opened(f"{scheme}://me:s3cret@127.0.0.1:{closed_port()}/x"):
        pass
    assert "Connection refused" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert caught.value.exit_code == 1


@contextlib.contextmanager
def web_server(answer: bytes) -> Iterator[str]:
    """Gives every client the same bytes and hangs up."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.recv(4096)
                client.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/x"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)


def answer(body: bytes, kind: str) -> bytes:
    return b"HTTP/1.0 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (kind.encode(), len(body)) + body


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (b"HTTP/1.0 404 Not Found\r\n\r\n", "404"),
        (b"HTTP/1.0 401 Unauthorized\r\n\r\n", "401"),
        (answer(b"<html>no stream</html>" * 50, "text/html"), "cannot open"),
        (b"", "cannot open"),
        (answer(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "application/vnd.apple.mpegurl"), "cannot open"),
    ],
)
def test_what_is_no_stream_is_one_line(response: bytes, words: str) -> None:
    with web_server(response) as url, pytest.raises(UserError) as caught, opened(url):
        pass
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recording_on_a_web_server_is_refused(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "a.avi").read_bytes()
    served = web_server(answer(clip, "video/x-msvideo"))
    with served as url, pytest.raises(UserError, match="is a recording, not a live stream"), opened(url):
        pass


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "image/jpeg"), (".png", "image/png")])
def test_a_picture_on_a_web_server_is_refused_as_one(suffix: str, kind: str) -> None:
    done, content = cv2.imencode(suffix, np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8))
    assert done
    served = web_server(answer(content.tobytes(), kind))
    with served as url, pytest.raises(UserError, match="is one picture, not a stream"), opened(f"{url}/a{suffix}"):
        pass


@pytest.mark.parametrize("text", ["rtsp://h/x#transport=smoke", "http://h/x#speed=3", "http://h/x#timeout=0"])
def test_wrong_options(text: str) -> None:
    with pytest.raises(UserError):
        opened(text)


# RTSP, by both ways to read it.


@pytest.fixture(scope="module")
def rtsp() -> Iterator[RtspServer]:
    missing = rtsp_server_missing()
    if missing:
        pytest.skip(f"needs GStreamer's RTSP server: {missing}")
    with RtspServer() as running:
        yield running


@pytest.mark.parametrize("reader", ["pyav", "gstreamer"])
def test_rtsp_drops_out_and_comes_back(rtsp: RtspServer, reader: str) -> None:
    if reader == "pyav":
        source = opened(rtsp.url)
    else:
        if not has_element("avdec_h264"):
            pytest.skip("needs GStreamer's avdec_h264 (gstreamer1.0-libav)")
        uri = parse_uri(rtsp.url)
        assert uri is not None
        source = LiveSource(rtsp_feed(uri, "avdec_h264", elements=("avdec_h264",)), uri.address, uri.label, QUICK)
    with source:
        assert source.fps == 30
        frames = iter(source)
        frame = next(frames)
        assert frame.image.shape == (120, 160, 3)
        assert frame.image.max() > 200  # a white ball on black
        assert np.median(frame.image) < 30
        for count in range(2):
            assert rtsp.drop() >= 1
            while source.reconnects == count:
                next(frames)


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    """GStreamer's own choice of a software decoder, which takes H.264 and H.265, stands for the Jetson's."""
    if not (has_element("decodebin") and has_element("avdec_h265")):
        pytest.skip("needs GStreamer and its libav plugins")
    monkeypatch.setattr(network, "has_element", lambda name: True)

    def hardware(uri: Uri) -> Feed:
        return rtsp_feed(uri, "decodebin", elements=("decodebin",))

    monkeypatch.setattr(network, "hardware_rtsp_feed", hardware)


@pytest.mark.usefixtures("jetson")
@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_the_hardware_decoder_takes_either_codec_unasked(codec: str, said: list[str]) -> None:
    missing = rtsp_server_missing(codec)
    if missing:
        pytest.skip(f"needs GStreamer's RTSP server: {missing}")
    with RtspServer(codec=codec) as server, opened(server.url) as source:
        frames = iter(source)
        assert next(frames).image.shape == (120, 160, 3)
        assert isinstance(source.feed, FirstThatOpens)
        assert isinstance(source.feed._feeds[0], FirstThatOpens)  # the hardware's, not PyAV
        assert server.drop() >= 1
        while source.reconnects == 0:
            next(frames)
    assert len(said) == 2  # dropped out and came back, nothing else


def test_what_the_hardware_cannot_open_is_decoded_in_software(
    rtsp: RtspServer, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    if has_element("nvv4l2decoder"):
        pytest.skip("this is a Jetson")
    monkeypatch.setattr(network, "has_element", lambda name: True)
    with opened(rtsp.url) as source:
        assert next(iter(source)).image.shape == (120, 160, 3)
    assert said == [f"{rtsp.url} is decoded in software ({rtsp.url} needs GStreamer's nvv4l2decoder, nvvidconv)."]
    source = opened(rtsp.url, decoder="hardware")
    with pytest.raises(UserError, match="nvv4l2decoder"), source:
        pass


def test_gstreamer_waits_as_long_as_it_is_told(rtsp: RtspServer) -> None:
    if not has_element("avdec_h264"):
        pytest.skip("needs GStreamer's avdec_h264 (gstreamer1.0-libav)")
    uri = parse_uri(f"{rtsp.url}#timeout=0.5&codec=h264")
    assert uri is not None
    said, told = list[str](), threading.Event()

    def tell(line: str) -> None:
        said.append(line)
        told.set()

    source = LiveSource(rtsp_feed(uri, "avdec_h264", elements=("avdec_h264",)), uri.address, uri.label, QUICK)
    with listening(tell), source:
        frames = iter(source)
        next(frames)
        with rtsp.stalled():
            assert told.wait(60)
        while source.reconnects == 0:
            next(frames)
    assert said[0] == f"{rtsp.url} dropped out (no frame in 0.5 s); trying again."


# GStreamer without a network.


@pytest.fixture
def gstreamer() -> None:
    if not has_gstreamer() or not has_element("videotestsrc"):
        pytest.skip("needs GStreamer and PyGObject (Debian: python3-gi, gir1.2-gst-plugins-base-1.0)")


def feed(source: str, elements: tuple[str, ...] = ()) -> GStreamerFeed:
    sink = "appsink name=sink drop=true max-buffers=1 sync=false"
    return GStreamerFeed("csi://0", f"{source} ! videoconvert ! video/x-raw,format=BGR ! {sink}", elements)


@pytest.mark.usefixtures("gstreamer")
@pytest.mark.parametrize("width", [64, 50, 33])  # rows are padded to four bytes
def test_gstreamer_gives_bgr_frames(width: int) -> None:
    pattern = f"videotestsrc is-live=true pattern=red ! video/x-raw,width={width},height=40,framerate=25/1"
    with LiveSource(feed(pattern), "csi://0", "csi-0", QUICK) as source:
        frame = next(iter(source))
        assert source.fps == 25
    assert frame.image.shape == (40, width, 3)
    assert np.abs(frame.image.reshape(-1, 3).astype(int) - (0, 0, 255)).max() <= 3


@pytest.mark.usefixtures("gstreamer")
def test_gstreamer_keeps_the_newest_frame_only() -> None:
    pipeline = feed("videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=120/1")
    pipeline.open()
    sink = pipeline._sink
    assert (sink.get_property("drop"), sink.get_property("max-buffers"), sink.get_property("sync")) == (True, 1, False)
    assert pipeline.read() is not None
    pipeline.close()
    pipeline.close()


@pytest.mark.usefixtures("gstreamer")
def test_a_gstreamer_stream_that_ends_is_opened_again(said: list[str]) -> None:
    pipeline = feed("videotestsrc num-buffers=3 ! video/x-raw,width=64,height=48")
    with LiveSource(pipeline, "csi://0", "csi-0", QUICK) as source:
        frames = iter(source)
        while source.reconnects < 3:
            next(frames)
    assert said[0] == "csi://0 dropped out (the stream ended); trying again."


@pytest.mark.usefixtures("gstreamer")
def test_missing_elements_are_named() -> None:
    with pytest.raises(UserError, match=r"needs GStreamer's nosuchsrc"):
        feed("videotestsrc", ("videotestsrc", "nosuchsrc")).open()
    with pytest.raises(UserError, match="refuses the pipeline"):
        feed("nosuchsrc").open()


@pytest.mark.usefixtures("gstreamer")
def test_without_a_jetson_its_camera_is_one_line() -> None:
    if has_element("nvarguscamerasrc"):
        pytest.skip("this is a Jetson")
    with pytest.raises(UserError, match=r"csi://0 needs GStreamer's nvarguscamerasrc"), opened("csi://0"):
        pass


@pytest.mark.parametrize("text", ["csi://front", "csi://0?size=3", "csi://0?flip=9", "csi://0?gain=3"])
def test_wrong_csi_options(text: str) -> None:
    with pytest.raises(UserError):
        opened(text)
