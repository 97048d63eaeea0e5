"""Draw the house: the package's rooms in their layers and who imports whom, from the code as it is.

    python tools/house.py            # writes docs/images/house.svg
    python tools/house.py --check    # exit code 1 if the picture is not what the code says

A room is a folder of the package; single files at the top stand in one row each as pyproject.toml's import contracts
place them. Of the arrows only those are drawn that no longer way round stands for (the transitive reduction), so a
picture of all imports stays readable; ``lint-imports`` checks every one of them.
"""

from __future__ import annotations

import argparse
import ast
import sys
from html import escape
from pathlib import Path

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "espmedsam_edge"
PICTURE = ROOT / "docs" / "images" / "house.svg"
WIDTH, BOX, GAP, ROW, MARGIN = 1240, 34, 10, 78, 16


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


def arrows(rooms: list[str]) -> set[tuple[str, str]]:
    """Pairs (importer, imported) of rooms, without those that a longer way round stands for."""
    graph = grimp.build_graph(PACKAGE)
    place = {}
    for module in graph.modules:
        homes = [room for room in rooms if module == room or module.startswith(f"{room}.")]
        if homes:
            place[module] = max(homes, key=len)
    direct: dict[str, set[str]] = {room: set() for room in rooms}
    for module, home in place.items():
        for imported in graph.find_modules_directly_imported_by(module):
            if imported in place and place[imported] != home:
                direct[home].add(place[imported])

    def reached(start: str, seen: set[str]) -> set[str]:
        for following in direct[start] - seen:
            seen.add(following)
            reached(following, seen)
        return seen

    beyond = {room: set().union(*(reached(next_, set()) for next_ in direct[room])) for room in rooms}
    return {(room, to) for room in rooms for to in direct[room] - beyond[room]}


def purpose(room: str) -> str:
    """The first sentence of a room's docstring."""
    path = ROOT.joinpath(*room.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def draw() -> str:
    """The picture as SVG."""
    rows = layers()
    rooms = [room for row in rows for room in row]
    boxes: dict[str, tuple[float, float, float]] = {}
    shapes = []
    for number, row in enumerate(rows):
        width = min(190.0, (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row))
        left = (WIDTH - len(row) * width - GAP * (len(row) - 1)) / 2
        for place, room in enumerate(row):
            x, y = left + place * (width + GAP), MARGIN + number * ROW
            boxes[room] = (x, y, width)
            inner = room.startswith(f"{PACKAGE}.runtime.")
            label = room.removeprefix(f"{PACKAGE}.").removeprefix("runtime.")
            shapes.append(
                f'<g><title>{escape(purpose(room))}</title><rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" '
                f'height="{BOX}" rx="5" class="{"inner" if inner else "outer"}"/><text x="{x + width / 2:.0f}" '
                f'y="{y + BOX / 2 + 5:.0f}">{escape(label)}</text></g>'
            )
    lines = []
    for start, end in sorted(arrows(rooms)):
        (x1, y1, w1), (x2, y2, w2) = boxes[start], boxes[end]
        a, b = x1 + w1 / 2, x2 + w2 / 2
        top, bottom = y1 + BOX, y2
        bend = (bottom - top) / 2
        lines.append(
            f'<path d="M{a:.0f} {top:.0f} C{a:.0f} {top + bend:.0f} {b:.0f} {bottom - bend:.0f} {b:.0f} {bottom:.0f}"/>'
        )
    height = 2 * MARGIN + (len(rows) - 1) * ROW + BOX
    style = (
        "text{font:13px sans-serif;text-anchor:middle;fill:#123}rect{stroke:#456;stroke-width:1}"
        ".outer{fill:#e8eef4}.inner{fill:#dcefdc}path{fill:none;stroke:#789;stroke-width:1.2;marker-end:url(#tip)}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="13">',
            f"<style>{style}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" style="fill:#789;stroke:none"/></marker></defs>',
            '<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>',
            *lines,
            *shapes,
            "</svg>\n",
        ]
    )


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
