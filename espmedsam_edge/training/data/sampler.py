"""Which images form the next batch: one modality a batch, balanced, repeatable, resumable, shared out over ranks.

Each modality is an endless stream of shuffled passes over its images. An epoch takes the next stretch of every stream,
so a large set is covered over several epochs without leaving anything out, and a small one comes round more often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError


@dataclass(frozen=True)
class Draw:
    """One image of a batch: where it is in its modality's list, and the seed of its augmentation."""

    index: int
    seed: int


@dataclass(frozen=True)
class BatchPlan:
    """One batch of one rank."""

    modality: str
    draws: tuple[Draw, ...]


class ModalityBatchSampler:
    """Batches of a single modality each, in an order that depends only on the seed and the epoch.

    Args:
        sizes: images a modality.
        batch_size: images a batch and rank; a global batch has ``batch_size * world_size`` of one modality.
        seed: of the shuffling, the order and the augmentations.
        balance: a modality of n images gets batches in proportion to n to the power of this: 0 the same number for
            each, 1 by size. The default, 0.5, gives the paper's 3,694 skin and 163 ultrasound images 4.8 to 1.
        batches: global batches an epoch; None: as many as it takes to show as many images as there are.
        rank: this process, 0 to ``world_size - 1``.
        world_size: processes that train together; all see the same modality at the same step.

    Raises:
        UserError: no modality, one without images, or a size that is not positive.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        seed: int = 0,
        *,
        balance: float = 0.5,
        batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not sizes:
            raise UserError("there is nothing to train on: no modality was given.", "Name at least one dataset.")
        empty = [name for name, size in sizes.items() if size < 1]
        if empty:
            raise UserError(f"modality '{empty[0]}' has no training images.", "Check its split.json, or leave it out.")
        if batch_size < 1 or (batches is not None and batches < 1):
            raise UserError("a batch needs at least one image and an epoch one batch.", "Raise batch_size or batches.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self.sizes = dict(sizes)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.balance = balance
        total = batches or -(-sum(sizes.values()) // self.global_batch)
        self.quotas = _apportion({name: size**balance for name, size in sizes.items()}, total)
        self.epoch = 0
        self.position = 0
        self._passes: dict[tuple[str, int], NDArray[np.int64]] = {}
        self._shuffled: tuple[int, list[tuple[str, int]]] = (-1, [])

    @property
    def global_batch(self) -> int:
        """Images a step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def batches(self) -> int:
        """Batches an epoch."""
        return sum(self.quotas.values())

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, counted from 0."""
        self.epoch, self.position = epoch, 0

    def advance(self) -> None:
        """Note that the next batch has been trained on: from now on ``state_dict`` resumes after it."""
        self.position += 1

    def __iter__(self) -> Iterator[BatchPlan]:
        """This epoch's batches from the position on; iterating moves nothing, ``advance`` does."""
        for step in range(self.position, self.batches):
            yield self.plan(step)

    def plan(self, step: int) -> BatchPlan:
        """The batch of this rank at a step of this epoch."""
        name, turn = self._order()[step]
        start = (self.epoch * self.quotas[name] + turn) * self.global_batch + self.rank * self.batch_size
        return BatchPlan(name, tuple(self._draw(name, place) for place in range(start, start + self.batch_size)))

    def state_dict(self) -> dict[str, Any]:
        """Where it is, and enough to tell whether a resumed run would see the same batches."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "sizes": dict(self.sizes),
            "quotas": dict(self.quotas),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another sampler was.

        Raises:
            UserError: the data, the seed or the batch changed, so what follows would not be what was to come.
        """
        mine = self.state_dict()
        for key, what in (
            ("sizes", "numbers of training images"),
            ("seed", "seed"),
            ("global_batch", "batch size over all processes"),
            ("quotas", "batches an epoch"),
        ):
            if mine[key] != state[key]:
                raise UserError(
                    f"cannot resume: the {what} changed from {state[key]} to {mine[key]}.",
                    "Put it back, or start a new run from the checkpoint's weights.",
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _order(self) -> list[tuple[str, int]]:
        """The epoch's (modality, how many of that modality came before), shuffled."""
        if self._shuffled[0] == self.epoch:
            return self._shuffled[1]
        order = [(name, turn) for name, quota in self.quotas.items() for turn in range(quota)]
        shuffled = np.random.default_rng([self.seed, 1, self.epoch]).permutation(len(order))
        turns = dict.fromkeys(self.quotas, 0)
        result = []
        for place in shuffled:
            name = order[place][0]
            result.append((name, turns[name]))
            turns[name] += 1
        self._shuffled = (self.epoch, result)
        return result

    def _draw(self, name: str, place: int) -> Draw:
        """The image at a place of a modality's endless stream."""
        size = self.sizes[name]
        lap, index = divmod(place, size)
        number = list(self.sizes).index(name)
        if (name, lap) not in self._passes:
            if len(self._passes) > 4 * len(self.sizes):
                self._passes.clear()
            self._passes[name, lap] = np.random.default_rng([self.seed, 2, number, lap]).permutation(size)
        seed = np.random.SeedSequence([self.seed, 3, number, place]).generate_state(1, np.uint64)[0]
        return Draw(int(self._passes[name, lap][index]), int(seed))


def _apportion(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in proportion to weights, at least 1 each, by largest remainder; their sum is ``total`` or more."""
    scale = total / sum(weights.values())
    exact = {name: weight * scale for name, weight in weights.items()}
    quotas = {name: max(1, int(value)) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: exact[name] - int(exact[name]), reverse=True)
    for name in by_remainder[: max(0, total - sum(quotas.values()))]:
        quotas[name] += 1
    return quotas
