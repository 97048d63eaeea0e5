"""What calibrate's gate said, as a bundle's manifest has it."""

from __future__ import annotations

from espmedsam_edge.bundle import Graph, Manifest


def accuracy_key(graph: Graph, backend: str = "") -> str:
    """The key in a manifest's ``accuracy`` of a graph's gate, or with ``backend`` of its check on that backend."""
    return f"{graph.modality}/{graph.precision}" + (f"@{backend}" if backend else "")


def passed(manifest: Manifest, graph: Graph, backend: str = "") -> bool:
    """Whether the gate passed a graph of lower precision; with ``backend``, what that makes of a graph."""
    entry = manifest.accuracy.get(accuracy_key(graph, backend), {})
    if backend:
        return entry.get("passed") is True and entry.get("graph_sha256") == graph.sha256
    loss, budget = entry.get("dice_loss_mean"), entry.get("budget")
    return isinstance(loss, int | float) and isinstance(budget, int | float) and loss <= budget
