"""``espmedsam-edge export``: a checkpoint in, a bundle of fused ONNX graphs out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from espmedsam_edge.terminal import tell, terminal_console


def command(
    weights: Path = typer.Argument(..., help="A checkpoint of this project (.safetensors)."),
    out: Path = typer.Option(..., "--out", help="The bundle to write: a folder."),
    modality: list[str] = typer.Option([], "--modality", help="Which to export; repeat for several. [default: all]"),
    image_size: int | None = typer.Option(None, help="Input side, a multiple of 64. [default: the checkpoint's]"),
    batch: int = typer.Option(1, help="Images a run, fixed in the graph."),
    dtype_storage: Literal["float32", "float16"] = typer.Option(
        "float32", help="How weights are stored in the file; float16 halves it, computing stays in float32."
    ),
    tile: int | None = typer.Option(
        None,
        help="Larger pictures are segmented in tiles of this side by default (infer --tile auto). "
        "[default: as the checkpoint states]",
    ),
) -> None:
    """Fuse each modality into one ONNX graph, compare it with the checkpoint, write the bundle."""

    from espmedsam_edge.destinations import BUNDLE, Destination, held
    from espmedsam_edge.export.exporter import export_bundle

    console = terminal_console(stderr=True)
    with held([Destination(out, BUNDLE)], [weights]), console.status("reading the checkpoint") as status:
        bundle, exported = export_bundle(
            weights,
            out,
            modalities=modality,
            image_size=image_size,
            batch=batch,
            storage=dtype_storage,
            tile=tile,
            progress=lambda step: status.update(step),
        )
    for graph in exported:
        tell(
            f"{bundle.path / graph.file}: {graph.megabytes:.1f} MB, {graph.nodes} nodes; agrees with the checkpoint on "
            f"{graph.agreement.mask_agreement:.3%} of the mask (logits: {graph.agreement.max_error:.1e} of their range)"
        )
    if bundle.manifest.weights.origin == "random":
        tell("These weights were never trained: the masks will mean nothing.")
