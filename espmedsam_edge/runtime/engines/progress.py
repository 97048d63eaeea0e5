"""How far a build is: TensorRT's nested phases, turned into one fraction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from espmedsam_edge.runtime.engines.tensorrt_api import TensorRT

if TYPE_CHECKING:
    import tensorrt as trt


class EngineProgress:
    """Turns TensorRT's nested phases into one fraction that never goes back. Called from TensorRT's threads."""

    def __init__(self, report: Callable[[str, float], bool], interval_s: float = 0.1) -> None:
        self._report = report
        self._interval = interval_s
        self._last = 0.0
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps, steps done
        self.fraction = 0.0
        self.going_on = True

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins, within its parent's current step."""
        with self._lock:
            self._phases[name] = (parent, max(1, steps), 0)
            self._tell(name)

    def step(self, name: str, step: int) -> bool:
        """Step number ``step`` (from 0) is done. False asks TensorRT to give the build up."""
        with self._lock:
            if name in self._phases:
                parent, steps, _ = self._phases[name]
                self._phases[name] = (parent, steps, min(steps, step + 1))
                self._tell(name)
            return self.going_on

    def finish(self, name: str) -> None:
        """The phase is over."""
        with self._lock:
            self._phases.pop(name, None)

    def _tell(self, name: str) -> None:
        done, current = 0.0, name
        for _ in range(len(self._phases)):  # a bound, should phases ever name each other as parents
            parent, steps, finished = self._phases[current]
            done = min(1.0, (finished + done) / steps)
            if parent is None or parent not in self._phases:
                break
            current = parent
        self.fraction = max(self.fraction, done)
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self.going_on = self._report(name, self.fraction) and self.going_on


def make_monitor(api: TensorRT, progress: EngineProgress) -> trt.IProgressMonitor | None:
    """TensorRT's progress monitor that feeds ``progress``; None where the API has none."""
    base: type[Any] | None = getattr(api.module, "IProgressMonitor", None)
    if base is None:
        return None

    def initialise(self: Any) -> None:
        base.__init__(self)  # pybind11 wants its own constructor called

    members = {
        "__init__": initialise,
        "phase_start": lambda self, name, parent, steps: progress.start(str(name), parent, int(steps)),
        "step_complete": lambda self, name, step: progress.step(str(name), int(step)),
        "phase_finish": lambda self, name: progress.finish(str(name)),
    }
    return cast("trt.IProgressMonitor", type("Monitor", (base,), members)())
