"""The outlines of a slide's mask as GeoJSON, as QuPath opens it; what lies across regions is one object."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.annotations.geojson import HEAD, TAIL, feature
from espmedsam_edge.annotations.outlines import Ring, corners, edge_outlines, without_diagonals
from espmedsam_edge.files import atomic_path
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.objects.separation import Labels, box_of, cuts
from espmedsam_edge.runtime.slide.regions import REMAINS, Mask, Regions

log = logging.getLogger(__name__)

_MOST_PARTS, _MOST_HOLES = 1_000_000, 100_000  # outlines; the tissue of a large slide has some 500,000 nuclei
_TINY = 1 << 17  # pixels
_LARGEST = 1 << 26  # pixels of an object's box; larger ones are outlined from every second, third, ... pixel

Edges = dict[tuple[int, int], dict[str, NDArray[np.int32]]]  # labels along the sides of regions
Node = tuple[int, int, int]  # a region's row and column, and a part's label in it


class _Piece(NamedTuple):
    """What of an object lies in one region: its box in the level, and one of its pixels."""

    left: int
    top: int
    right: int
    bottom: int
    x: int
    y: int


def write_objects(
    path: Path,
    regions: Regions,
    *,
    name: str,
    colour: tuple[int, int, int],
    scale: float,
    mpp: float | None,
    split: bool = False,
) -> int:
    """Write a FeatureCollection with a polygon for each object of the mask; how many there are.

    Of noise, a mask of over a million parts or 100,000 holes, the smallest are left out, and a warning says so.

    Args:
        path: .geojson
        regions: of the mask.
        name: of their class.
        colour: RGB.
        scale: pixels of the slide's largest level that one of the mask spans; coordinates are that level's.
        mpp: micrometres a pixel of the mask, for areas; None: areas are in pixels of the mask.
        split: whether objects that touch are taken apart; else each connected part is one.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """
    count, least = 0, _least(regions)
    if any(least):
        log.warning(
            "%s: the mask looks like noise: parts under %d pixels and holes under %d are left out of the outlines.",
            path,
            *least,
        )
    with atomic_path(path, remains=REMAINS) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(HEAD)
        for polygon, area in _polygons(regions, least, split=split):
            rings = [(scale * ring).round(2).tolist() for ring in polygon]
            size = {"Area px": area} if mpp is None else {"Area µm^2": round(area * mpp * mpp, 3)}
            closed = [[*ring, ring[0]] for ring in rings]
            file.write(("," if count else "") + "\n" + feature([closed], name, colour, size))
            count += 1
        file.write(TAIL)
    return count


class _Least(NamedTuple):
    """Pixels that a part, and that a hole must have to be outlined; 0: any."""

    part: int
    hole: int


def _least(regions: Regions) -> _Least:
    """Such that there are no more than ``_MOST_PARTS`` and ``_MOST_HOLES``."""
    masks = [one for one in product(range(regions.rows), range(regions.columns)) if regions.read(*one) is not None]
    at_most = np.zeros(2, np.int64)
    for place in masks:  # this is soon told, and enough but for noise
        at_most += [_corners_of(pixels) for pixels, _ in _kinds(regions, place)]
    if at_most[0] <= _MOST_PARTS and at_most[1] <= _MOST_HOLES:
        return _Least(0, 0)
    counts = np.zeros((2, _TINY + 1), np.int64)
    for place in masks:
        for kind, (pixels, connectivity) in enumerate(_kinds(regions, place)):
            areas = np.bincount(_labels(pixels, connectivity).ravel())[1:]
            counts[kind] += np.bincount(np.minimum(areas, _TINY), minlength=_TINY + 1)
    there = counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # of so many pixels and more
    few = [there[0] <= _MOST_PARTS, there[1] <= _MOST_HOLES]
    return _Least(*(0 if found[0] else int(np.argmax(found)) or _TINY for found in few))


def _kinds(regions: Regions, place: tuple[int, int]) -> tuple[tuple[Mask, int], tuple[Mask, int]]:
    """A region's mask and what is around it, each with its connectivity."""
    mask = regions.read(*place)
    assert mask is not None
    return (mask, 8), (255 - mask, 4)


def _corners_of(mask: Mask) -> int:
    """Pixels with none of the mask to the left and above: at least as many as there are parts, as each has one."""
    around = np.pad(mask, ((1, 0), (1, 0)))
    return cv2.countNonZero(mask & ~around[1:, :-1] & ~around[:-1, 1:])


