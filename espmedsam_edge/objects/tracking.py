"""Objects followed from frame to frame: the same one keeps its number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.objects.instance import Instance, Instances
from espmedsam_edge.objects.separation import Labels

LEAST_OVERLAP = 0.1
"""Of an object with where it was last seen, as intersection over union, by which it is known again."""

REACH = 2.0
"""How far one that overlaps nothing may have moved, in the mean of its diameters then and now."""

PATIENCE = 30
"""Frames that an object may be gone and still keep its number."""


_FEW = 1 << 14  # pairs of objects and sights that are assigned at once

Pairs = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Positions of objects, those of sights, and what speaks for each pair, over 0."""


@dataclass(frozen=True)
class _Sight:
    """A followed object where it was last seen."""

    id: int
    frame: int
    area: int
    centroid: tuple[float, float]
    diameter: float


class Tracker:
    """Numbers the objects of one video. Frames come in order; what is kept of them is one map of last sights.

    An object is the one that it overlaps with where that was last seen, in the assignment that has the largest sum of
    intersections over unions. What overlaps with none is one within reach, near and as large: of those that the last
    frame had, else of those that are gone. Others are new. No number is given twice.
    """

    def __init__(self) -> None:
        self._sights: dict[int, _Sight] = {}
        self._map: Labels = np.zeros((0, 0), np.int32)  # the numbers of objects where they were last seen
        self._frame = self._given = 0

    def followed(self, found: Instances) -> Instances:
        """The next frame's objects, with the numbers that they have kept.

        Of more objects than are measured none is followed, and all that come after are new.
        """
        self._frame += 1
        if self._map.shape != found.labels.shape or len(found.measured) != found.count:
            self._sights, self._map = {}, np.zeros_like(found.labels)
        if len(found.measured) != found.count:
            return found
        oldest = self._frame - PATIENCE - 1
        self._sights = {sight.id: sight for sight in self._sights.values() if sight.frame >= oldest}
        ids = self._known(found)
        numbered = [self._seen(one, ids[index]) for index, one in enumerate(found.measured)]
        table = np.array([0, *(one.id for one in numbered)], np.int32)
        labels = np.asarray(table[found.labels], np.int32)
        self._map[np.isin(self._map, table[1:])] = 0
        np.copyto(self._map, labels, where=labels > 0)
        return replace(found, labels=labels, measured=tuple(sorted(numbered, key=lambda one: one.id)))

    def _seen(self, one: Instance, known: int | None) -> Instance:
        if known is None:
            self._given += 1
        number = self._given if known is None else known
        gap = 0 if known is None else self._frame - self._sights[known].frame - 1
        self._sights[number] = _Sight(number, self._frame, one.area, one.centroid, one.pixels.equivalent_diameter)
        return replace(one, id=number, gap=gap)

    def _known(self, found: Instances) -> list[int | None]:
        """The number of each object, if it has one."""
        objects, sights = found.measured, list(self._sights.values())
        known: list[int | None] = [None] * len(objects)
        last = [place for place, sight in enumerate(sights) if sight.frame == self._frame - 1]
        for among in (None, last, range(len(sights))):
            if among is None:
                pairs = self._overlaps(found, sights)
            else:
                left = [index for index, number in enumerate(known) if number is None]
                pairs = _nearness(objects, sights, left, [place for place in among if sights[place].id not in known])
            for index, place in _assigned(*pairs, len(objects), len(sights)):
                known[index] = sights[place].id
        return known

    def _overlaps(self, found: Instances, sights: Sequence[_Sight]) -> Pairs:
        """Intersections over unions of objects with sights."""
        both = (found.labels > 0) & (self._map > 0)
        pairs, counts = np.unique(np.stack([found.labels[both] - 1, self._map[both]]), axis=1, return_counts=True)
        places = {sight.id: place for place, sight in enumerate(sights)}
        of = np.array([places.get(number, -1) for number in pairs[1].tolist()], np.int64)
        pairs, counts, of = pairs[:, of >= 0], counts[of >= 0], of[of >= 0]
        areas = np.array([one.area for one in found.measured])[pairs[0]]
        last = np.array([sights[place].area for place in of.tolist()], np.int64)
        share = counts / (areas + last - counts)
        return pairs[0][share >= LEAST_OVERLAP], of[share >= LEAST_OVERLAP], share[share >= LEAST_OVERLAP]


def _nearness(objects: Sequence[Instance], sights: Sequence[_Sight], left: Sequence[int], free: Sequence[int]) -> Pairs:
    """Objects and sights that are left and in reach of each other."""
    found: list[tuple[int, int, float]] = []
    centres = np.array([sights[place].centroid for place in free]).reshape(-1, 2)
    widths = np.array([sights[place].diameter for place in free])
    for index in left:
        width = objects[index].pixels.equivalent_diameter
        apart = np.hypot(*(centres - objects[index].centroid).T)
        near = 1 - apart / (REACH * (widths + width) / 2)
        near *= (np.minimum(widths, width) / np.maximum(widths, width)) ** 2
        found += [(index, free[place], float(near[place])) for place in np.flatnonzero(near > 0).tolist()]
    indices, places, gains = zip(*found, strict=True) if found else ((), (), ())
    return np.array(indices, np.int64), np.array(places, np.int64), np.array(gains)


def _assigned(
    indices: NDArray[Any], places: NDArray[Any], gains: NDArray[Any], objects: int, sights: int
) -> Iterator[tuple[int, int]]:
    """The pairs, each object and each sight in one at most, with the largest sum of gains.

    Where there are many, group by group of those that hang together.
    """
    if not len(indices):
        return
    from scipy.optimize import linear_sum_assignment  # half a second, which most runs need not wait for
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groups = np.zeros(objects, np.int32)
    if objects * sights > _FEW:
        total = objects + sights
        graph = coo_array((np.ones(len(indices)), (indices, objects + places)), shape=(total, total))
        groups = connected_components(graph, directed=False)[1]
    order = np.argsort(groups[indices], kind="stable")
    ends = np.flatnonzero(np.diff(groups[indices][order])) + 1
    for group in np.split(order, ends):
        rows, row = np.unique(indices[group], return_inverse=True)
        columns, column = np.unique(places[group], return_inverse=True)
        gain = np.zeros((len(rows), len(columns)))
        gain[row, column] = gains[group]
        for at, to in zip(*linear_sum_assignment(gain, maximize=True), strict=True):
            if gain[at, to] > 0:
                yield int(rows[at]), int(columns[to])
