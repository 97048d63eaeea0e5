"""The outlines of an object, such that filling them gives its pixels back, by either way there is to fill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]  # (H, W), 0 or not
Ring = NDArray[np.int64]  # (n, 2) of (x, y), not closed


class Outline(NamedTuple):
    """An 8-connected part: its outer ring, and a ring for each hole."""

    outer: Ring
    holes: list[Ring]


def edge_outlines(mask: Mask) -> list[Outline]:
    """Outlines along the edges of pixels, of which pixel (x, y) has those at x, x + 1, y and y + 1.

    A pixel is in the mask exactly where its centre, (x + 1/2, y + 1/2), is within an odd number of the rings. So
    pycocotools, CVAT and whatever fills by centres gives the mask back.
    """
    # With every pixel as four, the line through the outermost of them turns at the pixels' own corners.
    large = np.repeat(np.repeat(mask, 2, axis=0), 2, axis=1)
    return [Outline(*rings) for rings in _parts(large, lambda ring: corners((ring + 1) // 2))]


def centre_outlines(mask: Mask) -> list[Outline]:
    """Outlines through the centres of a part's outermost pixels, whose coordinates are whole numbers.

    Filling the outer ring with its line (``cv2.fillPoly``, Pillow's ``polygon``) gives the part back, its holes filled.
    A hole's ring goes through the pixels around it.
    """
    return [Outline(*rings) for rings in _parts(mask, lambda ring: ring)]


def simple_outlines(mask: Mask) -> list[Outline]:
    """As ``edge_outlines``, but no ring meets itself: what hangs together at corners alone are parts of their own.

    Parts, and the rings of one, may have corners in common. So polygons are valid by OGC's rules (JTS, GEOS).
    """
    if not any(pairs.any() for pairs in _diagonals(mask != 0)):
        return edge_outlines(mask)
    _, labels, stats, _ = cv2.connectedComponentsWithStats((mask != 0).view(np.uint8), connectivity=4)
    outlines = []
    for number, (x, y, width, height, _) in enumerate(stats.tolist()):
        if number:
            own = (labels[y : y + height, x : x + width] == number).view(np.uint8)
            ((ring, holes),) = edge_outlines(own)
            loops = sorted(_loops(ring), key=lambda loop: float(cv2.contourArea(np.asarray(loop, np.int32))))
            outer, *inner = (one + np.array([x, y]) for one in (loops.pop(), *loops, *holes))
            outlines.append(Outline(outer, inner))
    return outlines


def _loops(ring: Ring) -> list[Ring]:
    """A ring that meets itself at corners, as rings that do not."""
    loops, path = [], dict[tuple[int, int], None]()
    for x, y in ring.tolist():
        if (x, y) in path:
            loop = [(x, y)]
            while (last := path.popitem()[0]) != (x, y):
                loop.append(last)
            loops.append(np.array(loop, np.int64))
        path[x, y] = None
    return [*loops, np.array(list(path), np.int64)]


def without_diagonals(mask: Mask) -> Mask:
    """A copy in which pixels that meet at a corner alone are joined by one more, so that no outline meets itself."""
    joined = np.array(mask != 0)
    while True:
        falling, rising = _diagonals(joined)
        if not (falling.any() or rising.any()):
            return joined.view(np.uint8)
        joined[:-1, 1:] |= falling
        joined[:-1, :-1] |= rising


def _diagonals(mask: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where of four pixels, of which the upper left one is at the place, two meet at a corner alone; by direction."""
    above, below = mask[:-1], mask[1:]
    return (
        above[:, :-1] & below[:, 1:] & ~above[:, 1:] & ~below[:, :-1],
        above[:, 1:] & below[:, :-1] & ~above[:, :-1] & ~below[:, 1:],
    )


def hole_pixels(mask: Mask) -> int:
    """How many pixels are in holes of a mask's parts."""
    filled = np.zeros(mask.shape, np.uint8)
    found, _ = cv2.findContours((mask != 0).view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(filled, found, -1, 1, cv2.FILLED)
    return int(filled.sum()) - int(np.count_nonzero(mask))


def three_points(ring: NDArray[Any]) -> NDArray[Any]:
    """A ring of (n, ..., 2), its points repeated until there are three: readers refuse fewer."""
    return ring if len(ring) >= 3 else np.resize(ring, (3, *ring.shape[1:]))


def _parts(mask: Mask, placed: Any) -> Iterator[tuple[Ring, list[Ring]]]:
    found, hierarchy = cv2.findContours((mask != 0).view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if hierarchy is None:
        return
    rings = [placed(np.asarray(ring, np.int64).reshape(-1, 2)) for ring in found]
    for index, (_, _, inner, outer) in enumerate(hierarchy[0].tolist()):
        if outer >= 0:
            continue
        holes = []
        while inner >= 0:
            holes.append(rings[inner])
            inner = hierarchy[0][inner][0]
        yield rings[index], holes


def corners(ring: Ring) -> Ring:
    """A ring without repeated points and points on straight lines."""
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return np.asarray(ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]])
