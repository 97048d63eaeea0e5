"""From what a run is asked to write to the sinks that do it, each with its place."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.destinations import Claims, stands
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.pipes import STANDARD_OUTPUT, is_standard_output
from espmedsam_edge.runtime.dicom.segmentation import Algorithm
from espmedsam_edge.runtime.request import InferenceRequest, ModelOptions, Outputs
from espmedsam_edge.runtime.resumption import Part, check_new
from espmedsam_edge.runtime.run.controls import Controls
from espmedsam_edge.runtime.run.finding import ObjectFinder
from espmedsam_edge.runtime.run.jobs import Job
from espmedsam_edge.runtime.run.plan import Measurements, plan_jobs, publishing_sinks, shared_sinks
from espmedsam_edge.runtime.sinks.annotations import AnnotationFolder
from espmedsam_edge.runtime.sinks.background import BackgroundSinks
from espmedsam_edge.runtime.sinks.places import Places, numbered, plan_places
from espmedsam_edge.runtime.sinks.resumed import Table
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.anonymous import SourceNames
from espmedsam_edge.runtime.sources.selection import Selection
from espmedsam_edge.runtime.sources.shards import narrowed
from espmedsam_edge.runtime.sources.source import Source
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputPlan:
    """Who takes what.

    Attributes:
        jobs: each source with its own sinks.
        shared: the sinks of all sources.
        results: what each result is called, and where it is.
        style_of: the overlays' style by modality; None where none are drawn for a file or a stream.
        writes: whether anything is written at all.
        done: how many files an earlier run had finished; there are no jobs for them.
    """

    jobs: Sequence[Job]
    shared: Sequence[Sink]
    results: dict[str, Path]
    style_of: Callable[[str], OverlayStyle] | None
    writes: bool
    done: int = 0


def plan_outputs(
    request: InferenceRequest,
    sources: Sequence[Source],
    bundle: Bundle,
    parameters: Mapping[str, str],
    *,
    controls: Controls,
    background: BackgroundSinks,
    names: SourceNames,
    claims: Claims,
    selection: Selection,
) -> OutputPlan:
    """Decide on every place and make the sinks, before anything is read.

    Args:
        request: what is to be written, and whether the run is shown.
        sources: not yet entered.
        bundle: what will run; the first of them, where each picture is recognised.
        parameters: what DICOM-SEGs say of how they were made; read when one is written.
        controls: may change the overlay's opacity under way.
        background: takes the sinks of live sources.
        names: what results are named after.
        claims: the run's own, entered until it ends.
        selection: what of the sources is segmented.

    Raises:
        UserError: a place that will not do, a result that such a source cannot have, or a missing package.
    """
    outputs = request.outputs or Outputs()
    part = Part(request, sources, names.files, bundle)
    export = part.export
    places, measured = _places(request, outputs, sources, names, claims, part)
    if export is not None and not outputs.resume:
        check_new(export, outputs.overwrite)
    if not part.whole:
        sources = narrowed(sources, part.files)
        selection.begin(part.size)
    origin = bundle.manifest.weights.origin
    notice = "untrained weights" if origin == "random" else ""

    def style_of(modality: str) -> OverlayStyle:
        return OverlayStyle(color_of(modality), outputs.opacity, notice=notice)

    def current_style(modality: str) -> OverlayStyle:
        style, opacity = style_of(modality), controls.current().opacity
        return style if opacity is None else replace(style, opacity=opacity)

    results = _results(places, measured) | ({} if export is None else {"annotations": export})
    writes = bool(results) or _sent(outputs) or "-" in (measured.jsonl, measured.table, measured.objects)
    paced = request.serve is not None and not writes
    algorithm = Algorithm(__version__, parameters, origin != "random")
    find = _finder(request, outputs, sources)
    jobs = plan_jobs(sources, places, current_style, algorithm, outputs.stream, background, find=find, paced=paced)
    shared: list[Sink] = shared_sinks(sources, measured, {"weights": origin}, background)
    if export is not None and outputs.export is not None:
        annotations = AnnotationFolder(
            export,
            outputs.export,
            places.names,
            places.videos,
            background.failures,
            resumed=outputs.resume,
            keep=outputs.resume and not outputs.overwrite,
        )
        live = any(source.live for source in sources)
        shared = [background.add(str(export), annotations) if live else annotations, *shared]
    if outputs.resume:
        shared = [_resumed(part, jobs, shared)]  # stands behind all others
    shared = [*publishing_sinks(sources, measured, {"weights": origin}, background), *shared]
    drawn = places.overlays is not None or outputs.stream is not None
    return OutputPlan(jobs, shared, results, style_of if drawn else None, writes, part.done)


def _finder(request: InferenceRequest, outputs: Outputs, sources: Sequence[Source]) -> Callable[[], ObjectFinder]:
    """What makes a job's finder of objects."""
    wanted = request.model.objects if isinstance(request.model, ModelOptions) else ObjectOptions()
    if wanted.track and all(source.kind != "video" for source in sources):
        raise UserError("--track follows the objects of videos, and here are pictures.", "Leave it out.")
    needed = any(place is not None for place in (outputs.labels, outputs.objects, outputs.dicom_sr))
    return partial(ObjectFinder, wanted, needed=needed)


