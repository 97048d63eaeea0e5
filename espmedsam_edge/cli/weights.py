"""``espmedsam-edge weights``: the weights that came with the program, as a list, a bundle or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import typer

from espmedsam_edge.terminal import tell


def command(
    modality: str | None = typer.Option(None, help="Of the bundle. [default: all]"),
    out: Path | None = typer.Option(None, help="A bundle to write: a folder. Needs no torch."),
    checkpoint: Path | None = typer.Option(None, help="A checkpoint to write (.safetensors), to train or export from."),
    overwrite: bool | None = typer.Option(
        None, "--overwrite/--no-overwrite", help="Replace a checkpoint that exists. [default: no]"
    ),
) -> None:
    """List the weights that came with the program; write them as a bundle or as a checkpoint."""
    from espmedsam_edge.destinations import BUNDLE, Destination, held
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.marks import CHECKPOINT
    from espmedsam_edge.shipped.bundles import (
        TERMS,
        WEIGHTS,
        check_checkpoint_name,
        shipped_bundle,
        shipped_checkpoint,
        shipped_scores,
    )

    scores = shipped_scores()
    if modality is not None and out is None:
        raise UserError("--modality goes with --out.", "espmedsam-edge weights --modality NAME --out NAME.bundle")
    if out is None and checkpoint is None:
        for name, score in scores.items():
            tell(score.line(name))
        tell(f"For research and education, not for commercial use, whatever the program's license: {WEIGHTS / TERMS}")
        tell("Research software, not a medical device. More: docs/accuracy.md")
    if checkpoint is not None:
        check_checkpoint_name(checkpoint)
    wanted = ((out, BUNDLE), (checkpoint, CHECKPOINT))
    with held([Destination(path, kind) for path, kind in wanted if path is not None], overwrite=overwrite):
        if out is not None:
            bundle = shipped_bundle(modality, out)
            tell(f"{bundle.path}: {', '.join(bundle.manifest.modalities)}")
        if checkpoint is not None:
            shipped_checkpoint(checkpoint)
            tell(f"{checkpoint}: {', '.join(scores)}")
