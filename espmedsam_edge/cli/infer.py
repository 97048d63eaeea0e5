"""``espmedsam-edge infer``: files, cameras and streams in; overlays, masks and measurements out."""

from __future__ import annotations

import atexit
import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from espmedsam_edge.cli.config import CONFIG
from espmedsam_edge.cli.messages import once, run_bars, tell_failures
from espmedsam_edge.machine.memory import loading_modules, share_arenas
from espmedsam_edge.terminal import tell

if TYPE_CHECKING:
    from espmedsam_edge.runtime.inference import Inference
    from espmedsam_edge.runtime.latency import Latency
    from espmedsam_edge.runtime.request import InferenceReport
    from espmedsam_edge.runtime.run.jobs import LiveReport
    from espmedsam_edge.runtime.serve.server import Server

log = logging.getLogger(__name__)

Decoder = Literal["auto", "software", "hardware"]
Contours = Literal["none", "polygons", "rle", "both"]
Uids = Literal["hashed", "plain"]
Formats = Literal["coco", "yolo", "labelme", "cvat", "geojson"]
_ARGUMENTS = (
    "BUNDLE: the folder that export wrote; without one, the weights that came with the program. "
    "SOURCE: images, videos, DICOM files, folders, globs; - (a video or picture on standard input); "
    "0 or v4l2:///dev/video0 (USB camera), csi://0 (Jetson), rtsp://..., http://... (streams), "
    "test:// or test://fundus (a moving phantom)."
)


