"""``espmedsam-edge calibrate``: an FP16 or INT8 graph, measured on images and held to an accuracy budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from espmedsam_edge.cli.messages import shows_progress
from espmedsam_edge.terminal import progress_bars, tell

if TYPE_CHECKING:
    from espmedsam_edge.bundle import Bundle
    from espmedsam_edge.calibration.images import CalibrationImages
    from espmedsam_edge.calibration.report import CalibrationSummary
    from espmedsam_edge.calibration.request import CheckRequest, Listener


def command(
    bundle: Annotated[Path, typer.Argument(help="The bundle that export wrote; the new graph is added to it.")],
    images: Annotated[
        list[str],
        typer.Argument(help="Images of the modality: files, DICOM files, folders, globs, videos or dataset folders."),
    ],
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option(
            help="What to lower the graph to: fp16 or int8. With --check: the graph to check. [default: fp32]"
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="BACKEND", help="Write no graph: hold what a backend, such as openvino:bf16, computes to the gate."
        ),
    ] = None,
    method: Annotated[
        Literal["entropy", "percentile", "max"] | None,
        typer.Option(help="How INT8 activations are clipped. Default: percentile, the others where it fails."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Dice points it may lose on average. Default: 0.1 for fp16, 0.5 for int8.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="True masks, named like their images: the gate then counts points lost on them.")
    ] = None,
    target: Annotated[
        Literal["gpu", "cpu"],
        typer.Option(help="Of int8: what it is for. Its floating-point part is FP16 for a GPU, FP32 for a processor."),
    ] = "gpu",
    modality: Annotated[str | None, typer.Option(help="Which modality. Default: the only one.")] = None,
    count: Annotated[int, typer.Option("--images", help="Images to measure ranges on, sampled evenly.")] = 128,
    held_out: Annotated[int, typer.Option(help="Images kept aside for the accuracy gate.")] = 16,
    pictures: Annotated[bool, typer.Option(help="Show the worst held-out image in report.md.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: the physical cores.")] = None,
) -> None:
    """Add a graph of lower precision to a bundle, if it passes the accuracy gate.

    With --check, note in the bundle whether a backend's arithmetic passes it: only then does --backend auto take it.
    """
    from espmedsam_edge.bundle import Bundle, graph_file_name
    from espmedsam_edge.calibration.calibrator import calibrate
    from espmedsam_edge.calibration.images import find_images
    from espmedsam_edge.calibration.request import CalibrationRequest, CheckRequest
    from espmedsam_edge.destinations import check_writable, claimed
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.files import check_exchangeable

    if check is None and precision in (None, "fp32"):
        raise UserError("what to lower the graph to is not named.", "Name it: --precision fp16|int8")
    opened = Bundle.open(bundle)
    check_exchangeable(bundle)
    check_writable(bundle.resolve().parent)
    name = _modality(opened, modality, images)
    with _listener() as listener:
        listener.phase("finding the images", None)
        found = find_images(images, count=count, held_out=held_out, masks=masks)
    passed = True
    try:
        if check is not None:
            passed = _check(bundle, CheckRequest(name, check, precision or "fp32", budget, threads), found)
        else:
            assert precision is not None
            counts = f"{len(found.calibration)} images to measure, {len(found.held_out)} held out for the gate"
            tell(f"{name} {precision}: {counts}")
            request = CalibrationRequest(name, precision, method, budget, pictures, threads, target)
            file = graph_file_name(name, precision, len(opened.manifest.modalities))
            with claimed([bundle / file], inside=True), _listener() as listener:  # others may be added meanwhile
                summary = calibrate(bundle, request, found, listener)
            _report(opened, summary)
    finally:
        for failure in found.failures:
            tell(f"error: {failure.message}", err=True)
    if found.failures or not passed:
        raise typer.Exit(1)


def _check(bundle: Path, request: CheckRequest, images: CalibrationImages) -> bool:
    from espmedsam_edge.calibration.check import check_backend

    title = f"{request.modality} {request.precision} on {request.backend}"
    tell(f"{title}: {len(images.held_out)} images held out for the gate")
    with _listener() as listener:
        result = check_backend(bundle, request, images, listener)
    tell(f"gate {'passed' if result.passed else 'failed'}: {result}")
    tell(f"Noted in {bundle / 'report.md'}; --backend auto {'may take it' if result.passed else 'leaves it out'}.")
    return result.passed


def _modality(bundle: Bundle, modality: str | None, images: list[str]) -> str:
    """The one named; else the only one; else what a dataset folder says of itself."""
    from espmedsam_edge.imaging.dataset import IMAGES, DatasetFolder, infer_modality
    from espmedsam_edge.modalities import choose

    names = bundle.manifest.modalities
    if modality is None and len(names) > 1:
        for specification in images:
            if (Path(specification) / IMAGES).is_dir():
                return infer_modality(DatasetFolder.open(specification), names, f"bundle {bundle.path}")
    return choose(modality, names, f"bundle {bundle.path}")


@contextmanager
def _listener() -> Iterator[Listener]:
    """A progress bar on the terminal, if there is one."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with progress_bars(*columns, disable=not shows_progress()) as progress:
        task = progress.add_task("", total=None)

        class Bar:
            def phase(self, title: str, total: int | None) -> None:
                progress.reset(task, total=total, description=title)

            def step(self) -> None:
                progress.advance(task)

        yield Bar()


def _report(bundle: Bundle, summary: CalibrationSummary) -> None:
    ratio = f"{summary.size / summary.reference_size:.3f} of FP32's {summary.reference_size / 1e6:.1f} MB"
    tell(f"{bundle.path / summary.file}: {summary.size / 1e6:.1f} MB, {ratio}; {summary.macs_text()}")
    tell(f"gate passed: {summary.result}")
    if summary.raised:
        tell(f"kept in higher precision: {', '.join(summary.raised)}")
    tell(f"Details: {bundle.path / 'report.md'}")
