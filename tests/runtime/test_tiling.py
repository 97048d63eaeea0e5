"""Large pictures in tiles: against the toy graph's formula, which knows no tiles."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge import ModelOptions, Outputs, infer
from espmedsam_edge.bench.competitors import load_competitor, load_first
from espmedsam_edge.bundle import Bundle, write_bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.evaluation.candidates import BundleCandidate, open_candidate
from espmedsam_edge.imaging.geometry import mask_from_logits
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.modalities import Scale
from espmedsam_edge.runtime import tiling
from espmedsam_edge.runtime.inference import Inference
from espmedsam_edge.runtime.request import InferenceRequest
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.segmenter_pool import loader

PICTURE = (200, 328)


def picture(size: tuple[int, int] = PICTURE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def formula(bundle: Bundle, frame: np.ndarray) -> np.ndarray:
    """The toy graph's logits of a picture at its own size: a weighted mean of each 4x4 pixels."""
    normalization = bundle.manifest.input.normalization
    rgb = frame[..., ::-1].astype(np.float64) / 255
    values = ((rgb - normalization.mean) / normalization.std) @ np.array([1.0, -0.5, 0.25])
    height, width = values.shape
    return values.reshape(height // 4, 4, width // 4, 4).mean(axis=(1, 3))


def scaled(bundle: Bundle, **scale: int) -> Bundle:
    with write_bundle(bundle.path, extend=True) as draft:
        assert draft.manifest is not None
        draft.manifest = draft.manifest.model_copy(update={"scales": {"fundus": Scale(**scale)}})
    return Bundle.open(bundle.path)


@pytest.mark.parametrize("batch", [1, 4])
def test_in_tiles_the_network_sees_a_pictures_own_pixels(tmp_path: Path, batch: int) -> None:
    bundle = save_toy_bundle(tmp_path / "b.bundle", batch=batch)
    frame = picture()
    with Segmenter.load(bundle, tile=64, overlay=OverlayStyle((0, 0, 255))) as segmenter:
        for result in (segmenter.segment(frame), segmenter.start([frame]).results()[0]):
            expected = formula(bundle, frame)
            assert result.logits.shape == expected.shape
            assert np.abs(result.logits - expected).max() < 1e-4
            assert np.array_equal(result.mask, mask_from_logits(result.logits, PICTURE, 0.5))
            assert np.array_equal(result.at(0.7).mask, mask_from_logits(result.logits, PICTURE, 0.7))
            assert result.modality == "fundus"
            assert result.timings.inference > 0


def test_small_pictures_among_large_ones_are_taken_whole(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "b.bundle", batch=2)
    small, large = picture((50, 64)), picture()
    with Segmenter.load(bundle, tile=64) as tiled, Segmenter.load(bundle, tile="off") as whole:
        of_both = tiled.segment_batch([small, large, small])
        assert np.array_equal(of_both[0].logits, whole.segment(small).logits)
        assert np.array_equal(of_both[2].logits, of_both[0].logits)
        assert of_both[1].logits.shape == (50, 82)
        assert whole.segment(large).logits.shape == (16, 16)


def test_auto_does_as_the_bundle_says(toy_bundle: Bundle) -> None:
    frame = picture()
    with Segmenter.load(toy_bundle) as without:
        assert without.segment(frame).logits.shape == (16, 16)
    said_so = scaled(toy_bundle, largest=64, tile=32)
    with Segmenter.load(said_so) as segmenter:
        assert segmenter.segment(frame).logits.shape == (100, 164)
        assert segmenter.segment(picture((64, 40))).logits.shape == (16, 16)  # nothing extra: it is not shrunk
    with Segmenter.load(said_so, tile="off") as segmenter:
        assert segmenter.segment(frame).logits.shape == (16, 16)


def test_shrinking_below_what_was_trained_is_said_once(toy_bundle: Bundle, said: list[str]) -> None:
    bundle = scaled(toy_bundle, largest=100)
    with Segmenter.load(bundle) as segmenter:
        segmenter.segment(picture((120, 180)))
        assert not said
        for _ in range(2):
            segmenter.segment(picture())
    (line,) = said
    assert "328x200" in line
    assert "(100 at most)" in line
    assert "--tile SIZE" in line


@pytest.mark.parametrize("tile", ["0", "31", "-64", "64.5", "1e3", "large", "", "99999", 0, 10**9, "٦٤٠"])
def test_a_tile_that_is_no_size_is_one_line(toy_bundle: Bundle, tile: str | int) -> None:
    with pytest.raises(UserError, match="is no size"):
        Segmenter.load(toy_bundle, tile=tile)
    with pytest.raises(UserError, match="is no size"):
        ModelOptions(tile=tile)


def test_tiles_whose_logits_would_not_fit_into_memory_are_larger(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(tiling, "_MOST_CELLS", 41 * 25)  # of 16 a tile
    frames = [picture(seed=1), picture((100, 164), seed=2)]
    with Segmenter.load(toy_bundle, tile=32, threads=1) as segmenter, Segmenter.load(toy_bundle, tile=128) as other:
        found, expected = segmenter.segment_batch(frames), other.segment_batch(frames)
        assert segmenter.tiler.asked == 32
    assert np.array_equal(found[0].mask, expected[0].mask)
    (line,) = (line for line in said if "gigabytes" in line)
    assert line.endswith("328x200 pixels: they are of 128 there.")


def test_a_run_writes_the_tiles_mask(toy_bundle: Bundle, tmp_path: Path) -> None:
    frame = picture()
    cv2.imwrite(str(tmp_path / "a.png"), frame)
    out = Outputs(masks=tmp_path / "masks")
    report = infer(tmp_path / "a.png", ModelOptions(toy_bundle, tile=64), out)
    assert not report.failures
    with Segmenter.load(toy_bundle, tile=64) as segmenter:
        expected = segmenter.segment(frame).mask
    assert np.array_equal(cv2.imread(str(tmp_path / "masks" / "a.png"), cv2.IMREAD_UNCHANGED), expected)


def test_every_way_to_a_network_takes_tiles(toy_bundle: Bundle) -> None:
    """The service's, evaluate's and bench's, as the command's and Python's above."""
    frame = picture()
    expected = formula(toy_bundle, frame)
    with loader(toy_bundle, None, "onnxruntime-cpu", tile=64)("fundus") as segmenter:
        assert np.abs(segmenter.segment(frame).logits - expected).max() < 1e-4
    with BundleCandidate(toy_bundle, tile=64).predictor("fundus") as predict:
        assert np.abs(predict(frame) - expected).max() < 1e-4
    contender = load_first(toy_bundle, None, None, "onnxruntime-cpu", 1, tile=64)
    with contender.segmenter, load_competitor("fp32", contender.segmenter, None, 1).segmenter as other:
        for segmenter in (contender.segmenter, other):
            assert segmenter.segment(frame).logits.shape == expected.shape


def test_a_checkpoints_images_are_taken_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="taken whole"):
        open_candidate(tmp_path / "w.safetensors", tile=64)


@pytest.mark.parametrize(("tile", "wanted"), [("auto", "off"), (32, 32)])
def test_a_cameras_frames_take_tiles_if_asked_for(toy_bundle: Bundle, tile: str | int, wanted: object) -> None:
    """A frame of many tiles would be old when it is shown."""
    bundle = scaled(toy_bundle, largest=64, tile=32)
    request = InferenceRequest("test://fundus", ModelOptions(bundle, tile=tile), None)
    with Inference(request) as run:
        assert run.segmenter.tiler.asked == wanted