def _labels(mask: Mask, connectivity: int) -> NDArray[np.int32]:
    return np.asarray(cv2.connectedComponents(mask, connectivity=connectivity)[1], np.int32)


class _Parts(NamedTuple):
    """The connected parts of a mask.

    Attributes:
        labels: (H, W), each one's number.
        boxes: of each number the left, top, width, height and area.
        wanted: the numbers that are outlined.
    """

    labels: Labels
    boxes: NDArray[np.int64]
    wanted: NDArray[np.bool_]


def _parts(mask: Mask) -> _Parts:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8, ltype=cv2.CV_32S)
    wanted = np.ones(len(stats), np.bool_)
    wanted[0] = False
    return _Parts(np.asarray(labels, np.int32), np.asarray(stats, np.int64), wanted)


def _polygons(regions: Regions, least: _Least, *, split: bool) -> Iterator[tuple[list[NDArray[np.float64]], float]]:
    """Rings of each object, the outer one first, in the level's pixels, and its area in them."""
    outlined = _outlined_apart if split else _outlined_parts
    pieces: dict[Node, _Piece] = {}
    edges: Edges = {}
    for row in range(regions.rows):
        for column in range(regions.columns):
            mask = regions.read(row, column)
            if mask is None:
                continue
            place = regions.place(row, column)
            parts = _parts(_filled(mask, least.hole))
            across, sides = _across(parts, place, row, column, regions)
            pieces |= across
            if across:
                edges[row, column] = sides
            parts.wanted[[label for _, _, label in across]] = False
            parts.wanted[parts.boxes[:, cv2.CC_STAT_AREA] < least.part] = False
            yield from outlined(parts, place.x, place.y, 1)
    for group in _grouped(pieces, edges):
        left, top = min(p.left for p in group), min(p.top for p in group)
        width, height = max(p.right for p in group) - left, max(p.bottom for p in group) - top
        step = max(1, int(np.ceil(np.sqrt(width * height / _LARGEST))))
        part = regions.part(Crop(left, top, width, height), step)
        labels = np.asarray(cv2.connectedComponents(part, connectivity=8)[1])
        wanted = {int(labels[(p.y - top) // step, (p.x - left) // step]) for p in group} - {0}
        found = np.asarray(np.isin(labels, list(wanted)), np.uint8)
        if cv2.countNonZero(found) * step * step >= least.part:
            yield from outlined(_parts(_filled(found, least.hole // step**2)), left, top, step)


def _filled(mask: Mask, least: int) -> Mask:
    """Without the holes that are smaller."""
    if least < 2:
        return mask
    labels = _labels(np.asarray(mask == 0, np.uint8), 4)
    small = np.bincount(labels.ravel()) < least
    small[0] = False
    return np.where(small[labels], mask.max(), mask)


def _across(
    parts: _Parts, place: Crop, row: int, column: int, regions: Regions
) -> tuple[dict[Node, _Piece], dict[str, NDArray[np.int32]]]:
    """A region's parts that reach an edge behind which the mask goes on; and the parts along each edge."""
    labels = parts.labels
    sides = {"top": labels[0], "bottom": labels[-1], "left": labels[:, 0], "right": labels[:, -1]}
    inside = {
        "top": row > 0, "bottom": row < regions.rows - 1, "left": column > 0, "right": column < regions.columns - 1,
    }  # fmt: skip
    edges = {side: np.array(line, np.int32) for side, line in sides.items()}
    reaching = np.unique(np.concatenate([edges[side] for side in sides if inside[side]] or [np.zeros(1, np.int32)]))
    pieces = {}
    for label in reaching[reaching > 0].tolist():
        x, y, width, height, _ = parts.boxes[label].tolist()
        pixel = np.argwhere(labels[y : y + height, x : x + width] == label)[0]
        left, top = place.x + x, place.y + y
        pieces[row, column, label] = _Piece(
            left, top, left + width, top + height, left + int(pixel[1]), top + int(pixel[0])
        )
    return pieces, edges


def _grouped(pieces: dict[Node, _Piece], edges: Edges) -> list[list[_Piece]]:
    """Pieces that belong together: pixels of neighbouring regions that touch, corners included."""
    parents = {node: node for node in pieces}

    def root(node: Node) -> Node:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def join(first: tuple[int, int], second: tuple[int, int], one: NDArray[np.int32], other: NDArray[np.int32]) -> None:
        length = min(len(one), len(other))
        for shift in (-1, 0, 1):
            a = one[max(0, -shift) : length - max(0, shift)]
            b = other[max(0, shift) : length - max(0, -shift)]
            both = (a > 0) & (b > 0)
            for pair in np.unique(np.stack([a[both], b[both]], 1), axis=0).tolist():
                parents[root((*first, pair[0]))] = root((*second, pair[1]))

    for (row, column), lines in edges.items():
        right, below, across = (row, column + 1), (row + 1, column), (row + 1, column + 1)
        if right in edges:
            join((row, column), right, lines["right"], edges[right]["left"])
        if below in edges:
            join((row, column), below, lines["bottom"], edges[below]["top"])
        if across in edges:
            join((row, column), across, lines["bottom"][-1:], edges[across]["top"][:1])
        if right in edges and below in edges:
            join(right, below, edges[right]["bottom"][:1], edges[below]["top"][-1:])
    groups: defaultdict[Node, list[_Piece]] = defaultdict(list)
    for node, piece in pieces.items():
        groups[root(node)].append(piece)
    return list(groups.values())


def _outlined_apart(parts: _Parts, x: int, y: int, step: int) -> Iterator[tuple[list[NDArray[np.float64]], float]]:
    """As ``_outlined_parts``, of objects that touch each its own."""
    labels, boxes, wanted = parts
    whole = wanted.copy()
    for number, cut in cuts(labels, boxes, np.flatnonzero(wanted)):
        whole[number] = False
        rows, columns = box_of(boxes, number)
        for one in np.unique(cut[cut > 0]).tolist():
            yield from _outlined((cut == one).view(np.uint8), x + columns.start * step, y + rows.start * step, step)
    yield from _outlined_parts(_Parts(labels, boxes, whole), x, y, step)


def _outlined_parts(parts: _Parts, x: int, y: int, step: int) -> Iterator[tuple[list[NDArray[np.float64]], float]]:
    """As ``_outlined``, of those that are wanted."""
    if parts.wanted.any():
        yield from _outlined(parts.wanted[parts.labels].view(np.uint8), x, y, step)


def _outlined(mask: Mask, x: int, y: int, step: int) -> Iterator[tuple[list[NDArray[np.float64]], float]]:
    found, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if hierarchy is None:
        return
    for index, outline in enumerate(found):
        if hierarchy[0][index][3] >= 0:  # a hole, which comes with what it is in
            continue
        rings, area = [_ring(outline)], _pixels(outline, hole=False)
        inner = hierarchy[0][index][2]
        while inner >= 0:
            rings.append(_ring(found[inner]))
            area -= _pixels(found[inner], hole=True)
            inner = hierarchy[0][inner][0]
        yield [ring * step + (x, y) for ring in _simple(rings)], float(area * step * step)


def _ring(outline: Any) -> Ring:
    return np.asarray(outline, np.int64).reshape(-1, 2)


def _simple(rings: list[Ring]) -> list[NDArray[np.float64]]:
    """Outlines through the centres of pixels; along their edges where a part is so thin that those would meet."""
    points = np.concatenate(rings)
    if min(map(len, rings)) >= 3 and len(np.unique(points @ (1, 1 << 24))) == len(points):
        return [np.asarray(corners(ring) + 0.5, np.float64) for ring in rings]
    corner = points.min(axis=0)
    part = np.zeros((points.max(axis=0) - corner + 1)[::-1], np.uint8)
    for number, ring in enumerate(np.asarray(one - corner, np.int32) for one in rings):
        inside = np.zeros_like(part)
        cv2.fillPoly(inside, [ring], 1)
        if number:  # a hole, whose outline goes through the pixels around it
            cv2.polylines(inside, [ring], True, 0)
        part[inside > 0] = not number
    (edges,) = edge_outlines(without_diagonals(part))
    return [np.asarray(ring + corner, np.float64) for ring in (edges.outer, *edges.holes)]


def _pixels(outline: Any, *, hole: bool) -> int:
    """Pixels within an outline through pixel centres, its own included (of a hole: without them): Pick's theorem."""
    steps = np.abs(np.diff(outline.reshape(-1, 2), axis=0, append=outline.reshape(-1, 2)[:1]))
    half = int(steps.max(axis=1).sum()) / 2
    return round(cv2.contourArea(outline) + (-half if hole else half) + 1)
