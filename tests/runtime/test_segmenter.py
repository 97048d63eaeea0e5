"""Frame in, segmentation out, against the toy graph's formula."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from toy_bundles import save_toy_bundle

import espmedsam_edge
from espmedsam_edge import modalities
from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import mask_from_logits, preprocess
from espmedsam_edge.modalities import Modality
from espmedsam_edge.runtime import segmenter as segmenter_module
from espmedsam_edge.runtime.backends.backend import Choice
from espmedsam_edge.runtime.segmentation import DeviceLost
from espmedsam_edge.runtime.segmenter import Segmenter


def frames_of(sizes: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def expected_mask(bundle: Bundle, frame: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    image = preprocess(frame, 64, bundle.manifest.input.normalization)[0].astype(np.float64)
    logits = np.einsum("chw,c->hw", image, [1.0, -0.5, 0.25]).reshape(16, 4, 16, 4).mean(axis=(1, 3))
    return mask_from_logits(logits.astype(np.float32), frame.shape[:2], threshold)


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    return float((first == second).mean())


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (33, 77), (480, 640)])
def test_the_mask_is_the_graphs(toy_bundle: Bundle, size: tuple[int, int]) -> None:
    with Segmenter.load(toy_bundle) as segmenter:
        (frame,) = frames_of([size])
        result = segmenter.segment(frame)
        assert result.mask.shape == size
        assert result.modality == "fundus"
        assert result.logits.shape == (16, 16)
        # A pixel on the boundary may fall either way by float32 rounding.
        assert agreement(result.mask, expected_mask(toy_bundle, frame)) >= 0.9999
        assert min(result.timings.preprocess, result.timings.inference, result.timings.postprocess) > 0


def test_it_takes_a_path_and_the_package_exports_it(toy_bundle: Bundle) -> None:
    with espmedsam_edge.Segmenter.load(str(toy_bundle.path)) as segmenter:
        assert (segmenter.modality, segmenter.precision, segmenter.image_size, segmenter.batch) == (
            "fundus",
            "fp32",
            64,
            1,
        )
        assert str(segmenter.choice).startswith("onnxruntime (CPU")


def test_the_threshold_can_be_set(toy_bundle: Bundle) -> None:
    (frame,) = frames_of([(50, 60)])
    with Segmenter.load(toy_bundle, threshold=0.7) as segmenter:
        result = segmenter.segment(frame)
        assert result.threshold == 0.7
        assert agreement(result.mask, expected_mask(toy_bundle, frame, 0.7)) >= 0.9999
    with pytest.raises(UserError, match="threshold 1 is not between 0 and 1"):
        Segmenter.load(toy_bundle, threshold=1)
    with pytest.raises(UserError, match="threshold nan"):
        Segmenter.load(toy_bundle, threshold=float("nan"))


LOPSIDED = np.arange(16, dtype=np.float32).reshape(4, 4) / 16


@pytest.mark.parametrize(("batch", "taken"), [(1, 1), (8, 1), (17, 2)])
def test_tta_is_the_mean_over_the_modalitys_views(tmp_path: Path, batch: int, taken: int) -> None:
    frames = frames_of([(64, 64), (48, 80), (90, 30)])
    turned = [np.rot90(LOPSIDED, quarters) for quarters in range(4)]
    even = np.mean([*turned, *(patch.T for patch in turned)], axis=0).astype(np.float32)
    bundle = save_toy_bundle(tmp_path / "t.bundle", ("tiles",), batch=batch, patch=LOPSIDED)
    # The mean over all turned and mirrored copies is what the mean over all turned and mirrored kernels gives.
    same = save_toy_bundle(tmp_path / "s.bundle", ("tiles",), patch=even)
    with (
        Segmenter.load(bundle, tta=True) as segmenter,
        Segmenter.load(bundle) as plain,
        Segmenter.load(same) as expected,
    ):
        assert segmenter.batch == taken
        assert segmenter.choice.taken.startswith("onnxruntime (CPU")
        assert segmenter.choice.taken.endswith("mean of 8 views)")
        results = segmenter.segment_batch(frames)
        for result, other, usual in zip(
            results, expected.segment_batch(frames), plain.segment_batch(frames), strict=True
        ):
            np.testing.assert_allclose(result.logits, other.logits, atol=2e-5)
            assert agreement(result.mask, other.mask) >= 0.999
            assert np.abs(result.logits - usual.logits).max() > 0.05


def test_tta_says_where_it_changes_nothing(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = save_toy_bundle(tmp_path / "t.bundle", ("tiles",), patch=LOPSIDED)
    monkeypatch.setitem(modalities._REGISTRY, "tiles", Modality("tiles", "tiles", views="none"))
    (frame,) = frames_of([(64, 64)])
    with Segmenter.load(bundle, tta=True) as segmenter, Segmenter.load(bundle) as plain:
        np.testing.assert_array_equal(segmenter.segment(frame).logits, plain.segment(frame).logits)
        assert "views" not in segmenter.choice.taken
    assert sum(line.startswith("No copies") and "of tiles" in line for line in said) == 1


class LostGpu:
    """A network on a GPU that is gone."""

    name, device = "tensorrt", "a GPU"

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.closed = False

    def run(self, image: np.ndarray) -> np.ndarray:
        raise DeviceLost("the GPU is gone.", exit_code=1)

    def close(self) -> None:
        self.closed = True


def test_tta_goes_on_without_a_gpu_that_is_lost(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = save_toy_bundle(tmp_path / "t.bundle", ("tiles",), patch=LOPSIDED)
    gone = LostGpu(bundle.graph())
    (frame,) = frames_of([(64, 64)])
    with Segmenter.load(bundle, backend="onnxruntime-cpu", tta=True) as segmenter:
        expected = segmenter.segment(frame).logits
    monkeypatch.setattr(segmenter_module, "load_fastest", lambda *_, **__: Choice(gone))
    with Segmenter.load(bundle, tta=True) as segmenter:
        for _ in range(2):
            np.testing.assert_array_equal(segmenter.segment(frame).logits, expected)
        assert segmenter.choice.backend.name == "onnxruntime-cpu"
    assert gone.closed
    assert sum(line.startswith("The GPU is lost") for line in said) == 1


def test_modalities_of_one_bundle_differ(toy_bundle_of_two: Bundle) -> None:
    (frame,) = frames_of([(40, 40)])
    with (
        Segmenter.load(toy_bundle_of_two, "fundus") as first,
        Segmenter.load(toy_bundle_of_two, modality="colonoscopy") as second,
    ):
        np.testing.assert_allclose(first.segment(frame).logits, -second.segment(frame).logits, atol=1e-6)
    with pytest.raises(UserError, match=r"holds 2 modalities: fundus, colonoscopy\. Pick one"):
        Segmenter.load(toy_bundle_of_two)
    with pytest.raises(UserError, match="Did you mean 'colonoscopy'"):
        Segmenter.load(toy_bundle_of_two, "colonscopy")


@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_a_batch_gives_what_single_frames_give(tmp_path: Path, toy_bundle: Bundle, count: int) -> None:
    frames = frames_of([(20 + 7 * number, 90 - 5 * number) for number in range(count)])
    with Segmenter.load(save_toy_bundle(tmp_path / "four.bundle", batch=4)) as segmenter:
        together = segmenter.segment_batch(frames)
        one_by_one = [segmenter.segment(frame) for frame in frames]
    assert len(together) == count
    with Segmenter.load(toy_bundle) as single:
        for frame, result, alone in zip(frames, together, one_by_one, strict=True):
            reference = single.segment(frame)
            for found in (result, alone):
                np.testing.assert_allclose(found.logits, reference.logits, atol=1e-6)
                assert found.mask.shape == frame.shape[:2]


def test_results_own_their_memory(tmp_path: Path) -> None:
    with Segmenter.load(save_toy_bundle(tmp_path / "b", batch=2)) as segmenter:
        first, second = segmenter.segment_batch(frames_of([(30, 30), (30, 30)]))
        kept = first.mask.copy(), first.logits.copy()
        segmenter.segment_batch(frames_of([(30, 30)] * 4, seed=9))
        np.testing.assert_array_equal(first.mask, kept[0])
        np.testing.assert_array_equal(first.logits, kept[1])
        assert first.logits.base is None or first.logits.base.nbytes == first.logits.nbytes
        assert not np.shares_memory(first.logits, second.logits)


def test_views_and_read_only_frames_are_taken(toy_bundle: Bundle) -> None:
    (frame,) = frames_of([(64, 128)])
    frame.setflags(write=False)
    with Segmenter.load(toy_bundle) as segmenter:
        for view in (frame, frame[:, ::-1], frame[::2, 10:74], frame[..., ::-1]):
            expected = segmenter.segment(np.ascontiguousarray(view))
            np.testing.assert_array_equal(segmenter.segment(view).mask, expected.mask)


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((10, 10), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10, 3), np.float32),
        np.zeros((0, 10, 3), np.uint8),
        [[1, 2, 3]],
    ],
)
def test_what_is_no_frame_is_refused(toy_bundle: Bundle, frame: object) -> None:
    with Segmenter.load(toy_bundle) as segmenter, pytest.raises(UserError, match="frame"):
        segmenter.segment(frame)  # type: ignore[arg-type]


def test_threads_share_a_segmenter(toy_bundle: Bundle) -> None:
    frames = frames_of([(40, 50)] * 6)
    with Segmenter.load(toy_bundle, threads=1) as segmenter:
        expected = [segmenter.segment(frame).mask for frame in frames]
        wrong: list[int] = []

        def work(number: int) -> None:
            for _ in range(25):
                if not np.array_equal(segmenter.segment(frames[number]).mask, expected[number]):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(frames))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_closed_segmenter_says_so(toy_bundle: Bundle) -> None:
    segmenter = Segmenter.load(toy_bundle)
    segmenter.close()
    segmenter.close()
    with pytest.raises(RuntimeError, match="closed"):
        segmenter.segment(frames_of([(8, 8)])[0])


def test_started_frames_are_done_at_once_without_a_gpu(toy_bundle: Bundle) -> None:
    frames = [np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8) for seed in range(3)]
    with Segmenter.load(toy_bundle, threads=1, backend="onnxruntime-cpu") as segmenter:
        assert segmenter.in_flight == 1
        groups = [segmenter.start([frame], threshold=0.3) for frame in frames]
        for frame, group in zip(frames, groups, strict=True):
            (result,) = group.results()
            (expected,) = segmenter.segment_batch([frame], threshold=0.3)
            np.testing.assert_array_equal(result.mask, expected.mask)
            assert result.threshold == 0.3
        with pytest.raises(ValueError, match="2 frames for a graph with batch 1"):
            segmenter.start(frames[:2])
        with pytest.raises(UserError, match="a frame must be a uint8 array"):
            segmenter.start([frames[0].astype(np.float32)])  # type: ignore[list-item]
