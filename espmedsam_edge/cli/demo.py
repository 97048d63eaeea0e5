"""espmedsam-edge demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espmedsam_edge.cli.messages import once
from espmedsam_edge.terminal import tell

if TYPE_CHECKING:
    from espmedsam_edge.demo.demo import Demo, Row


def command(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("demo-output"),
    bundle: Annotated[Path | None, typer.Option(help="Default: the weights that came with the program.")] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite/--no-overwrite", help="Replace files that exist. Default: what this program wrote."),
    ] = None,
) -> None:
    """Segment pictures and a clip, to see it work; needs no torch and no GPU."""
    import time

    from espmedsam_edge.demo.demo import demo_bundles, demo_destinations, run_demo
    from espmedsam_edge.demo.sheet import contact_sheet
    from espmedsam_edge.destinations import Destination, check_writable, held
    from espmedsam_edge.imaging.encode import write_image
    from espmedsam_edge.machine.installation import near
    from espmedsam_edge.marks import PICTURE

    start = time.perf_counter()
    check_writable(out.absolute())
    bundles = demo_bundles(bundle)
    tell(f"Segmenting with {', '.join(dict.fromkeys(near(opened.path) for opened in bundles.values()))}\n")
    tell(f"  {'modality':<22}  {'target':<16}  {'frames':>6}  {'Dice':>6}  {'objects':>7}  {'ms a frame':>10}")
    sheet = out / "contact-sheet.png"
    with once(), held([*demo_destinations(bundles, out), Destination(sheet, PICTURE)], (), overwrite) as unchanged:
        demo = run_demo(bundles, out, _say_row, shipped=bundle is None, overwrite=overwrite)
        unchanged()
        write_image(sheet, contact_sheet(demo))
    _say_end(demo, sheet, time.perf_counter() - start)


def _say_row(row: Row) -> None:
    dice = "-" if row.dice is None else f"{row.dice:.3f}"
    objects = "-" if row.objects is None else row.objects
    tell(f"  {row.name:<22}  {row.target:<16}  {row.frames:>6}  {dice:>6}  {objects:>7}  {1000 * row.seconds:>10.1f}")


def _say_end(demo: Demo, sheet: Path, seconds: float) -> None:
    from espmedsam_edge.machine.installation import near, program_command

    out = demo.out
    tell(f"\nDone in {seconds:.1f} s, on {demo.backend}.")
    if not demo.trained:
        tell("The weights are untrained (random): the masks are meaningless. The demo shows that the program runs.")
    for note in dict.fromkeys(bundle.manifest.weights.note for bundle in demo.bundles.values()):
        if note:
            tell(note)
    if demo.shipped:
        tell("Research software, not a medical device. All modalities: espmedsam-edge weights")
    lines = {
        sheet: "everything on one page: look at this first",
        out / "clip-overlay.mp4": "the clip with its masks drawn in (without: clip.mp4)",
        out / "overlays": "the pictures with their masks drawn in",
        out / "masks": "the masks, 0 and 255 (the true ones: truth)",
        out / "results.jsonl": "area, box, centroid and times, a line a frame",
    }
    width = max(len(str(path)) for path in lines)
    tell("\nLook at:")
    for path, text in lines.items():
        tell(f"  {path!s:<{width}}  {text}")
    own = "IMAGES" if demo.shipped else f"{near(next(iter(demo.bundles.values())).path)} IMAGES"
    choice = f" --modality {next(iter(demo.bundles))}" if len(demo.bundles) > 1 and not demo.shipped else ""
    tell(f"\nYour own images: {program_command()} infer {own}{choice}")
