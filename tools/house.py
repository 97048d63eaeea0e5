"""Draw the house: the package's rooms on their floors, and four walks through them, from the code as it is.

    python tools/house.py            # writes docs/images/house.svg
    python tools/house.py --check    # exit code 1 if the picture is not what the code says

A room is a folder of the package, or a file of its top or of runtime's. Floors are those of the import contracts in
pyproject.toml, which ``lint-imports`` holds the code to: imports go downwards only. What a room is for is the first
sentence of its docstring.
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from html import escape
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "espmedsam_edge"
PICTURE = ROOT / "docs" / "images" / "house.svg"
WIDTH, LEFT, GAP, HEIGHT, FLOOR = 1200, 60, 8, 52, 64
WIDEST = 280

# Each enters a room once, in this order; docs/architecture.md tells the steps.
WALKS = {
    "a file's frame": ("#1f6fb2", "cli inference sources video run segmenter backends kernels cuda segmentation sinks"),
    "a camera's frame": (
        "#b2541f",
        "cli inference serve sources run segmenter backends kernels cuda segmentation sinks",
    ),
    "a graph": ("#2f8f3f", "cli export model imaging calibration bundle engines backends onnx_session"),
    "a training image": ("#8a3fa8", "cli training imaging model metrics files"),
}


def layers() -> list[list[str]]:
    """Rows of room names, top first: the package's contract, with the rooms of runtime in runtime's place."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows: dict[str, list[list[str]]] = {}
    for contract in contracts:
        if contract["type"] == "layers":
            container = contract.get("containers", [PACKAGE])[0]
            names = [[part.strip(" ()") for part in row.replace(":", "|").split("|")] for row in contract["layers"]]
            rows[container] = [[n if n.startswith(PACKAGE) else f"{container}.{n}" for n in row] for row in names]
    house: list[list[str]] = []
    for row in rows[PACKAGE]:
        runtime = f"{PACKAGE}.runtime"
        if runtime in row and runtime in rows:
            house += rows[runtime]
            row = [name for name in row if name != runtime]
            if row:
                house[-1] = [*house[-1], *row]
        else:
            house.append(row)
    return house


def purpose(room: str) -> str:
    """The first sentence of a room's docstring, without its full stop."""
    path = ROOT.joinpath(*room.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.split("\n\n")[0].replace("`", "").split()).split(". ")[0].rstrip(".")


def draw() -> str:
    """The picture as SVG."""
    floors = layers()
    names = {room.rsplit(".", 1)[1] for floor in floors for room in floor}
    walks = {walk: (colour, rooms.split()) for walk, (colour, rooms) in WALKS.items()}
    for walk, (_, rooms) in walks.items():
        if not set(rooms) <= names or len(set(rooms)) != len(rooms):
            raise SystemExit(f"{walk}: {', '.join(sorted(set(rooms) - names)) or 'a room twice'}")
    shapes = []
    for number, floor in enumerate(floors):
        width = min(WIDEST, (WIDTH - LEFT - GAP * len(floor)) / len(floor))
        for place, room in enumerate(floor):
            shapes += _room(room, LEFT + place * (width + GAP), GAP + number * FLOOR, width, walks)
    bottom = GAP + len(floors) * FLOOR
    shapes += [
        f'<path d="M26 {GAP} V{bottom - 20}" class="down"/>',
        f'<text transform="translate(20 {bottom / 2:.0f}) rotate(-90)" class="note">imports go down only</text>',
    ]
    for number, (walk, (colour, _)) in enumerate(walks.items()):
        x = LEFT + number * 180
        shapes += [
            f'<circle cx="{x + 8}" cy="{bottom + 12}" r="8" fill="{colour}"/>',
            f'<text x="{x + 22}" y="{bottom + 16}" class="walk">{escape(walk)}</text>',
        ]
    style = (
        "text{font-family:sans-serif;fill:#123}.name{font-size:13px;font-weight:bold}.what{font-size:9.5px}"
        ".walk{font-size:12px}.note{font-size:12px;text-anchor:middle}.step{font-size:9px;fill:#fff;text-anchor:middle}"
        "rect{stroke:#567;stroke-width:1}.outer{fill:#eaf0f5}.inner{fill:#e2f1e2}"
        ".down{stroke:#567;stroke-width:2;marker-end:url(#tip)}"
    )
    tip = (
        '<marker id="tip" markerWidth="8" markerHeight="8" refX="4" refY="4" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 28}">',
            f"<style>{style}</style><defs>{tip}</defs>",
            '<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def _room(room: str, x: float, y: float, width: float, walks: dict[str, tuple[str, list[str]]]) -> list[str]:
    name, inner = room.rsplit(".", 1)[1], room.startswith(f"{PACKAGE}.runtime.")
    steps = [(colour, rooms.index(name) + 1) for colour, rooms in walks.values() if name in rooms]
    shapes = [
        f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="5" '
        f'class="{"inner" if inner else "outer"}"/>',
        f'<text x="{x + 8:.0f}" y="{y + 17}" class="name">{escape(name)}</text>',
    ]
    for line, text in enumerate(textwrap.wrap(purpose(room), int(width / 5.5), max_lines=2, placeholder=" ...")):
        shapes.append(f'<text x="{x + 8:.0f}" y="{y + 31 + 12 * line}" class="what">{escape(text)}</text>')
    for place, (colour, step) in enumerate(reversed(steps)):
        middle = x + width - 12 - 18 * place
        shapes.append(f'<circle cx="{middle:.0f}" cy="{y + 12}" r="8" fill="{colour}"/>')
        shapes.append(f'<text x="{middle:.0f}" y="{y + 15}" class="step">{step}</text>')
    return shapes


def main() -> int:
    """Write the picture, or say whether it is what the code says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the picture is stale")
    picture = draw()
    if not parser.parse_args().check:
        PICTURE.write_text(picture)
        return 0
    if PICTURE.is_file() and PICTURE.read_text() == picture:
        return 0
    print("docs/images/house.svg is not what the code says. Draw it anew: python tools/house.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
