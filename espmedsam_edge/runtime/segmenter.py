"""A loaded modality: frame in, ``Segmentation`` out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import numpy as np

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame, Tensor, mask_from_logits, preprocess
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.remote_bundles import open_bundle
from espmedsam_edge.runtime.auto.fastest import load_fastest
from espmedsam_edge.runtime.backends.accepted_frames import check_host_frame, from_elsewhere
from espmedsam_edge.runtime.backends.averaging import averaged
from espmedsam_edge.runtime.backends.backend import (
    AnyFrame,
    Backend,
    Choice,
    FrameBackend,
    FrameOptions,
    OverlappingBackend,
    Started,
    load_backend,
)
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec
from espmedsam_edge.runtime.segmentation import DeviceLost, DoesNotFit, Segmentation, Timings, check_threshold, finite
from espmedsam_edge.runtime.tiling import AUTO, Tiler, segment_tiles

log = logging.getLogger(__name__)


class Segmenter(Closing):
    """One modality of a bundle on one backend. Safe to call from several threads; calls take turns on the backend.

    Examples:
        >>> import cv2
        >>> from espmedsam_edge import Segmenter
        >>> with Segmenter.load("fundus.bundle") as segmenter:
        ...     result = segmenter.segment(cv2.imread("retina.png"))
        >>> result.modality, result.mask.shape
        ('fundus', (120, 160))
    """

    def __init__(
        self,
        bundle: Bundle,
        choice: Choice,
        threshold: float,
        overlay: OverlayStyle | None = None,
        fall_back: Callable[[], Choice] | None = None,
        tile: str | int = AUTO,
    ) -> None:
        """Take a loaded backend; ``load`` is the usual way.

        Args:
            bundle, choice: where the graph is from, and its backend.
            threshold, overlay: see ``load``.
            fall_back: loads the backend on the CPU that takes what a GPU cannot: all once it is lost, before that what
                does not fit there. None: such frames fail.
            tile: see ``load``.
        """
        self.bundle = bundle
        self.graph = choice.backend.graph
        self.threshold = threshold
        self._lock = threading.RLock()
        self._fall_back = fall_back
        self._on_cpu: Choice | None = None  # what ``fall_back`` gave
        self._spare_images: list[Tensor] = []  # of groups that were under way
        if overlay is not None:
            overlay = replace(overlay, notice="")  # the one part of an overlay that is always written on the CPU
        self.frame_options = FrameOptions(bundle.manifest.input.normalization, threshold, overlay)
        self.tiler = Tiler(tile, bundle.manifest.scales.get(self.modality), self.modality)
        self._take(choice)
        self._closed = False

    def _take(self, choice: Choice) -> None:
        self.choice = choice
        # A backend that takes whole frames, or None for one that has only the network.
        self.frame_backend = choice.backend if isinstance(choice.backend, FrameBackend) else None

    @classmethod
    def load(
        cls,
        bundle: Bundle | str | Path,
        modality: str | None = None,
        precision: str | None = None,
        backend: str = "auto",
        threshold: float | None = None,
        threads: int | None = None,
        overlay: OverlayStyle | None = None,
        tta: bool = False,
        tile: str | int = AUTO,
        *,
        many: bool = False,
    ) -> Segmenter:
        """Open a bundle and load one of its graphs.

        Args:
            bundle: a bundle, or its path or address (``remote_bundles``).
            modality: may be left out where the bundle has one.
            precision: "fp32", "fp16" or "int8"; None: fp32, else what there is; with "auto" the fastest that is right.
            backend: a name of ``runtime.backends.backend.BACKENDS``, or one with words after it, such as "openvino:GPU"
                (``BackendSpec``), or "auto" (``load_fastest``); ``segmenter.choice`` tells which was taken, and why.
                With "auto", frames that do not fit on a GPU, and all once it is lost, go to the CPU; that is logged.
            threshold: the probability (between 0 and 1) from which a pixel is foreground; None: the manifest's.
            threads: CPU threads; None: the physical cores the process may use.
            overlay: the style that ``Segmentation.overlay`` will be asked for: a backend on a GPU draws it on its way.
            tta: average the network over mirrored and turned copies of each frame, those that the modality allows
                (``modalities.views_of``); frames must be in the host's memory then.
            many: whether many frames are to be under way at once (``start``), so that their rate counts.
            tile: how large frames are segmented: "off", whole; a number, in overlapping tiles of that many pixels if
                they are larger; "auto", as the bundle says. Frames that lie on a GPU are taken whole.

        Raises:
            UserError: what is wrong with the bundle, a name or this machine.
        """
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        if threshold is None:
            threshold = opened.manifest.threshold
        check_threshold(threshold)
        many = many and not tta  # whose views are runs one after the other
        if backend == "auto":
            choice = load_fastest(opened, modality, precision, threads, many=many)
        else:
            name = str(BackendSpec.parse(backend).for_many()) if many else backend
            choice = load_backend(opened, opened.graph(modality, precision), name, threads)

        def finished(loaded: Choice) -> Choice:
            return averaged(loaded) if tta else loaded

        def on_the_cpu() -> Choice:
            return finished(load_backend(opened, choice.backend.graph, "onnxruntime-cpu", threads))

        return cls(opened, finished(choice), threshold, overlay, on_the_cpu if backend == "auto" else None, tile)

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

    def segment(self, frame: AnyFrame) -> Segmentation:
        """Segment one frame, (H, W, 3) uint8 BGR of any size.

        A backend on a GPU also takes frames in place that another library holds there: anything with DLPack or
        ``__cuda_array_interface__``.

        Raises:
            DoesNotFit: too large for the GPU, where the backend was asked for by name.
            NotFinite: the network's output is NaN or infinite.
            UserError: not such an array, or the backend failed.
        """
        return self.segment_batch([frame])[0]

    def segment_batch(self, frames: Sequence[AnyFrame], threshold: float | None = None) -> list[Segmentation]:
        """Segment frames, of any number and sizes, in groups of the graph's batch; the last group is padded.

        Args:
            frames: each as for ``segment``.
            threshold: for these frames, between 0 and 1; None: the segmenter's own.

        Raises:
            DoesNotFit: as for ``segment``.
            NotFinite: of some frames; carries the results of the others.
            UserError: an array that is not (H, W, 3) uint8, or the backend failed.
        """
        options = self._checked(frames, threshold)
        results: list[Segmentation] = []
        for start in range(0, len(frames), self.batch):
            group = frames[start : start + self.batch]
            results += self._tiled(group, options) or self._segment_group(group, options)
        return finite(results)

    @property
    def in_flight(self) -> int:
        """How many groups of ``start`` overlap: 1 where the backend does one thing after the other."""
        backend = self.choice.backend
        return backend.in_flight if isinstance(backend, FrameBackend | OverlappingBackend) else 1

    def start(self, frames: Sequence[AnyFrame], threshold: float | None = None) -> Started:
        """Hand over a group of frames and return, so that several overlap; where the backend cannot, segment them now.

        Examples:
            >>> started = [segmenter.start([frame]) for frame in (first, second)]  # doctest: +SKIP
            >>> results = [group.results()[0] for group in started]  # doctest: +SKIP

        Args:
            frames: at most ``batch``, each as for ``segment``; they stay as they are until the results were asked for.
            threshold: as for ``segment_batch``.

        Returns:
            What gives the results, one a frame. With more than ``in_flight`` groups under way, ``start`` waits for the
            oldest of them first; its results are kept.

        Raises:
            ValueError: more frames than the graph takes, or none.
            UserError: as for ``segment_batch``; what fails later is raised where the results are asked for.
        """
        if not 1 <= len(frames) <= self.batch:
            raise ValueError(f"{len(frames)} frames for a graph with batch {self.batch}")
        options = self._checked(frames, threshold)
        tiled = self._tiled(frames, options)
        return self._start(frames, options) if tiled is None else _Later(lambda: tiled)

    def _tiled(self, frames: Sequence[AnyFrame], options: FrameOptions) -> list[Segmentation] | None:
        """The results of a group with a frame that is taken in tiles; None: it has none."""
        tiles = [self.tiler.tiles(frame, self.graph) for frame in frames]
        if not any(tiles):
            return None
        return [
            self._segment_group([frame], options)[0]
            if its is None
            else segment_tiles(cast(Frame, frame), its, options, self._start, self.batch, self.in_flight)
            for frame, its in zip(frames, tiles, strict=True)
        ]

    def _start(self, frames: Sequence[AnyFrame], options: FrameOptions) -> Started:
        with self._lock:
            self._check_open()
            if self.frame_backend is not None:
                try:
                    started = self.frame_backend.start_frames(frames, options)
                    return _Later(lambda: self._finish(frames, options, started))
                except UserError as error:
                    return _Later(partial(list, self._on_the_cpu_instead(error, frames, options)))
            if isinstance(self.choice.backend, OverlappingBackend):
                return self._start_tensors(self.choice.backend, cast(Sequence[Frame], frames), options)
        return _Later(partial(list, self._segment_group(frames, options)))

    def _finish(self, frames: Sequence[AnyFrame], options: FrameOptions, started: Started) -> list[Segmentation]:
        with self._lock:
            try:
                return started.results()
            except UserError as error:
                return self._on_the_cpu_instead(error, frames, options)

    def _on_the_cpu_instead(
        self, error: UserError, frames: Sequence[AnyFrame], options: FrameOptions
    ) -> list[Segmentation]:
        """Segment frames on the CPU that the GPU could not take, where that may be; else raise its error."""
        lost = isinstance(error, DeviceLost)
        on_gpu = any(not isinstance(frame, np.ndarray) for frame in frames)
        if self._fall_back is None or on_gpu or not (lost or isinstance(error, DoesNotFit)):
            raise error
        self._check_open()
        if len(frames) > 1 and not lost:  # each of them may fit
            return [self._segment_group([frame], options)[0] for frame in frames]
        first = self._on_cpu is None
        found = self._on_cpu = self._on_cpu or self._fall_back()
        if lost and self.choice.backend is not found.backend:
            log.warning("The GPU is lost: %s Going on with %s, more slowly. %s", error.message, found.taken, error.hint)
            gone = self.choice
            self._take(Choice(found.backend, (*gone.passed_over, f"not {gone.backend.name}: {error}")))
            gone.backend.close()
        elif first:
            log.warning("%s Such frames go to %s, more slowly. %s", error.message, found.taken, error.hint)
        return self._segment_tensors(cast(Sequence[Frame], frames), options, found.backend)

    def _checked(self, frames: Sequence[AnyFrame], threshold: float | None) -> FrameOptions:
        """The options for frames that are arrays such as the backend takes."""
        for frame in frames:
            if self.frame_backend is None or isinstance(frame, np.ndarray) or not from_elsewhere(frame):
                check_host_frame(frame)
        return self.frame_options if threshold is None else replace(self.frame_options, threshold=threshold)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the segmenter is closed")

    def _segment_group(self, group: Sequence[AnyFrame], options: FrameOptions) -> list[Segmentation]:
        try:
            with self._lock:
                self._check_open()
                if self.frame_backend is not None:
                    return self.frame_backend.segment_frames(group, options)
            # Of the network alone only its run is taken in turn: masks are made beside other callers' frames.
            return self._segment_tensors(cast(Sequence[Frame], group), options)
        except UserError as error:
            with self._lock:
                return self._on_the_cpu_instead(error, group, options)

    @cached_property
    def _image(self) -> Tensor:
        """Reused from frame to frame; rows of a batch that no frame fills stay what they were, which is harmless."""
        return np.zeros(self.graph.input_shape, np.float32)

    def _segment_tensors(
        self, frames: Sequence[Frame], options: FrameOptions, backend: Backend | None = None
    ) -> list[Segmentation]:
        """Segment checked frames on a backend that has only the network; None: the one that is taken."""
        with self._lock:
            self._check_open()
            preprocess_seconds = self._preprocess(frames, options, self._image)
            begin = time.perf_counter()
            logits = (backend or self.choice.backend).run(self._image)
            inference_seconds = time.perf_counter() - begin
        return self._masks(logits, frames, options, preprocess_seconds, inference_seconds)

    def _start_tensors(self, backend: OverlappingBackend, frames: Sequence[Frame], options: FrameOptions) -> Started:
        """Hand checked frames to a backend that computes while others are prepared and finished."""
        image = self._spare_images.pop() if self._spare_images else np.zeros(self.graph.input_shape, np.float32)
        preprocess_seconds = self._preprocess(frames, options, image)
        run = backend.start(image)

        def finish() -> list[Segmentation]:
            with self._lock:
                begin = time.perf_counter()
                logits = run.logits()
                waited = time.perf_counter() - begin
                self._spare_images.append(image)
                return self._masks(logits, frames, options, preprocess_seconds, waited)

        return _Later(finish)

    def _preprocess(self, frames: Sequence[Frame], options: FrameOptions, image: Tensor) -> list[float]:
        """Write the network's input for each frame; seconds of each."""
        seconds = []
        for row, frame in enumerate(frames):
            begin = time.perf_counter()
            preprocess(frame, self.image_size, options.normalization, out=image[row : row + 1])
            seconds.append(time.perf_counter() - begin)
        return seconds

    def _masks(
        self,
        logits: Tensor,
        frames: Sequence[Frame],
        options: FrameOptions,
        preprocess_seconds: list[float],
        inference_seconds: float,
    ) -> list[Segmentation]:
        results = []
        for row, frame in enumerate(frames):
            begin = time.perf_counter()
            low = logits[row, 0].copy() if len(logits) > 1 else logits[0, 0]  # a view would keep the whole batch alive
            mask = mask_from_logits(low, frame.shape[:2], options.threshold)
            timings = Timings(preprocess_seconds[row], inference_seconds / len(frames), time.perf_counter() - begin)
            results.append(Segmentation(mask, self.modality, low, options.threshold, timings))
        return results

    def stage_seconds(self, frames: Sequence[AnyFrame]) -> dict[str, float]:
        """Seconds of each stage of one batch by the device's own clock, for measuring.

        Raises:
            ValueError: the backend does not take whole frames (``frame_backend`` is None).
            UserError: the backend failed.
        """
        if self.frame_backend is None:
            raise ValueError(f"{self.choice.backend.name} has no stages of its own")
        with self._lock:
            return self.frame_backend.stage_seconds(frames, self.frame_options)

    def close(self) -> None:
        """Free the graph, after the call that is running; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.choice.backend.close()
                if self._on_cpu is not None:
                    self._on_cpu.backend.close()


class _Later:
    """Frames that were handed over: what finishes them is called once, when the results are asked for."""

    def __init__(self, finish: Callable[[], list[Segmentation]]) -> None:
        self._finish = finish
        self._results: list[Segmentation] | None = None
        self._lock = threading.Lock()

    def results(self) -> list[Segmentation]:
        with self._lock:
            if self._results is None:
                self._results = self._finish()
        return finite(self._results)
