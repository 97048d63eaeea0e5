"""What a trial of backends found, as plain text for a terminal, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from espmedsam_edge.bench.report import markdown_table
from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.marks import BENCH_TITLE
from espmedsam_edge.runtime.auto.kept_trials import ALIKE, Trial, Tried
from espmedsam_edge.runtime.auto.trial import REFERENCE_CPU, title_of

_SCHEMA = 1


@dataclass(frozen=True)
class TrialReport:
    """A trial, and of what.

    Attributes:
        bundle: whose graphs were tried.
        graph: the reference's.
        trial: what was found.
        passed_over: why others were not tried, a sentence each.
    """

    bundle: Bundle
    graph: Graph
    trial: Trial
    passed_over: Sequence[str]

    @property
    def taken(self) -> str:
        """What "auto" takes from now on: ``int8 on openvino:bf16``."""
        best = self.trial.faster
        return _title(best[0][1]) if best else title_of(self.graph, "onnxruntime")

    def as_text(self) -> str:
        """A line each, in columns."""
        reference = title_of(self.graph, REFERENCE_CPU)
        rows = [(reference, "1.000", f"{self.trial.milliseconds:.1f} ms a run of the network")]
        rows += [(_title(one), *_found(one)) for one in self.trial.tried]
        width = max(len(title) for title, _, _ in rows)
        return "\n".join(["  ".join(filter(None, (f"  {t:<{width}}", r, f))) for t, r, f in rows] + [*self.passed_over])

    def as_json(self) -> dict[str, Any]:
        """Plain values; ``ratio`` is the part of the reference's time."""
        return {
            "schema": _SCHEMA,
            "kind": "trial",
            "environment": collect_environment(),
            "bundle": self.bundle.path.name,
            "modality": self.graph.modality,
            "reference": title_of(self.graph, REFERENCE_CPU),
            "reference_ms": self.trial.milliseconds,
            "date": self.trial.date,
            "threads": int(self.trial.made_of["threads"]),
            "tried": [one.model_dump() for one in self.trial.tried],
            "passed_over": list(self.passed_over),
            "taken": self.taken,
        }

    def as_markdown(self) -> str:
        """A page with the table."""
        made_of, reference = self.trial.made_of, title_of(self.graph, REFERENCE_CPU)
        rows = [[reference, "1.000", f"{self.trial.milliseconds:.1f} ms a run of the network"]]
        rows += [[_title(one), *_found(one)] for one in self.trial.tried]
        lines = [
            f"{BENCH_TITLE}{self.bundle.path.name}: what may run {self.graph.modality} here",
            "",
            f"- Machine: {made_of['processor']}, {made_of['threads']} threads, {made_of.get('gpu', 'no GPU')}",
            f"- Time: {self.trial.date}",
            f"- `--backend auto` takes {self.taken}",
            *(f"- {line}" for line in self.passed_over),
            "",
            *markdown_table(["tried", f"part of the time of {reference}", "what it gives"], rows),
        ]
        return "\n".join(lines) + "\n"


def _title(one: Tried) -> str:
    return f"{one.precision} on {one.backend}"


def _found(one: Tried) -> tuple[str, str]:
    """Its part of the reference's time, and how it did."""
    if one.ratio is None or one.dice is None:
        return "", f"fails: {one.failed}"
    doubt = "" if one.usable else f", less than {ALIKE:.0%}: not taken"
    return f"{one.ratio:.3f}", f"mask {one.dice:.2%} Dice to ONNX Runtime's{doubt}"
