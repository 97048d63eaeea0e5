"""The view as a sink, its statistics, and the WebSocket: frames in order, at the viewer's speed, and its wishes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from serving_setup import Stage, close_code, next_frame, next_text, staged
from starlette.websockets import WebSocketDisconnect

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.runtime.run.finding import ObjectFinder
from espmedsam_edge.runtime.segmentation import Segmentation, Timings
from espmedsam_edge.runtime.serve import live_view, viewer
from espmedsam_edge.runtime.serve.adaptation import LEVELS, Adaptation
from espmedsam_edge.runtime.serve.panel import Change
from espmedsam_edge.runtime.serve.statistics import Statistics
from espmedsam_edge.runtime.sources.source import SourceFrame


@pytest.fixture
def stage(toy_bundle_of_two: Bundle) -> Iterator[Stage]:
    with staged(toy_bundle_of_two) as made:
        yield made


def decoded(jpeg: bytes) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR))


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


def some_result(area: int = 4, seconds: float = 0.010) -> Segmentation:
    mask = np.zeros((10, 20), np.uint8)
    mask.reshape(-1)[:area] = 255
    return Segmentation(mask, "fundus", np.zeros((16, 16), np.float32), 0.5, Timings(seconds, 0, 0))


def test_statistics_are_of_what_came() -> None:
    now = [100.0]
    statistics = Statistics(lambda: now[0])
    assert statistics.summary().latency is None
    for index in range(61):
        now[0] = 100 + index / 30
        frame = SourceFrame(np.zeros((10, 20, 3), np.uint8), Path("a"), index, skipped=index // 2, spacing=(0.5, 0.25))
        statistics.add(frame, some_result(area=index, seconds=index / 1000))
    summary = statistics.summary()
    assert summary.frames == 61
    assert summary.skipped == 30
    assert summary.fps == pytest.approx(30)
    assert summary.latency == pytest.approx((0.030, 0.054, 0.0594))
    assert (summary.area, summary.fraction, summary.square_millimetres) == (60, 0.3, 7.5)
    (latency,) = statistics.latency.collect()
    values = {(sample.name.rpartition("_")[2], sample.labels.get("le")): sample.value for sample in latency.samples}
    assert values["count", None] == values["bucket", "+Inf"] == 61
    assert values["bucket", "0.01"] == 11  # 0, 1, ... 10 ms
    curve = statistics.curve(after=0, most=20)
    assert len(curve) <= 20
    assert curve[-1].number == 61
    assert [point.number for point in statistics.curve(after=59, most=20)] == [60, 61]
    now[0] += 10
    assert statistics.summary().fps == 0


def test_skipped_frames_of_several_sources_add_up() -> None:
    statistics = Statistics()
    for name, skipped in (("a", 1), ("b", 5), ("a", 3)):
        frame = SourceFrame(np.zeros((10, 20, 3), np.uint8), Path(name), 0, captured=time.monotonic(), skipped=skipped)
        statistics.add(frame, some_result())
    assert statistics.summary().latency_of == "capture"
    for number in range(20):  # files, which skip nothing
        statistics.add(SourceFrame(np.zeros((10, 20, 3), np.uint8), Path(f"{number}.png")), some_result())
    assert statistics.summary().skipped == 8
    assert len(statistics._skipped) == 2


def test_a_picture_is_the_overlay(stage: Stage) -> None:
    assert stage.view.picture(640, 90) is None
    frame = stage.show()
    expected = stage.panel.first.segment(frame.image).overlay(frame.image, OverlayStyle(color_of("fundus")))  # type: ignore[union-attr]
    picture = stage.view.picture(640, 95)
    assert picture is not None
    assert (picture.width, picture.height) == (128, 96)  # never larger than the frame
    assert mean_difference(decoded(picture.jpeg), expected) < 8  # what JPEG loses of fine, coloured noise
    small = stage.view.picture(64, 95)
    assert small is not None
    assert decoded(small.jpeg).shape == (48, 64, 3)
    assert (small.area, small.fraction) == (picture.area, picture.fraction)
    assert stage.view.picture(64, 95) is small  # drawn once for viewers alike
    stage.panel.apply(Change(opacity=0.0))
    bare = stage.view.picture(640, 95)
    assert bare is not None
    assert bare.number > picture.number
    assert mean_difference(decoded(bare.jpeg), decoded(picture.jpeg)) > 1


def test_controls_show_their_effect_on_a_held_frame(stage: Stage) -> None:
    frame = stage.show()
    stage.panel.apply(Change(paused=True))
    for modality, threshold in (("fundus", 0.2), ("colonoscopy", 0.2), ("colonoscopy", 0.7), ("fundus", 0.7)):
        stage.panel.apply(Change(modality=modality, threshold=threshold))
        expected = stage.pool.get(modality).segment_batch([frame.image], threshold)[0]
        picture = stage.view.picture(640, 90)
        assert picture is not None
        assert (picture.modality, picture.area) == (modality, expected.area)
    assert stage.view.statistics.summary().frames == 1


def test_a_held_frame_is_cleaned_up_at_every_setting(stage: Stage) -> None:
    """As the run's own results are: by ``--largest`` and ``--min-area``, whichever modality is looked at."""
    finder = ObjectFinder(ObjectOptions(min_area=12, largest=2))
    frame = SourceFrame(np.random.default_rng(4).integers(0, 256, (96, 128, 3), np.uint8), Path("a.png"))
    stage.view.write(frame, finder.of_frame(frame, stage.pool.get("fundus").segment(frame.image)))
    stage.panel.apply(Change(paused=True))
    cleaned = 0
    for modality, threshold in (("fundus", 0.4), ("fundus", 0.6), ("colonoscopy", 0.6), ("colonoscopy", 0.4)):
        stage.panel.apply(Change(modality=modality, threshold=threshold))
        plain = stage.pool.get(modality).segment_batch([frame.image], threshold)[0]
        areas = np.sort(np.bincount(cv2.connectedComponents(plain.mask, connectivity=8)[1].ravel())[1:])[::-1]
        picture = stage.view.picture(640, 90)
        assert picture is not None
        assert (picture.modality, picture.area) == (modality, areas[:2][areas[:2] >= 12].sum())
        cleaned += picture.area < plain.area
    assert cleaned > 1


