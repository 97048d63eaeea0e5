"""The overlay on the network: what goes out on loopback comes in, by PyAV and by GStreamer."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from sink_material import result_of, source_of
from video_files import clip_frame, number_of

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.runtime.sinks import gstreamer_stream
from espmedsam_edge.runtime.sinks import stream as streaming
from espmedsam_edge.runtime.sinks.gstreamer_stream import describe_pipeline
from espmedsam_edge.runtime.sinks.stream import OverlayStream, parse_destination
from espmedsam_edge.runtime.sources.source import SourceFrame
from espmedsam_edge.runtime.video.pyav import has_pyav

SIZE = (120, 160)
INVISIBLE = OverlayStyle((0, 255, 255), opacity=0, outline=False)
needs_pyav = pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")


def send(sink: OverlayStream, number: int) -> None:
    frame = SourceFrame(clip_frame(number, SIZE), Path("c"), number, number / 30)
    sink.write(frame, result_of(np.zeros(SIZE, np.uint8)))


class Receiver:
    """Takes frames off the network in a thread, until there are enough."""

    def __init__(self, scheme: str, enough: int) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.numbers: list[int] = []
        self._scheme, self._enough = scheme, enough
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        import av

        options = {"probesize": "50000", "analyzeduration": "300000"}
        forms = {"udp": "mpegts", "rtp": None}
        address = f"{self._scheme}://127.0.0.1:{self.port}"
        with av.open(address, format=forms[self._scheme], options=options, timeout=(60, 60)) as container:
            for frame in container.decode(video=0):
                self.numbers.append(number_of(frame.to_ndarray(format="bgr24")))
                if len(self.numbers) >= self._enough:
                    return


@needs_pyav
@pytest.mark.parametrize("scheme", ["udp", "rtp"])
@pytest.mark.parametrize("writer", ["PyAV", "GStreamer"])
def test_frames_arrive_in_order(scheme: str, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if writer == "GStreamer":
        if not gstreamer_stream.available(scheme):
            pytest.skip("needs GStreamer and PyGObject")
        monkeypatch.setattr(streaming, "has_pyav", lambda: False)
    receiver = Receiver(scheme, 30)
    deadline = time.monotonic() + 60
    with OverlayStream(
        parse_destination(f"{scheme}://127.0.0.1:{receiver.port}"), source_of(live=True, fps=Fraction(30)), INVISIBLE
    ) as sink:
        number = 0
        while receiver.thread.is_alive() and time.monotonic() < deadline:
            send(sink, number)
            number += 1
            time.sleep(0.01)
    assert len(receiver.numbers) >= 30
    steps = np.diff(receiver.numbers) % 12
    assert (steps == 1).mean() > 0.9  # UDP may lose one


class RtspRecorder:
    """An RTSP server that takes a stream and writes its pictures as JPEGs to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, "0"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RECORDER, self.port, str(self.folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = self._process.stdout.readline().strip()
        if not self.port:
            pytest.skip(f"no RTSP server: {self._process.communicate()[1].strip().splitlines()[-1]}")
        self.url = f"rtsp://127.0.0.1:{self.port}/live"

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def pictures(self) -> int:
        return len(list(self.folder.glob("*.jpg")))


_RECORDER = """
import sys
try:
    import gi
    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer
except (ImportError, ValueError) as error:
    sys.exit(str(error))
Gst.init(None)
for element in ("rtph264depay", "avdec_h264", "jpegenc", "multifilesink"):
    if Gst.ElementFactory.find(element) is None:
        sys.exit("no GStreamer element " + element)
server = GstRtspServer.RTSPServer.new()
server.set_address("127.0.0.1")
server.set_service(sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory.new()
factory.set_transport_mode(GstRtspServer.RTSPTransportMode.RECORD)
factory.set_launch(
    "( rtph264depay name=depay0 ! h264parse ! avdec_h264 ! videoconvert ! jpegenc ! "
    f"multifilesink location={sys.argv[2]}/%04d.jpg )"
)
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""


@pytest.fixture
def rtsp_recorder(tmp_path: Path) -> Iterator[RtspRecorder]:
    recorder = RtspRecorder(tmp_path)
    yield recorder
    recorder.stop()


@needs_pyav
@pytest.mark.parametrize("writer", ["PyAV", "GStreamer"])
def test_an_rtsp_server_is_fed_again_after_it_was_restarted(
    rtsp_recorder: RtspRecorder, writer: str, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    if writer == "GStreamer":
        if not gstreamer_stream.available("rtsp"):
            pytest.skip("needs GStreamer with rtspclientsink, and PyGObject")
        monkeypatch.setattr(streaming, "has_pyav", lambda: False)
    number, deadline = 0, time.monotonic() + 120
    source = source_of(live=True, fps=Fraction(30))

    def send_until(condition: Callable[[], bool]) -> None:
        nonlocal number
        while not condition():
            assert time.monotonic() < deadline
            send(sink, number)
            number += 1
            time.sleep(1 / 30)  # as the frames say; GStreamer waits for those that are ahead of time

    with OverlayStream(parse_destination(rtsp_recorder.url), source, INVISIBLE) as sink:
        began = time.monotonic()
        send_until(lambda: rtsp_recorder.pictures() >= 20 and time.monotonic() - began > 1.5)
        rtsp_recorder.stop()
        send_until(lambda: len(said) == 1)
        for picture in rtsp_recorder.folder.glob("*.jpg"):
            picture.unlink()
        rtsp_recorder.start()
        send_until(lambda: rtsp_recorder.pictures() >= 20 and len(said) == 2)
    assert "broke off" in said[0]
    assert "is back after" in said[1]
    assert "broke off 1 times" in said[2]


@needs_pyav
def test_a_server_that_is_not_there_is_one_line_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    destination = parse_destination(f"rtsp://user:secret@127.0.0.1:{port}/live")

    def send_on() -> None:
        with OverlayStream(destination, source_of(live=True), INVISIBLE) as sink:
            for number in range(3000):
                send(sink, number)
                time.sleep(0.02)

    with pytest.raises(UserError, match=rf"the stream to rtsp://127\.0\.0\.1:{port}/live broke off") as caught:
        send_on()
    assert "secret" not in str(caught.value)
    assert caught.value.exit_code == 1


@needs_pyav
def test_a_file_goes_out_at_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds + 0.01  # sending takes a little

    monkeypatch.setattr(streaming.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(streaming.time, "sleep", sleep)
    sink = OverlayStream(parse_destination("udp://127.0.0.1:9"), source_of(), INVISIBLE)
    for at in (5.0, 5.5, 6.0, 900.0):
        sink._keep_pace(at)
    assert slept == pytest.approx([0, 0.49, 0.49, 5.0])


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("udp://10.0.0.7:5000", "udp://10.0.0.7:5000"),
        ("RTP://host.local:5000/", "rtp://host.local:5000"),
        ("udp://[::1]:5000", "udp://[::1]:5000"),
        ("rtsp://u:p@server/cam/1?key=k", "rtsp://server:554/cam/1"),
        ("rtsp://server/user=admin&password=p/1", "rtsp://server:554/user=***&password=***/1"),
    ],
)
def test_destinations(text: str, address: str) -> None:
    found = parse_destination(text)
    assert found.address == address
    assert found.url == (text if found.scheme == "rtsp" else address)


@pytest.mark.parametrize(
    "text",
    [
        "file.mp4",
        "http://host:1",
        "udp://host",
        "udp://:5000",
        "udp://host:99999",
        "udp://host:5000?fifo_size=1",
        "udp://host:5000/../x",
        "udp://u:secret@host:5000",
        'rtsp://host/a" ! filesink location="x',
        "rtsp://ho st/a",
    ],
)
def test_other_destinations_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="cannot stream to") as caught:
        parse_destination(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("character", ["/", "#", "?"])
def test_a_password_that_ends_the_address_is_refused_without_any_of_it(character: str) -> None:
    with pytest.raises(UserError, match="write") as caught:
        parse_destination(f"rtsp://user:12{character}secret@host:554/live")
    for shown in ("user:", "12", "secret", "host:554"):
        assert shown not in str(caught.value).replace("%2", "")


def test_the_jetsons_encoder_is_fed_from_its_own_memory() -> None:
    text = describe_pipeline("udp", "10.0.0.7", 5000, "", Fraction(30), "nvv4l2h264enc")
    assert "nvvidconv ! video/x-raw(memory:NVMM),format=NV12 ! nvv4l2h264enc" in text
    assert text.endswith("mpegtsmux alignment=7 ! udpsink host=10.0.0.7 port=5000 sync=false")
    assert "leaky-type=downstream" in text


def test_gstreamer_without_its_rtsp_plugin_leaves_servers_to_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Jetson without the package gstreamer1.0-rtsp: its encoder is there, but not what speaks to servers."""
    monkeypatch.setattr(gstreamer_stream, "has_element", lambda name: name != "rtspclientsink")
    monkeypatch.setattr(streaming, "PyAvStream", lambda *_: "PyAV")
    monkeypatch.setattr(gstreamer_stream, "GStreamerStream", lambda *_: "GStreamer")
    by = {
        text: streaming.open_stream(parse_destination(text), SIZE, Fraction(30))
        for text in ("rtsp://127.0.0.1/live", "udp://127.0.0.1:9")
    }
    assert list(by.values()) == ["PyAV", "GStreamer"]


def test_without_any_encoder_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "has_pyav", lambda: False)
    monkeypatch.setattr(gstreamer_stream, "available", lambda scheme: False)
    with pytest.raises(UserError, match="neither PyAV nor what GStreamer needs is installed"):
        OverlayStream(parse_destination("udp://127.0.0.1:9"), source_of(), INVISIBLE)
