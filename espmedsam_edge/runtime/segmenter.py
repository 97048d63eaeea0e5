"""A loaded modality: frame in, ``Segmentation`` out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame, mask_from_logits, preprocess
from espmedsam_edge.runtime.backend import Choice, load_backend
from espmedsam_edge.runtime.segmentation import Segmentation, Timings


class Segmenter:
    """One modality of a bundle on one backend. Safe to call from several threads; calls take turns on the backend.

    Example:
        >>> with Segmenter.load("fundus.bundle") as segmenter:  # doctest: +SKIP
        ...     result = segmenter.segment(frame)
        ...     print(result.area, result.bounding_box)
    """

    def __init__(self, bundle: Bundle, choice: Choice, threshold: float) -> None:
        self.bundle = bundle
        self.choice = choice
        self.graph = choice.backend.graph
        self.threshold = threshold
        self._lock = threading.Lock()
        # Reused from frame to frame; the rows of a batch that no frame fills stay what they were, which is harmless.
        self._image = np.zeros(self.graph.input_shape, np.float32)
        self._closed = False

    @classmethod
    def load(
        cls,
        bundle: Bundle | str | Path,
        modality: str | None = None,
        precision: str | None = None,
        backend: str = "auto",
        threshold: float | None = None,
        threads: int | None = None,
    ) -> Segmenter:
        """Open a bundle and load one of its graphs.

        Args:
            bundle: a bundle, or the path of one.
            modality: may be left out where the bundle has one.
            precision: "fp32", "fp16" or "int8"; None: fp32, else what there is.
            backend: a name of ``runtime.backend.BACKENDS``, or "auto"; ``segmenter.choice`` tells which was taken.
            threshold: the probability (between 0 and 1) from which a pixel is foreground; None: the manifest's.
            threads: CPU threads; None: the physical cores the process may use.

        Raises:
            UserError: what is wrong with the bundle, a name or this machine.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if threshold is None:
            threshold = opened.manifest.threshold
        if not 0 < threshold < 1:
            raise UserError(f"threshold {threshold} is not between 0 and 1.", "It is a probability; 0.5 is usual.")
        graph = opened.graph(modality, precision)
        return cls(opened, load_backend(opened, graph, backend, threads), threshold)

    @property
    def modality(self) -> str:
        """The modality it segments."""
        return self.graph.modality

    @property
    def precision(self) -> str:
        """The graph's precision: "fp32", "fp16" or "int8"."""
        return self.graph.precision

    @property
    def image_size(self) -> int:
        """S: the side in pixels of the square the network sees."""
        return self.graph.image_size

    @property
    def batch(self) -> int:
        """How many frames one run of the graph takes."""
        return self.graph.batch

    def segment(self, frame: Frame) -> Segmentation:
        """Segment one frame, (H, W, 3) uint8 BGR of any size.

        Raises:
            UserError: not such an array, or the backend failed.
        """
        return self.segment_batch([frame])[0]

    def segment_batch(self, frames: Sequence[Frame]) -> list[Segmentation]:
        """Segment frames, of any number and sizes, in groups of the graph's batch; the last group is padded.

        Raises:
            UserError: an array that is not (H, W, 3) uint8, or the backend failed.
        """
        for frame in frames:
            _check(frame)
        results: list[Segmentation] = []
        for start in range(0, len(frames), self.batch):
            results += self._segment_group(frames[start : start + self.batch])
        return results

    def _segment_group(self, frames: Sequence[Frame]) -> list[Segmentation]:
        preprocess_seconds = []
        with self._lock:
            if self._closed:
                raise RuntimeError("the segmenter is closed")
            for row, frame in enumerate(frames):
                begin = time.perf_counter()
                normalization = self.bundle.manifest.input.normalization
                preprocess(frame, self.image_size, normalization, out=self._image[row : row + 1])
                preprocess_seconds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            logits = self.choice.backend.run(self._image)
            inference_seconds = (time.perf_counter() - begin) / len(frames)
        results = []
        for row, frame in enumerate(frames):
            begin = time.perf_counter()
            low = logits[row, 0].copy() if len(logits) > 1 else logits[0, 0]  # a view would keep the whole batch alive
            mask = mask_from_logits(low, frame.shape[:2], self.threshold)
            timings = Timings(preprocess_seconds[row], inference_seconds, time.perf_counter() - begin)
            results.append(Segmentation(mask, self.modality, low, self.threshold, timings))
        return results

    def close(self) -> None:
        """Free the graph, after the call that is running; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.choice.backend.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check(frame: Frame) -> None:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise UserError(
            f"a frame must be a uint8 array of shape (height, width, 3), BGR; got {found}.",
            "Read files with espmedsam_edge.imaging.decode.read_image, which converts them.",
        )
    if 0 in frame.shape:
        raise UserError(f"the frame is empty: {frame.shape}.", "Give a frame of at least one pixel.")
