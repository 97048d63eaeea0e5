"""What is asked of a calibration, and who listens to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from espmedsam_edge.bundle import Precision
from espmedsam_edge.calibration.histogram import Method

Target = Literal["gpu", "cpu"]
"""What an INT8 graph is for: its floating-point part is FP16 for a GPU, FP32 for a processor, which has no FP16."""


class Listener(Protocol):
    """Is told how a calibration gets on."""

    def phase(self, title: str, total: int | None) -> None:
        """A new phase of ``total`` steps (None: unknown) begins."""

    def step(self) -> None:
        """One step of the phase is done."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate.

    Attributes:
        modality: of the bundle.
        precision: "fp16" or "int8".
        method: how INT8 activations are clipped; None: percentile, and the others where it misses the budget.
        budget: Dice points; None: 0.1 for FP16, 0.5 for INT8.
        pictures: whether ``report.md`` shows the worst image.
        threads: for ONNX Runtime, 1 to 1024; None: the physical cores that the process may use.
        target: what an INT8 graph is for; FP16 is for a GPU.
    """

    modality: str
    precision: Precision
    method: Method | None = None
    budget: float | None = None
    pictures: bool = True
    threads: int | None = None
    target: Target = "gpu"


@dataclass(frozen=True)
class CheckRequest:
    """What to check.

    Attributes:
        modality: of the bundle.
        backend: as ``load_backend`` takes it, such as "openvino:bf16".
        precision: of the graph that it runs.
        budget: Dice points; None: 0.5 for an INT8 graph, else 0.1.
        threads: as of ``CalibrationRequest``.
    """

    modality: str
    backend: str
    precision: Precision = "fp32"
    budget: float | None = None
    threads: int | None = None
