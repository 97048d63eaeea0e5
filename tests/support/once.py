"""What is costly to make and the same for every test: made once a run, however many processes share its tests."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto

_shared: list[Path] = []


def share_in(folder: Path) -> None:
    """Name the folder that the processes of this run share."""
    folder.mkdir(exist_ok=True)
    _shared[:] = [folder]


def once(name: str, make: Callable[[], bytes]) -> bytes:
    """What ``make`` gives; the first process that asks makes it while the others wait."""
    file = _shared[0] / name
    with (_shared[0] / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_bytes(make())
    return file.read_bytes()


def exported_graph(
    size: int, batch: int = 1, *, preset: str = "espmedsam-tiny", modality: str = "fundus", published: bool = False
) -> ModelProto:
    """What export makes of ``scrambled_model(preset, published=published)``; a copy of the caller's own.

    Tracing and simplifying even the tiny preset takes seconds, so tests share sizes where it does not matter.
    """
    import onnx

    def export() -> bytes:
        from networks import scrambled_model

        from espmedsam_edge.export.fusion import FusedSegmenter
        from espmedsam_edge.export.graph import build_graph

        network = FusedSegmenter(scrambled_model(preset, published=published), modality, size, batch)
        return build_graph(network, size, batch).SerializeToString()

    name = f"{preset}-{modality}-{'published' if published else 'paper'}-{size}-{batch}.onnx"
    return onnx.load_from_string(once(name, export))
