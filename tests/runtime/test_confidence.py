"""How sure a result is to be of its network's kind of picture: in every result, and what ``--min-confidence`` does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge import Inference, InferenceRequest, ModelOptions, Outputs, Segmenter, UserError, infer, infer_frames
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.imaging.recognition import Look, confidences, look
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.sources import recognised

SIZE = (120, 160)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for number, picture in enumerate((phantom("fundus", 3, SIZE)[0], noise(), phantom("fundus", 5, SIZE)[0])):
        cv2.imwrite(f"in/{number}.png", picture)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The frames that were looked at."""
    seen: list[np.ndarray] = []

    def counted(frame: np.ndarray) -> Look:
        seen.append(frame)
        return look(frame)

    monkeypatch.setattr(recognised, "look", counted)
    return seen


def noise() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (*SIZE, 3), np.uint8)


def test_every_result_has_a_confidence_and_what_is_of_another_kind_is_marked(toy_bundle: Bundle) -> None:
    report = infer("in", toy_bundle, Outputs(out="overlays", jsonl="r.jsonl", csv="r.csv"))
    assert report.failures == []
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        picture = cv2.imread(f"in/{number}.png")
        assert line["confidence"] == pytest.approx(confidences(picture)["fundus"], abs=1e-4)
        assert line["refused"] is False
    assert [line["confidence"] >= 0.5 for line in lines] == [True, False, True]
    rows = [row.split(",")[-1] for row in Path("r.csv").read_text().splitlines()]
    assert rows == ["confidence", *(f"{line['confidence']:.4f}" for line in lines)]
    with Segmenter.load(toy_bundle) as segmenter:
        for number, notice in ((0, ""), (1, f"unlike fundus ({lines[1]['confidence']:.2f})")):
            picture = cv2.imread(f"in/{number}.png")
            style = OverlayStyle(color_of("fundus"), notice=notice)
            expected = draw_overlay(picture, segmenter.segment(picture).mask, style)
            assert np.array_equal(cv2.imread(f"overlays/{number}.png"), expected)


def test_below_the_least_confidence_the_mask_is_empty_and_the_picture_a_failure(toy_bundle: Bundle) -> None:
    report = infer("in", ModelOptions(toy_bundle, min_confidence=0.5), Outputs(masks="masks", jsonl="r.jsonl"))
    (failure,) = report.failures
    assert failure.message.startswith("in/1.png looks unlike fundus (confidence 0.0")
    assert report.frames == 3
    areas = [int(np.count_nonzero(cv2.imread(f"masks/{number}.png", 0))) for number in range(3)]
    assert areas[1] == 0 < min(areas[0], areas[2])
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [(line["refused"], line["area"]) for line in lines] == [(False, areas[0]), (True, 0), (False, areas[2])]


def test_a_refused_result_stays_empty_at_another_threshold(toy_bundle: Bundle) -> None:
    with Inference(InferenceRequest("in/1.png", ModelOptions(toy_bundle, min_confidence=0.5), None)) as run:
        ((frame, result),) = run.frames()
    assert result.refused
    assert not result.at(0.01).mask.any()
    with Segmenter.load(toy_bundle) as segmenter:
        assert segmenter.segment(frame.image).at(0.01).mask.any()


def test_an_empty_mask_of_the_right_kind_says_so(toy_bundle: Bundle) -> None:
    ((frame, result),) = infer_frames("in/0.png", ModelOptions(toy_bundle))
    assert result.remark == ""
    empty = replace(result, mask=np.zeros_like(result.mask))
    assert empty.remark == "nothing found"
    expected = draw_overlay(frame.image, empty.mask, OverlayStyle(color_of("fundus"), notice="toy, nothing found"))
    assert np.array_equal(empty.overlay(frame.image, OverlayStyle(color_of("fundus"), notice="toy")), expected)


def test_a_kind_that_is_not_known_has_no_confidence_and_that_is_said_once(
    tmp_path: Path, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = save_toy_bundle(tmp_path / "teeth.bundle", ("teeth",))
    report = infer("in", bundle, Outputs(jsonl="r.jsonl"))
    assert (report.frames, report.failures) == (3, [])
    assert "confidence" not in Path("r.jsonl").read_text()
    assert (report.unjudged, said) == (["teeth"], [])
    report = infer("in", ModelOptions(bundle, min_confidence=0.9), None)
    assert (report.frames, report.failures) == (3, [])
    (line,) = said
    assert line.startswith("--min-confidence has no effect for teeth")
    with pytest.raises(SystemExit) as left:
        main(["infer", str(bundle.path), "in", "--jsonl", "again.jsonl"])
    assert left.value.code == 0
    assert capsys.readouterr().out.count("No confidence for teeth") == 1


def test_each_of_several_networks_gives_its_own(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "two.bundle", ("fundus", "xray"))
    cv2.imwrite("in/1.png", film := phantom("xray", 4, SIZE)[0])
    results = [result for _, result in infer_frames("in", bundle)]
    assert [result.modality for result in results] == ["fundus", "xray", "fundus"]
    assert results[1].confidence == pytest.approx(confidences(film)["xray"])


def test_the_part_that_is_segmented_is_judged(toy_bundle: Bundle) -> None:
    framed = np.zeros((400, 500, 3), np.uint8)
    framed[100:220, 200:360] = noise()
    cv2.imwrite("framed.png", framed)
    from espmedsam_edge import ReadingOptions

    ((_, result),) = infer_frames("framed.png", toy_bundle, reading=ReadingOptions(crop=(200, 100, 160, 120)))
    assert result.confidence == pytest.approx(confidences(noise())["fundus"])


def test_a_video_is_looked_at_once_a_second_and_refused_frames_are_one_line(
    toy_bundle: Bundle, looks: list[np.ndarray]
) -> None:
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (SIZE[1], SIZE[0]))
    for number in range(35):
        writer.write(noise() if number >= 20 else phantom("fundus", 3, SIZE)[0])
    writer.release()
    report = infer("clip.avi", ModelOptions(toy_bundle, min_confidence=0.5), Outputs(jsonl="r.jsonl"))
    assert len(looks) == 4
    refused = [json.loads(line)["refused"] for line in Path("r.jsonl").read_text().splitlines()]
    assert refused == [False] * 20 + [True] * 15
    (failure,) = report.failures
    assert failure.message == "15 of 35 frames of clip.avi look unlike their modality: their masks are empty."


def test_a_live_source_is_looked_at_now_and_then(toy_bundle: Bundle, looks: list[np.ndarray]) -> None:
    from espmedsam_edge import ReadingOptions

    request = InferenceRequest("test://fundus", ModelOptions(toy_bundle), None, ReadingOptions(frames=8))
    with Inference(request) as run:
        results = [result for _, result in run.frames()]
    assert all(result.confidence is not None for result in results)
    assert 1 <= len(looks) < 8


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_what_is_no_confidence_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="is not from 0 to 1"):
        ModelOptions(min_confidence=value)
