"""Hands units to workers, and takes back what comes; a worker that ends is replaced, and its units are done again."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

from espmedsam_edge.batch.units import Unit
from espmedsam_edge.batch.worker import UnitResult
from espmedsam_edge.errors import UserError

log = logging.getLogger(__name__)

STRIKES = 3
"""How many workers a unit may end before it is given up."""

_AHEAD = 2  # units that a worker has: one to do, one that waits
_START_SECONDS = 600  # until a worker has loaded its network, which may build an engine
_PATIENCE = 60.0  # seconds without a result, after which a line says so

Take = Callable[[Unit, UnitResult], None]


class Driver:
    """Runs units on workers.

    Args:
        ray: connected.
        start: makes a worker: an actor with the methods of ``UnitWorker``.
        workers: how many.
        check: sees that what a worker says of itself fits.
    """

    def __init__(
        self, ray: Any, start: Callable[[], Any], workers: int, check: Callable[[dict[str, Any]], None]
    ) -> None:
        self._ray, self._start, self._check = ray, start, check
        self._workers: dict[Any, deque[Any]] = {}  # to the references of what each was handed, oldest first
        self._units: dict[Any, Unit] = {}  # by reference
        self._strikes: defaultdict[Unit, Counter[str]] = defaultdict(Counter)  # by reason
        for _ in range(workers):
            self._workers[start()] = deque()

    def ready(self) -> None:
        """Wait until every worker has started.

        Raises:
            UserError: one does not fit, cannot load the network, or has no room.
        """
        asked = [worker.about.remote() for worker in self._workers]
        done, waiting = self._ray.wait(asked, num_returns=len(asked), timeout=_START_SECONDS)
        if waiting:
            raise UserError(
                f"{len(waiting)} of {len(asked)} workers did not start in {_START_SECONDS} s.",
                "Is the cluster busy? Ask for fewer --workers.",
                exit_code=1,
            )
        try:
            for about in self._ray.get(done):
                self._check(about)
        except self._ray.exceptions.RayError as error:
            raise _of_the_worker(error) or UserError(
                f"a worker cannot start: {_short(error)}",
                "Is the package installed on all machines of the cluster?",
                exit_code=1,
            ) from None

    def run(self, units: Iterable[Unit], take: Take) -> None:
        """Do units, and give each with its result as it comes.

        Raises:
            UserError: the disk is full, or the cluster is gone.
        """
        waiting = deque(units)
        while waiting or self._units:
            self._hand_out(waiting)
            done, _ = self._ray.wait(list(self._units), num_returns=1, timeout=_PATIENCE)
            if not done:
                log.warning("Nothing came for %.0f s; is there room in the cluster?", _PATIENCE)
            for reference in done:
                if reference in self._units:  # else its worker ended, which is known already
                    self._take_back(reference, waiting, take)

    def _hand_out(self, waiting: deque[Unit]) -> None:
        while waiting:
            worker, handed = min(self._workers.items(), key=lambda item: len(item[1]))
            if len(handed) >= _AHEAD:
                return
            unit = waiting.popleft()
            reference = worker.do.remote(unit)
            handed.append(reference)
            self._units[reference] = unit

    def _take_back(self, reference: Any, waiting: deque[Unit], take: Take) -> None:
        worker = next(worker for worker, handed in self._workers.items() if reference in handed)
        if self._settled(reference, waiting, take):
            self._workers[worker].remove(reference)
            return
        # It ended. What it had finished counts; of the rest the first was at work, the others only waited.
        handed = self._workers.pop(worker)
        lost = [one for one in handed if one is not reference and not self._settled(one, waiting, take)]
        at_work, *others = [self._units.pop(one) for one in handed if one is reference or one in lost]
        waiting.extendleft(reversed(others))
        self._strike(at_work, waiting, take, "it ended its worker's process")
        self._workers[self._start()] = deque()

    def _settled(self, reference: Any, waiting: deque[Unit], take: Take) -> bool:
        """Take what came of a unit; False: it went with its worker."""
        exceptions, unit = self._ray.exceptions, self._units[reference]
        try:
            result = self._ray.get(reference)
        except exceptions.ActorDiedError:
            return False
        except exceptions.RayError as error:  # raised in the worker, or its result found no room in the object store
            known = _of_the_worker(error)
            del self._units[reference]
            if known is not None:
                take(unit, UnitResult(failures=[str(known)]))
            else:
                self._strike(unit, waiting, take, _short(error))
            return True
        del self._units[reference]
        take(unit, result)
        return True

    def _strike(self, unit: Unit, waiting: deque[Unit], take: Take, why: str) -> None:
        self._strikes[unit][why] += 1
        if self._strikes[unit].total() < STRIKES:
            waiting.append(unit)  # behind all others
            return
        # The usual reason: an answer may also be lost with a worker that the next unit ended.
        ((why, _),) = self._strikes[unit].most_common(1)
        log.warning("%s is given up after %d tries: %s", unit.label, STRIKES, why)
        take(unit, UnitResult(failures=[f"given up after {STRIKES} tries: {why}"]))


def _of_the_worker(error: Exception) -> UserError | None:
    """What a worker says is wrong, if it is one of ours."""
    cause = getattr(error, "cause", None)
    return UserError(cause.message, cause.hint, exit_code=1) if isinstance(cause, UserError) else None


def _short(error: Exception) -> str:
    """An error of Ray's or of a worker's in a line: its kind, and the last line of its text."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
    return f"{type(cause).__name__}: {lines[-1][:300]}"
