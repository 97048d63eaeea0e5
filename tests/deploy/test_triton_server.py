"""The repository served by Triton: requests in parallel, malformed ones, and ``infer --backend triton``."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("tritonclient.http", reason="needs tritonclient (extra triton)")

import tritonclient.http as http_client
from nginx import free_port
from toy_bundles import save_toy_bundle
from triton_server import ENVIRONMENT, Triton, triton_server

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.deploy.triton import write_repository
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.backends import triton_backend
from espmedsam_edge.runtime.backends.backend import BackendAway
from espmedsam_edge.runtime.segmenter import Segmenter

pytestmark = pytest.mark.xdist_group("triton")
ROOT = Path(__file__).parents[2]
CLIENTS, REQUESTS = 16, 1000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With a batch of 4."""
    return save_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy.bundle", batch=4)


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    folder = tmp_path_factory.mktemp("triton")
    write_repository([bundle], folder / "models", engine="python")
    with triton_server(folder / "models", folder) as started:
        yield started


def asked(server: Triton, model: str = "fundus", **inputs: tuple[np.ndarray, str]) -> Any:
    """Ask with a client of its own."""
    client = http_client.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=60)
    try:
        given = []
        for name, (value, kind) in inputs.items():
            given.append(http_client.InferInput(name, list(value.shape), kind))
            given[-1].set_data_from_numpy(value)
        return client.infer(model, given)
    finally:
        client.close()


def encoded(picture: np.ndarray) -> tuple[np.ndarray, str]:
    return np.array([[encode_image(picture, ".png")]], np.object_), "BYTES"


def test_a_thousand_requests_of_sixteen_clients_are_all_right(server: Triton, bundle: Bundle) -> None:
    pictures = [phantom("fundus", seed, (64 + 8 * seed, 120 - 8 * seed))[0] for seed in range(8)]
    with Segmenter.load(bundle, threads=1) as segmenter:
        expected = [segmenter.segment(picture) for picture in pictures]
    bodies = [encoded(picture) for picture in pictures]
    before = server.get("models/fundus/stats")["model_stats"][0]

    def ask_some(client: int) -> int:
        right = 0
        for number in range(client, REQUESTS, CLIENTS):
            which = number % len(pictures)
            if number % 10 == 0:  # strangers among them, whose failure is theirs alone
                with pytest.raises(http_client.InferenceServerException, match="cannot read the image"):
                    asked(server, image=text(b"no picture"))
            answer, wanted = asked(server, image=bodies[which]), expected[which]
            right += (
                np.array_equal(answer.as_numpy("mask")[0], wanted.mask)
                and int(answer.as_numpy("area")[0, 0]) == wanted.area
                and json.loads(answer.as_numpy("json")[0, 0])["bounding_box"] == list(wanted.bounding_box or ())
            )
        return right

    with ThreadPoolExecutor(CLIENTS) as clients:
        assert sum(clients.map(ask_some, range(CLIENTS))) == REQUESTS
    after = server.get("models/fundus/stats")["model_stats"][0]
    done = after["inference_count"] - before["inference_count"]
    runs = after["execution_count"] - before["execution_count"]
    assert REQUESTS <= done <= 1.1 * REQUESTS  # failed ones may count
    assert runs < done / 1.2  # requests were gathered


def test_frames_thresholds_and_pngs(server: Triton, bundle: Bundle) -> None:
    picture, _ = phantom("fundus", 3, (96, 128))
    with Segmenter.load(bundle, threads=1) as segmenter:
        expected = segmenter.segment(picture).at(0.3)
    answer = asked(server, frame_bgr=(picture[None], "UINT8"), threshold=(np.array([[0.3]], np.float32), "FP32"))
    assert np.array_equal(answer.as_numpy("mask")[0], expected.mask)
    png = np.frombuffer(answer.as_numpy("mask_png")[0, 0], np.uint8)
    assert np.array_equal(cv2.imdecode(png, cv2.IMREAD_UNCHANGED), expected.mask)
    boxes = answer.as_numpy("boxes")[0]
    assert [boxes[0].tolist()] == [list(cv2.boundingRect(expected.mask))]


