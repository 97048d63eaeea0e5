"""Which sinks take the frames of each source, and those of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import Styling
from espmedsam_edge.runtime.dicom.identifiers import DicomIdentifiers
from espmedsam_edge.runtime.dicom.segmentation import Algorithm
from espmedsam_edge.runtime.run.finding import ObjectFinder
from espmedsam_edge.runtime.run.jobs import Job
from espmedsam_edge.runtime.sinks.area_plot import AreaPlot
from espmedsam_edge.runtime.sinks.background import BackgroundSinks
from espmedsam_edge.runtime.sinks.dicom_seg import DicomSegmentations
from espmedsam_edge.runtime.sinks.dicom_sr import DicomReports
from espmedsam_edge.runtime.sinks.measurements import AreaTable, Form, JsonLines, LineForm, ObjectTable
from espmedsam_edge.runtime.sinks.places import Places, numbered
from espmedsam_edge.runtime.sinks.publishing import Publication, open_publisher
from espmedsam_edge.runtime.sinks.recording import mask_video, overlay_video
from espmedsam_edge.runtime.sinks.sink import LabelMaps, MaskImages, OverlayImages, Paced, Sink
from espmedsam_edge.runtime.sinks.stream import OverlayStream, parse_destination
from espmedsam_edge.runtime.sources.source import Source


@dataclass(frozen=True)
class Measurements:
    """Which files of measurements are wanted.

    Attributes:
        jsonl: the file for one line of JSON a frame, ``-`` for standard output, None for none.
        contours: how lines of JSON give the mask's shape.
        uids: hashed or plain: lines of JSON hold DICOM's identifiers; None: they do not.
        table: the CSV of areas, ``-`` for standard output, None for none.
        objects: the CSV of objects, alike.
        plot: the PNG of areas over time, None for none.
        publish: where lines of JSON are sent, an address of ``PUBLISHERS``; None: nowhere.
        overwrite: what of that which came to the plot's place meanwhile is replaced, see ``check_destinations``.
    """

    jsonl: str | None = None
    contours: Form = "none"
    uids: str | None = None
    table: str | None = None
    objects: str | None = None
    plot: Path | None = None
    publish: str | None = None
    overwrite: bool | None = None

    def numbered(self, number: int) -> Measurements:
        """With the number of the run's other results in the names of the files."""
        jsonl, table, objects = (
            place if place in (None, "-") else str(numbered(Path(place), number))
            for place in (self.jsonl, self.table, self.objects)
        )
        plot = None if self.plot is None else numbered(self.plot, number)
        return replace(self, jsonl=jsonl, table=table, objects=objects, plot=plot)


def plan_jobs(
    sources: Sequence[Source],
    places: Places,
    style: Styling,
    algorithm: Algorithm | None = None,
    stream: str | None = None,
    background: BackgroundSinks | None = None,
    *,
    find: Callable[[], ObjectFinder] | None = None,
    paced: bool = False,
) -> list[Job]:
    """A job for each source, with the sinks that write its results to their places.

    Sinks of a live source work in threads of their own.

    Args:
        sources: what is segmented.
        places: where results go.
        style: how masks are drawn.
        algorithm: what DICOM-SEGs say of how they were made; needed where there are any.
        stream: where the overlay is sent; see ``parse_destination``.
        background: takes the sinks of live sources.
        find: makes what finds each job's objects.
        paced: whether video files go at their own speed instead of as fast as they can be segmented.

    Raises:
        UserError: a result that such a source cannot have, or a missing package.
    """
    background = background or BackgroundSinks()
    if stream is not None and (len(sources) != 1 or sources[0].kind != "video"):
        raise UserError("--stream sends one video, camera or stream.", "Give one source, or leave --stream out.")
    jobs = []
    for source in sources:
        sinks = _files_of(source, places, style, algorithm)
        if paced and source.kind == "video" and not source.live:
            sinks.append((source.name, Paced()))
        if stream is not None:
            destination = parse_destination(stream)
            sinks.append((destination.address, OverlayStream(destination, source, style)))
        taken = [background.add(name, sink) if source.live else sink for name, sink in sinks]
        jobs.append(Job(source, taken, None if find is None else find()))
    return jobs