def test_a_pause_holds_the_picture_of_a_run_that_writes(toy_bundle: Bundle) -> None:
    with staged(toy_bundle, holds=True) as stage:
        stage.panel.apply(Change(paused=True))
        for index in range(3):
            stage.show(index)
        held = stage.view.picture(640, 90)
        assert held is not None
        assert held.frame == 0  # paused before there was anything to hold
        assert stage.view.statistics.summary().frames == 3
        stage.panel.apply(Change(paused=False))
        stage.show(3)
        picture = stage.view.picture(640, 90)
        assert picture is not None
        assert picture.frame == 3


def test_health_tells_of_a_live_run_without_frames(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def health(stage: Stage) -> tuple[int, str]:
        answer = stage.client.get("/healthz")
        return answer.status_code, answer.json()["status"]

    monkeypatch.setattr(live_view, "STALLED_SECONDS", 3600.0)
    for live, service in ((True, False), (False, False), (False, True)):
        with staged(toy_bundle, live=live, service=service) as stage:
            if not service:
                stage.show(0)
            assert health(stage) == (200, "ok")
            with monkeypatch.context() as patched:
                patched.setattr(live_view, "STALLED_SECONDS", -1.0)  # as if that long had passed
                assert health(stage) == ((503, "stalled") if live else (200, "ok"))
                if live:
                    assert stage.client.get("/healthz").json()["seconds_without_frame"] >= 0
                    stage.panel.apply(Change(paused=True))
                    assert health(stage) == (200, "ok")  # nothing is to come
                    stage.panel.apply(Change(paused=False))
                    stage.view.end()  # as of a source that was given up
                    assert health(stage) == (503, "stalled")


def test_of_several_live_sources_one_is_shown(stage: Stage) -> None:
    now = time.monotonic()
    for index, address in enumerate(("rtsp://a", "rtsp://b", "rtsp://a")):
        stage.show(index, address=address, captured=now)
    assert (stage.view.sources, stage.view.source) == (2, 0)
    picture = stage.view.picture(640, 90)
    assert picture is not None
    assert picture.frame == 2
    stage.panel.apply(Change(source=1))
    picture = stage.view.picture(640, 90)
    assert picture is not None
    assert picture.frame == 1
    assert stage.panel.state()["frames"] == 1
    with pytest.raises(UserError, match="no source 3"):
        stage.panel.apply(Change(source=2))


def test_a_segmenter_is_loaded_once_and_kept(stage: Stage) -> None:
    assert stage.pool.loaded("colonoscopy") is None
    stage.panel.apply(Change(modality="colonoscopy"))
    loaded = stage.panel.segmenter
    for modality in ("fundus", "colonoscopy") * 3:
        stage.panel.apply(Change(modality=modality))
    assert stage.panel.segmenter is loaded
    with pytest.raises(UserError, match="no modality 'brain'"):
        stage.panel.apply(Change(modality="brain"))
    assert stage.panel.segmenter is loaded


def test_levels_follow_the_viewer() -> None:
    adaptation = Adaptation()
    adaptation.viewport = 1000
    assert (adaptation.width, adaptation.quality) == (992, LEVELS[0].quality)
    for _ in range(100):
        adaptation.acknowledged(0.5)
    assert adaptation.level == len(LEVELS) - 1
    assert adaptation.width < 320
    for _ in range(60):
        adaptation.acknowledged(0.08)
    assert adaptation.level == len(LEVELS) - 1  # neither slow nor quick
    for _ in range(len(LEVELS) * 45):
        adaptation.acknowledged(0.01)
    assert adaptation.level == 0


def test_a_level_that_was_too_much_is_not_tried_at_once_again() -> None:
    adaptation = Adaptation()
    steps = []
    for _ in range(2000):
        before = adaptation.level
        adaptation.acknowledged(0.3 if before == 0 else 0.02)
        if adaptation.level < before:
            steps.append(_)
    gaps = np.diff(steps)
    assert len(steps) <= 5
    assert (gaps[1:] > gaps[:-1]).all()


def test_frames_come_in_order_and_only_after_an_acknowledgement(stage: Stage) -> None:
    with stage.connect() as socket:
        hello = socket.receive_json()
        assert [entry["name"] for entry in hello["modalities"]] == ["fundus", "colonoscopy"]
        assert (hello["token"], hello["service"], hello["untrained"]) == (False, False, False)
        stage.show(0)
        header, jpeg = next_frame(socket)
        assert header["frame"] == 0
        assert decoded(jpeg).shape == (header["height"], header["width"], 3)
        for index in range(1, 20):
            stage.show(index)
        socket.send_json({"type": "ack", "frame": header["number"] + 1000})  # not the one that is on its way
        state = next_text(socket, "state", lambda body: body["frames"] == 20)
        assert state["status"] == "running"
        assert state["latency"].keys() == {"p50", "p90", "p99"}
        assert "secret-name" not in str(state)
        socket.send_json({"type": "ack", "frame": header["number"], "width": 800})
        newest, _ = next_frame(socket)
        assert newest["frame"] == 19  # those between were never sent
        assert newest["number"] > header["number"]


def test_curve_has_every_point_once(stage: Stage) -> None:
    stage.show(0)
    with stage.connect() as socket:
        first = next_text(socket, "curve")
        assert first["restart"] is True
        for index in range(1, 4):
            stage.show(index)
        later = next_text(socket, "curve")
        assert later["restart"] is False
        while len(first["points"]) + len(later["points"]) < 4:
            later["points"] += next_text(socket, "curve")["points"]
        times = [at for at, _ in first["points"] + later["points"]]
        assert len(times) == 4
        assert times == sorted(times)


def test_wishes_are_done_and_shown_to_all(stage: Stage) -> None:
    stage.show(0)
    with stage.connect() as one, stage.connect() as other:
        one.send_json({"type": "set", "modality": "colonoscopy", "threshold": 0.25, "opacity": 1, "paused": True})
        state = next_text(other, "state", lambda body: body["modality"] == "colonoscopy")
        assert (state["threshold"], state["opacity"], state["paused"], state["status"]) == (0.25, 1, True, "paused")
        settings = stage.panel.controls.current()
        assert settings.segmenter is stage.pool.loaded("colonoscopy")
        one.send_json({"type": "set", "modality": "brain"})
        assert "no modality 'brain'" in next_text(one, "error")["message"]
        assert stage.panel.controls.current() == settings


@pytest.mark.parametrize(
    "message",
    [
        "",
        "x",
        "[]",
        "null",
        "{}",
        '{"type": "eval"}',
        '{"type": "ack"}',
        '{"type": "ack", "frame": -1}',
        '{"type": "ack", "frame": 1e400}',
        '{"type": "set", "threshold": NaN}',
        '{"type": "set", "threshold": 1.0}',
        '{"type": "set", "opacity": "0.5"}',
        '{"type": "set", "paused": 1}',
        '{"type": "set", "modality": ["fundus"]}',
        '{"type": "set", "segmenter": "x"}',
        '{"type": "ack", "frame": 1, "width": 0}',
        "[" * 4000,
        '{"type": "set", "modality": "' + "x" * 5000 + '"}',
    ],
)
def test_what_is_not_of_the_protocol_ends_the_connection(stage: Stage, message: str) -> None:
    before = stage.panel.controls.current()
    with stage.connect() as socket:
        socket.send_text(message)
        assert close_code(socket) == 1008
    assert stage.panel.controls.current() == before


def test_bytes_end_the_connection(stage: Stage) -> None:
    with stage.connect() as socket:
        socket.send_bytes(b'{"type": "set", "paused": true}')
        assert close_code(socket) == 1008


def test_too_many_messages_end_the_connection(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "_MESSAGES_A_SECOND", 0.0)
    monkeypatch.setattr(viewer, "_MESSAGES_AT_ONCE", 5.0)
    with stage.connect() as socket:
        for _ in range(6):
            socket.send_json({"type": "ack", "frame": 0})
        assert close_code(socket) == 1008


def test_one_viewer_too_many_is_told(stage: Stage) -> None:
    def connect(depth: int) -> Any:
        with stage.connect() as socket:
            assert socket.receive_json()["type"] == "hello"
            if depth:
                return connect(depth - 1)
            with stage.connect() as last, pytest.raises(WebSocketDisconnect) as closed:
                last.receive_json()
            return closed.value.code

    assert connect(viewer.MAX_VIEWERS - 1) == viewer.TOO_MANY_VIEWERS
    text = stage.client.get("/metrics").text
    assert "espmedsam_viewers_refused_total 1.0\n" in text


def test_a_viewer_that_goes_leaves_nothing(stage: Stage) -> None:
    stage.show(0)
    for _ in range(5):
        with stage.connect() as socket:
            socket.receive_json()
    while "espmedsam_viewers 0.0\n" not in stage.client.get("/metrics").text:
        time.sleep(0.01)
    assert stage.view._listeners == []


def test_the_run_never_waits_for_a_viewer(stage: Stage) -> None:
    """A viewer that takes nothing: frames still go in, and the thread that writes them comes back."""
    with stage.connect() as socket:
        socket.receive_json()
        writer = threading.Thread(target=lambda: [stage.show(index) for index in range(50)])
        writer.start()
        writer.join(60)
        assert not writer.is_alive()
    assert stage.view.statistics.summary().frames == 50


def test_without_a_run_there_is_nothing_to_change(toy_bundle: Bundle) -> None:
    with staged(toy_bundle, service=True) as stage, stage.connect() as socket:
        assert socket.receive_json()["service"] is True
        assert next_text(socket, "state")["status"] == "service"
        socket.send_json({"type": "set", "paused": True})
        assert "nothing runs" in next_text(socket, "error")["message"]
