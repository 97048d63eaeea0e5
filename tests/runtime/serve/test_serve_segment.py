"""``POST /v1/segment`` against the segmenter itself, its refusals, and the metrics."""

from __future__ import annotations

import json
import re
import struct
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from serving_setup import Stage, png, staged
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.imaging.recognition import recognise
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.inference import open_service
from espmedsam_edge.runtime.request import ModelOptions
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.serve import segment_api
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.segment_api import preferred_kind


@pytest.fixture
def stage(toy_bundle_of_two: Bundle) -> Iterator[Stage]:
    with staged(toy_bundle_of_two) as made:
        yield made


@pytest.mark.parametrize("modality", [None, "fundus", "colonoscopy"])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_masks_and_measurements_are_the_segmenters(
    stage: Stage, toy_bundle_of_two: Bundle, modality: str | None, threshold: float | None
) -> None:
    image, file = png(3)
    with Segmenter.load(toy_bundle_of_two, modality or "fundus", threads=1) as segmenter:
        expected = segmenter.segment_batch([image], threshold)[0]
    query = {name: value for name, value in (("modality", modality), ("threshold", threshold)) if value is not None}
    answer = stage.client.post("/v1/segment", params=query, content=file, headers={"Accept": "image/png"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    mask = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(mask, expected.mask)
    assert 0 < expected.area < expected.mask.size
    assert answer.headers["x-modality"] == expected.modality
    found = stage.client.post("/v1/segment", params=query, content=file, headers={"Accept": "application/json"}).json()
    assert found.pop("milliseconds").keys() == {"preprocess", "inference", "postprocess"}
    wanted = expected.to_dict()
    del wanted["milliseconds"]
    assert {key: found[key] for key in wanted} == json.loads(json.dumps(wanted))
    assert found["contours"] == [contour.tolist() for contour in expected.contours()]


@pytest.mark.parametrize("crop", ["20,10,60,50", "auto"])
def test_a_crop_gives_the_whole_images_results(stage: Stage, toy_bundle_of_two: Bundle, crop: str) -> None:
    picture = np.zeros((90, 130, 3), np.uint8)
    picture[10:60, 20:80] = np.maximum(png()[0][:50, :60], 40)
    file = encode_image(picture, ".png")
    with Segmenter.load(toy_bundle_of_two, "fundus") as segmenter:
        part = segmenter.segment(picture[10:60, 20:80])
    answer = stage.client.post(f"/v1/segment?crop={crop}", content=file, headers={"Accept": "image/png"})
    assert answer.status_code == 200
    mask = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_UNCHANGED)
    expected = np.zeros((90, 130), np.uint8)
    expected[10:60, 20:80] = part.mask
    np.testing.assert_array_equal(mask, expected)
    found = stage.client.post(f"/v1/segment?crop={crop}", content=file).json()
    assert (found["width"], found["height"], found["area"]) == (130, 90, part.area)


def test_the_service_averages_over_views_where_it_is_asked_to(tmp_path: Path) -> None:
    patch = np.arange(16, dtype=np.float32).reshape(4, 4) / 99
    bundle = save_toy_bundle(tmp_path / "t.bundle", ("tiles",), patch=patch)
    image, file = png(3)
    areas = []
    for tta in (False, True):
        with Segmenter.load(bundle, threads=1, tta=tta) as segmenter:
            areas.append(segmenter.segment(image).area)
        options = ModelOptions(bundle, threads=1, tta=tta)
        with (
            open_service(options, ServeOptions("0")) as server,
            urllib.request.urlopen(f"{server.url.rstrip('/')}/v1/segment", file) as answer,
        ):
            assert json.load(answer)["area"] == areas[-1]
    assert areas[0] != areas[1]


def test_a_viewers_choice_does_not_change_the_service(stage: Stage) -> None:
    _, file = png()
    before = stage.client.post("/v1/segment", content=file).json()
    stage.panel.controls.change(segmenter=stage.pool.get("colonoscopy"), threshold=0.9)
    after = stage.client.post("/v1/segment", content=file).json()
    assert (before["modality"], before["threshold"], before["area"]) == (
        after["modality"],
        after["threshold"],
        after["area"],
    )


def phantoms(modality: str) -> Iterator[np.ndarray]:
    return (phantom(modality, seed, (96, 128))[0] for seed in range(30))


def looks_like(modality: str, image: np.ndarray) -> bool:
    guess = recognise(image, PAPER_MODALITIES)
    return guess is not None and guess.sure and guess.modality == modality


def test_without_a_run_an_image_is_segmented_as_it_looks_or_its_modality_is_asked_for(
    toy_bundle_of_two: Bundle,
) -> None:
    noise = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), ".png")
    with staged(toy_bundle_of_two, service=True) as stage:
        answer = stage.client.post("/v1/segment", content=noise)
        assert answer.status_code == 400
        assert "none of the modalities" in answer.json()["error"]
        assert "fundus, colonoscopy" in answer.json()["hint"]
        assert stage.client.post("/v1/segment?modality=colonoscopy", content=noise).status_code == 200
        assert stage.pool.loaded("fundus") is None
        for modality in ("fundus", "colonoscopy"):
            image = next(image for image in phantoms(modality) if looks_like(modality, image))
            with Segmenter.load(toy_bundle_of_two, modality, threads=1) as segmenter:
                expected = segmenter.segment(image)
            found = stage.client.post("/v1/segment", content=encode_image(image, ".png")).json()
            assert (found["modality"], found["area"]) == (modality, expected.area)