def shared_sinks(
    sources: Sequence[Source],
    wanted: Measurements,
    constants: Mapping[str, Any],
    background: BackgroundSinks | None = None,
) -> list[Sink]:
    """The sinks that take the frames of all sources.

    Args:
        sources: what is segmented; with a live one among them, an interrupted run keeps what was measured.
        wanted: which files.
        constants: what every line of JSON says besides.
        background: takes the sinks where there is a live source.

    Raises:
        UserError: a missing package.
    """
    live = any(source.live for source in sources)
    sinks: list[tuple[str, Sink]] = []
    if wanted.jsonl is not None:
        lines = JsonLines(_file(wanted.jsonl), _form(wanted, constants), keep_interrupted=live)
        sinks.append((_told(wanted.jsonl), lines))
    for place, table in ((wanted.table, AreaTable), (wanted.objects, ObjectTable)):
        if place is not None:
            sinks.append((_told(place), table(_file(place), keep_interrupted=live)))
    if wanted.plot is not None:
        sinks.append((str(wanted.plot), AreaPlot(wanted.plot, keep_interrupted=live, overwrite=wanted.overwrite)))
    if not live:
        return [sink for _, sink in sinks]
    background = background or BackgroundSinks()
    return [background.add(name, sink) for name, sink in sinks]


def publishing_sinks(
    sources: Sequence[Source], wanted: Measurements, constants: Mapping[str, Any], background: BackgroundSinks
) -> list[Sink]:
    """The sinks that send lines of the frames of all sources as they come; see ``shared_sinks``.

    Args:
        sources: what is segmented.
        wanted: where lines are sent, and in which form.
        constants: what every line of JSON says besides.
        background: takes the sinks where there is a live source, and what failed to be published.

    Raises:
        UserError: an address that will not do, or a missing package.
    """
    if wanted.publish is None:
        return []
    publisher = open_publisher(Publication(wanted.publish, _form(wanted, constants), background.failures))
    return [background.add(publisher.name, publisher) if any(source.live for source in sources) else publisher]


def _form(wanted: Measurements, constants: Mapping[str, Any]) -> LineForm:
    return LineForm(constants, wanted.contours, None if wanted.uids is None else DicomIdentifiers(wanted.uids))


def _file(place: str) -> Path | None:
    return None if place == "-" else Path(place)


def _told(place: str) -> str:
    return "standard output" if place == "-" else place


def _files_of(source: Source, places: Places, style: Styling, algorithm: Algorithm | None) -> list[tuple[str, Sink]]:
    first, images = source.files[0], source.kind == "images"
    sinks: list[tuple[str, Sink]] = []
    if places.overlays is not None:
        path = places.overlays[first]
        sinks.append(
            (
                str(path),
                OverlayImages(places.overlays, style, places.overwrite)
                if images
                else overlay_video(path, source, style),
            )
        )
    if places.masks is not None:
        sinks.append(
            (str(places.masks[first]), MaskImages(places.masks, numbered=not images, overwrite=places.overwrite))
        )
    if places.labels is not None:
        sinks.append(
            (str(places.labels[first]), LabelMaps(places.labels, numbered=not images, overwrite=places.overwrite))
        )
    if places.mask_videos is not None and first in places.mask_videos:
        path = places.mask_videos[first]
        sinks.append((str(path), mask_video(path, source)))
    if places.segmentations is not None:
        if source.live or algorithm is None:
            raise UserError(f"{source.name} is not DICOM; --dicom-seg is for DICOM files.", "Leave it out.")
        paths = {file: places.segmentations[file] for file in source.files}
        sinks.append((str(places.segmentations[first]), DicomSegmentations(paths, algorithm, places.overwrite)))
    if places.reports is not None:
        if source.live or algorithm is None:
            raise UserError(f"{source.name} is not DICOM; --dicom-sr is for DICOM files.", "Leave it out.")
        paths = {file: places.reports[file] for file in source.files}
        reports = DicomReports(paths, algorithm, places.segmentations, places.overwrite)
        sinks.append((str(places.reports[first]), reports))
    return sinks
