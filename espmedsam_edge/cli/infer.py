"""``espmedsam-edge infer``: files, cameras and streams in; overlays, masks and measurements out."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from espmedsam_edge.cli.messages import shows_progress
from espmedsam_edge.terminal import tell, terminal_console

if TYPE_CHECKING:
    from espmedsam_edge.bundle import Bundle
    from espmedsam_edge.runtime.dicom.segmentation import Algorithm
    from espmedsam_edge.runtime.latency import Latency
    from espmedsam_edge.runtime.run.jobs import LiveReport, RunProgress, RunReport
    from espmedsam_edge.runtime.run.plan import Measurements
    from espmedsam_edge.runtime.segmenter import Segmenter
    from espmedsam_edge.runtime.serve.options import ServeOptions
    from espmedsam_edge.runtime.serve.server import Server
    from espmedsam_edge.runtime.sinks.background import BackgroundSinks
    from espmedsam_edge.runtime.sinks.places import Places
    from espmedsam_edge.runtime.sources.source import Failure

log = logging.getLogger(__name__)

Decoder = Literal["auto", "software", "hardware"]
Contours = Literal["none", "polygons", "rle", "both"]
Uids = Literal["hashed", "plain"]
_LISTED_FAILURES = 20
_ARGUMENTS = (
    "BUNDLE: the folder that export wrote; without one, the weights that came with the program. "
    "SOURCE: images, videos, DICOM files, folders, globs; 0 or v4l2:///dev/video0 (USB camera), csi://0 (Jetson), "
    "rtsp://..., http://... (streams), test:// or test://fundus (a moving phantom)."
)


def command(
    arguments: list[str] | None = typer.Argument(None, metavar="[BUNDLE] SOURCE...", help=_ARGUMENTS),
    modality: str | None = typer.Option(
        None, help="What to segment. [default: the bundle's only one; without a bundle, as the first picture looks]"
    ),
    precision: str | None = typer.Option(None, help="fp32, fp16 or int8. [default: fp32, else what there is]"),
    backend: str = typer.Option("auto", help="What runs the graph; auto takes the best that works here."),
    out: Path | None = typer.Option(
        None,
        help="Overlays: a file for one image or video, else a folder. "
        "[default: NAME-overlay.png or .mp4, or the folder overlays; none if other results alone are asked for]",
    ),
    masks: Path | None = typer.Option(None, help="A folder for masks: PNG, 0 and 255, at the frame's size."),
    mask_video: Path | None = typer.Option(
        None, help="Masks as video, white on black: .mp4, .mov or .mkv for one video, else a folder."
    ),
    jsonl: str | None = typer.Option(None, help="A file for one line of JSON a frame; - for standard output."),
    contours: Contours = typer.Option("none", help="In those lines: the mask as polygons, as COCO's rle, or both."),
    uids: Uids | None = typer.Option(
        None, help="In those lines: DICOM's study, series and instance identifiers, hashed or plain. [default: neither]"
    ),
    csv: Path | None = typer.Option(None, help="A file for a table of the area in each frame."),
    plot: Path | None = typer.Option(None, help="A PNG of the area over time."),
    dicom_seg: Path | None = typer.Option(
        None, help="DICOM-SEG of DICOM inputs: a .dcm file for one, else a folder. Holds the source's patient data."
    ),
    anonymous_names: bool = typer.Option(
        False,
        "--anonymous-names",
        help="Call sources source-1, source-2-0001, ... in results, messages and the view: names may hold a patient's.",
    ),
    stream: str | None = typer.Option(
        None, help="Send the overlay: udp://HOST:PORT or rtp://HOST:PORT (MPEG-TS), or rtsp://SERVER/PATH."
    ),
    threshold: float | None = typer.Option(None, help="Probability from which a pixel counts. [default: the bundle's]"),
    opacity: float = typer.Option(0.35, min=0, max=1, help="Of the overlay's tint."),
    frames: int | None = typer.Option(None, min=1, help="Stop after that many frames of each source."),
    duration: float | None = typer.Option(None, min=0, help="Stop reading after that many seconds."),
    max_latency: float | None = typer.Option(
        None, min=0, help="Refuse frames of live sources that are older than that many seconds."
    ),
    give_up: float | None = typer.Option(
        None, min=0, help="Give a live source up that is gone for that many seconds. [default: never]"
    ),
    decoder: Decoder = typer.Option("auto", help="Of streams: hardware is the Jetson's, by GStreamer."),
    threads: int | None = typer.Option(None, min=1, help="CPU threads. [default: the cores there are]"),
    overwrite: bool = typer.Option(
        True, help="Replace results that exist; those of cameras and streams stay, and new ones are numbered."
    ),
    serve: str | None = typer.Option(
        None,
        metavar="[HOST:]PORT",
        help="Show the run in the browser and answer POST /v1/segment there; without a SOURCE only the latter. "
        "A port alone is reachable from this machine only. Then nothing is written unless asked for.",
    ),
    token: str | None = typer.Option(
        None,
        envvar="ESPMEDSAM_TOKEN",
        show_envvar=True,
        help="What viewers must enter. [default: none on this machine only, else one is made and printed]",
    ),
    allow_host: list[str] | None = typer.Option(
        None, metavar="NAME", help="A further name of this server, such as that of a proxy before it."
    ),
) -> None:
    """Segment images, videos, cameras and streams; write overlays, masks and measurements.

    A file that cannot be read is reported at the end and the rest is done (exit code 1). Of cameras and streams always
    the newest frame is segmented; Ctrl-C ends them and keeps what was written.
    """
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
    from espmedsam_edge.runtime.bundle_choice import choose_bundle
    from espmedsam_edge.runtime.run.controls import Adjustable, WithoutPause
    from espmedsam_edge.runtime.run.pipeline import Limits, run_pipeline
    from espmedsam_edge.runtime.run.plan import Measurements, plan_jobs, shared_sinks
    from espmedsam_edge.runtime.segmenter import Segmenter
    from espmedsam_edge.runtime.serve.options import ServeOptions
    from espmedsam_edge.runtime.sinks.background import BackgroundSinks
    from espmedsam_edge.runtime.sinks.places import numbered, plan_places
    from espmedsam_edge.runtime.sources.anonymous import SourceNames
    from espmedsam_edge.runtime.sources.live import BackOff, LiveOptions
    from espmedsam_edge.runtime.sources.opening import open_sources
    from espmedsam_edge.runtime.sources.phantom import scene_named

    if not arguments and serve is None:
        raise UserError("nothing to segment.", "Name images, videos or a camera; --help shows how.")
    names = SourceNames()
    anonymous = names if anonymous_names else None
    with names.in_errors():
        opened, modality, sources = choose_bundle(arguments or (), modality, anonymous)
    if not sources:
        if serve is None:
            raise UserError("nothing to segment.", f"Name images, videos or a camera after {opened.path}.")
        options = ServeOptions(serve, token, allow_host or ())
        _serve_alone(opened, options, modality, precision, backend, threshold, threads)
        return
    graph = opened.graph(modality, precision)
    sources = [scene_named(source, graph.modality) for source in sources]
    live_options = LiveOptions(BackOff(give_up=give_up), decoder)
    found, failures = open_sources(sources, live_options, anonymous)
    measured = Measurements(jsonl, contours, uids, csv, plot)
    if not found:
        _end(None, names.hide_all(failures))
    places = plan_places(
        found,
        out,
        masks,
        Path(jsonl) if jsonl not in (None, "-") else None,
        overwrite=overwrite,
        mask_video=mask_video,
        dicom_seg=dicom_seg,
        tables=[path for path in (csv, plot) if path is not None],
        elsewhere=stream is not None or serve is not None or jsonl == "-",
        called=names.files,
    )
    if places.kept is not None:
        log.info("%s exists and is kept; this run writes %s.", places.kept, numbered(places.kept, places.number))
    measured = measured.numbered(places.number)
    origin = opened.manifest.weights.origin
    untrained = origin == "random"
    style = OverlayStyle(color_of(graph.modality), opacity, notice="untrained weights" if untrained else "")
    results = _results(places, measured)
    written = bool(results) or jsonl is not None or stream is not None
    controls = Adjustable()

    def current_style() -> OverlayStyle:
        opacity = controls.current().opacity
        return style if opacity is None else replace(style, opacity=opacity)

    others = serve is not None or any(not source.live for source in found)
    background = BackgroundSinks(failures, max_latency, others)
    algorithm = _algorithm(opened, graph.precision, trained=not untrained)
    paced = serve is not None and not written
    with names.in_errors():
        jobs = plan_jobs(found, places, current_style, algorithm, stream, background, paced=paced)
    sinks = shared_sinks(found, measured, {"weights": origin}, background)
    with ExitStack() as held:
        held.enter_context(names.in_errors())
        held.enter_context(_terminated_like_interrupted())
        segmenter = held.enter_context(
            Segmenter.load(
                opened,
                modality,
                precision,
                backend,
                threshold=threshold,
                threads=threads,
                overlay=None if places.overlays is None and stream is None else style,
            )
        )
        server = None
        if serve is not None:
            from espmedsam_edge.runtime.serve.serving import serve_run

            options = ServeOptions(serve, token, allow_host or ())
            view, server = held.enter_context(
                serve_run(
                    options,
                    segmenter,
                    controls,
                    precision=precision,
                    backend=backend,
                    threshold=threshold,
                    threads=threads,
                    opacity=opacity,
                    writes=written,
                    live=any(source.live for source in found),
                )
            )
            sinks = [*sinks, view]
        with ExitStack() as stack:
            shared = [stack.enter_context(sink) for sink in sinks]
            progress = stack.enter_context(_progress(len(jobs)))
            limits = Limits(frames, duration, max_latency)
            try:
                report = run_pipeline(
                    segmenter, jobs, shared, progress, WithoutPause(controls) if written else controls, limits
                )
            except KeyboardInterrupt:
                log.warning("interrupted: finished files were kept, unfinished ones removed.")
                raise typer.Exit(130) from None
        _say(segmenter, report, results, background, untrained=untrained, to_stderr=jsonl == "-")
        if server is not None and report.frames and not report.interrupted:
            _until_interrupted(server, f"the view stays at {server.url}: Ctrl-C ends it.")
    if report.interrupted and any(not source.live for source in found):
        log.warning("interrupted: what live sources gave was kept, unfinished files removed.")
        raise typer.Exit(130)
    _end(report, names.hide_all(failures + report.failures))


def _serve_alone(
    bundle: Bundle,
    options: ServeOptions,
    modality: str | None,
    precision: str | None,
    backend: str,
    threshold: float | None,
    threads: int | None,
) -> None:
    """Without a SOURCE: the service and its page, until Ctrl-C."""
    from espmedsam_edge.runtime.serve.serving import serve_alone

    with (
        _terminated_like_interrupted(),
        serve_alone(
            options,
            bundle,
            modality,
            precision=precision,
            backend=backend,
            threshold=threshold,
            threads=threads,
        ) as server,
    ):
        _until_interrupted(server)


def _until_interrupted(server: Server, line: str | None = None) -> None:
    """Wait for Ctrl-C, from the moment that ``line`` says so."""
    try:
        if line is not None:
            log.info("%s", line)
        server.wait()
    except KeyboardInterrupt:
        return


def _algorithm(bundle: Bundle, precision: str, *, trained: bool) -> Algorithm:
    """What DICOM-SEGs say of how they were made."""
    from espmedsam_edge.runtime.dicom.segmentation import Algorithm
    from espmedsam_edge.version import __version__

    checkpoint = bundle.manifest.weights.checkpoint_sha256
    return Algorithm(__version__, {"precision": precision, "checkpoint": checkpoint}, trained)


def _results(places: Places, measured: Measurements) -> list[tuple[str, Path]]:
    """What each result is called, and where it is."""
    json_file = Path(measured.jsonl) if measured.jsonl not in (None, "-") else None
    named = (
        ("overlays", places.overlay_folder),
        ("masks", places.mask_folder),
        ("mask videos", places.mask_video_folder),
        ("DICOM-SEG", places.segmentation_folder),
        ("measurements", json_file),
        ("areas", measured.table),
        ("plot", measured.plot),
    )
    return [(what, place) for what, place in named if place is not None]


def _say(
    segmenter: Segmenter,
    report: RunReport,
    results: Sequence[tuple[str, Path]],
    background: BackgroundSinks,
    *,
    untrained: bool,
    to_stderr: bool,
) -> None:
    def line(text: str) -> None:
        tell(text, err=to_stderr)

    line(f"{segmenter.bundle.path}: {segmenter.modality}, {segmenter.precision}, {segmenter.choice.taken}")
    for reason in segmenter.choice.passed_over:
        line(reason)
    for live in report.live:
        line(_live_line(live, background))
    if not report.frames:
        return
    if segmenter.frame_backend is not None:
        line(f"GPU memory: {segmenter.frame_backend.device_use()}")
    stages = ", ".join(
        f"{stage} {1000 * seconds / report.frames:.1f}" for stage, seconds in report.stage_seconds.items()
    )
    if segmenter.frame_backend is not None:
        line(f"GPU memory: {segmenter.frame_backend.device_use()}")
    frames = "1 frame" if report.frames == 1 else f"{report.frames} frames"
    line(f"{frames} in {report.seconds:.1f} s, {report.frames / report.seconds:.1f} FPS (ms a frame: {stages})")
    for what, place in results:
        if place.exists():
            line(f"{what}: {place}")
    if untrained:
        line("These weights were never trained: the masks mean nothing.")


def _live_line(live: LiveReport, background: BackgroundSinks) -> str:
    """What became of a live source: counts, and the age of its masks and of its written results in milliseconds."""
    refused, slowest = live.refused + background.refused(live.label), background.slowest(live.label)
    parts = [f"{live.frames} frames", f"{live.skipped} skipped"]
    if refused:
        parts.append(f"{refused} refused as too old")
    if live.reconnects:
        parts.append(f"dropped out {live.reconnects} times")
    if live.latency is not None:
        parts.append(f"latency {_percentiles(live.latency)} to the mask")
    if slowest is not None:
        parts.append(f"{_percentiles(slowest[1])} to {slowest[0]}")
    return f"{live.name}: {', '.join(parts)}"


def _percentiles(latency: Latency) -> str:
    return f"p50 {1000 * latency.p50:.0f} ms, p99 {1000 * latency.p99:.0f} ms"


def _end(report: RunReport | None, failures: Sequence[Failure]) -> None:
    """List what failed, one line each, and leave."""
    for failure in failures[:_LISTED_FAILURES]:
        tell(f"failed: {failure.message}", err=True)
    if len(failures) > _LISTED_FAILURES:
        tell(f"failed: {len(failures) - _LISTED_FAILURES} more.", err=True)
    raise typer.Exit(1 if failures else 0)


@contextmanager
def _progress(jobs: int) -> Iterator[Callable[[RunProgress], None] | None]:
    """A bar on the terminal with FPS and remaining time, a fresh one for each source; nothing where there is none."""
    if not shows_progress():
        yield None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f} FPS" if task.speed else "- FPS")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Bars(*columns, console=terminal_console(stderr=True), transient=True) as bars:
        tasks = {-1: bars.add_task("starting", total=None)}

        def show(progress: RunProgress) -> None:
            if progress.job not in tasks:
                for job in [-1] if progress.live else list(tasks):  # live sources go on beside each other
                    if job in tasks:
                        bars.remove_task(tasks.pop(job))
                part = f" ({progress.job + 1}/{jobs})" if jobs > 1 else ""
                tasks[progress.job] = bars.add_task(escape(Path(progress.name).name) + part, total=progress.expected)
            bars.update(tasks[progress.job], completed=progress.done, total=progress.expected)

        yield show


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does: stages stopped, unfinished files removed."""

    def interrupt(number: int, stack_frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, as when a program calls this command
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
