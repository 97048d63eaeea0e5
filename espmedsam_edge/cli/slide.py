"""``espmedsam-edge slide``: whole slides in; masks, outlines and overviews out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from espmedsam_edge.cli.messages import shows_progress, tell_failures
from espmedsam_edge.terminal import progress_bars, tell


def command(
    arguments: list[str] = typer.Argument(
        ...,
        metavar="[BUNDLE] SLIDE...",
        help="A bundle, if not the weights that came along; tiled TIFF, SVS, NDPI, DICOM.",
    ),
    out: Path = typer.Option(Path("slides"), help="A folder for NAME-mask.ome.tif, NAME.geojson, NAME-overview.jpg."),
    modality: str | None = typer.Option(None, help="What to segment. [default: what the bundle has, else microscopy]"),
    precision: str | None = typer.Option(None, help="fp32, fp16 or int8. [default: fp32, else what there is]"),
    backend: str = typer.Option("auto", help="What runs the graph; auto takes the best that works here."),
    threshold: float | None = typer.Option(None, help="Probability from which a pixel counts. [default: the bundle's]"),
    threads: int | None = typer.Option(None, min=1, help="CPU threads. [default: the cores there are]"),
    tile: str = typer.Option("auto", help="Side of a tile in pixels; auto: the bundle's, else the network's input."),
    level: int = typer.Option(0, min=0, help="Of the pyramid; 0 is the largest. The mask has this level's size."),
    pixel_size: float | None = typer.Option(
        None, min=0.01, max=100, help="Micrometres a pixel of the largest level. [default: the file's]"
    ),
    instances: bool | None = typer.Option(
        None,
        "--instances/--no-instances",
        help="Outline objects that touch each for itself. [default: where there are many, as nuclei]",
    ),
    everything: bool = typer.Option(False, "--everything", help="Segment empty glass, too."),
    overwrite: bool | None = typer.Option(
        None,
        "--overwrite/--no-overwrite",
        help="Replace files that exist, or none, and begin anew. [default: replace what this program wrote]",
    ),
) -> None:
    """Segment whole slides region by region, where there is tissue; a run that ended goes on from where it was.

    A slide that cannot be read is reported at the end and the rest is done (exit code 1).
    """
    from espmedsam_edge.destinations import Destination, check_again, held
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.marks import OBJECTS, PICTURE, SLIDE_MASK
    from espmedsam_edge.runtime.bundle_choice import choose_bundle, means_a_bundle
    from espmedsam_edge.runtime.segmenter import Segmenter
    from espmedsam_edge.runtime.slide.apart import files_of
    from espmedsam_edge.runtime.slide.segmenting import SlideOptions, SlideResults, segment_slide
    from espmedsam_edge.runtime.tiling import OFF, parse_tile

    bundle, slides = None, arguments
    if means_a_bundle(slides[0]):
        bundle, *slides = slides
    if not slides:
        raise UserError("nothing to segment.", "Name slides after the bundle.")
    chosen = choose_bundle(bundle, modality, precision)
    name = chosen.modality or ("microscopy" if "microscopy" in chosen.among else None)
    if name is None:
        raise UserError("the modality of slides cannot be told.", f"Name it: --modality {'|'.join(chosen.among)}")
    side = parse_tile(tile)
    if side == OFF:
        raise UserError("a slide is always taken in tiles.", "Give --tile auto, or the side of a tile in pixels.")
    options = SlideOptions(
        side if isinstance(side, int) else None, level, pixel_size, everything, overwrite=overwrite, instances=instances
    )
    paths = list(dict.fromkeys(Path(slide) for slide in slides))
    places = {path: SlideResults.of(path, out) for path in paths}
    wanted = [
        Destination(place, kind)
        for results in places.values()
        for place, kind in ((results.mask, SLIDE_MASK), (results.objects, OBJECTS), (results.overview, PICTURE))
    ]
    failures: list[str] = []

    def check(place: Path) -> None:
        check_again(next(one for one in wanted if one.path == place), overwrite)

    with (
        held(wanted, [file for path in paths for file in (path, *files_of(path))], overwrite),
        Segmenter.load(
            chosen.bundle_of(name), name, precision, backend, threshold=threshold, threads=threads, tile="off"
        ) as segmenter,
    ):
        segmenter.choice.tell()
        for path in paths:
            try:
                with _progress(path.name) as progress:
                    report = segment_slide(path, segmenter, places[path], options, progress, check)
            except UserError as error:
                failures.append(str(error))
                continue
            except KeyboardInterrupt:
                tell("interrupted: finished regions were kept; the same command goes on from there.", err=True)
                raise typer.Exit(130) from None
            failures += [report.failure] if report.failure else []
            tell(
                f"{path}: {report.objects} objects in {report.tiles} of {report.of} tiles (the rest is glass), "
                f"{report.seconds:.1f} s"
            )
            for place in places[path][:3]:
                tell(f"  {place}")
    tell_failures(failures)
    raise typer.Exit(1 if failures else 0)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal with the remaining time; nothing where there is none."""
    if not shows_progress():
        yield None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_bars(*columns) as bars:
        task = bars.add_task(escape(name), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
