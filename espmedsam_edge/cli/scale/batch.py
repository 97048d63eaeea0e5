"""``espmedsam-edge batch``: any number of files in; masks and a Parquet table out, by the workers of a Ray cluster."""

from __future__ import annotations

from pathlib import Path

import typer

from espmedsam_edge.cli.messages import counting_bar, tell_failures
from espmedsam_edge.terminal import tell


def command(
    arguments: list[str] = typer.Argument(
        ...,
        metavar="[BUNDLE] INPUT...",
        help="A bundle, if not the weights that came along; pictures, videos, DICOM files, folders, globs.",
    ),
    out: Path = typer.Option(..., help="A folder for masks/, the table frames/*.parquet and the journal."),
    address: str | None = typer.Option(
        None, help="Of a Ray cluster: HOST:PORT or ray://HOST:PORT. [default: one is started on this machine]"
    ),
    workers: int | None = typer.Option(None, min=1, help="Processes. [default: as many as have room]"),
    gpus: float = typer.Option(0.0, min=0, help="Of each worker; 0.5 lets two share one."),
    masks: bool = typer.Option(True, "--masks/--no-masks", help="Write masks, or the table alone."),
    chunk: float = typer.Option(60.0, min=1, help="Seconds of a video that a worker does at a time."),
    modality: str | None = typer.Option(
        None, help="What to segment. [default: the bundle's only one, else as each picture looks]"
    ),
    precision: str | None = typer.Option(None, help="fp32, fp16 or int8. [default: fp32, else what there is]"),
    backend: str = typer.Option("auto", help="What runs the graph; auto takes the best that works there."),
    threshold: float | None = typer.Option(None, help="Probability from which a pixel counts. [default: the bundle's]"),
    threads: int | None = typer.Option(None, min=1, help="CPU threads of each worker. [default: the cores, shared]"),
    tta: bool = typer.Option(False, "--tta", help="Average over mirrored and turned copies, as infer does."),
    tile: str = typer.Option("auto", metavar="auto|off|SIZE", help="Large pictures in tiles, as infer does."),
) -> None:
    """Segment files on many workers; a batch that ended goes on from where it was.

    What fails is a row of the table, and is reported at the end (exit code 1).
    """
    from espmedsam_edge.batch.cluster import ClusterOptions
    from espmedsam_edge.batch.run import BatchRequest, run_batch
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.runtime.bundle_choice import means_a_bundle
    from espmedsam_edge.runtime.request import ModelOptions

    bundle, inputs = None, arguments
    if means_a_bundle(inputs[0]):
        bundle, *inputs = inputs
    if not inputs:
        raise UserError("nothing to segment.", "Name files or folders after the bundle.")
    model = ModelOptions(bundle, modality, precision, backend, threshold, threads, tta=tta, tile=tile)
    request = BatchRequest(inputs, out, model, ClusterOptions(address, workers, gpus), masks, chunk)
    with counting_bar("batch") as bar:
        try:
            report = run_batch(request, None if bar is None else lambda done, total: bar(completed=done, total=total))
        except KeyboardInterrupt:
            tell("interrupted: what is done is noted; the same command goes on from there.", err=True)
            raise typer.Exit(130) from None
    tell(f"{report.units} units done by {report.workers} workers, {report.frames} frames; {report.before} before.")
    tell(f"masks and table: {out}")
    tell_failures(report.failures)
    raise typer.Exit(1 if report.failures else 0)
