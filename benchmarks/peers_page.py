"""docs/peers.md from the result files of peers.py: Table III side by side, the encoders, licences, the plot."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from peers_networks import OURS, OURS_RUNTIMES, PUBLISHED_OURS, ROWS, Row

from espmedsam_edge.errors import UserError
from espmedsam_edge.evaluation.paper import paper_tables
from espmedsam_edge.files import atomic_write, read_json
from espmedsam_edge.marks import MARK

DOCS = Path(__file__).parents[1] / "docs"
PLOT = Path("images") / "peers.png"
QUIET = 0.5
"""Cores that others may keep busy meanwhile; above, a result is marked as not for publishing."""

_HEAD = """\
# Beside other networks: Table III again

The paper compares the cost of ESP-MedSAM-S with networks that people would otherwise deploy: light versions of SAM in
automatic mask mode. Here they are in one run, on one machine, by one counter. Weights are random, except ours: time
does not depend on them, but random weights keep no mask, which spares the others the last steps of automatic mode.

A network of the SAM family finds everything in a picture, or what a point or a box shows it. Ours finds one kind of
target without being shown. So there are two comparisons: **automatic mode**, in which nobody shows anything, and
**one box**, drawn by hand, after which the others need one pass of their encoder and one of their decoder, as ours
does.
"""
_NOTES = """\
## Where the paper's figures and these part

"FLOPs" in Table III are multiply-accumulates in 10^9, as far as they can be reproduced: of the encoder and **one**
prompt. In automatic mode a picture has 1024 prompts of 1.8 GMAC each, so every one of them does about 2,000 GMAC a
picture and the encoder hardly matters. That is why the paper's frames a second differ so little from one to the next.
"""
_TIMES = """\
The paper's times are of one RTX A6000; ratios differ from machine to machine.
"""
_ACCURACY = """\
## Accuracy

None of the others was trained here, so none was scored. The plot takes the Dice that the paper printed (Table I, mean
of its six modalities; by hand: a point, the time is that of one box) and the time measured here.

