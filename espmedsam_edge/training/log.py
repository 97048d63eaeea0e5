"""What a run leaves behind to look at: two CSV files, TensorBoard events, contact sheets, a line an epoch, a bar."""

from __future__ import annotations

import csv
import io
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from espmedsam_edge.files import atomic_write, write_errors
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.terminal import progress_bars
from espmedsam_edge.training.run_folder import EVENTS_SUFFIX

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

TERMS = ("loss", "pixel", "dice", "patch")
_STEPS = ("step", "epoch", "modality", "learning_rate", *TERMS, "images_per_second")
_EPOCHS = ("step", "epoch", "modality", "score")


class RunLog:
    """Writes a run's records; a resumed run goes on after the step it resumes from, later rows are dropped.

    Only the first process writes (``quiet`` elsewhere).

    Args:
        folder: of the run.
        steps: optimiser steps of the whole run, for the bar; None: not known, as the run ends by time.
        step: done so far.
        quiet: write and show nothing.
    """

    def __init__(self, folder: Path, steps: int | None, step: int, *, quiet: bool = False) -> None:
        self.folder = folder
        self.quiet = quiet
        self._writer: SummaryWriter | None = None
        self._rows: dict[str, list[dict[str, object]]] = {"train.csv": [], "valid.csv": []}
        self._columns = {"train.csv": _STEPS, "valid.csv": _EPOCHS}
        self._progress = progress_bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            disable=quiet or not sys.stderr.isatty() or not log.isEnabledFor(logging.INFO),
        )
        self._task = self._progress.add_task("", total=steps, completed=step)
        self._last = time.perf_counter()
        self._step = step

    def __enter__(self) -> RunLog:
        """Cut back what an earlier, killed run wrote past the step it resumes from; start the bar."""
        if not self.quiet:
            for name, columns in self._columns.items():
                self._cut(self.folder / name, columns)
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.tell("TensorBoard is not installed: train.csv and valid.csv alone have the curves.")
            else:
                with write_errors(self.folder):
                    self._writer = SummaryWriter(
                        str(self.folder / "tensorboard"), purge_step=self._step + 1, filename_suffix=EVENTS_SUFFIX
                    )
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left, also after an error."""
        self._progress.stop()
        self.flush()
        if self._writer is not None:
            self._writer.close()

    def step(
        self, step: int, epoch: int, modality: str, rate: float, terms: Mapping[str, float], images: int, at: float
    ) -> None:
        """Note one optimiser step (the last batch's modality and terms) that ended at ``at`` of ``perf_counter``."""
        speed = images / max(at - self._last, 1e-9)
        self._last = at
        if self.quiet:
            return
        row: dict[str, object] = {"step": step, "epoch": epoch, "modality": modality, "learning_rate": f"{rate:.4g}"}
        row.update({name: f"{value:.6g}" for name, value in terms.items()})
        row["images_per_second"] = f"{speed:.3g}"
        self._rows["train.csv"].append(row)
        if self._writer is not None:
            for name, value in terms.items():
                self._writer.add_scalar(f"train/{modality}/{name}", value, step)
            self._writer.add_scalar("learning_rate", rate, step)
        self._progress.update(self._task, completed=step, description=f"epoch {epoch} {modality} {terms['loss']:.3f}")

    def validation(self, step: int, epoch: int, scores: Mapping[str, float]) -> None:
        """Note a validation's scores."""
        if self.quiet:
            return
        for modality, score in scores.items():
            row: dict[str, object] = {"step": step, "epoch": epoch, "modality": modality, "score": f"{score:.6g}"}
            self._rows["valid.csv"].append(row)
            if self._writer is not None:
                self._writer.add_scalar(f"valid/{modality}", score, step)

    def sheet(self, step: int, epoch: int, picture: NDArray[np.uint8]) -> None:
        """Keep a contact sheet as ``sheets/epoch-0001.jpg`` and in TensorBoard; (H, W, 3) uint8 BGR."""
        if self.quiet:
            return
        write_image(self.folder / "sheets" / f"epoch-{epoch:04d}.jpg", picture)
        if self._writer is not None:
            self._writer.add_image("sheet", np.ascontiguousarray(picture[..., ::-1]), step, dataformats="HWC")

    def tell(self, line: str) -> None:
        """Log a line for the person who watches; of several processes the first alone does."""
        if not self.quiet:
            log.info("%s", line)

    def flush(self) -> None:
        """Append the rows noted so far; on an epoch's end and before a state is saved."""
        for name, rows in self._rows.items():
            if not rows or self.quiet:
                continue
            buffer = io.StringIO()
            csv.DictWriter(buffer, self._columns[name], restval="", lineterminator="\n").writerows(rows)
            with write_errors(self.folder / name), (self.folder / name).open("a", encoding="utf-8") as stream:
                stream.write(buffer.getvalue())
            rows.clear()
        if self._writer is not None:
            self._writer.flush()

    def _cut(self, file: Path, columns: tuple[str, ...]) -> None:
        kept = [",".join(columns)]
        if file.is_file() and self._step:
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
                step, _, rest = line.partition(",")
                if step.isdigit() and int(step) <= self._step and rest.count(",") == len(columns) - 2:
                    kept.append(line)
        atomic_write(file, "\n".join(kept) + "\n")
