"""Streams from a network (RTSP, MJPEG over HTTP and what else FFmpeg opens) by PyAV, tuned for little delay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import max_pixels
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.machine.installation import install_command
from espmedsam_edge.runtime.sources.gstreamer import JETSON_DECODER, hardware_rtsp_feed
from espmedsam_edge.runtime.sources.live import Disconnected, Feed, FirstThatOpens, LiveOptions, LiveSource
from espmedsam_edge.runtime.sources.uris import Uri
from espmedsam_edge.runtime.video.display import Display
from espmedsam_edge.runtime.video.gstreamer import has_element
from espmedsam_edge.runtime.video.pyav import has_pyav, load_pyav

OPEN_SECONDS = 8.0
READ_SECONDS = 5.0
OPTIONS = ("transport", "timeout", "codec")
# A stream can name further addresses (a playlist); none of these reads this machine's files.
_PROTOCOLS = "rtsp,rtp,srtp,rtmp,http,https,httpproxy,tcp,tls,udp,srt,crypto"


def open_stream(uri: Uri, live: LiveOptions) -> LiveSource:
    """The source of a stream, decoded in software, or an RTSP stream by the Jetson's decoder where there is one.

    Raises:
        UserError: what decodes it is not installed, or an option is wrong.
    """
    return LiveSource(_feed(uri, live), uri.address, uri.label, live.back_off)


def _feed(uri: Uri, live: LiveOptions) -> Feed:
    by_rtsp = uri.scheme in ("rtsp", "rtsps")
    if live.decoder == "hardware" and not by_rtsp:
        raise UserError(f"{uri.address} cannot be decoded in hardware.", "Only rtsp:// streams can: --decoder auto")
    if live.decoder == "hardware" or (live.decoder == "auto" and by_rtsp and has_element(JETSON_DECODER)):
        hardware = hardware_rtsp_feed(uri)
        if live.decoder == "hardware" or not has_pyav():
            return hardware
        return FirstThatOpens([hardware, NetworkFeed(uri)], f"{uri.address} is decoded in software")
    return NetworkFeed(uri)


class NetworkFeed:
    """A stream, opened by FFmpeg without read-ahead and decoded without frame threads, which would add frames of delay.

    Options of the URI, behind ``#``: ``transport=tcp|udp`` (RTSP; TCP unless told) and ``timeout=SECONDS`` without data
    after which the stream counts as dropped out.

    Raises:
        UserError: PyAV is not installed, or an option is wrong.
    """

    def __init__(self, uri: Uri) -> None:
        if not has_pyav():
            raise UserError(f"{uri.address} needs PyAV.", f"Install it: {install_command('video')}", exit_code=1)
        uri.allow(*OPTIONS)
        self._transport = uri.options.get("transport", "tcp")
        if self._transport not in ("tcp", "udp"):
            raise UserError(f"transport={self._transport} in {uri.address} is neither tcp nor udp.")
        self._timeout = uri.number("timeout", 0.1, 3600) or READ_SECONDS
        self._uri = uri
        self.fps: Fraction | None = None
        self._container: Any = None
        self._frames: Iterator[Frame] = iter(())

    def open(self) -> None:
        av = load_pyav()
        options = {"protocol_whitelist": _PROTOCOLS, "fflags": "nobuffer", "flags": "low_delay"}
        if self._uri.scheme in ("rtsp", "rtsps"):
            options |= {"rtsp_transport": self._transport, "analyzeduration": "500000"}  # microseconds
        else:
            options |= {"probesize": "500000", "analyzeduration": "1000000"}
        try:
            self._container = av.open(
                self._uri.place, options=options, timeout=(OPEN_SECONDS, self._timeout), metadata_errors="replace"
            )
        except (av.error.FFmpegError, OSError) as error:
            raise self._unreachable(error) from error
        streams = self._container.streams.video
        if not streams:
            self.close()
            raise UserError(f"{self._uri.address} has no video in it.", "Check the path.", exit_code=1)
        if re.search(r"_pipe$|^image2", self._container.format.name):  # FFmpeg's names for single pictures
            self.close()
            raise UserError(
                f"{self._uri.address} is one picture, not a stream.",
                "Download it and give the file, or POST it to infer --serve.",
                exit_code=1,
            )
        if self._container.duration and self._uri.scheme in ("http", "https"):
            self.close()
            raise UserError(
                f"{self._uri.address} is a recording, not a live stream.",
                "Download it and give the file: then no frame is skipped.",
                exit_code=1,
            )
        stream = streams[0]
        stream.thread_type = "SLICE"
        stream.codec_context.flags |= av.codec.context.Flags.low_delay
        rate = stream.average_rate
        self.fps = Fraction(rate) if rate and rate < 1000 else None
        self._frames = self._decoded(av, stream)

    def _decoded(self, av: Any, stream: Any) -> Iterator[Frame]:
        display = Display()
        try:
            for packet in self._container.demux(stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:  # damaged on its way; the next key frame mends it
                    continue
                for frame in frames:
                    if frame.width * frame.height > max_pixels():
                        raise UserError(
                            f"{self._uri.address} has frames of {frame.width}x{frame.height} pixels, over the limit.",
                            "Raise ESPMEDSAM_MAX_PIXELS if memory allows.",
                            exit_code=1,
                        )
                    if not frame.is_corrupt:
                        yield display.shown(frame)
        except (av.error.FFmpegError, OSError) as error:
            raise Disconnected(_reason(error)) from error

    def read(self) -> Frame | None:
        frame = next(self._frames, None)
        if frame is None:
            raise Disconnected("the stream ended")
        return frame

    def interrupt(self) -> None:
        """FFmpeg cannot be interrupted from outside; a read that waits comes back after its timeout."""

    def close(self) -> None:
        self._frames = iter(())
        if self._container is not None:
            self._container.close()
            self._container = None

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"cannot open {self._uri.address}: {_reason(error)}.",
            "Check the address, the network, and the name and password if it asks for them.",
            exit_code=1,
        )


def _reason(error: Exception) -> str:
    """FFmpeg's reason in a few words, without the address, which may hold a password."""
    if isinstance(error, TimeoutError) or type(error).__name__ == "ExitError":
        return "no answer in time"
    text = getattr(error, "strerror", None) or type(error).__name__
    return re.sub(r"^Server returned ", "the server returned ", str(text)).rstrip(".")
