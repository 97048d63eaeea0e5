"""One batch as a whole: units planned, those that are done left out, the others run, the table written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from espmedsam_edge.batch.cluster import ClusterOptions, check_installed, check_worker, cluster
from espmedsam_edge.batch.driver import Driver
from espmedsam_edge.batch.table import FOLDER, Table
from espmedsam_edge.batch.units import Unit, plan_units, source_of
from espmedsam_edge.batch.worker import UnitResult, UnitWorker
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.destinations import Destination, held
from espmedsam_edge.files import sha256_file, write_errors
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.marks import FRAMES, PICTURE
from espmedsam_edge.remote_bundles import is_remote
from espmedsam_edge.runtime.bundle_choice import choose_bundle
from espmedsam_edge.runtime.request import InferenceRequest, ModelOptions, Outputs
from espmedsam_edge.runtime.resumption import settings_of
from espmedsam_edge.runtime.sinks.journal import Journal, Record
from espmedsam_edge.runtime.sources.source import Failure

log = logging.getLogger(__name__)

JOURNAL = "journal"
CHUNK = 60.0
"""Seconds of a video that a worker does at a time."""

Progress = Callable[[int, int], None]  # units done, and of how many


@dataclass(frozen=True)
class BatchRequest:
    """What is done.

    Attributes:
        inputs: files, folders and globs.
        out: the folder of masks, table and journal; on a cluster one that all its machines see under this name.
        model: which network, and on what.
        cluster: where.
        masks: whether masks are written.
        chunk: seconds of a video that a worker does at a time.
    """

    inputs: Sequence[str]
    out: Path
    model: ModelOptions = field(default_factory=ModelOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    masks: bool = True
    chunk: float = CHUNK


@dataclass
class BatchReport:
    """What was done: units now and before, frames now, workers, and what failed, a line each."""

    units: int = 0
    before: int = 0
    frames: int = 0
    workers: int = 0
    failures: list[str] = field(default_factory=list)


def run_batch(
    request: BatchRequest, progress: Progress | None = None, worker: type[UnitWorker] = UnitWorker
) -> BatchReport:
    """Do it; what an earlier run has finished is left as it is.

    Args:
        request: what.
        progress: called after each unit.
        worker: what runs in the workers' processes.

    Raises:
        UserError: nothing to do, an option, a place or a cluster that will not do, or a full disk.
        KeyboardInterrupt: Ctrl-C; what came until then is kept.
    """
    check_installed()
    units, unread = plan_units(list(request.inputs), request.chunk)
    report = BatchReport(failures=[failure.message for failure in unread])
    if not units:
        return report
    with held(_places(request, units), {Path(unit.path) for unit in units}):
        _run_units(request, units, unread, report, progress, worker)
    return report


def _run_units(
    request: BatchRequest,
    units: Sequence[Unit],
    unread: Sequence[Failure],
    report: BatchReport,
    progress: Progress | None,
    worker: type[UnitWorker],
) -> None:
    settings = _settings(request)
    new = not request.out.exists()
    with write_errors(request.out):
        request.out.mkdir(parents=True, exist_ok=True)
    out = request.out.resolve()
    with _gone_if_unused(out, new), Journal(out / JOURNAL) as journal:
        unchanged = _Unchanged(units, journal, settings)
        table = Table(out, journal, settings, unchanged.holds, unchanged.asked)
        left = [unit for unit in units if not table.has(unit)]
        for failure in unread:  # rows, too
            table.add(Unit(failure.name, failure.name, ""), UnitResult(failures=[failure.message]))
        report.before = len(units) - len(left)
        if report.before:
            log.info("%s: %d of %d units are done already.", request.out, report.before, len(units))
        if left:
            _run(request, out, left, table, report, progress, worker)
        table.flush()


@contextmanager
def _gone_if_unused(out: Path, new: bool) -> Iterator[None]:
    """Remove the folder that this run made, where it ends in an error before anything came of it."""
    try:
        yield
    except BaseException:
        if new:
            files = list(islice((file for file in out.rglob("*") if not file.is_dir()), 2))
            if len(files) < 2 and all(file.parent == out / JOURNAL for file in files):  # of a run that did nothing
                shutil.rmtree(out, ignore_errors=True)
        raise


def _run(
    request: BatchRequest,
    out: Path,
    left: Sequence[Unit],
    table: Table,
    report: BatchReport,
    progress: Progress | None,
    worker: type[UnitWorker],
) -> None:
    def take(unit: Unit, result: UnitResult) -> None:
        table.add(unit, result)
        report.units += 1
        report.frames += len(result.rows)
        report.failures += result.failures
        if progress is not None:
            progress(report.units, len(left))

    with cluster(request.cluster, request.model.threads or 1) as (ray, room):
        report.workers = workers = min(room, len(left))
        local = request.cluster.address is None
        threads = request.model.threads or (max(1, usable_cores() // workers) if local else 1)
        claimed = 1 if local else threads
        actor = ray.remote(num_cpus=claimed, num_gpus=request.cluster.gpus, max_restarts=0, max_task_retries=0)(worker)
        model = replace(request.model, threads=threads, bundle=_everywhere(request.model.bundle))

        def start() -> object:
            return actor.remote(model, str(out), request.masks)

        driver = Driver(ray, start, workers, lambda about: check_worker(about, str(out)))
        driver.ready()
        try:
            driver.run(left, take)
        finally:
            table.flush()


def _places(request: BatchRequest, units: Sequence[Unit]) -> list[Destination]:
    """Where results go: not where ``infer`` would not write, nor where another run writes."""
    masks = {unit.mask: FRAMES if unit.clip else PICTURE for unit in units} if request.masks else {}
    table = Destination(request.out / FOLDER / JOURNAL, PICTURE)  # nothing stands there: it is about the folder
    return [*(Destination(request.out / name, kind) for name, kind in masks.items()), table]


def _everywhere(bundle: Bundle | str | Path | None) -> str | None:
    """A bundle as workers find it, wherever they run."""
    if bundle is None:
        return None
    if isinstance(bundle, Bundle):
        bundle = bundle.path
    return str(bundle) if is_remote(str(bundle)) else str(Path(bundle).absolute())


def _settings(request: BatchRequest) -> str:
    """See ``Record``."""
    chosen = choose_bundle(request.model.bundle, request.model.modality, request.model.precision)
    bundle = chosen.bundle_of(chosen.modality or chosen.among[0])
    asked = InferenceRequest([], request.model, Outputs(masks=request.out if request.masks else None))
    return f"{settings_of(asked, bundle)}, {request.masks}, {request.chunk:g}"


class _Unchanged:
    """Whether what is done still holds: of units that are asked for now, the file has the same content."""

    def __init__(self, units: Sequence[Unit], journal: Journal, settings: str) -> None:
        self._journal = journal
        self._units = {unit.label: unit for unit in units}
        self._sources = {unit.source for unit in units}
        known = {record.label for record in journal.records(settings)}
        recorded = sorted({unit.path for unit in units if unit.label in known})
        with ThreadPoolExecutor(max(1, usable_cores())) as threads:
            self._hashes = dict(zip(recorded, threads.map(_hash, recorded), strict=True))

    def asked(self, label: str) -> bool:
        """Whether a label is of a file that is asked for now, in whatever stretches; else it is of another call."""
        return not self._sources.isdisjoint((label, source_of(label)))

    def holds(self, record: Record) -> bool:
        """Whether a record does."""
        unit = self._units.get(record.label)
        if unit is None:
            return not self.asked(record.label)
        return self._hashes.get(unit.path) == record.sha256 and self._journal.stand(record)


def _hash(path: str) -> str:
    try:
        return sha256_file(Path(path))
    except OSError:
        return "gone"
