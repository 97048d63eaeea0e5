"""One whole run: a request in, files and a report out, and frame by frame for those who want them.

``infer`` and ``infer_frames`` are the front; ``Inference`` is the run as an object, for those who watch it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.destinations import Claims
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.bundle_choice import choose_bundle
from espmedsam_edge.runtime.networks import Networks
from espmedsam_edge.runtime.output_plan import OutputPlan, plan_outputs
from espmedsam_edge.runtime.request import InferenceReport, InferenceRequest, ModelOptions, Outputs, ReadingOptions
from espmedsam_edge.runtime.run.controls import Adjustable, WithoutPause
from espmedsam_edge.runtime.run.handover import Handover
from espmedsam_edge.runtime.run.jobs import Limits, LiveReport, RunProgress, RunReport
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.sinks.background import BackgroundSinks
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.anonymous import SourceNames
from espmedsam_edge.runtime.sources.live import BackOff, LiveOptions
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.phantom import scene_named
from espmedsam_edge.runtime.sources.piped import STANDARD_INPUT
from espmedsam_edge.runtime.sources.selection import selected
from espmedsam_edge.runtime.sources.source import Failure, Source, SourceFrame

if TYPE_CHECKING:
    from espmedsam_edge.runtime.serve.server import Server

log = logging.getLogger(__name__)

Model = ModelOptions | Segmenter | Bundle | str | Path | None
Sources = str | Path | Sequence[str | Path]


def infer(
    sources: Sources,
    model: Model = None,
    outputs: Outputs = Outputs(),
    reading: ReadingOptions = ReadingOptions(),
    serve: ServeOptions | None = None,
    on_progress: Callable[[RunProgress], None] | None = None,
) -> InferenceReport:
    """Segment files, cameras and streams and write the results, as the command ``espmedsam-edge infer`` does.

    Examples:
        >>> import cv2
        >>> from espmedsam_edge import Outputs, infer
        >>> from espmedsam_edge.phantoms import phantom
        >>> picture, _ = phantom("microscopy", seed=3, size=(120, 160))
        >>> cv2.imwrite("cells.png", picture)
        True
        >>> report = infer("cells.png", outputs=Outputs(masks="masks", jsonl="areas.jsonl"))
        >>> report.modality, report.frames, report.failures
        ('microscopy', 1, [])
        >>> cv2.imread("masks/cells.png", cv2.IMREAD_UNCHANGED).shape
        (120, 160)

    Args:
        sources: one or several: images, videos, DICOM files, folders, globs, cameras and streams.
        model: a bundle, its path, or ``ModelOptions``; None: the weights that came with the program. A ``Segmenter``
            that is loaded already stays the caller's.
        outputs: what is written; without any, overlays beside where you are.
        reading: limits, and how streams are read.
        serve: shows the run in the browser until it ends.
        on_progress: called after each frame, from another thread.

    Returns:
        What was done. A source that fails is in ``failures``, and the rest is done.

    Raises:
        UserError: nothing to segment, a bundle, an option or a place that will not do, or a result that all sources
            share could not be written.
        KeyboardInterrupt: Ctrl-C, without a live source; finished files are kept, unfinished ones removed.
    """
    with Inference(_request(sources, model, outputs, reading, serve)) as run:
        return run.run(on_progress)


def infer_frames(
    sources: Sources, model: Model = None, outputs: Outputs | None = None, reading: ReadingOptions = ReadingOptions()
) -> Iterator[tuple[SourceFrame, Segmentation]]:
    """Segment files, cameras and streams, and give each frame with its result as soon as it is there.

    Reading, segmenting and writing go on meanwhile, some frames ahead and no more, and wait for whoever takes longer;
    live sources skip to their newest frame instead. Leaving the loop ends the run as Ctrl-C does: what is finished and
    what live sources gave is kept, unfinished files are removed. What fails is raised once the rest is done; with
    ``Inference`` it is in the report instead.

    Examples:
        >>> import cv2
        >>> from espmedsam_edge import ModelOptions, infer_frames
        >>> from espmedsam_edge.phantoms import phantom
        >>> for number in (1, 2):
        ...     _ = cv2.imwrite(f"cells-{number}.png", phantom("microscopy", seed=number, size=(120, 160))[0])
        >>> for frame, result in infer_frames("cells-*.png", ModelOptions(modality="microscopy")):
        ...     print(frame.source, result.mask.shape, result.area > 0)
        cells-1.png (120, 160) True
        cells-2.png (120, 160) True

    Args:
        sources: see ``infer``.
        model: see ``infer``.
        outputs: what is written besides; None: nothing.
        reading: see ``infer``.

    Yields:
        A frame (``image`` is (H, W, 3) uint8 BGR) and its result, in order within each source.

    Raises:
        UserError: see ``infer``, when the first frame is asked for or later; after the last one, what failed.
    """
    with Inference(_request(sources, model, outputs, reading)) as run:
        yield from run.frames()
        failures = run.report.failures if run.report is not None else []
    for failure in failures:
        log.warning("failed: %s", failure.message)
    if failures:
        more = f"{len(failures) - 1} more failed: see the report of Inference." if len(failures) > 1 else ""
        raise UserError(failures[0].message, more, exit_code=1)


def _request(
    sources: Sources,
    model: Model,
    outputs: Outputs | None,
    reading: ReadingOptions,
    serve: ServeOptions | None = None,
) -> InferenceRequest:
    options = model if isinstance(model, (ModelOptions, Segmenter)) else ModelOptions(model)
    return InferenceRequest(sources, options, outputs, reading, serve)


def _many(sources: Sequence[Source]) -> bool:
    """Whether files of several frames are read, for which nobody waits in particular."""
    several = len(sources) > 1 or any(source.kind == "video" or len(source.files) > 1 for source in sources)
    return several and not any(source.live for source in sources)


@contextmanager
def open_service(model: ModelOptions, serve: ServeOptions) -> Iterator[Server]:
    """Answer ``POST /v1/segment``, and its page, without a run.

    Raises:
        UserError: a bundle or an option that will not do, or the address is taken.
    """
    from espmedsam_edge.runtime.serve.serving import serve_alone

    chosen = choose_bundle(model.bundle, model.modality, model.precision)
    with serve_alone(serve, chosen, **model.to_load()) as server:
        yield server


class Inference:
    """One run: enter it to have everything opened, planned and loaded, then ``run`` it once, or take its ``frames``.

    What stays open until it is left: the segmenter and, if asked for, the server.

    Examples:
        >>> from espmedsam_edge import Inference, InferenceRequest, ModelOptions, Outputs
        >>> with Inference(InferenceRequest("retina.png", ModelOptions("fundus.bundle"), Outputs())) as run:
        ...     run.controls.threshold = 0.4
        ...     report = run.run()
        >>> report.frames, report.results
        (1, {'overlays': PosixPath('retina-overlay.png')})

    Attributes:
        sources: those that could be opened; empty: there is nothing to run, and the report says why.
        segmenter: what runs, once entered, if there are sources; where each picture is recognised, the first one's.
        background: takes sinks of live sources, so that a slow one holds nothing up.
        controls: what may change while it runs: threshold, opacity, modality, a pause.
        server: shows the run, if that was asked for.
        report: once the run has ended.
    """

    segmenter: Segmenter
    background: BackgroundSinks
    _networks: Networks

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.sources: list[Source] = []
        self.server: Server | None = None
        self.report: InferenceReport | None = None
        self._names = SourceNames()
        self._failures: list[Failure] = []
        self.controls = Adjustable()
        self._claims = Claims()
        self._plan: OutputPlan | None = None
        self._held: ExitStack | None = None

    def __enter__(self) -> Inference:
        """Open, plan and load.

        Raises:
            UserError: see ``infer``.
        """
        with ExitStack() as stack:
            stack.enter_context(self._names.in_errors())
            stack.enter_context(self._names.in_records())
            self._open(stack)
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._held is not None:
            self._held.__exit__(kind, error, traceback)

    def run(
        self,
        on_progress: Callable[[RunProgress], None] | None = None,
        sinks: Sequence[Sink] = (),
        stop: threading.Event | None = None,
    ) -> InferenceReport:
        """Segment everything.

        Args:
            on_progress: called after each frame, from another thread.
            sinks: take the frames of all sources besides; not yet entered.
            stop: does what Ctrl-C does once it is set, from any thread.

        Raises:
            UserError, KeyboardInterrupt: see ``infer``.
        """
        if self._held is None or self.report is not None:
            raise RuntimeError("enter a run before it runs, and run it once")
        if self._plan is None or not self._plan.jobs:  # no source could be opened, or all was done before
            self.report = self._without_frames(self._plan)
            return self.report
        reading = self.request.reading
        limits = Limits(reading.frames, reading.duration, reading.max_latency, self._networks.min_confidence)
        controls = WithoutPause(self.controls) if self._plan.writes else self.controls
        with ExitStack() as stack:
            pool = self._networks.pool
            shared = [stack.enter_context(sink) for sink in (*self._plan.shared, *sinks, *self._networks.sinks())]
            segmenter_of = None if pool is None else pool.get
            done = run_pipeline(
                self.segmenter, self._plan.jobs, shared, on_progress, controls, limits, stop, segmenter_of
            )
        self._claims.release()
        self.report = self._reported(done, self._plan)
        return self.report

    def frames(self) -> Iterator[tuple[SourceFrame, Segmentation]]:
        """Run, and give each frame with its result; see ``infer_frames``."""
        handed, stop, errors = Handover(), threading.Event(), list[BaseException]()

        def work() -> None:
            try:
                self.run(sinks=[handed], stop=stop)
            except BaseException as error:  # noqa: BLE001 (nothing is swallowed: it is raised below)
                errors.append(error)
            finally:
                handed.end()

        thread = threading.Thread(target=work, name="espmedsam-frames", daemon=True)
        thread.start()
        try:
            yield from handed.take()
        finally:
            stop.set()
            handed.leave()
            thread.join()
            for error in errors:
                if not isinstance(error, KeyboardInterrupt):  # of ``stop``
                    raise error

    def _open(self, stack: ExitStack) -> None:
        self._networks = networks = Networks(self.request.model)
        if not self.request.named:
            after = "" if networks.bundle is None else f" after {networks.bundle.path}"
            raise UserError("nothing to segment.", f"Name images, videos or a camera{after}.")
        self._open_sources(networks)
        if not self.sources or networks.bundle is None or networks.graph is None:
            return
        reading, serve = self.request.reading, self.request.serve
        others = serve is not None or any(not source.live for source in self.sources)
        self.background = BackgroundSinks(self._failures, reading.max_latency, others)
        self._plan = plan_outputs(
            self.request,
            self.sources,
            networks.bundle,
            networks.parameters,
            controls=self.controls,
            background=self.background,
            names=self._names,
            claims=stack.enter_context(self._claims),
            selection=self._selection,
        )
        self.sources = [job.source for job in self._plan.jobs]
        if not self.sources:
            return
        live = any(source.live for source in self.sources)
        networks.load(stack, self._plan.style_of, many=serve is None and _many(self.sources), live=live)
        self.segmenter = networks.segmenter
        if serve is not None:
            self._serve(stack, serve, self._plan)

    def _open_sources(self, networks: Networks) -> None:
        reading, named = self.request.reading, self.request.named
        live = LiveOptions(BackOff(give_up=reading.give_up), reading.decoder)
        names = self._names if reading.anonymous_names else None
        if STANDARD_INPUT in named:
            networks.refuse("standard input")
        if networks.modality is not None:
            named = [scene_named(source, networks.modality) for source in named]
        opened, self._failures = open_sources(named, live, names)

        self._selection = reading.selection()
        self.sources, failures = networks.look_at(
            selected(opened, self._selection),
            lambda: selected(open_sources(named, names=names)[0], reading.selection()),
        )
        self._failures += failures

    def _serve(self, stack: ExitStack, serve: ServeOptions, plan: OutputPlan) -> None:
        from espmedsam_edge.runtime.serve.serving import serve_run

        model = self.request.model if isinstance(self.request.model, ModelOptions) else ModelOptions()
        view, self.server = stack.enter_context(
            serve_run(
                serve,
                self.segmenter,
                self.controls,
                **model.to_load(),
                opacity=(self.request.outputs or Outputs()).opacity,
                writes=plan.writes,
                pool=self._networks.pool,
                live=any(source.live for source in self.sources),
            )
        )
        self._plan = replace(plan, shared=[*plan.shared, view])

    def _without_frames(self, plan: OutputPlan | None) -> InferenceReport:
        with ExitStack() as stack:
            for sink in () if plan is None else plan.shared:
                stack.enter_context(sink)
        self._claims.release()
        return InferenceReport(self._names.hide_all(self._failures), done=0 if plan is None else plan.done)

    def _reported(self, done: RunReport, plan: OutputPlan) -> InferenceReport:
        segmenter = self.segmenter
        on_gpu = segmenter.frame_backend if done.frames else None
        networks = self._networks.reports()
        return InferenceReport(
            failures=self._names.hide_all(self._failures + done.failures + self._networks.refusals.failures()),
            bundle=segmenter.bundle.path,
            modality=", ".join(network.modality for network in networks) or segmenter.modality,
            precision=segmenter.precision,
            backend=segmenter.choice.taken,
            why=segmenter.choice.why,
            networks=networks,
            passed_over=segmenter.choice.passed_over,
            trained=segmenter.bundle.manifest.weights.origin != "random",
            frames=done.frames,
            seconds=done.seconds,
            stage_seconds=done.stage_seconds,
            live=[self._with_written(live) for live in done.live],
            results={what: place for what, place in plan.results.items() if place.exists()},
            gpu_memory=None if on_gpu is None else on_gpu.device_use(),
            unjudged=self._networks.unjudged(),
            interrupted=done.interrupted,
            unfinished=done.unfinished,
            done=plan.done,
        )

    def _with_written(self, live: LiveReport) -> LiveReport:
        """With what the sinks in the background made of it."""
        refused = live.refused + self.background.refused(live.label)
        return replace(live, refused=refused, written=self.background.slowest(live.label))
