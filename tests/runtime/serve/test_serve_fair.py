"""One client's pictures do not keep another waiting, and no picture takes longer than it may."""

from __future__ import annotations

import http.client
import io
import threading
import time
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs uvicorn (extra serve)")

from serving_setup import png

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.imaging import decoder_process
from espmedsam_edge.imaging.decode import decode_image
from espmedsam_edge.imaging.decoder_process import PictureDecoder
from espmedsam_edge.runtime import segmenter
from espmedsam_edge.runtime.serve import segment_api
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.server import Server
from espmedsam_edge.runtime.serve.serving import serve_alone


@pytest.fixture
def server(toy_bundle: Bundle) -> Iterator[Server]:
    with serve_alone(ServeOptions("0"), toy_bundle, threads=1) as made:
        yield made


@cache
def costly() -> bytes:
    """A kilobyte-sized JPEG of 16 million pixels in as many scans as are let through: over a second of decoding."""
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.new("L", (4000, 4000), 90).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    return data[:-2] + data[last:-2] * 55 + b"\xff\xd9"


def post(server: Server, data: bytes, client: str) -> tuple[int, bytes, float]:
    """Status, body and seconds, asked from one of this machine's own addresses."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", server.address.port, timeout=60, source_address=(f"127.0.0.{client}", 0)
    )
    begin = time.monotonic()
    try:
        connection.request("POST", "/v1/segment", data)
        answer = connection.getresponse()
        return answer.status, answer.read(), time.monotonic() - begin
    finally:
        connection.close()


def test_a_picture_that_takes_too_long_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "SECONDS", 0.4)
    status, body, seconds = post(server, costly(), "1")
    assert status == 422
    assert b"more than 0.4 seconds" in body
    assert seconds < 4
    assert post(server, png()[1], "1")[0] == 200
    assert post(server, png(size=(1200, 1200))[1], "1")[0] in (200, 422)  # by a new child


def test_another_client_does_not_wait_for_them(server: Server) -> None:
    small = png()[1]
    assert post(server, small, "3")[0] == 200
    first: list[int] = []
    hostile = [threading.Thread(target=lambda: first.append(post(server, costly(), "2")[0])) for _ in range(9)]
    for thread in hostile:
        thread.start()
    time.sleep(0.3)
    others = [post(server, small, "3") for _ in range(5)]
    assert [status for status, _, _ in others] == [200] * 5
    assert max(seconds for _, _, seconds in others) < 1  # in turn it would be over ten
    assert len(first) < 9  # they are still at it
    server._service.close()
    for thread in hostile:
        thread.join(30)
    assert len(first) == 9


def test_nobody_waits_for_what_another_does_before_and_after_the_network(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of 40 million pixels takes two seconds on a busy machine; a modality's first loading may take minutes."""
    entered, go_on = threading.Event(), threading.Event()
    make_mask = segmenter.mask_from_logits

    def slow(logits: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
        if size == (96, 96):
            entered.set()
            go_on.wait(60)
        return make_mask(logits, size, threshold)

    monkeypatch.setattr(segmenter, "mask_from_logits", slow)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(post(server, png(size=(96, 96))[1], "2")[0]))
    thread.start()
    try:
        assert entered.wait(60)
        status, _, seconds = post(server, png()[1], "3")
        assert status == 200
        assert seconds < 30
        assert codes == []
    finally:
        go_on.set()
        thread.join(60)
    assert codes == [200]


def test_of_each_client_only_so_many_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    decode = segment_api._decode

    def slow(data: bytes, decoder: PictureDecoder) -> np.ndarray:
        entered.set()
        go_on.wait(60)
        return decode(data, decoder)

    monkeypatch.setattr(segment_api, "_decode", slow)
    codes: list[int] = []
    small = png()[1]
    threads = [threading.Thread(target=lambda: codes.append(post(server, small, "2")[0])) for _ in range(9)]
    for thread in threads:
        thread.start()
    assert entered.wait(60)
    deadline = time.monotonic() + 30
    while server._service._seats._present["127.0.0.2"] < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert post(server, small, "2")[0] == 503
    go_on.set()
    assert post(server, small, "3")[0] == 200
    for thread in threads:
        thread.join(60)
    assert codes == [200] * 9


def test_the_childs_frames_are_this_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = PictureDecoder()
    try:
        for seed, size in enumerate([(96, 128), (64, 80), (300, 500)]):
            _, data = png(seed, size)
            np.testing.assert_array_equal(decoder.decode(data), decode_image(data))
        with pytest.raises(decoder_process.UserError, match="it is not a"):
            decoder.decode(b"no picture")
        np.testing.assert_array_equal(decoder.decode(data), decode_image(data))
    finally:
        decoder.close()
    with pytest.raises(decoder_process.UserError, match="stopping"):
        decoder.decode(data)
