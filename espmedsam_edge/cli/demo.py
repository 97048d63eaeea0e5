"""espmedsam-edge demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from espmedsam_edge.runtime.demo import Demo, Row


def command(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("demo-output"),
    bundle: Annotated[Path | None, typer.Option(help="Default: the small one that ships with the program.")] = None,
) -> None:
    """Segment generated pictures of every modality and a clip, to see it work; needs no torch and no GPU."""
    import time

    from espmedsam_edge.imaging.encode import write_image
    from espmedsam_edge.runtime.demo import demo_bundle, run_demo
    from espmedsam_edge.runtime.demo_sheet import contact_sheet
    from espmedsam_edge.runtime.environment import near

    start = time.perf_counter()
    opened = demo_bundle(bundle)
    typer.echo(f"Drawing pictures and segmenting them with {near(opened.path)}\n")
    typer.echo(f"  {'modality':<22}  {'target':<16}  {'frames':>6}  {'Dice':>6}  {'ms a frame':>10}")
    demo = run_demo(opened, out, _say_row)
    sheet = out / "contact-sheet.png"
    write_image(sheet, contact_sheet(demo))
    _say_end(demo, sheet, time.perf_counter() - start)


def _say_row(row: Row) -> None:
    dice = "-" if row.dice is None else f"{row.dice:.3f}"
    typer.echo(f"  {row.name:<22}  {row.target:<16}  {row.frames:>6}  {dice:>6}  {1000 * row.seconds:>10.1f}")


def _say_end(demo: Demo, sheet: Path, seconds: float) -> None:
    from espmedsam_edge.runtime.environment import near, program_command

    out, weights = demo.out, demo.bundle.manifest.weights
    typer.echo(f"\nDone in {seconds:.1f} s, on {demo.backend}.")
    if not demo.trained:
        typer.echo(
            "The weights are untrained (random): the masks are meaningless. The demo shows that the program runs."
        )
    elif weights.note:
        typer.echo(f"The weights: {weights.note}")
    lines = {
        sheet: "everything on one page: look at this first",
        out / "clip-overlay.mp4": "the clip with its masks drawn in (without: clip.mp4)",
        out / "overlays": "the pictures with their masks drawn in",
        out / "masks": "the masks, 0 and 255 (the true ones: truth)",
        out / "results.jsonl": "area, box, centroid and times, a line a frame",
    }
    width = max(len(str(path)) for path in lines)
    typer.echo("\nLook at:")
    for path, text in lines.items():
        typer.echo(f"  {path!s:<{width}}  {text}")
    name = demo.bundle.manifest.modalities[0]
    choice = f" --modality {name}" if len(demo.bundle.manifest.modalities) > 1 else ""
    typer.echo(f"\nYour own images: {program_command()} infer {near(demo.bundle.path)} IMAGES{choice}")