def command(
    arguments: list[str] | None = typer.Argument(None, metavar="[BUNDLE] SOURCE...", help=_ARGUMENTS),
    modality: str | None = typer.Option(
        None, help="What to segment. [default: the bundle's only one, else as each picture looks]"
    ),
    precision: str | None = typer.Option(None, help="fp32, fp16 or int8. [default: the fastest that passed its gate]"),
    backend: str = typer.Option("auto", help="What runs the graph; auto takes the fastest that is right here."),
    device: str | None = typer.Option(
        None, help="Of --backend openvino: CPU, GPU, NPU or AUTO; of inductor: CPU or CUDA. [default: CPU; CUDA]"
    ),
    arithmetic: str | None = typer.Option(
        None, help="Of --backend openvino or inductor, what it computes in: fp32, bf16, fp16 or graph. [default: fp32]"
    ),
    provider: str | None = typer.Option(None, help="Of --backend onnxruntime: one that doctor lists. [default: CPU]"),
    url: str | None = typer.Option(
        None, help="Of --backend triton: the server, such as http://tower:8000, with the repository that deploy wrote."
    ),
    out: Path | None = typer.Option(
        None,
        help="Overlays: a file for one image or video, else a folder; - for Matroska (PNG) on standard output. "
        "[default: NAME-overlay.png or .mp4, or the folder overlays; none if other results alone are asked for]",
    ),
    masks: Path | None = typer.Option(None, help="A folder for masks: PNG, 0 and 255, at the frame's size."),
    mask_video: Path | None = typer.Option(
        None, help="Masks as video, white on black: .mp4, .mov or .mkv for one video, else a folder."
    ),
    jsonl: str | None = typer.Option(None, help="A file for one line of JSON a frame; - for standard output."),
    contours: Contours = typer.Option(
        "none", help="In those lines, and published ones: the mask as polygons, as COCO's rle, or both."
    ),
    uids: Uids | None = typer.Option(
        None,
        help="In those lines, and published ones: DICOM's study, series and instance identifiers, hashed or plain. "
        "[default: neither]",
    ),
    csv: str | None = typer.Option(None, help="A file for a table of the area in each frame; - for standard output."),
    labels: Path | None = typer.Option(
        None, help="A folder for the numbers of objects: PNG of 16 bits (over 65,535 objects TIFF of 32)."
    ),
    objects: str | None = typer.Option(
        None, help="A file for a table of every object: place, area, diameters, ...; - for standard output."
    ),
    plot: Path | None = typer.Option(None, help="A PNG of the area over time."),
    dicom_seg: Path | None = typer.Option(
        None, help="DICOM-SEG of DICOM inputs: a .dcm file for one, else a folder. Holds the source's patient data."
    ),
    dicom_sr: Path | None = typer.Option(
        None,
        help="Structured reports of DICOM inputs, each object's size: a .dcm file, or a folder. Hold patient data.",
    ),
    export: Formats | None = typer.Option(
        None, help="Pictures and their masks in a folder that an annotation tool opens, to be corrected there."
    ),
    export_to: Path | None = typer.Option(None, help="That folder, which must be new or empty. [default: annotations]"),
    anonymous_names: bool = typer.Option(
        False,
        "--anonymous-names",
        help="Call sources source-1, source-2-0001, ... in results, messages and the view: names may hold a patient's.",
    ),
    stream: str | None = typer.Option(
        None, help="Send the overlay: udp://HOST:PORT or rtp://HOST:PORT (MPEG-TS), or rtsp://SERVER/PATH."
    ),
    publish: str | None = typer.Option(
        None,
        metavar="mqtt://HOST/TOPIC",
        help="Send the line of JSON of each frame to an MQTT broker; mqtts:// with TLS.",
    ),
    tta: bool = typer.Option(
        False,
        "--tta",
        help="Average the network over mirrored and turned copies of each frame, those that the modality allows "
        "(2 to 8): better masks of some modalities, for as many times the time.",
    ),
    threshold: float | None = typer.Option(None, help="Probability from which a pixel counts. [default: the bundle's]"),
    instances: bool | None = typer.Option(
        None,
        "--instances/--no-instances",
        help="Tell objects apart that touch, count and measure them. [default: where there are many, as nuclei]",
    ),
    min_area: int | None = typer.Option(
        None, metavar="PIXELS", help="Take smaller objects out of the mask. [default: none]"
    ),
    largest: int | None = typer.Option(
        None, metavar="N", help="Leave only the N largest objects in the mask. [default: all]"
    ),
    track: bool = typer.Option(
        False, "--track", help="Of videos: the same object keeps its number, in --jsonl, --objects and --labels."
    ),
    min_confidence: float | None = typer.Option(
        None,
        min=0,
        max=1,
        help="Leave the mask empty where a picture is less than so much of the kind that the network is for, and fail "
        "it: 0.5 is where it looks like something else. [default: say so, and segment it]",
    ),
    opacity: float = typer.Option(0.35, min=0, max=1, help="Of the overlay's tint."),
    crop: str | None = typer.Option(
        None,
        metavar="X,Y,W,H",
        help="Segment that part of frames; auto: the picture inside borders and text. Results are the whole frame's.",
    ),
    rotate: int = typer.Option(0, help="Turn frames clockwise first: 90, 180 or 270."),
    start: float | None = typer.Option(None, min=0, help="Leave out so many seconds of a video or stream at first."),
    every: int | None = typer.Option(None, min=1, metavar="N", help="Take every N-th frame of videos and streams."),
    fps: float | None = typer.Option(None, help="Take at most so many frames a second of videos and streams."),
    spacing: str | None = typer.Option(
        None,
        metavar="VALUE|tiff",
        help="How far pixels lie apart, as 0.25um or ROWS,COLUMNS as 0.4,0.3mm; tiff: the resolution that TIFF files "
        "state. [default: what DICOM, OME and ImageJ say]",
    ),
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
    tile: str = typer.Option(
        "auto",
        metavar="auto|off|SIZE",
        help="Pictures larger than those of the training: in overlapping tiles of SIZE pixels, whole (off), or as is "
        "best for what is segmented (auto).",
    ),
    overwrite: bool | None = typer.Option(
        None,
        "--overwrite/--no-overwrite",
        help="Replace files that exist, or none. Results of cameras and streams stay, and new ones are numbered. "
        "[default: replace what this program wrote]",
    ),
    resume: bool = typer.Option(
        False,
        "--resume",
        help="Note each finished file in a journal beside the results, and leave those alone that are noted there and "
        "have the same content: the same command goes on after a kill.",
    ),
    shard: str | None = typer.Option(
        None, metavar="I/N", help="Do the I-th of N equal shares of the files; tables get its name: areas-2-of-8.csv."
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
    trust_proxy: list[str] | None = typer.Option(
        None,
        metavar="ADDRESS",
        help="A proxy before this server, or its network: clients are whom it names in X-Forwarded-For. "
        "A token is needed then.",
    ),
    config: Path | None = CONFIG,
) -> None:
    """Segment images, videos, cameras and streams; write overlays, masks and measurements.

    A file that cannot be read is reported at the end and the rest is done (exit code 1). Of cameras and streams always
    the newest frame is segmented; Ctrl-C ends them and keeps what was written.
    """
    with loading_modules():
        from espmedsam_edge.errors import UserError
        from espmedsam_edge.objects.options import ObjectOptions
        from espmedsam_edge.pipes import is_standard_output
        from espmedsam_edge.runtime.bundle_choice import means_a_bundle
        from espmedsam_edge.runtime.inference import Inference, open_service
        from espmedsam_edge.runtime.request import InferenceRequest, ModelOptions, Outputs, ReadingOptions
        from espmedsam_edge.runtime.serve.options import ServeOptions

    if not arguments and serve is None:
        raise UserError("nothing to segment.", "Name images, videos or a camera; --help shows how.")
    bundle, sources = None, arguments or []
    if sources and means_a_bundle(sources[0]):
        bundle, *sources = sources
    network = (bundle, modality, precision, backend, threshold, threads, device, arithmetic, provider, tta, tile)
    model = ModelOptions(*network, ObjectOptions(instances, min_area, largest, track), url, min_confidence)
    serving = None if serve is None else ServeOptions(serve, token, allow_host or (), trust_proxy or ())
    share_arenas()
    atexit.register(gc.freeze)  # else Python looks for garbage before it ends, which takes a tenth of a second
    if serving is not None and not sources:
        with open_service(model, serving) as server:
            _until_interrupted(server)
        return
    outputs = Outputs(
        out=out,
        masks=masks,
        mask_video=mask_video,
        jsonl=jsonl,
        contours=contours,
        uids=uids,
        csv=csv,
        labels=labels,
        objects=objects,
        plot=plot,
        dicom_seg=dicom_seg,
        dicom_sr=dicom_sr,
        export=export,
        export_to=export_to,
        stream=stream,
        publish=publish,
        opacity=opacity,
        overwrite=overwrite,
        resume=resume,
    )
    reading = ReadingOptions(
        frames=frames,
        duration=duration,
        max_latency=max_latency,
        give_up=give_up,
        decoder=decoder,
        anonymous_names=anonymous_names,
        crop=crop,
        rotate=rotate,
        start=start,
        every=every,
        fps=fps,
        spacing=spacing,
        shard=shard,
    )
    request = InferenceRequest(sources, model, outputs, reading, serving, [] if config is None else [config])
    # Files that decide on the network are read twice; a camera's lines come back as often as it does.
    with once(*_OF_FILES), Inference(request) as run:
        report = _run(run)
        places = (jsonl, csv, objects, out, mask_video, plot, dicom_seg, dicom_sr)
        _print(report, to_stderr=any(map(is_standard_output, places)))
        if run.server is not None and report.frames and not report.interrupted:
            _until_interrupted(run.server, f"the view stays at {run.server.url}: Ctrl-C ends it.")
    _leave(report)


_OF_FILES = (
    "imaging",
    "runtime.dicom",
    "runtime.video",
    "runtime.sources.opening",
    "runtime.sources.scales",
    "runtime.run.finding",
)


def _run(run: Inference) -> InferenceReport:
    with run_bars(len(run.sources)) as progress:
        try:
            return run.run(progress)
        except KeyboardInterrupt:
            log.warning("interrupted: finished files were kept, unfinished ones removed.")
            raise typer.Exit(130) from None


def _until_interrupted(server: Server, line: str | None = None) -> None:
    """Wait for Ctrl-C, from the moment that ``line`` says so."""
    try:
        if line is not None:
            log.info("%s", line)
        server.wait()
    except KeyboardInterrupt:
        return


def _print(report: InferenceReport, *, to_stderr: bool) -> None:
    def line(text: str) -> None:
        tell(text, err=to_stderr)

    if report.bundle is None:
        return
    if len(report.networks) > 1:
        for network in report.networks:
            count = "1 frame" if network.frames == 1 else f"{network.frames} frames"
            what = f"{network.bundle}: {network.modality}, {network.precision}, {network.backend}, {count}"
            line(f"{what}: {network.why}" if network.why else what)
    else:
        what = f"{report.bundle}: {report.modality}, {report.precision}, {report.backend}"
        line(f"{what}: {report.why}" if report.why else what)
    for reason in report.passed_over:
        line(reason)
    for live in report.live:
        line(_live_line(live))
    if not report.frames:
        return
    if report.gpu_memory is not None:
        line(f"GPU memory: {report.gpu_memory}")
    stages = ", ".join(
        f"{stage} {1000 * seconds / report.frames:.1f}" for stage, seconds in report.stage_seconds.items()
    )
    frames = "1 frame" if report.frames == 1 else f"{report.frames} frames"
    line(f"{frames} in {report.seconds:.1f} s, {report.frames / report.seconds:.1f} FPS (ms a frame: {stages})")
    for what, place in report.results.items():
        line(f"{what}: {place}")
    if report.unjudged:
        line(f"No confidence for {', '.join(report.unjudged)}: what such pictures look like is not known.")
    if not report.trained:
        line("These weights were never trained: the masks mean nothing.")


def _live_line(live: LiveReport) -> str:
    """What became of a live source: counts, and the age of its masks and of its written results in milliseconds."""
    parts = [f"{live.frames} frames", f"{live.skipped} skipped"]
    if live.refused:
        parts.append(f"{live.refused} refused as too old")
    if live.failed:
        parts.append(f"{live.failed} left out (the network's output was not finite)")
    if live.reconnects:
        parts.append(f"dropped out {live.reconnects} times")
    if live.latency is not None:
        parts.append(f"latency {_percentiles(live.latency)} to the mask")
    if live.written is not None:
        parts.append(f"{_percentiles(live.written[1])} to {live.written[0]}")
    return f"{live.name}: {', '.join(parts)}"


def _percentiles(latency: Latency) -> str:
    return f"p50 {1000 * latency.p50:.0f} ms, p99 {1000 * latency.p99:.0f} ms"


def _leave(report: InferenceReport) -> None:
    """List what failed, one line each, and leave."""
    if report.unfinished:
        log.warning("interrupted: what live sources gave was kept, unfinished files removed.")
        raise typer.Exit(130)
    tell_failures([failure.message for failure in report.failures])
    raise typer.Exit(1 if report.failures else 0)