def text(*parts: bytes) -> tuple[np.ndarray, str]:
    return np.array([[part] for part in parts], np.object_), "BYTES"


NAN = np.array([[np.nan]], np.float32), "FP32"
FRAME = np.zeros((1, 32, 32, 3), np.uint8), "UINT8"
BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 60000, 60000, 8, 2, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "inputs",
    [
        {"image": text(b"")},
        {"image": text(b"no picture")},
        {"image": text(BOMB)},
        {"image": text(encode_image(np.zeros((600, 800, 3), np.uint8), ".png")[:300])},
        {"image": text(b"a", b"b")},
        {"image": text(b"a"), "frame_bgr": FRAME},
        {"frame_bgr": (np.zeros((1, 0, 32, 3), np.uint8), "UINT8")},
        {"frame_bgr": FRAME, "threshold": NAN},
        {"threshold": (np.array([[0.5]], np.float32), "FP32")},
        {"frame_bgr": (np.zeros((1, 32, 32, 4), np.uint8), "UINT8")},
        {"image": (np.zeros((1, 1), np.float32), "FP32")},
        {"nothing": text(b"a")},
    ],
)
def test_a_malformed_request_is_refused_and_the_next_is_answered(server: Triton, inputs: Any) -> None:
    with pytest.raises(http_client.InferenceServerException):
        asked(server, **inputs)
    assert server.ready
    assert asked(server, frame_bgr=FRAME).as_numpy("mask").shape == (1, 32, 32)


def test_noise_takes_nothing_down(server: Triton) -> None:
    generator = np.random.default_rng(0)
    path = "/v2/models/fundus/infer"
    bodies = [generator.bytes(size) for size in (0, 1, 50, 5000)]
    bodies += [b"{}", b'{"inputs": 3}', b'{"inputs": [{"name": "image", "shape": [1, -5], "datatype": "BYTES"}]}']
    bodies += [b'{"inputs": [{"name": "image", "shape": [1, 99999999999], "datatype": "BYTES", "data": ["a"]}]}']
    for body in bodies:
        for headers in ({}, {"Inference-Header-Content-Length": "7"}, {"Inference-Header-Content-Length": "-1"}):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            connection.request("POST", path, body, headers)
            assert connection.getresponse().status >= 400
            connection.close()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as broken:
            broken.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\nhalf".encode())
    assert server.process.poll() is None
    assert asked(server, frame_bgr=FRAME).as_numpy("area").tolist() == [[0]]


def test_infer_runs_the_network_there(
    server: Triton, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(6):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), phantom("fundus", seed, (96, 128))[0])

    def infer(out: str, *more: str) -> int:
        arguments = ["infer", str(bundle.path), *map(str, sorted(tmp_path.glob("?.png"))), *more]
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--masks", str(tmp_path / out)])
        return int(ended.value.code or 0)

    assert infer("here", "--backend", "onnxruntime-cpu") == 0
    assert infer("there", "--backend", "triton", "--url", server.url) == 0
    assert f"triton ({server.url}, Triton 2." in capsys.readouterr().out
    for seed in range(6):
        assert (tmp_path / "here" / f"{seed}.png").read_bytes() == (tmp_path / "there" / f"{seed}.png").read_bytes()


def test_what_is_another_graph_or_no_triton_is_one_line(server: Triton, bundle: Bundle, tmp_path: Path) -> None:
    other = save_toy_bundle(tmp_path / "other.bundle", ("fundus",), image_size=128)
    colonoscopy = save_toy_bundle(tmp_path / "colonoscopy.bundle", ("colonoscopy",))
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        nowhere = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        nobody.close()
        for backend, asked_for, reason in (
            (f"triton:{server.url}", other, "is another version of this graph"),
            (f"triton:{server.url}", colonoscopy, "has no model colonoscopy_fp32"),
            (f"triton:{server.url}/below", bundle, "is no Triton server"),
            (f"triton:{nowhere}", bundle, "no answer of Triton at .*refused"),
            ("triton:http://nowhere.invalid", bundle, "no answer of Triton"),
            ("triton", bundle, "which Triton server"),
            ("triton:ftp://x", bundle, "no address of a Triton server"),
            ("triton:http://user:secret@x", bundle, "no address of a Triton server"),
            ("triton:http://a..b", bundle, "no address of a Triton server"),
        ):
            with pytest.raises(UserError, match=reason) as refused:
                Segmenter.load(asked_for, backend=backend)
            assert "secret" not in str(refused.value)
            assert "\n" not in str(refused.value)