![The paper's Dice against the time measured here](images/peers.png)
"""
_LICENCES = """\
EdgeSAM's authors allow non-commercial use; the package states MIT for all that it holds. Measure with it, but ask the
authors before you build on it.
"""


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Result files of peers.py, each with that of unet.py of the same machine where there is one.

    Raises:
        UserError: one is not there, or is another script's.
    """
    found = []
    for path in paths:
        try:
            result = read_json(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}", "Run measure first.") from error
        needed = {"settings", "environment", "counts", "seconds", "kept", "failed", "others"}
        if not isinstance(result, dict) or result.get("kind") != "peers" or not needed <= result.keys():
            raise UserError(f"{path} is no result of peers.py.", "Run measure first.")
        beside = path.with_name(path.name.replace("peers", "unet", 1))
        unet = read_json(beside.read_text()) if beside.is_file() else {}
        whole = unet.get("kind") == "unet" and "times" in unet
        found.append({**result, "file": path.name, "unet": {**unet, "file": beside.name} if whole else None})
    return found


def write_page(paths: Sequence[Path], docs: Path = DOCS) -> None:
    """Write peers.md and its plot below ``docs``."""
    results = read_results(paths)
    if points(results[0]):
        atomic_write(docs / PLOT, draw(results[0]))
    atomic_write(docs / "peers.md", page(results))
    print(docs / "peers.md")


def page(results: Sequence[dict[str, Any]]) -> str:
    """The whole page; a section a machine."""
    parts = [_HEAD]
    for result in results:
        parts += ["\n".join(_machine(result)), _verdict(result), "\n".join(_sizes(result))]
        if any(result["seconds"].values()):
            parts += ["\n".join(_times(result)), "\n".join(_encoders(result))]
    parts += ["\n".join(_notes()), *([_ACCURACY] if points(results[0]) else [])]
    parts += ["\n".join(_unet(result["unet"])) for result in results if result.get("unet")]
    parts += ["\n".join(_licences(results[0])), "\n".join(_again(results))]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def seconds(result: dict[str, Any], figure: str, name: str) -> float | None:
    """The median of what was measured, or None."""
    found = result["seconds"].get(figure, {}).get(name)
    return median(found) if found else None


def _machine(result: dict[str, Any]) -> Iterator[str]:
    environment, settings = result["environment"], result["settings"]
    cpu, gpus = environment["cpu"], environment.get("gpus") or []
    on_gpu = settings["device"] == "cuda" and gpus
    yield f"## {gpus[0]['name'] if on_gpu else cpu['model']}, {cpu['usable']} cores\n"
    versions = environment["packages"]
    used = ("torch", "timm", "onnxruntime", "openvino", "mobilesam-mirror", "efficientsam", "x-segment-anything")
    with_versions = ", ".join(f"{name} {versions[name]}" for name in used if name in versions)
    yield f"From `benchmarks/results/{result['file']}`: {environment['time'][:10]}, {environment['system']},"
    yield f"Python {environment['python']}, {with_versions}."
    size, rounds = " x ".join(map(str, settings["picture"])), settings["rounds"]
    if not any(result["seconds"].values()):
        yield "\n**Sizes alone: no time was measured yet.**"
        return
    yield f"{settings['threads']} threads, a picture of {size} pixels. Medians of {rounds} rounds in which each network"
    yield f"has its turn; of automatic mode {settings['automatic_rounds']}."
    if settings["points_per_side"] != 32:
        yield f"\n**Not the paper's setting: {settings['points_per_side']} points a side in automatic mode.**"
    busy = max([*result["others"].values(), environment.get("load_average_1min") or 0.0])
    if busy > QUIET:
        yield f"\n**Other work kept {busy:.1f} cores busy meanwhile: these times are not for publishing.**"


def _sizes(result: dict[str, Any]) -> Iterator[str]:
    points = result["settings"]["points_per_side"] ** 2
    yield "### Sizes\n"
    yield _line(
        "network", "parameters, M", "paper", "encoder, GMAC", "and one prompt", "paper: FLOPs", "automatic mode, GMAC"
    )
    yield "|---" * 7 + "|"
    for row in (*ROWS, PUBLISHED_OURS):
        parameters, flops, _ = row.published
        cells = ["", "", "", ""]
        if counted := result["counts"].get(row.name):
            encoder, prompt = counted["encoder_mac"] / 1e9, counted["prompt_mac"] / 1e9
            whole = encoder + prompt * (1 if row.name == OURS else points)
            cells = [f"{counted['parameters'] / 1e6:.2f}", f"{encoder:.1f}", f"{encoder + prompt:.1f}", f"{whole:,.0f}"]
        yield _line(
            _bold(row.name), cells[0], f"{parameters:.2f}", *cells[1:3], f"{flops:.2f}" if flops else "", cells[3]
        )


def _times(result: dict[str, Any]) -> Iterator[str]:
    one_pass = seconds(result, "automatic", OURS)
    yield "### Times\n"
    yield _line(
        "network", "encoder, ms", "one box, ms", "automatic mode, s", "over our one pass", "paper: s", "over ours"
    )
    yield "|---" * 7 + "|"
    for name in (*(row.name for row in ROWS), *_ours()):
        if name in _ours()[1:] and not any(seconds(result, figure, name) for figure in ("one box", "automatic")):
            continue
        fps = next((row.published[2] for row in (*ROWS, PUBLISHED_OURS) if row.name == name), None)
        whole = seconds(result, "automatic", name)
        yield _line(
            _bold(name),
            _ms(seconds(result, "encoder", name)),
            _ms(seconds(result, "one box", name)),
            f"{whole:.2f}" if whole else "",
            _times_as_long(whole / one_pass) if whole and one_pass else "",
            f"{1 / fps:.2f}" if fps else "",
            f"{(PUBLISHED_OURS.published[2] or 0) / fps:.1f}" if fps else "",
        )
    yield "\nEmpty: not measured. Ours needs no box: both columns are its one pass, from a frame to its mask; without a"
    yield "runtime's name in PyTorch, unfused. " + _TIMES.strip()
    if kept := result["kept"]:
        yield f"Masks kept in automatic mode: {', '.join(f'{name} {count}' for name, count in kept.items())}."
    for figure, failures in result["failed"].items():
        for name, why in failures.items():
            yield f"\nNot measured: {figure} of {name}: {why}."


def _ours() -> tuple[str, ...]:
    return (OURS, *(name for _, name in OURS_RUNTIMES.values()))


def _bold(name: str) -> str:
    return f"**{name}**" if name in _ours() else name


def _times_as_long(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _ms(value: float | None) -> str:
    return f"{1000 * value:,.0f}" if value and value >= 0.1 else f"{1000 * value:.2f}" if value else ""


def _verdict(result: dict[str, Any]) -> str:
    """The two comparisons in words, from what was measured."""
    peers = [row.name for row in ROWS if row.build is not None]
    ours = {name: value for name in _ours() if (value := seconds(result, "automatic", name))}
    whole = {name: value for name in peers if (value := seconds(result, "automatic", name))}
    box = {name: value for name in peers if (value := seconds(result, "one box", name))}
    said = []
    if whole and ours:
        name = min(whole, key=whole.__getitem__)
        ratios = ", ".join(
            f"{_times_as_long(whole[name] / value)} times as long as {own}" for own, value in ours.items()
        )
        said.append(f"**Nobody shows anything**: the fastest of them, {name}, takes {ratios}.")
    one_pass = seconds(result, "one box", OURS)
    if box and one_pass:
        name, last = min(box, key=box.__getitem__), max(box, key=box.__getitem__)
        said.append(
            f"**Somebody draws a box**: {name} takes {_times_as_long(box[name] / one_pass)} times as long as our one "
            f"pass, {last} {_times_as_long(box[last] / one_pass)} times, all in PyTorch; drawing it is not counted."
        )
    return "\n\n".join(said)


def _encoders(result: dict[str, Any]) -> Iterator[str]:
    figures = [figure for figure, found in result["seconds"].items() if figure.startswith("encoder") and found]
    yield "### Encoders, milliseconds\n"
    titles = {"encoder": "PyTorch, eager", **{f: name.partition(", ")[2] for f, (_, name) in OURS_RUNTIMES.items()}}
    yield _line("network", *(titles.get(figure, f"PyTorch, {figure.removeprefix('encoder ')}") for figure in figures))
    yield "|---" * (len(figures) + 1) + "|"
    for row in ROWS:
        if row.build is not None:
            yield _line(row.name, *(_ms(seconds(result, figure, row.name)) for figure in figures))
    yield _line(f"**{OURS}**", *(_ms(seconds(result, figure, OURS)) for figure in figures))
    fused = [_ms(seconds(result, figure, OURS_RUNTIMES.get(figure, ("", ""))[1])) for figure in figures]
    if any(fused):
        yield _line(f"**{OURS}, whole, frame to mask**", *fused)


def _notes() -> Iterator[str]:
    yield _NOTES
    for row in (*ROWS, PUBLISHED_OURS):
        yield f"* **{row.name}**: {row.note}"


def _licences(result: dict[str, Any]) -> Iterator[str]:
    versions = result["environment"]["packages"]
    yield "## Licences\n"
    yield "The packages serve this measurement alone (extra `peers`); nothing of them is in this program.\n"
    yield _line("network", "package", "licence")
    yield "|---|---|---|"
    for row in ROWS:
        version = versions.get(row.package, "")
        yield _line(row.name, f"{row.package} {version}".strip() or "none", row.licence)
    yield "\n" + _LICENCES


def _unet(result: dict[str, Any]) -> Iterator[str]:
    (name, other), (own, ours) = result["networks"].items()
    yield "## A U-Net on the same images\n"
    yield f"From `benchmarks/results/{result['file']}`: MONAI's BasicUNet with an output a modality, and {own}, both"
    cpu, minutes = result["environment"]["cpu"], result["minutes"]
    yield f"from random weights, by the recipe `{result['recipe']}` on the same lists, {minutes:g} minutes of training"
    yield f"each, of processor time with all {cpu['usable']} cores of {cpu['model']} at work ({other['steps']} and"
    yield f"{ours['steps']} steps)."
    yield "Neither was tuned for it. The weights that ship had longer ([accuracy](accuracy.md)). Test images at"
    yield "1024 x 1024: Dice in per cent, HD95 in pixels.\n"
    yield _line("modality", "test set", "images", f"{name}: Dice", "HD95", f"{own}: Dice", "HD95")
    yield "|---" * 7 + "|"
    pairs = []
    for modality, sets in ours["scores"].items():
        for dataset, mine in sets.items():
            theirs = other["scores"][modality][dataset]
            pairs.append((theirs["dice"], mine["dice"]))
            scores = (f"{one[key]:.{digits}f}" for one in (theirs, mine) for key, digits in (("dice", 2), ("hd95", 1)))
            yield _line(modality, dataset, str(mine["images"]), *scores)
    ahead, (theirs, mine) = sum(one > two for one, two in pairs), (mean(column) for column in zip(*pairs, strict=True))
    who = f"the U-Net wins, {theirs:.2f} to {mine:.2f}" if theirs > mine else f"{own} wins, {mine:.2f} to {theirs:.2f}"
    yield f"\n**By the mean Dice of these sets {who}**; the U-Net is ahead in {ahead} of {len(pairs)}."
    yield "So many minutes tell how soon a network learns, not where it ends.\n"
    times = result.get("times", {})
    titles = (f"{side} px: {what}" for side in times for what in ("GMAC", "PyTorch, ms", "ONNX Runtime, ms"))
    yield _line("network", "parameters, M", *titles)
    yield "|---" * (2 + 3 * len(times)) + "|"
    for network, facts in result["networks"].items():
        cells = [
            cell
            for found in times.values()
            for cell in (
                f"{found['mac'][network] / 1e9:.1f}",
                *(_ms(found["ms"][f"{network}, {runtime}"]["p50"] / 1000) for runtime in ("PyTorch", "ONNX Runtime")),
            )
        ]
        yield _line(network, f"{facts['parameters'] / 1e6:.2f}", *cells)
    yield "\nThe network alone, one image. In ONNX Runtime ours is the fused graph; its logits are a quarter as wide."


def _again(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## Again\n"
    yield "```\npip install -e '.[peers]'"
    for result in results:
        name = result["file"].removesuffix(".json")
        device = " --device cuda" if result["settings"]["device"] == "cuda" else ""
        yield f"python benchmarks/peers.py measure --name {name}{device}"
        if unet := result.get("unet"):
            minutes, its = unet["minutes"], unet["file"].removesuffix(".json")
            yield f"python benchmarks/unet.py --data ../shared/data --minutes {minutes:g} --name {its}"
            yield f"python benchmarks/peers.py page {name}"
    yield "```"


def _dice(row: Row, prompt: str) -> float | None:
    """The paper's mean Dice over Table I's modalities."""
    table = next(table for table in paper_tables().tables if table.number == "I")
    found = [one.scores for one in table.rows if (one.method, one.prompt) == (row.name, prompt)]
    return mean(score.dice for score in found[0].values()) if found else None


def points(result: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """What the plot shows: kind, name, seconds a picture, the paper's Dice in per cent."""
    found = []
    for row in ROWS:
        for kind, figure, prompt in (
            ("automatic mode", "automatic", "none"),
            ("one prompt by hand", "one box", "point"),
        ):
            time, dice = seconds(result, figure, row.name), _dice(row, prompt)
            if time and dice:
                found.append((kind, row.name, time, dice))
    own = _dice(PUBLISHED_OURS, "none")
    for name in _ours():
        time = seconds(result, "automatic", name)
        if time and own:
            found.append(("without prompts", name, time, own))
    return found


def draw(result: dict[str, Any]) -> bytes:
    """The plot as PNG: the paper's Dice against seconds a picture, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    figure = Figure(figsize=(9, 5.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = {
        "automatic mode": ("o", "#D55E00"),
        "one prompt by hand": ("^", "#0072B2"),
        "without prompts": ("*", "#009E73"),
    }
    shown = points(result)
    for kind, (marker, colour) in styles.items():
        mine = [(name, x, y) for one, name, x, y in shown if one == kind]
        size = 160 if marker == "*" else 50
        axes.scatter([x for _, x, _ in mine], [y for *_, y in mine], size, colour, marker, label=kind, zorder=3)
        column, above = 1.3 * max((x for _, x, _ in mine), default=0), 0.0
        for name, x, y in sorted(mine, key=lambda one: one[2]):  # names in a column of their own: the points are close
            if marker == "*":
                text = name.partition(", ")[2] or f"{name}, PyTorch"
                axes.annotate(text, (x, y), (-2, 9), textcoords="offset points", rotation=50, fontsize=8)
                continue
            above = max(y, above + 0.8)
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)}
            axes.annotate(name, (x, y), (column, above), va="center", fontsize=8, arrowprops=line)
    if shown:
        axes.set_xscale("log")
        times = [time for _, _, time, _ in shown]
        axes.set_xlim(0.7 * min(times), 5 * max(times))  # room for the names
        axes.set_ylim(top=93.5)
        axes.legend(frameon=False, loc="lower left")
    axes.set_xlabel("seconds a picture, measured here (logarithmic)")
    axes.set_ylabel("mean Dice of six modalities, per cent, published")
    axes.set_title("Published accuracy against measured time", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    canvas.draw()
    picture, written = io.BytesIO(), PngInfo()
    written.add_text("Software", MARK)
    colours = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(64)
    colours.save(picture, format="png", optimize=True, pnginfo=written)
    return picture.getvalue()