def test_an_image_that_is_plainly_of_another_modality_is_segmented_with_a_warning(toy_bundle_of_two: Bundle) -> None:
    image = next(image for image in phantoms("colonoscopy") if looks_like("colonoscopy", image))
    capture = np.zeros((200, 300, 3), np.uint8)
    capture[50:146, 100:228] = image
    with staged(toy_bundle_of_two, service=True) as stage:

        def post(modality: str, sent: np.ndarray = image, **options: Any) -> Any:
            place = f"/v1/segment?modality={modality}{options.pop('query', '')}"
            return stage.client.post(place, content=encode_image(sent, ".png"), **options)

        warned = post("fundus").json()["warning"]
        assert re.fullmatch(r"the image looks like colonoscopy \(\d+ %\) and was segmented as fundus\.", warned)
        assert post("fundus", headers={"Accept": "image/png"}).headers["x-warning"] == warned
        assert post("fundus", capture, query="&crop=100,50,128,96").json()["warning"] == warned
        for right in (post("colonoscopy"), stage.client.post("/v1/segment", content=encode_image(image, ".png"))):
            assert "warning" not in right.json()
            assert "x-warning" not in right.headers


def test_a_modality_that_cannot_be_recognised_is_asked_for(tmp_path: Path) -> None:
    with staged(save_toy_bundle(tmp_path / "b.bundle", ("fundus", "teeth")), service=True) as stage:
        answer = stage.client.post("/v1/segment", content=png()[1])
        assert (answer.status_code, answer.json()["error"]) == (400, "which modality?")


