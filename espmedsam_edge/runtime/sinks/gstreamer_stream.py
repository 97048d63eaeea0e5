"""A stream on the network by GStreamer, which reaches a Jetson's hardware encoder; PyGObject is optional."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.video.gstreamer import error_class, has_element, load_gstreamer, without_addresses
from espmedsam_edge.runtime.video.writing import fitted

_BITS = 4_000_000  # a second: the hardware encoder has no constant quality
_END_SECONDS = 3


_SENDERS = {"udp": ("mpegtsmux", "udpsink"), "rtp": ("mpegtsmux", "rtpmp2tpay", "udpsink"), "rtsp": ("rtspclientsink",)}


def available(scheme: str) -> bool:
    """Whether GStreamer is here with the elements that a stream of this kind (udp, rtp, rtsp) needs."""
    needed = ("appsrc", "videoconvert", "h264parse", *_SENDERS[scheme])
    return all(has_element(name) for name in needed) and encoder() is not None


def has_hardware_encoder() -> bool:
    """Whether a Jetson's encoder is here."""
    return has_element("nvv4l2h264enc") and has_element("nvvidconv")


def encoder() -> str | None:
    """The best encoder here: ``nvv4l2h264enc``, else ``x264enc``; None if there is neither."""
    if has_hardware_encoder():
        return "nvv4l2h264enc"
    return "x264enc" if has_element("x264enc") else None


def describe_pipeline(scheme: str, host: str, port: int, url: str, fps: Fraction, encoder: str) -> str:
    """The pipeline from frames to the network, as ``gst-launch`` writes it.

    Args:
        scheme: udp, rtp or rtsp.
        host, port: of the receiver, for udp and rtp.
        url: of the RTSP server's stream, for rtsp.
        fps: for the distance of keyframes: one a second.
        encoder: nvv4l2h264enc or x264enc.
    """
    keyframes = max(1, round(fps))
    encode = {
        "nvv4l2h264enc": "videoconvert ! video/x-raw,format=BGRx ! nvvidconv ! video/x-raw(memory:NVMM),format=NV12 "
        f"! nvv4l2h264enc bitrate={_BITS} idrinterval={keyframes} iframeinterval={keyframes} insert-sps-pps=true "
        "maxperf-enable=true",
        "x264enc": "videoconvert ! video/x-raw,format=I420 "
        f"! x264enc tune=zerolatency speed-preset=veryfast bitrate={_BITS // 1000} key-int-max={keyframes}",
    }[encoder]
    send = {
        "udp": f"mpegtsmux alignment=7 ! udpsink host={host} port={port} sync=false",
        "rtp": f"mpegtsmux alignment=7 ! rtpmp2tpay ! udpsink host={host} port={port} sync=false",
        "rtsp": f'rtspclientsink protocols=tcp location="{url}"',
    }[scheme]
    # leaky-type: a network that takes nothing loses the oldest frames instead of holding up the run.
    source = "appsrc name=frames format=time is-live=true max-buffers=8 leaky-type=downstream"
    return f"{source} ! {encode} ! h264parse config-interval=-1 ! {send}"


class GStreamerStream:
    """Sends by GStreamer; arguments as ``describe_pipeline``, and the frames' ``size`` = (H, W), even.

    Raises:
        UserError: GStreamer cannot set the pipeline up.
    """

    def __init__(self, scheme: str, host: str, port: int, url: str, size: tuple[int, int], fps: Fraction) -> None:
        self._gst, self._size = load_gstreamer(), size
        description = describe_pipeline(scheme, host, port, url, fps, encoder() or "x264enc")
        self._start: float | None = None
        gst = self._gst
        try:
            self._pipeline = gst.parse_launch(description)
        except error_class() as error:
            raise _failed(str(error)) from error
        self._frames = self._pipeline.get_by_name("frames")
        caps = f"video/x-raw,format=BGR,width={size[1]},height={size[0]},framerate={fps.numerator}/{fps.denominator}"
        self._frames.set_property("caps", gst.Caps.from_string(caps))
        self._pipeline.set_state(gst.State.PLAYING)

    def write(self, frame: Frame, time: float) -> None:
        self._start = time if self._start is None else self._start
        picture = fitted(frame, self._size)
        pitch = -(-picture.shape[1] * 3 // 4) * 4  # GStreamer's rows begin at multiples of four bytes
        rows = np.zeros((picture.shape[0], pitch), np.uint8)
        rows[:, : picture.shape[1] * 3] = picture.reshape(picture.shape[0], -1)
        buffer = self._gst.Buffer.new_wrapped(rows.tobytes())
        buffer.pts = buffer.dts = round((time - self._start) * self._gst.SECOND)
        self._frames.push_buffer(buffer)
        message = self._pipeline.get_bus().pop_filtered(self._gst.MessageType.ERROR)
        if message is not None:
            raise _failed(str(message.parse_error()[0].message))

    def close(self) -> None:
        """See ``StreamWriter.close``; waits a few seconds for what is under way."""
        gst = self._gst
        self._frames.end_of_stream()
        kinds = gst.MessageType.EOS | gst.MessageType.ERROR
        self._pipeline.get_bus().timed_pop_filtered(_END_SECONDS * gst.SECOND, kinds)
        self._pipeline.set_state(gst.State.NULL)


def _failed(reason: str) -> UserError:
    return UserError(
        f"GStreamer cannot stream: {without_addresses(reason)}.",
        "Check the receiver, and GStreamer's plugins with: espmedsam-edge doctor",
        exit_code=1,
    )
