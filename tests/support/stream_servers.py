"""Small servers on loopback for streams that drop out on demand: Motion JPEG over HTTP, and GStreamer's RTSP server.

Run as a program it is the RTSP server, which needs a process of its own: python stream_servers.py WIDTH HEIGHT FPS
CODEC prints its port, and disconnects every client when it gets a line on standard input.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import cv2
import numpy as np

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER 0: closing sends RST, as a cut cable's router does


class MjpegServer:
    """Sends pictures as multipart JPEG over HTTP to each client, as network cameras do.

    Args:
        picture: called for each frame of each client with the frame's number.
        fps: how fast.
        header: False: hang up before the answer, as a camera does that is starting.
    """

    def __init__(self, picture: Callable[[int], np.ndarray], fps: float = 50) -> None:
        self._picture, self._fps = picture, fps
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/video"
        self.requests: list[bytes] = []
        self.connected = threading.Semaphore(0)  # once for each client that got frames
        self.stalled = threading.Event()  # while set, nothing is sent but connections stay
        self.refusing = threading.Event()  # while set, clients are hung up on
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> MjpegServer:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.drop()
        for thread in self._threads:
            thread.join(5)

    def drop(self) -> int:
        """Cut every connection; how many there were."""
        with self._lock:
            clients, self._clients = self._clients, set()
        for client in clients:
            with contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                client.shutdown(socket.SHUT_RDWR)
            client.close()
        return len(clients)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            if self.refusing.is_set():
                client.close()
                continue
            with self._lock:
                self._clients.add(client)
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.requests.append(client.recv(4096))
            client.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n")
            number = 0
            while not self._closing.wait(1 / self._fps):
                if self.stalled.is_set():
                    continue
                _, jpeg = cv2.imencode(".jpg", self._picture(number), [cv2.IMWRITE_JPEG_QUALITY, 95])
                header = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
                client.sendall(header + jpeg.tobytes() + b"\r\n")
                number += 1
                if number == 3:
                    self.connected.release()


class RtspServer:
    """GStreamer's RTSP server in a process of its own; H.264 (or ``codec="h265"``) of a test picture."""

    def __init__(self, size: tuple[int, int] = (120, 160), fps: int = 30, codec: str = "h264") -> None:
        command = [sys.executable, __file__, str(size[1]), str(size[0]), str(fps), codec]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"rtsp://127.0.0.1:{int(self._process.stdout.readline())}/test"

    def __enter__(self) -> RtspServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Send nothing and answer nothing for a while, connections stay."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def drop(self) -> int:
        """Cut every connection; how many there were."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("drop\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def rtsp_server_missing(codec: str = "h264") -> str | None:
    """Why the RTSP server cannot run here; None where it can."""
    done = subprocess.run([sys.executable, __file__, "check", codec], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def _rtsp_main(width: int, height: int, fps: int, codec: str) -> None:
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer

    Gst.init(None)
    encoder = codec.replace("h", "x") + "enc"
    for element in (encoder, f"rtp{codec}pay", "videotestsrc"):
        if Gst.ElementFactory.find(element) is None:
            sys.exit(f"no GStreamer element {element}")
    if not width:
        return
    server = GstRtspServer.RTSPServer.new()
    server.set_address("127.0.0.1")
    server.set_service("0")
    factory = GstRtspServer.RTSPMediaFactory.new()
    factory.set_launch(
        f"( videotestsrc is-live=true pattern=ball ! video/x-raw,width={width},height={height},framerate={fps}/1 ! "
        f"{encoder} tune=zerolatency speed-preset=ultrafast key-int-max=15 ! rtp{codec}pay name=pay0 pt=96 )"
    )
    server.get_mount_points().add_factory("/test", factory)
    server.attach(None)
    print(server.get_bound_port(), flush=True)

    def lines() -> Iterator[str]:
        yield from sys.stdin

    def drop() -> bool:
        dropped = server.client_filter(lambda server, client: GstRtspServer.RTSPFilterResult.REF)
        server.client_filter(lambda server, client: GstRtspServer.RTSPFilterResult.REMOVE)
        print(len(dropped), flush=True)
        return False

    def listen() -> None:
        for _ in lines():
            GLib.idle_add(drop)
        loop.quit()

    loop = GLib.MainLoop()
    threading.Thread(target=listen, daemon=True).start()
    loop.run()


if __name__ == "__main__":
    sizes = (0, 0, 0) if sys.argv[1] == "check" else map(int, sys.argv[1:4])
    _rtsp_main(*sizes, sys.argv[-1])  # type: ignore[misc, arg-type]
