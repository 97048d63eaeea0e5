"""A stand-in for a network of steady time, to measure and to soak everything around one."""

from __future__ import annotations

import time

import numpy as np

from espmedsam_edge.bundle import Graph
from espmedsam_edge.imaging.geometry import Tensor


class SleepingBackend:
    """Sleeps, which leaves the CPU alone as a GPU does, and gives the same logits each time.

    Args:
        graph: whose place it takes.
        seconds: of each run.
        disc: foreground is a disc of half the picture's width; else there is none.
    """

    name = "stand-in"

    def __init__(self, graph: Graph, seconds: float, *, disc: bool = False) -> None:
        self.graph, self.device = graph, f"sleeps {1000 * seconds:g} ms"
        self._seconds = seconds
        batch, _, height, width = graph.output_shape
        rows, columns = np.mgrid[:height, :width]
        distance = np.hypot(rows - height / 2, columns - width / 2)
        logits = width / 4 - distance if disc else np.full((height, width), -1.0)
        self._logits: Tensor = np.broadcast_to(logits.astype(np.float32), (batch, 1, height, width))

    def run(self, image: Tensor) -> Tensor:
        time.sleep(self._seconds)
        return np.array(self._logits)

    def close(self) -> None:
        """See ``Backend.close``."""
