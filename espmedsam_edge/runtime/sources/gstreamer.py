"""CSI cameras and the Jetson's hardware decoder, through GStreamer (PyGObject): only the newest frame is kept."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.sources.live import Disconnected, Feed, FirstThatOpens, LiveOptions, LiveSource
from espmedsam_edge.runtime.sources.uris import Uri
from espmedsam_edge.runtime.video.gstreamer import error_class, load_gstreamer, without_addresses

SINK = "appsink name=sink drop=true max-buffers=1 sync=false"
_TO_BGR = "videoconvert ! video/x-raw,format=BGR"
# The Jetson's converter moves frames out of its own memory but cannot make BGR.
_FROM_JETSON = f"nvvidconv ! video/x-raw,format=BGRx ! {_TO_BGR}"
JETSON_DECODER = "nvv4l2decoder"
_CODECS = ("h264", "h265")
_OPEN_SECONDS = 10.0
_READ_SECONDS = 5.0
_SLICE_SECONDS = 0.2


class GStreamerFeed:
    """A pipeline that ends in an ``appsink`` named sink with BGR frames.

    Args:
        address: what messages call it.
        description: the pipeline as ``gst-launch-1.0`` takes it; may hold a password, so it is never shown.
        elements: what it needs besides GStreamer's core, for a clear line where one is missing.
        read_seconds: without a frame until it counts as dropped out.
    """

    def __init__(
        self, address: str, description: str, elements: Sequence[str] = (), read_seconds: float = _READ_SECONDS
    ) -> None:
        self._address, self._description, self._elements = address, description, elements
        self._read_seconds = read_seconds
        self.fps: Fraction | None = None
        self._pipeline: Any = None
        self._sink: Any = None
        self._interrupted = False

    def open(self) -> None:
        gst = load_gstreamer()
        missing = [name for name in self._elements if gst.ElementFactory.find(name) is None]
        if missing:
            raise UserError(
                f"{self._address} needs GStreamer's {', '.join(missing)}.",
                "Those that begin with nv come with JetPack's nvidia-l4t-gstreamer; see docs/jetson.md.",
                exit_code=1,
            )
        try:
            self._pipeline = gst.parse_launch(self._description)
        except error_class() as error:
            raise UserError(f"{self._address}: GStreamer refuses the pipeline.", exit_code=1) from error
        self._sink = self._pipeline.get_by_name("sink")
        self._pipeline.set_state(gst.State.PLAYING)
        try:
            self._await_first(gst)
        except Disconnected as error:
            self.close()
            raise UserError(
                f"cannot open {self._address}: {error}.", "Check the camera or the address.", exit_code=1
            ) from error

    def _await_first(self, gst: Any) -> None:
        """Wait until the first frame's format is known, which says that the source works."""
        waited = 0.0
        while not self._interrupted:
            sample = self._sink.emit("try-pull-preroll", int(_SLICE_SECONDS * 1e9))
            if sample is not None:
                caps = sample.get_caps().get_structure(0)
                known, numerator, denominator = caps.get_fraction("framerate")
                self.fps = Fraction(numerator, denominator) if known and numerator and denominator else None
                return
            self._check_bus(gst)
            waited += _SLICE_SECONDS
            if waited > _OPEN_SECONDS:
                raise Disconnected(f"no frame in {_OPEN_SECONDS:g} s")

    def _check_bus(self, gst: Any) -> None:
        message = self._pipeline.get_bus().pop_filtered(gst.MessageType.ERROR | gst.MessageType.EOS)
        if message is None:
            return
        if message.type == gst.MessageType.EOS:
            raise Disconnected("the stream ended")
        error, _ = message.parse_error()
        raise Disconnected(without_addresses(error.message))

    def read(self) -> Frame | None:
        gst = load_gstreamer()
        waited = 0.0
        while not self._interrupted:
            sample = self._sink.emit("try-pull-sample", int(_SLICE_SECONDS * 1e9))
            if sample is not None:
                return _frame(gst, sample)
            self._check_bus(gst)
            if self._sink.get_property("eos"):
                raise Disconnected("the stream ended")
            waited += _SLICE_SECONDS
            if waited > self._read_seconds:
                raise Disconnected(f"no frame in {self._read_seconds:g} s")
        return None

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.set_state(load_gstreamer().State.NULL)
            self._pipeline = self._sink = None