def big_png(side: int) -> bytes:
    """A PNG file of a few kilobytes that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * 1000)
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


_IMAGE = png()[1]


@pytest.mark.parametrize(
    ("query", "headers", "content", "status"),
    [
        ("", {}, b"", 400),
        ("", {}, b"not an image", 422),
        ("", {}, _IMAGE[: len(_IMAGE) // 2], 422),
        ("", {}, big_png(30000), 413),
        ("", {}, big_png(4), 422),
        ("", {"Accept": "text/html"}, _IMAGE, 406),
        ("", {"Accept": "image/png;q=0"}, _IMAGE, 406),
        ("", {"Content-Type": "multipart/form-data; boundary=x"}, _IMAGE, 415),
        ("?modality=brain", {}, _IMAGE, 400),
        ("?modality=", {}, _IMAGE, 400),
        ("?threshold=nan", {}, _IMAGE, 400),
        ("?threshold=1", {}, _IMAGE, 400),
        ("?threshold=inf", {}, _IMAGE, 400),
        ("?threshold=x", {}, _IMAGE, 400),
        ("?threshold=0.5&threshold=0.6", {}, _IMAGE, 400),
        ("?size=5", {}, _IMAGE, 400),
        ("?crop=1,2,3", {}, _IMAGE, 400),
        ("?crop=0,0,0,1", {}, _IMAGE, 400),
        ("?crop=0,0,1,99999", {}, _IMAGE, 400),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    stage: Stage, query: str, headers: dict[str, str], content: bytes, status: int
) -> None:
    answer = stage.client.post(f"/v1/segment{query}", headers=headers, content=content)
    assert answer.status_code == status
    body = answer.json()
    assert body["error"].endswith(".")
    assert body["hint"].endswith((".", "png"))
    assert str(stage.pool.bundle.path) not in answer.text


def test_a_body_over_the_limit_is_refused_before_it_is_read(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_api, "MAX_BODY", 10_000)
    assert stage.client.post("/v1/segment", content=b"x" * 10_001).status_code == 413
    given = 0

    def pieces() -> Iterator[bytes]:
        nonlocal given
        for _ in range(1000):
            given += 1000
            yield b"x" * 1000

    assert stage.client.post("/v1/segment", content=pieces()).status_code == 413  # no length announced


def test_a_graph_that_fails_names_no_file(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = next(graph for graph in stage.pool.bundle.manifest.graphs if graph.modality == "colonoscopy")
    (stage.pool.bundle.path / graph.file).write_bytes(b"damaged")
    answer = stage.client.post("/v1/segment?modality=colonoscopy", content=_IMAGE)
    assert answer.status_code == 503
    assert "bundle" not in answer.text
    assert stage.client.post("/v1/segment?modality=fundus", content=_IMAGE).status_code == 200


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("image/png, application/json;q=0.5", "image/png"),
        ("image/png;q=0.5, application/json", "application/json"),
        ("image/png, */*", "image/png"),
        ("text/html, image/webp, */*;q=0.1", "application/json"),
        ("IMAGE/PNG", "image/png"),
        ("application/json;q=nan, image/png;q=0.1", "image/png"),
    ],
)
def test_accept_decides(accept: str | None, kind: str) -> None:
    assert preferred_kind(accept) == kind


def test_metrics_are_what_prometheus_reads_and_name_nobody(stage: Stage) -> None:
    for index in range(5):
        stage.show(index, skipped=index, captured=None)
    stage.client.post("/v1/segment", content=_IMAGE)
    stage.client.get("/no/such/patient/Doe^Jane")
    answer = stage.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.text
    assert text.endswith("\n")
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+')
    typed = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            typed.add(line.split()[2])
        elif not line.startswith("#"):
            assert sample.fullmatch(line), line
            assert any(line.startswith(name) for name in typed), line
    assert "espmedsam_frames_total 5.0\n" in text
    assert "espmedsam_frames_skipped_total 4.0\n" in text
    assert 'espmedsam_frame_latency_seconds_bucket{le="+Inf"} 5.0\n' in text
    assert 'espmedsam_http_answers_total{code="200",path="/v1/segment"} 1.0\n' in text
    assert 'espmedsam_http_answers_total{code="404",path="other"} 1.0\n' in text
    assert "espmedsam_segment_request_seconds_count 1.0\n" in text
    assert "_created" not in text
    for secret in ("secret-name", "Doe", str(stage.pool.bundle.path)):
        assert secret not in text


def test_counts_of_a_histogram_only_grow(stage: Stage) -> None:
    for index in range(3):
        stage.show(index)
    text = stage.client.get("/metrics").text
    counts = [
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("espmedsam_frame_latency_seconds_bucket")
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 3


@pytest.mark.parametrize("wanted", [None, False])
def test_answers_count_and_measure_where_there_are_many(tmp_path: Path, wanted: bool | None) -> None:
    """Also under a crop, and after clean-up, which changes the mask that is sent, too."""
    picture = np.zeros((128, 160, 3), np.uint8)
    for x, y, radius in ((30, 40, 14), (52, 40, 14), (110, 30, 12), (100, 100, 20), (20, 110, 4)):
        cv2.circle(picture, (x, y), radius, (0, 0, 255), -1)
    bundle = save_toy_bundle(tmp_path / "b", ("microscopy",), image_size=512)
    objects = ObjectOptions(wanted, min_area=100)
    with open_service(ModelOptions(bundle, objects=objects, threads=1), ServeOptions("127.0.0.1:0")) as server:

        def ask(query: str, kind: str) -> bytes:
            headers = {"Accept": kind, "Authorization": f"Bearer {server.token}"}
            url = f"{server.url.split('?')[0].rstrip('/')}/v1/segment?modality=microscopy{query}"
            request = urllib.request.Request(url, encode_image(picture, ".png"), headers)
            with urllib.request.urlopen(request) as answer:
                return bytes(answer.read())

        for query in ("", "&crop=0,0,160,70"):
            found = json.loads(ask(query, "application/json"))
            mask = cv2.imdecode(np.frombuffer(ask(query, "image/png"), np.uint8), cv2.IMREAD_UNCHANGED)
            assert mask is not None
            assert found["area"] == cv2.countNonZero(mask)
            assert mask[110, 20] == 0  # too small
            if wanted is False:
                assert "objects" not in found
                continue
            assert found["objects"] == len(found["instances"]) == (3 if query else 4)
            assert sum(one["area"] for one in found["instances"]) == found["area"]
