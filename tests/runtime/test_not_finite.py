"""NaN or infinite logits are an error of that frame, named; they are never a row like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_bundles import save_toy_bundle, toy_graph

from espmedsam_edge.bundle import Bundle, Manifest, Weights, write_bundle
from espmedsam_edge.cli import main
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.runtime.segmentation import NotFinite, Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter

# A bright picture's sum overflows float32, a black one's does not: by the toy's normalisation black is negative.
HUGE = (3e38, 3e38, 3e38)


@pytest.fixture
def overflowing(tmp_path: Path) -> Bundle:
    """A toy bundle of batch 2 with weights so large that white pixels give infinity, grey ones a finite number."""
    with write_bundle(tmp_path / "huge.bundle") as draft:
        draft.new_file("fp32.onnx").write_bytes(toy_graph(batch=2, weights=HUGE))
        entry = draft.graph("fp32.onnx", modality="fundus", precision="fp32", image_size=64, batch=2)
        draft.manifest = Manifest(
            preset="toy", weights=Weights(checkpoint_sha256="0" * 64, origin="trained"), graphs=[entry]
        )
    return Bundle.open(tmp_path / "huge.bundle")


def white() -> np.ndarray:
    return np.full((64, 64, 3), 255, np.uint8)


def grey() -> np.ndarray:
    """Near the normalisation's mean, so that little is left."""
    return np.full((64, 64, 3), (104, 116, 124), np.uint8)


def test_one_frame_is_an_error_and_the_others_of_its_batch_are_kept(overflowing: Bundle) -> None:
    with Segmenter.load(overflowing, backend="onnxruntime-cpu", threads=1) as segmenter:
        assert np.isfinite(segmenter.segment(grey()).logits).all()
        with pytest.raises(NotFinite, match=r"not finite \(NaN or infinite\)"):
            segmenter.segment(white())
        with pytest.raises(NotFinite) as caught:
            segmenter.segment_batch([grey(), white(), grey()])
        kinds = [type(outcome) for outcome in caught.value.outcomes]
        assert kinds == [Segmentation, NotFinite, Segmentation]
        with pytest.raises(NotFinite):
            segmenter.start([white()]).results()


def test_a_picture_without_a_result_fails_and_the_others_are_written(
    overflowing: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, image in {"a": grey(), "b": white(), "c": grey()}.items():
        write_image(images / f"{name}.png", image)
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit) as caught:
        main(["infer", str(overflowing.path), str(images), "--jsonl", str(rows), "--backend", "onnxruntime-cpu"])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "b.png" in error
    assert "not finite" in error
    assert "Traceback" not in error
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == 2
    assert all("b.png" not in json.dumps(row) for row in found)


def test_a_live_frame_without_a_result_is_left_out_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = save_toy_bundle(tmp_path / "b")
    segment: Callable[..., list[Segmentation]] = Segmenter._segment_group
    count = 0

    def spoilt(self: Segmenter, group: object, options: object) -> list[Segmentation]:
        nonlocal count
        results = segment(self, group, options)
        count += 1
        if count in (2, 4):
            results[0].logits[3, 3] = np.nan
        return results

    monkeypatch.setattr(Segmenter, "_segment_group", spoilt)
    rows = tmp_path / "rows.jsonl"
    source = "test://fundus?fps=20&size=64x64&frames=6"
    with pytest.raises(SystemExit) as caught:
        main(["infer", str(bundle.path), source, "--jsonl", str(rows), "--backend", "onnxruntime-cpu"])
    out, error = capsys.readouterr()
    assert caught.value.code == 0, error
    assert "2 left out (the network's output was not finite)" in out + error
    assert error.count("a frame is left out") == 1
    assert len(rows.read_text().splitlines()) == count - 2