def test_something_else_at_the_address_is_one_line(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="something else answers"):
            Segmenter.load(bundle, backend=f"triton:http://127.0.0.1:{other.getsockname()[1]}")


def _logits(**of: Any) -> dict[str, Any]:
    return {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1], "data": [0.0]} | of]}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"outputs": 3},
        {"outputs": [3]},
        {"outputs": [{"name": "logits"}]},
        _logits(shape=[2]),
        _logits(shape=["a"]),
        _logits(shape=[-1, 10**30]),
        _logits(datatype="FP99"),
        _logits(datatype=None),
        _logits(datatype="BYTES", data=["much"]),
        _logits(data=None),
        _logits(data={"a": 1}),
        _logits(data="[" * 5000 + "]" * 5000),
        _logits(parameters={"binary_data_size": 10**12}),
        _logits(parameters={"binary_data_size": "x"}),
        _logits(shape=[4, 1, 16, 16], data=[float("nan")] * 1024),
        _logits(shape=[4, 1, 16, 16], data=[float("-inf")] * 1024),
    ],
)
def test_what_is_no_logits_is_one_line(answer: Any, bundle: Bundle) -> None:
    (graph,) = bundle.manifest.graphs
    config = {"parameters": {"graph_sha256": {"string_value": graph.sha256}}}
    with (
        answering({"/config": config, "/infer": answer}) as url,
        Segmenter.load(bundle, backend=f"triton:{url}") as one,
    ):
        with pytest.raises(UserError) as refused:
            one.segment(np.zeros((32, 32, 3), np.uint8))
        assert refused.value.exit_code == 1


@pytest.mark.parametrize("answer", [[], 3, "x", {"parameters": 3}, {"parameters": {"graph_sha256": "x"}}], ids=repr)
def test_what_is_no_configuration_is_one_line(answer: Any, bundle: Bundle) -> None:
    with answering({"/config": answer}) as url, pytest.raises(UserError, match="answers as no Triton server does"):
        Segmenter.load(bundle, backend=f"triton:{url}")


