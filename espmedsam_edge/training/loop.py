"""The training loop: Lightning Fabric on one process or many, interruptible after any step, resumed to the bit."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from espmedsam_edge.errors import UserError
from espmedsam_edge.training.averaging import WeightAverage
from espmedsam_edge.training.collection import Collection
from espmedsam_edge.training.data.dataset import Batch, TrainingSet
from espmedsam_edge.training.data.loader import BatchLoader
from espmedsam_edge.training.data.sampler import ModalityBatchSampler
from espmedsam_edge.training.data.stock import DeviceStock, fits
from espmedsam_edge.training.ledger import LossLedger
from espmedsam_edge.training.log import RunLog
from espmedsam_edge.training.objectives import Objective, SegmentationObjective, compile_objective, leave_uncompiled
from espmedsam_edge.training.optimizer import make_optimizer
from espmedsam_edge.training.pace import Pace, StepClock
from espmedsam_edge.training.recipe import SCRATCH, Recipe, Stage
from espmedsam_edge.training.run_folder import STATE
from espmedsam_edge.training.state import (
    TrainingProgress,
    first_difference,
    random_states,
    read_state,
    restore,
    restore_random_states,
    save_state,
)
from espmedsam_edge.training.trainable import set_training_mode
from espmedsam_edge.training.validation import contact_sheet, mean_score, validate

_NOTES = 5  # lines about masks with grey pixels, enough to see what they are
WriteWeights = Callable[[dict[str, Tensor], TrainingProgress], None]
"""Writes a network's state as the stage's checkpoint."""


@dataclass
class TrainingLoop:
    """One stage's run.

    Attributes:
        fabric: launched.
        stage: what the recipe is run as.
        recipe: for that stage alone.
        objective: with the network to train, its trainable parameters selected.
        images: to train and validate on.
        folder: of the run.
        write: called with the best weights whenever they improve, and with the last where nothing is validated.
    """

    fabric: Fabric
    stage: Stage
    recipe: Recipe
    objective: Objective
    images: Collection
    folder: Path
    write: WriteWeights

    def __post_init__(self) -> None:
        run, fabric = self.recipe.run, self.fabric
        self.network: nn.Module = self.objective.network
        self.sampler = ModalityBatchSampler(
            self.images.train.sizes,
            run.batch_size,
            run.seed,
            balance=self.recipe.data.balance,
            batches=run.steps_per_epoch * run.accumulate or None,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )
        self.pace = Pace(self.recipe, -(-self.sampler.batches // run.accumulate))
        # Not with fp16's loss scale, whose unscaling Fabric must do itself to clip.
        fused = run.precision != "16-mixed"
        self.optimizer = make_optimizer(self.network, self.recipe.optimizer, fused=fused)
        if run.compile:
            compile_objective(self.objective)
        self.wrapped, self.fabric_optimizer = fabric.setup(self.objective, self.optimizer)
        self.average = WeightAverage(self.network, run.ema) if run.ema else None
        self.progress = TrainingProgress(
            stage=self.stage, identity=self.recipe.identity(), world_size=fabric.world_size, sampler={}
        )
        self._stock: DeviceStock | None = None
        self._random: dict[str, Tensor] | None = None
        self._stop = False
        self._clock = StepClock()
        self._between_steps = True

    def resume(self) -> bool:
        """Go on from the folder's state, if it has one; whether it had.

        Raises:
            UserError: the state is of another recipe, stage or number of processes, or cannot be read or used.
        """
        path = self.folder / STATE
        if not path.is_file():
            return False
        saved = read_state(path)
        if saved.progress.stage != self.stage:
            raise UserError(f"{self.folder} holds a run of '{saved.progress.stage}'.", "Choose another --out.")
        if difference := first_difference(saved.progress.identity, self.progress.identity):
            raise UserError(
                f"cannot resume {self.folder}: the recipe changed ({difference}).",
                "Put it back, or start anew: --overwrite",
            )
        if saved.progress.world_size != self.fabric.world_size:
            raise UserError(
                f"cannot resume {self.folder}: it ran on {saved.progress.world_size} processes, "
                f"now {self.fabric.world_size}.",
                "Use as many, or start anew: --overwrite",
            )
        rank = f".{self.fabric.global_rank}"
        self._random = {
            key.removesuffix(rank): value for key, value in saved.part("random").items() if key.endswith(rank)
        }
        scaler = self._scaler()
        try:
            self.sampler.load_state_dict(saved.progress.sampler)
            restore(saved, self.network, self.optimizer, self.average)
            restore_random_states(self._random)
            if scaler is not None and saved.progress.scaler:
                scaler.load_state_dict(saved.progress.scaler)
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(" :.")
            raise UserError(
                f"{path} is damaged: it does not fit its recipe ({why}).", "Start anew: --overwrite"
            ) from error
        self.progress = saved.progress
        self._clock = StepClock(saved.progress.spent)
        return True

    def run(self) -> TrainingProgress:
        """Train to the end of the recipe.

        Returns:
            Where the run ended, with its best score.

        Raises:
            UserError: an image could not be read, the loss is not finite, the disk is full, or the run was asked to
                stop; what was trained up to then is saved.
        """
        if self.progress.finished:
            return self.progress
        quiet = not self.fabric.is_global_zero
        steps = None if self.pace.minutes else self.pace.steps
        with RunLog(self.folder, steps, self.progress.step, quiet=quiet) as log, self._signals():
            self._ledger = LossLedger(log, self.recipe.run.read_every, self.recipe.run.precision)
            for line in self._summary():
                log.tell(line)
            if not self.progress.sampler:
                self.progress.sampler = self.sampler.state_dict()
            if self._random is not None:
                restore_random_states(self._random)
            try:
                self._score_start(log)
                while not self.pace.over(self.progress, self.sampler.epoch):
                    self._epoch(log)
            except UserError:
                # In the middle of a step batch statistics have moved already, and processes that fail alone cannot
                # gather their random states: then the last regular state is the one to go on from.
                if self._between_steps and self.fabric.world_size == 1:
                    self._read()
                    self._save()
                raise
            self.progress.finished = True
            self._save()
        return self.progress

    def _summary(self) -> list[str]:
        parameters = list(self.network.parameters())
        learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        images = ", ".join(f"{name} {size}" for name, size in self.images.train.sizes.items())
        whole = sum(parameter.numel() for parameter in parameters)
        first = f"{self.stage}: {learning:,} of {whole:,} parameters learn from {images} images"
        steps = f"{self.pace.length} of {self.sampler.global_batch * self.recipe.run.accumulate}"
        done = f", {self.progress.step} done" if self.progress.step else ""
        return [f"{first}; {steps}{done}", *self.images.remarks]

    def _epoch(self, log: RunLog) -> None:
        """The rest of the sampler's epoch, its validation, and the step to the next."""
        epoch, begin = self.sampler.epoch, time.perf_counter()
        loader = self._loader()
        saved = time.monotonic()
        group: list[Batch] = []
        self._clock.start()
        for batch in loader:
            group.append(batch)
            if len(group) < self.recipe.run.accumulate and self.sampler.position < self.sampler.batches:
                continue
            self._step(group)
            group = []
            if self._stop:
                self._read()
                raise UserError(
                    f"stopped after step {self.progress.step} of {self.pace.length}; {self.folder} holds its state.",
                    "Go on with: the same command and --resume",
                    exit_code=1,
                )
            if time.monotonic() - saved > 60 * self.recipe.run.save_minutes:
                self._read()
                log.flush()
                self._save()
                saved = time.monotonic()
                self._clock.start()
            if self.pace.minutes and self.pace.over(self.progress, epoch):
                break
        mean = self._read()
        seconds = time.perf_counter() - begin
        line = f"epoch {epoch + 1}" + ("" if self.pace.minutes else f"/{self.recipe.run.epochs}")
        if mean is not None:
            line += f"  loss {mean:.4f}"
        line += f"  {seconds:.0f} s, of it {loader.waited:.1f} s waiting for images"
        line += self._validate(epoch + 1, log)
        self.sampler.set_epoch(epoch + 1)
        self.progress.sampler = self.sampler.state_dict()
        log.flush()
        self._save()
        log.tell(line)
        if epoch == 0:
            for note in self.images.train.notes[:_NOTES]:
                log.tell(f"  {note}")

    def _loader(self) -> BatchLoader:
        """The epoch's batches, from images on the device where the recipe asks for that and they fit."""
        data, train = self.recipe.data, self.images.train
        if self._stock is None and fits(train, self.fabric.device, data):
            self._stock = DeviceStock(train, self.fabric.device, data.workers)
        if self._stock is not None:
            return BatchLoader(self._stock, self.sampler, workers=0)
        return BatchLoader(train, self.sampler, data.workers)

    def _read(self) -> float | None:
        """Read the losses noted so far; their mean since the last time.

        Raises:
            UserError: one is not finite; then the weights are spoiled since, and are not saved.
        """
        self._between_steps = False
        mean = self._ledger.mean()
        self._between_steps = True
        return mean

    def _step(self, group: list[Batch]) -> None:
        """One optimiser step on one or more batches."""
        run, step, rate = self.recipe.run, self.progress.step, self.pace.learning_rate(self.progress)
        set_training_mode(self.network, freeze_batch_norm=self.pace.share(self.progress) >= run.batch_norm_fraction)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self._between_steps = False
        try:
            self._gradients(group)
        except Exception as error:
            if not leave_uncompiled(self.objective, error):
                raise
            self.optimizer.zero_grad(set_to_none=True)
            self._gradients(group)
        if self.recipe.optimizer.gradient_clip:
            self.fabric.clip_gradients(
                self.wrapped,
                self.fabric_optimizer,
                max_norm=self.recipe.optimizer.gradient_clip,
                error_if_nonfinite=False,
            )
        self.fabric_optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        self.progress.step = step + 1
        self.progress.sampler = self.sampler.state_dict()
        self._ledger.end_step(step + 1, self.sampler.epoch + 1, rate, len(group) * self.sampler.global_batch)
        self._count_time()
        self._between_steps = True

    def _gradients(self, group: list[Batch]) -> None:
        """Those of one or more batches, added up."""
        for index, batch in enumerate(group):
            moved = self._resized(batch.to(self.fabric.device))
            # Convolutions, and the blocks between them that want channels last, run faster so, most of all in bf16.
            pixels = moved.images.contiguous(memory_format=torch.channels_last)
            with self.fabric.no_backward_sync(self.wrapped, enabled=index + 1 < len(group)):
                values: dict[str, Tensor] = self.wrapped(pixels, moved.masks, batch.modality)
                self._ledger.note(self.progress.step, batch, values)
                self.fabric.backward(values["loss"] / len(group))

    def _resized(self, batch: Batch) -> Batch:
        """The batch at the size that this part of the run trains at."""
        run = self.recipe.run
        if self.pace.share(self.progress) >= run.small_fraction:
            return batch
        if batch.modality in self.recipe.data.windows:
            return batch.cut(run.small_size)
        return batch if batch.modality in run.small_except else batch.shrunk(run.small_size)

    def _count_time(self) -> None:
        """Note the time spent; of several processes the first's counts, so that all end at the same step."""
        self._clock.lap()
        if not self.pace.minutes:
            return
        if self.fabric.world_size == 1:
            self.progress.spent = self._clock.spent
        elif self.progress.step % self.recipe.run.read_every == 0:
            self.progress.spent = self.fabric.broadcast(self._clock.spent)

    def _score_start(self, log: RunLog) -> None:
        """Score what the run starts from as epoch 0, so that nothing worse than that is ever written."""
        if self.progress.step or self.recipe.init == SCRATCH or self.images.valid is None:
            return
        line = self._score(self.images.valid, 0, log)
        log.flush()
        log.tell(f"start{line}")

    def _validate(self, epoch: int, log: RunLog) -> str:
        """What an epoch's line says of its validation, if it has one; without images the last weights are written."""
        last = self.pace.over(self.progress, epoch)
        if epoch % self.recipe.run.validate_every and not last:
            return ""
        if self.images.valid is not None:
            return self._score(self.images.valid, epoch, log)
        if last:
            with self._averaged():
                self._write()
        return ""

    def _score(self, images: TrainingSet, epoch: int, log: RunLog) -> str:
        """Score the weights (averaged, where the recipe asks), write them if they are the best so far."""
        self.network.eval()
        with self._averaged():
            scores = validate(self.objective, images, self.recipe.run.batch_size, self.fabric)
            sheet = self.recipe.run.sheet_images
            if sheet and self.fabric.is_global_zero and isinstance(self.objective, SegmentationObjective):
                log.sheet(self.progress.step, epoch, contact_sheet(self.objective, images, sheet, self.fabric))
            log.validation(self.progress.step, epoch, scores)
            mean = mean_score(scores.values())
            better = self.progress.best is None or mean > self.progress.best
            if better:
                self.progress.best, self.progress.best_epoch = mean, epoch
                self._write()
        listed = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
        what = "Dice" if isinstance(self.objective, SegmentationObjective) else "-distance"
        return f"  {what} {mean:.4f} ({listed})" + ("  best" if better and epoch else "")

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.average.applied(self.network) if self.average else contextlib.nullcontext()

    def _write(self) -> None:
        if self.fabric.is_global_zero:
            self.write(self.network.state_dict(), self.progress)

    def _save(self) -> None:
        """Save the state as of the last whole optimiser step."""
        states = random_states()
        if self.fabric.world_size > 1:
            gathered = {key: self.fabric.all_gather(value) for key, value in states.items()}
            random = {f"{key}.{rank}": value for key, rows in gathered.items() for rank, value in enumerate(rows)}
        else:
            random = {f"{key}.0": value for key, value in states.items()}
        scaler = self._scaler()
        if scaler is not None:
            self.progress.scaler = {key: float(value) for key, value in scaler.state_dict().items()}
        if self.fabric.is_global_zero:
            path = self.folder / STATE
            save_state(path, self.progress, self.network, self.optimizer, self.average, random)

    def _scaler(self) -> Any:
        return getattr(self.fabric.strategy.precision, "scaler", None)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the run after the step in hand, with its state saved; a second one at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
            yield
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
