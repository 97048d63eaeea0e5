"""What the kernels must do, whatever runs them: checks against OpenCV, NumPy and the CPU backend's own functions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import cv2
import numpy as np
from hypothesis import strategies as st
from kernel_frames import NOISE, FrameCase, Guarded, Memory, frame_cases
from numpy.typing import NDArray

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.imaging.geometry import (
    logit,
    mask_from_logits,
    preprocess,
    upsample_logits,
)
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.kernels import parameters
from espmedsam_edge.runtime.kernels.frame_view import FrameView
from espmedsam_edge.runtime.kernels.launch import Canvas, FrameKernels

NORMALIZATIONS = (Normalization(), Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))


@dataclass(frozen=True)
class PreprocessCase:
    """A batch of frames and the network's input size."""

    frames: tuple[FrameCase, ...]
    image_size: int
    normalization: Normalization = NORMALIZATIONS[0]


def preprocess_cases() -> st.SearchStrategy[PreprocessCase]:
    """Batches of one to ten frames: more than one launch takes."""
    frames = st.one_of(
        st.lists(frame_cases(), min_size=1, max_size=2),
        st.lists(frame_cases(), min_size=9, max_size=10),
    )
    return st.builds(
        PreprocessCase,
        frames.map(tuple),
        st.one_of(st.sampled_from([16, 32, 64, 128]), st.integers(1, 150)),
        st.sampled_from(NORMALIZATIONS),
    )


def check_preprocess(kernels: FrameKernels, memory: Memory, case: PreprocessCase) -> float:
    """Run a case and compare it with the CPU backend; the greatest part of a frame's values that is a level off."""
    size, frames = case.image_size, [frame.make(memory) for frame in case.frames]
    count = 3 * size * size
    out = Guarded(memory, (len(frames) + 1) * 4 * count)  # the batch has a row to spare
    kernels.preprocess(
        memory.stream,
        [view for view, _ in frames],
        out.address,
        size,
        case.normalization,
    )
    got = out.read(np.float32, (len(frames) + 1, 3, size, size))
    assert (got[-1:].view(np.uint8) == NOISE).all(), "the batch's spare row was written"
    std = np.asarray(case.normalization.std, np.float32)[:, None, None]
    mean = np.asarray(case.normalization.mean, np.float32)[:, None, None]
    worst = 0.0
    for result, (_, picture) in zip(got, frames, strict=False):
        levels = (result.astype(np.float64) * std + mean) * 255
        tolerance = 1e-3  # float32 arithmetic
        exact = fixed_point_resize(picture, size).transpose(2, 0, 1)[::-1]
        assert np.abs(levels - exact).max() <= tolerance
        reference = preprocess(picture, size, case.normalization)[0]
        expected = (reference.astype(np.float64) * std + mean) * 255
        # OpenCV places its taps in floating point: a weight in the middle of two steps of 2^-11 may be rounded the
        # other way, which moves a value by one level at most
        difference = np.abs(levels - expected)
        assert difference.max() <= 1 + tolerance
        worst = max(worst, float((difference > 0.5).mean()))
    return worst


def fixed_point_resize(picture: NDArray[np.uint8], size: int) -> NDArray[np.int64]:
    """cv2.resize's arithmetic on 8 bits, written out: 11-bit weights, 4 and 16 bits dropped, rounded at the end."""
    height, width = picture.shape[:2]
    left, right, first, second = _taps(width, size, inside=True)
    top, bottom, upper, lower = _taps(height, size, inside=False)
    levels = picture.astype(np.int64)
    first, second = first[None, :, None], second[None, :, None]
    across = levels[:, left] * first + levels[:, right] * second
    down = (across[top] >> 4) * upper[:, None, None] >> 16
    return (down + ((across[bottom] >> 4) * lower[:, None, None] >> 16) + 2) >> 2


