"""``espmedsam-edge import``: foreign checkpoints in, ours out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from espmedsam_edge.terminal import tell

app = typer.Typer(no_args_is_help=True, help="Convert published checkpoints into this project's format.")
_OUT = typer.Option(..., "--out", help="The checkpoint to write (.safetensors).")
_OVERWRITE = typer.Option(None, "--overwrite/--no-overwrite", help="Replace a file that exists. [default: no]")


def _write(out: Path, files: list[Path], overwrite: bool | None, convert: Callable[[], str]) -> None:
    from espmedsam_edge.destinations import Destination, held
    from espmedsam_edge.marks import CHECKPOINT

    with held([Destination(out, CHECKPOINT)], files, overwrite):
        tell(convert())


@app.command("reference")
def reference(
    files: list[Path] = typer.Argument(..., help="The authors' single-modality .pth files."),
    modality: list[str] = typer.Option(..., "--modality", help="One a file, in the same order."),
    out: Path = _OUT,
    image_size: int = typer.Option(1024, help="Input side in pixels that the network was trained for."),
    overwrite: bool | None = _OVERWRITE,
) -> None:
    """The authors' published ESP-MedSAM checkpoints; several merge into one."""
    from espmedsam_edge.model.convert import convert_reference

    _write(out, files, overwrite, lambda: convert_reference(files, modality, out, image_size))


@app.command("mobilesam")
def mobilesam(
    file: Path = typer.Argument(..., help="mobile_sam.pt"),
    out: Path = _OUT,
    overwrite: bool | None = _OVERWRITE,
) -> None:
    """MobileSAM: its encoder and decoder, to start training from."""
    from espmedsam_edge.model.convert import convert_mobilesam

    _write(out, [file], overwrite, lambda: convert_mobilesam(file, out))


@app.command("sam")
def sam(
    file: Path = typer.Argument(..., help="sam_vit_b.pth, _l or _h"),
    out: Path = _OUT,
    overwrite: bool | None = _OVERWRITE,
) -> None:
    """SAM: its mask decoder, to start training from."""
    from espmedsam_edge.model.convert import convert_sam

    _write(out, [file], overwrite, lambda: convert_sam(file, out))