def _on_and_on(begin: bytes, block: bytes, pause: float = 0) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that ends when nobody listens any more, or after 300 MB."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + begin)
            for _ in range(300_000_000 // len(block) if not pause else 200):
                handler.wfile.write(block)
                time.sleep(pause)

    return answer


def _packed(handler: BaseHTTPRequestHandler) -> None:
    body = gzip.compress(bytes(300_000_000), 1)
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.mark.parametrize("path", ["/config", "/infer"])
@pytest.mark.parametrize(
    "answer",
    [
        _on_and_on(b"Content-Length: 300000000\r\n\r\n", bytes(1 << 16)),
        _on_and_on(b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(1 << 16) + b"\r\n"),
        _on_and_on(b"X: ", b"x" * (1 << 16)),
        _on_and_on(b"", b"X: y\r\n" * 10_000),
        _on_and_on(b"Content-Length: 300000000\r\n\r\n", b" ", 0.1),
        _packed,
    ],
    ids=["length", "chunks", "header", "headers", "slow", "packed"],
)
def test_answers_without_end_are_cut(answer: Any, path: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_ABOUT_SECONDS", 2.0)
    monkeypatch.setattr(triton_backend, "_RUN_SECONDS", 2.0)
    (graph,) = bundle.manifest.graphs
    config = {"parameters": {"graph_sha256": {"string_value": graph.sha256}}}
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with (
        answering({"/config": config} | {path: answer}) as url,
        pytest.raises(UserError) as refused,
        Segmenter.load(bundle, backend=f"triton:{url}") as one,
    ):
        one.segment(np.zeros((32, 32, 3), np.uint8))
    assert "\n" not in str(refused.value)
    assert time.monotonic() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@contextmanager
def answering(answers: dict[str, Any]) -> Iterator[str]:
    """Something that says it is Triton, by the ends of the paths it is asked; other paths get {}.

    Args:
        answers: of each, what is sent as JSON, or what answers a handler.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = next((value for end, value in answers.items() if self.path.endswith(end)), {})
            if callable(found):
                found(self)
                return
            body = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """Says nothing of who went in the middle."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_goes_away_is_one_line(server: Triton, bundle: Bundle) -> None:
    frame = np.zeros((32, 32, 3), np.uint8)
    with passing_on(server.port) as (port, stop), Segmenter.load(bundle, backend=f"triton:127.0.0.1:{port}") as there:
        there.segment(frame)
        stop()
        with pytest.raises(UserError, match="no answer of Triton"):
            there.segment(frame)


def test_a_server_that_is_back_is_asked_again(server: Triton, bundle: Bundle) -> None:
    frame, _ = phantom("fundus", 4, (96, 128))
    with passing_on(server.port) as (port, stop), Segmenter.load(bundle, backend=f"triton:127.0.0.1:{port}") as there:
        mask = there.segment(frame).mask
        stop()
        for _ in range(2):
            with pytest.raises(BackendAway):
                there.segment(frame)
        with passing_on(server.port, port):
            assert np.array_equal(there.segment(frame).mask, mask)


@contextmanager
def passing_on(port: int, here: int = 0) -> Iterator[tuple[int, Callable[[], None]]]:
    """A port behind which another is, and what ends that with all its connections."""
    opened: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listening.accept()
                there = socket.create_connection(("127.0.0.1", port))
                opened.extend((here, there))
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    def stop() -> None:
        for one in opened:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    listening = socket.create_server(("127.0.0.1", here))
    opened.append(listening)
    threading.Thread(target=accept, args=(listening,), daemon=True).start()
    try:
        yield listening.getsockname()[1], stop
    finally:
        stop()


def test_the_images_health_check_asks_it(server: Triton) -> None:
    (text,) = re.findall(r"CMD (\[.*healthz?/.*\])$", (ROOT / "docker" / "triton.Dockerfile").read_text(), re.MULTILINE)
    for port, code in ((server.port, 0), (free_port(), 1)):
        command = [word.replace(":8000", f":{port}") for word in json.loads(text)]
        assert subprocess.run(command, capture_output=True, timeout=30).returncode == code


def test_it_answers_by_grpc_as_well(server: Triton, bundle: Bundle, tmp_path: Path) -> None:
    """With the page's block, by the client in Triton's own environment: its protobuf is older than ours."""
    picture, _ = phantom("fundus", 2, (96, 128))
    (tmp_path / "retina.png").write_bytes(encode_image(picture, ".png"))
    with Segmenter.load(bundle, threads=1) as segmenter:
        expected = segmenter.segment(picture)
    code = block("python").replace("tritonclient.http", "tritonclient.grpc")
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{server.grpc_port}")
    command = [str(ENVIRONMENT / "bin" / "python"), "-c", code]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert said.stdout == f"(96, 128) {expected.area} [{list(expected.bounding_box or ())}]\n", said.stderr


def block(kind: str) -> str:
    """The one block of a language in docs/triton.md."""
    (found,) = re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / "triton.md").read_text(), re.DOTALL)
    return str(found)


def test_the_blocks_of_the_page_run(server: Triton, bundle: Bundle, tmp_path: Path) -> None:
    picture, _ = phantom("fundus", 1, (96, 128))
    (tmp_path / "retina.png").write_bytes(encode_image(picture, ".png"))
    with Segmenter.load(bundle, threads=1) as segmenter:
        expected = segmenter.segment(picture)
    for command in ([sys.executable, "-c", block("python")], ["bash", "-c", block("bash")]):
        command[-1] = command[-1].replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert said.returncode == 0, said.stderr
        if command[0] == "bash":
            (boxes, numbers) = json.loads(said.stdout)["outputs"]
            assert json.loads(numbers["data"][0])["area"] == expected.area
            assert boxes["data"] == list(expected.bounding_box or ())
        else:
            assert said.stdout == f"(96, 128) {expected.area} [{list(expected.bounding_box or ())}]\n"