def _taps(source: int, target: int, *, inside: bool) -> tuple[NDArray[np.int64], ...]:
    position = (2 * np.arange(target, dtype=np.int64) + 1) * source - target
    index, rest = np.divmod(position, 2 * target)
    weight = rest.astype(np.float32) / np.float32(2 * target)
    if inside:
        weight[(index < 0) | (index >= source - 1)] = 0
    one = np.float32(2048)
    weights = (np.rint((1 - weight) * one).astype(np.int64), np.rint(weight * one).astype(np.int64))
    return (np.clip(index, 0, source - 1), np.clip(index + 1, 0, source - 1), *weights)


STYLE = OverlayStyle((255, 200, 0))


@dataclass(frozen=True)
class PostprocessCase:
    """Frames of a batch and what is made of each."""

    frames: tuple[FrameCase, ...]
    logits_size: tuple[int, int]
    threshold: float = 0.5
    style: OverlayStyle = STYLE
    outputs: frozenset[str] = frozenset({"mask", "overlay", "measures"})
    content: str = "blobs"
    outline: int | None = None
    seed: int = 0

    def logits(self, index: int) -> NDArray[np.float32]:
        """The logits of a frame: smooth shapes, noise, nothing, everything, one pixel or not-a-number."""
        rng = np.random.default_rng(self.seed + index)
        noise = rng.normal(size=self.logits_size).astype(np.float32) * 8
        if self.content == "blobs":
            noise = np.asarray(cv2.GaussianBlur(noise, (0, 0), 3)).reshape(self.logits_size) * 8
        if self.content in ("empty", "full"):
            noise = np.abs(noise) + 1 if self.content == "full" else -np.abs(noise) - 1
        if self.content == "dot":
            noise = np.full(self.logits_size, -1, np.float32)
            noise[tuple(rng.integers(0, side) for side in self.logits_size)] = 50
        if self.content == "nan":
            noise[rng.random(self.logits_size) < 0.02] = np.nan
        return noise


@st.composite
def postprocess_cases(draw: st.DrawFn) -> PostprocessCase:
    """Batches of one or two frames, or more than one launch takes, with any set of outputs."""
    several = draw(st.sampled_from([1, 1, 2, 9]))
    color = draw(st.tuples(*[st.integers(0, 255)] * 3))
    return PostprocessCase(
        tuple(draw(frame_cases()) for _ in range(several)),
        draw(st.tuples(st.integers(1, 80), st.integers(1, 80))),
        draw(st.sampled_from([0.5, 0.2, 0.9])),
        OverlayStyle(color, draw(st.floats(0, 1)), draw(st.booleans())),
        draw(st.sets(st.sampled_from(["mask", "overlay", "measures"]), min_size=1).map(frozenset)),
        draw(st.sampled_from(["blobs", "blobs", "noise", "empty", "full", "dot", "nan"])),
        draw(st.one_of(st.none(), st.integers(1, parameters.MAX_OUTLINE))),
        draw(st.integers(0, 1 << 16)),
    )


