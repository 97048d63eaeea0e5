"""The overlay as a live stream on the network: H.264 over UDP, RTP or to an RTSP server."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from urllib.parse import urlsplit

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.imaging.overlay import Styling, style_now
from espmedsam_edge.machine.installation import install_command
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks import gstreamer_stream
from espmedsam_edge.runtime.sinks.reconnecting_stream import ReconnectingStream, StreamWriter, broken_off
from espmedsam_edge.runtime.sinks.recording import DEFAULT_FPS
from espmedsam_edge.runtime.sources.source import Source, SourceFrame
from espmedsam_edge.runtime.sources.uris import check_login, without_secrets
from espmedsam_edge.runtime.video.pyav import has_pyav, load_pyav
from espmedsam_edge.runtime.video.writing import PyAvEncoder, even_size

SCHEMES = ("udp", "rtp", "rtsp")
_FORMATS = {"udp": "mpegts", "rtp": "rtp_mpegts", "rtsp": "rtsp"}
_CRF = 23
_KEYFRAME_SECONDS = 1  # who tunes in waits for one
_OPEN_SECONDS, _WRITE_SECONDS = 10.0, 10.0
_LONGEST_PAUSE = 5.0  # seconds between two frames of a file, whatever their times say


@dataclass(frozen=True)
class Destination:
    """Where a stream goes.

    Attributes:
        scheme: udp (MPEG-TS), rtp (MPEG-TS in RTP) or rtsp (announced to a server).
        host, port: of the receiver.
        url: all of it, user name and password included, which is never shown.
        address: what messages call it.
    """

    scheme: str
    host: str
    port: int
    url: str
    address: str


def parse_destination(text: str) -> Destination:
    """``udp://HOST:PORT``, ``rtp://HOST:PORT`` or ``rtsp://[USER:PASSWORD@]HOST[:PORT]/PATH``.

    Raises:
        UserError: anything else.
    """
    scheme = text.partition("://")[0].lower()
    example = "Give udp://HOST:PORT, rtp://HOST:PORT or rtsp://HOST:PORT/PATH."
    if "://" not in text or scheme not in SCHEMES:
        raise UserError(f"cannot stream to '{_shown(text)}'.", f"{example} {nearest(scheme, SCHEMES)}")
    check_login(text)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    port = 554 if scheme == "rtsp" and port is None else port
    wild = re.search(r"[\s\"'\\\\]", text) is not None
    plain = scheme != "rtsp" and (parts.path not in ("", "/") or parts.query or parts.username is not None)
    if wild or not host or not port or plain or not re.fullmatch(r"[\w.:%-]+", host):
        raise UserError(f"cannot stream to '{_shown(text)}'.", example)
    shown = f"[{host}]" if ":" in host else host
    path = without_secrets(parts.path.rstrip("/")) if scheme == "rtsp" else ""
    address = f"{scheme}://{shown}:{port}{path}"
    return Destination(scheme, host, port, text if scheme == "rtsp" else address, address)


def _shown(text: str) -> str:
    return without_secrets(re.sub(r"//[^/]*@", "//", text.partition("?")[0]))


class OverlayStream:
    """Sends the frames with their masks drawn on them. Frames of a file go out at the pace of their times.

    For a live source it is a ``ReconnectingStream``; over a file, a stream that breaks off is an error.

    On a Jetson GStreamer encodes with the hardware (``nvv4l2h264enc``); elsewhere PyAV does, or GStreamer with x264
    where PyAV is missing.

    Raises:
        UserError: neither PyAV nor GStreamer is here.
    """

    def __init__(self, destination: Destination, source: Source, style: Styling) -> None:
        if not has_pyav() and not gstreamer_stream.available(destination.scheme):
            raise UserError(
                f"cannot stream to {destination.address}: neither PyAV nor what GStreamer needs is installed.",
                f"Install PyAV: {install_command('video')}",
            )
        self._destination, self._source, self._style = destination, source, style
        self._writer: StreamWriter | None = None
        self._began: tuple[float, float] | None = None  # on the clock, in the source

    def __enter__(self) -> OverlayStream:
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        picture = result.overlay(frame.image, style_now(self._style, result.modality))
        fps = self._source.fps or DEFAULT_FPS
        at = float(frame.index / fps) if frame.time is None else frame.time
        try:
            if self._writer is None:
                self._writer = self._opened(result.size, fps)
            if not self._source.live:
                self._keep_pace(at)
            self._writer.write(picture, at)
        except OSError as error:
            raise broken_off(self._destination.address, error) from error

    def _opened(self, size: tuple[int, int], fps: Fraction) -> StreamWriter:
        def opened() -> StreamWriter:
            return open_stream(self._destination, size, fps)

        return ReconnectingStream(opened, self._destination.address) if self._source.live else opened()

    def _keep_pace(self, at: float) -> None:
        now = time.monotonic()
        began, first = self._began = self._began or (now, at)
        time.sleep(min(max(0.0, began + (at - first) - now), _LONGEST_PAUSE))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except UserError:
            if kind is None:  # else the error that there is says more
                raise


def open_stream(destination: Destination, size: tuple[int, int], fps: Fraction) -> StreamWriter:
    """Start a stream of frames of ``size`` = (H, W).

    Raises:
        OSError: no connection.
        UserError: no receiver, or no encoder here.
    """
    if gstreamer_stream.available(destination.scheme) and (gstreamer_stream.has_hardware_encoder() or not has_pyav()):
        return gstreamer_stream.GStreamerStream(
            destination.scheme, destination.host, destination.port, destination.url, even_size(size), fps
        )
    return PyAvStream(destination, even_size(size), fps)


class PyAvStream(PyAvEncoder):
    """Sends by PyAV: MPEG-TS in UDP, in RTP, or RTP announced to an RTSP server over TCP."""

    def __init__(self, destination: Destination, size: tuple[int, int], fps: Fraction) -> None:
        av = load_pyav()
        # 1316 bytes: seven packets of MPEG-TS, which fit into one of Ethernet.
        url, options = destination.url, {"flush_packets": "1"}
        if destination.scheme == "rtsp":
            options["rtsp_transport"] = "tcp"
        else:
            url = f"{destination.address}?pkt_size=1316"
        container = av.open(
            url, "w", format=_FORMATS[destination.scheme], options=options, timeout=(_OPEN_SECONDS, _WRITE_SECONDS)
        )
        super().__init__(container, size, fps, _CRF, _KEYFRAME_SECONDS)

    def close(self) -> None:
        try:
            self.finish()
        except OSError:  # the receiver has gone: nothing is left to tell it
            self._container.close()