def open_csi(uri: Uri, live: LiveOptions) -> LiveSource:
    """A Jetson's CSI camera: ``csi://SENSOR?size=1920x1080&fps=30&flip=0``, the image signal processor included.

    Raises:
        UserError: an option is wrong.
    """
    uri.allow("size", "fps", "flip")
    if not uri.place.isdecimal() or len(uri.place) > 2:
        raise UserError(f"csi://{uri.place} is not a sensor's number.", "The first is csi://0.")
    height, width = uri.size() or (1080, 1920)
    fps = uri.whole("fps", 1, 240) or 30
    flip = uri.whole("flip", 0, 7) or 0
    description = (
        f"nvarguscamerasrc sensor-id={uri.place} ! "
        f"video/x-raw(memory:NVMM),width={width},height={height},framerate={fps}/1 ! "
        f"nvvidconv flip-method={flip} ! video/x-raw,format=BGRx ! {_TO_BGR} ! {SINK}"
    )
    feed = GStreamerFeed(uri.address, description, ("nvarguscamerasrc", "nvvidconv", "videoconvert"))
    return LiveSource(feed, uri.address, uri.label, live.back_off)


def hardware_rtsp_feed(uri: Uri) -> Feed:
    """An RTSP stream decoded by the Jetson's decoder: see ``rtsp_feed``.

    Raises:
        UserError: an option is wrong.
    """
    return rtsp_feed(uri, f"{JETSON_DECODER} enable-max-performance=1", _FROM_JETSON, (JETSON_DECODER, "nvvidconv"))


def rtsp_feed(uri: Uri, decoder: str, convert: str = _TO_BGR, elements: Sequence[str] = ()) -> Feed:
    """An RTSP stream by ``rtspsrc`` and a decoder element; ``elements``: what decoder and conversion need.

    Options of the URI: ``codec=h264|h265`` (without it, each is tried), ``transport=tcp|udp``, ``timeout=SECONDS``.

    Raises:
        UserError: an option is wrong.
    """
    uri.allow("codec", "transport", "timeout")
    codec = uri.options.get("codec")
    if codec is not None and codec not in _CODECS:
        raise UserError(f"codec={codec} in {uri.address} is neither h264 nor h265.")
    transport = uri.options.get("transport", "tcp")
    if transport not in ("tcp", "udp"):
        raise UserError(f"transport={transport} in {uri.address} is neither tcp nor udp.")
    location = uri.place.replace("\\", "\\\\").replace('"', '\\"')
    timeout = uri.number("timeout", 0.1, 3600) or _READ_SECONDS
    feeds = []
    for name in [codec] if codec is not None else _CODECS:
        description = (
            f'rtspsrc location="{location}" latency=0 protocols={transport} drop-on-latency=true ! '
            f"rtp{name}depay ! {name}parse ! {decoder} ! {convert} ! {SINK}"
        )
        needed = ("rtspsrc", f"rtp{name}depay", f"{name}parse", *elements)
        feeds.append(GStreamerFeed(uri.address, description, needed, timeout))
    return FirstThatOpens(feeds)


def _frame(gst: Any, sample: Any) -> Frame:
    """A sample's picture, copied out of GStreamer's memory, whose rows may be padded to four bytes."""
    caps = sample.get_caps().get_structure(0)
    height, width = caps.get_value("height"), caps.get_value("width")
    buffer = sample.get_buffer()
    mapped, content = buffer.map(gst.MapFlags.READ)
    if not mapped:
        raise Disconnected("a frame could not be read")
    try:
        rows = np.frombuffer(content.data, np.uint8).reshape(height, -1)
        return np.ascontiguousarray(rows[:, : 3 * width]).reshape(height, width, 3)
    finally:
        buffer.unmap(content)