class _Made:
    """One frame's output buffers."""

    def __init__(self, memory: Memory, view: FrameView, logits: int, outputs: frozenset[str]) -> None:
        width, height = view.width, view.height
        self.row = -(-width // parameters.RUN) * parameters.RUN
        measures = ctypes.sizeof(parameters.Measures)
        self.mask = Guarded(memory, height * self.row)
        self.overlay = Guarded(memory, 3 * height * self.row)
        self.measures = Guarded(memory, measures)
        self.totals = Guarded(memory, ctypes.sizeof(parameters.Totals), zero=True)
        self.canvas = Canvas(
            view,
            logits,
            mask=self.mask.address if "mask" in outputs else 0,
            mask_pitch=self.row,
            overlay=self.overlay.address if "overlay" in outputs else 0,
            overlay_pitch=3 * self.row,
            measures=self.measures.address if "measures" in outputs else 0,
            totals=self.totals.address,
        )

    def check(self, case: PostprocessCase, logits: NDArray[np.float32], picture: NDArray[np.uint8]) -> None:
        height, width = picture.shape[:2]
        size = (height, width)
        level = logit(case.threshold)
        mask = mask_from_logits(logits, size, case.threshold)
        # Beside a logit that is not a number, whether 0 · NaN is taken in at a border is each side's own affair.
        beside_nan = cv2.dilate(np.isnan(logits).astype(np.float32), np.ones((3, 3)))
        sound = upsample_logits(beside_nan.reshape(logits.shape), size) == 0
        upsampled = np.where(sound, upsample_logits(logits, size), level)
        # Only a logit within float32 rounding of the threshold may fall on the other side of it.
        uncertain = np.abs(upsampled - level) <= 4e-6 * np.nanmax(np.abs(logits), initial=1.0)
        if "mask" in case.outputs:
            padded = self.mask.read(np.uint8, (height, self.row))
            assert (padded[:, width:] == 0).all()
            made = padded[:, :width]
            assert np.isin(made, (0, 255)).all()
            assert uncertain[made != mask].all()
            assert (made != mask)[sound].sum() <= 1e-4 * mask.size + 1
            mask = np.ascontiguousarray(made)
        else:
            assert (self.mask.read(np.uint8, (-1,)) == NOISE).all()
        if "overlay" in case.outputs:
            drawn = self.overlay.read(np.uint8, (height, self.row, 3))[:, :width].astype(int)
            expected = _drawn(picture, mask, case).astype(int)
            if "mask" not in case.outputs:  # a pixel at the threshold changes its neighbours' outline
                reach = 2 * parameters.MAX_OUTLINE + 1
                doubtful = cv2.dilate(uncertain.astype(np.uint8), np.ones((reach, reach), np.uint8)).reshape(size) > 0
                expected[doubtful] = drawn[doubtful]
            assert np.abs(drawn - expected).max() <= 1  # two ways to round a blend
        else:
            assert (self.overlay.read(np.uint8, (-1,)) == NOISE).all()
        assert (self.totals.read(np.uint32, (-1,)) == 0).all()
        if "measures" in case.outputs and "mask" in case.outputs:
            found = parameters.Measures.from_buffer_copy(self.measures.read(np.uint8, (-1,)).tobytes())
            _check_measures(found, mask)


def _drawn(picture: NDArray[np.uint8], mask: NDArray[np.uint8], case: PostprocessCase) -> NDArray[np.uint8]:
    if case.outline is None or not case.style.outline:
        return draw_overlay(picture, mask, case.style)
    width = case.outline  # any width, though frames of a test's size have one of 1
    drawn = draw_overlay(picture, mask, replace(case.style, outline=False))
    edge = cv2.subtract(mask, cv2.erode(mask, np.ones((2 * width + 1, 2 * width + 1), np.uint8)))
    drawn[np.asarray(edge) > 0] = case.style.color
    return drawn


def _check_measures(found: parameters.Measures, mask: NDArray[np.uint8]) -> None:
    rows, columns = np.nonzero(mask)
    assert found.area == len(rows)
    assert (found.sum_x, found.sum_y) == (columns.sum(), rows.sum())
    box = (found.left, found.top, found.right, found.bottom)
    if len(rows):
        assert box == (columns.min(), rows.min(), columns.max(), rows.max())
    else:
        assert box == (2**31 - 1, 2**31 - 1, -1, -1)


def check_postprocess(kernels: FrameKernels, memory: Memory, case: PostprocessCase, launches: int = 1) -> None:
    """Run a case and compare it with the CPU backend.

    Args:
        kernels: that run it.
        memory: of theirs.
        case: what to run.
        launches: how often, into the same buffers.
    """
    frames = [frame.make(memory) for frame in case.frames]
    logits = [case.logits(index) for index in range(len(frames))]
    made = [_Made(memory, view, memory.put(low), case.outputs) for (view, _), low in zip(frames, logits, strict=True)]
    for _ in range(launches):
        kernels.postprocess(memory.stream, [each.canvas for each in made], case.logits_size, case.threshold, case.style)
    for each, low, (_, picture) in zip(made, logits, frames, strict=True):
        each.check(case, low, picture)