def _resumed(part: Part, jobs: Sequence[Job], tables: Sequence[Sink]) -> Sink:
    """What notes that files are done, before all other sinks of a clip and behind those of pictures."""
    resumed = part.resumed(cast(Sequence[Table], tables))  # of files alone, so none is in the background
    for job in jobs:
        if job.source.kind == "video":
            job.sinks = [resumed.of(job.source, partial(getattr, job, "failed")), *job.sinks]
    return resumed


def _places(
    request: InferenceRequest,
    outputs: Outputs,
    sources: Sequence[Source],
    names: SourceNames,
    claims: Claims,
    part: Part,
) -> tuple[Places, Measurements]:
    """Where files go, numbered where those of an earlier run stay."""
    tables = (outputs.jsonl, outputs.csv, outputs.objects)
    jsonl, csv, objects = (None if place is None else str(place) for place in tables)
    plot, out = _path(outputs.plot), _path(outputs.out)
    if part.shard is not None:
        jsonl, csv, objects = (
            place if place in (None, "-") else str(part.shard.named(Path(place))) for place in (jsonl, csv, objects)
        )
        plot = None if plot is None else part.shard.named(plot)
    if out == Path("-"):
        out = STANDARD_OUTPUT
    if [is_standard_output(place) for place in (jsonl, csv, objects, out)].count(True) > 1:
        raise UserError("two results would be written to standard output.", "Write one of them to a file.")
    if out == STANDARD_OUTPUT and os.isatty(1):
        raise UserError("the overlay would be written to the terminal.", "Pipe it: ... --out - | ffplay -")
    nothing_by_default = request.outputs is None or request.serve is not None
    places = plan_places(
        sources,
        out,
        _path(outputs.masks),
        None if jsonl == "-" else _path(jsonl),
        csv=None if csv == "-" else _path(csv),
        labels=_path(outputs.labels),
        objects=None if objects == "-" else _path(objects),
        plot=plot,
        export=part.export,
        overwrite=outputs.overwrite,
        mask_video=_path(outputs.mask_video),
        dicom_seg=_path(outputs.dicom_seg),
        dicom_sr=_path(outputs.dicom_sr),
        elsewhere=nothing_by_default or _sent(outputs) or "-" in (jsonl, csv, objects),
        called=names.files,
        also_read=[file for name in (*request.named, *_also_read(request)) if (file := Path(name)).is_file()],
        claims=claims,
        left=None if part.whole else part.left,
    )
    if places.kept is not None:
        reason = "exists and is kept" if stands(places.kept) else "is another run's"
        log.info("%s %s; this run writes %s.", places.kept, reason, numbered(places.kept, places.number))
    measured = Measurements(
        jsonl, outputs.contours, outputs.uids, csv, objects, plot, outputs.publish, outputs.overwrite
    )
    return places, measured.numbered(places.number)


def _sent(outputs: Outputs) -> bool:
    """Whether results go to somebody, besides or instead of files."""
    return outputs.stream is not None or outputs.publish is not None


def _also_read(request: InferenceRequest) -> list[str | Path]:
    """What a run reads besides its sources and its bundle."""
    if request.outputs is None or request.outputs.publish is None:
        return [*request.also_read]
    from espmedsam_edge.runtime.sinks.mqtt import files_of

    return [*request.also_read, *files_of(request.outputs.publish)]


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)


def _results(places: Places, measured: Measurements) -> dict[str, Path]:
    """What each result is called, and where it is."""
    texts = (measured.jsonl, measured.table, measured.objects)
    json_file, table, objects = (None if place in (None, "-") else Path(place) for place in texts)
    named = (
        ("overlays", places.overlay_folder),
        ("masks", places.mask_folder),
        ("mask videos", places.mask_video_folder),
        ("DICOM-SEG", places.segmentation_folder),
        ("reports", places.report_folder),
        ("measurements", json_file),
        ("areas", table),
        ("labels", places.label_folder),
        ("objects", objects),
        ("plot", measured.plot),
    )
    return {what: place for what, place in named if place is not None}
