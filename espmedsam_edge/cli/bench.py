"""espmedsam-edge bench."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Annotated

import typer

from espmedsam_edge.cli.messages import shows_progress
from espmedsam_edge.terminal import progress_bars, tell

log = logging.getLogger(__name__)


def command(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="B.bundle", help="The bundle to measure.")],
    source: Annotated[
        str | None,
        typer.Argument(help="Image, folder, glob or video to take frames from. Default: a generated 1080p clip."),
    ] = None,
    modality: Annotated[str | None, typer.Option(help="May be left out where the bundle has one.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or int8. Default: fp32, else what there is.")
    ] = None,
    backend: Annotated[str, typer.Option(help="What runs the graph.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Of --backend openvino: CPU, GPU, NPU or AUTO; of inductor: CPU or CUDA.")
    ] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option(help="Of --backend openvino or inductor, what it computes in: fp32, bf16, fp16 or graph."),
    ] = None,
    provider: Annotated[str | None, typer.Option(help="Of --backend onnxruntime: one that doctor lists.")] = None,
    compare: Annotated[
        str,
        typer.Option(
            metavar="X,Y",
            help="Measure in turn with: a backend, a precision, torch-eager, torch-compile, a bundle, an ONNX file.",
        ),
    ] = "",
    choose: Annotated[
        bool,
        typer.Option(
            "--choose",
            help="Only try what --backend auto may take on this machine, and keep the result for it; "
            "takes --modality, --precision, --threads, --json and --markdown.",
        ),
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The weights, for --compare torch-eager or torch-compile.")
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds to measure, for each contender; at least 10 runs.")] = 3.0,
    roofline: Annotated[
        bool, typer.Option(help="Compare with the best the machine can do; needs the onnx package.")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: the physical cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a report to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a PNG to this file (needs the extra 'bench').")] = None,
    tile: Annotated[
        str,
        typer.Option(metavar="auto|off|SIZE", help="Large frames in tiles of SIZE pixels, whole, or as infer does."),
    ] = "off",
    overwrite: Annotated[
        bool | None,
        typer.Option(
            "--overwrite/--no-overwrite", help="Replace files that exist, or none. Default: what this program wrote."
        ),
    ] = None,
) -> None:
    """Measure latency and FPS of a bundle, stage by stage, and say what the numbers mean.

    Contenders of --compare run in turn with the bundle (A B A B ...) in one process; the report gives the part of their
    time that the bundle takes, with a 95 % interval.
    """
    import json

    from espmedsam_edge.bench.benchmark import BenchRequest, run_benchmark
    from espmedsam_edge.bench.measure import BenchSettings
    from espmedsam_edge.bench.plot import draw_plot
    from espmedsam_edge.bench.report import as_json, as_markdown, as_text
    from espmedsam_edge.destinations import Destination, held
    from espmedsam_edge.files import atomic_write
    from espmedsam_edge.machine.installation import why_missing
    from espmedsam_edge.marks import BENCH, PAGE, PICTURE
    from espmedsam_edge.runtime.backends.backend_spec import BackendSpec

    names = [name.strip() for name in compare.split(",") if name.strip()]
    if choose:
        _refuse_beside_choose(context)
        _choose(bundle, modality, precision, threads, json_file, markdown, overwrite)
        return
    spec = str(BackendSpec.parse(backend).with_words(device, arithmetic, provider))
    request = BenchRequest(bundle, source, modality, precision, spec, threads, names, checkpoint, roofline, tile)
    wanted = ((json_file, BENCH), (markdown, PAGE), (plot, PICTURE))
    inside = glob(f"{source}/**" if os.path.isdir(source) else source, recursive=True) if source is not None else []
    read = [Path(name) for name in (source, *inside, checkpoint, *names) if name is not None]
    with held([Destination(path, kind) for path, kind in wanted if path is not None], read, overwrite) as unchanged:
        with _bar("measuring") as progress:
            result = run_benchmark(request, BenchSettings(duration=duration), progress)
        tell(as_text(result))
        unchanged()
        if json_file:
            atomic_write(json_file, json.dumps(as_json(result), indent=2) + "\n")
        if markdown:
            atomic_write(markdown, as_markdown(result))
        if plot:
            reason = why_missing("matplotlib", "bench")
            if reason:
                log.warning("notice: %s was not drawn: %s", plot, reason)
            else:
                atomic_write(plot, draw_plot(result))
    if any(not line.startswith("roofline:") for line in result.left_out):
        raise typer.Exit(1)


_OF_CHOOSE = ("bundle", "choose", "modality", "precision", "threads", "json_file", "markdown", "overwrite")


def _refuse_beside_choose(context: typer.Context) -> None:
    """Refuse what was given and would have no effect on a trial."""
    from espmedsam_edge.errors import UserError

    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        given = source is not None and not source.name.startswith("DEFAULT")
        if given and name not in (*_OF_CHOOSE, "verbose", "quiet"):
            called = parameter.opts[0] if parameter.opts[0].startswith("-") else "a SOURCE"
            raise UserError(
                f"{called} has no effect with --choose.", f"Leave out --choose to measure with it, or {called}."
            )


def _choose(
    path: Path,
    modality: str | None,
    precision: str | None,
    threads: int | None,
    json_file: Path | None,
    markdown: Path | None,
    overwrite: bool | None,
) -> None:
    """Try everything, show it, and keep it."""
    import json

    from espmedsam_edge.bench.trial_report import TrialReport
    from espmedsam_edge.bundle import Bundle
    from espmedsam_edge.destinations import Destination, held
    from espmedsam_edge.files import atomic_write
    from espmedsam_edge.marks import BENCH, PAGE
    from espmedsam_edge.runtime.auto.kept_trials import keep_trial
    from espmedsam_edge.runtime.auto.trial import REFERENCE_CPU, title_of, try_backends

    bundle = Bundle.open(path)
    graph = bundle.graph(modality, precision)
    wanted = [Destination(file, kind) for file, kind in ((json_file, BENCH), (markdown, PAGE)) if file is not None]
    with held(wanted, [], overwrite) as unchanged:
        tell(f"Trying what runs {graph.modality} of {path} here, in turn with {title_of(graph, REFERENCE_CPU)}")
        trial, passed_over = try_backends(
            bundle, modality, precision, threads, lambda title: log.debug("trying %s", title)
        )
        report = TrialReport(bundle, graph, trial, passed_over)
        tell(report.as_text())
        file = keep_trial(trial)
        if file is not None:
            tell(f"--backend auto takes {report.taken} here from now on ({file})")
        unchanged()
        if json_file:
            atomic_write(json_file, json.dumps(report.as_json(), indent=2) + "\n")
        if markdown:
            atomic_write(markdown, report.as_markdown())


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None] | None]:
    """A bar on stderr that goes when it is done; nothing where stderr is no terminal."""
    if not shows_progress():
        yield None
        return
    import time

    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    # A thread that redraws would disturb what is measured: it is drawn from here, between rounds.
    with progress_bars(*columns, auto_refresh=False) as bar:
        task, drawn = bar.add_task(name, total=1.0), 0.0

        def update(fraction: float) -> None:
            nonlocal drawn
            due = time.monotonic() - drawn > 0.2
            bar.update(task, completed=fraction, refresh=due)
            drawn = time.monotonic() if due else drawn

        yield update
