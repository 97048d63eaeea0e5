"""A picture mirrored and turned, and one answer from the network's answers to all of these views of it.

Views are of the network's square input, so each is one of its own pixels in another place, and undone to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.modalities import Views


class View(NamedTuple):
    """A square turned counterclockwise by ``quarters`` of a full turn, then mirrored left to right or not."""

    quarters: int
    mirrored: bool

    def of(self, square: Tensor) -> Tensor:
        """This view of (..., S, S)."""
        turned = np.rot90(square, self.quarters, (-2, -1))
        return turned[..., ::-1] if self.mirrored else turned

    def undone(self, square: Tensor) -> Tensor:
        """The (..., S, S) of which this is the view."""
        return np.rot90(square[..., ::-1] if self.mirrored else square, -self.quarters, (-2, -1))


VIEWS: dict[Views, tuple[View, ...]] = {
    "none": (View(0, False),),
    "mirror": (View(0, False), View(0, True)),
    "flips": (View(0, False), View(0, True), View(2, False), View(2, True)),
    "turns": tuple(View(quarters, mirrored) for quarters in range(4) for mirrored in (False, True)),
}
"""The views by the name that a modality has for those it allows: each holds those of the one before it."""


def average(run: Callable[[Tensor], Tensor], images: Tensor, views: Sequence[View], batch: int) -> Tensor:
    """The mean of what a network says of each view of some images.

    Args:
        run: the network: (``batch``, 3, S, S) float32, not to be written to, to logits (``batch``, 1, s, s).
        images: (N, 3, S, S) float32.
        views: at least one.
        batch: how many views one run takes; the last is filled up with zeros.

    Returns:
        (N, 1, s, s) float32 logits.
    """
    sums: Tensor = np.zeros(0, np.float32)
    tasks = [(row, view) for row in range(len(images)) for view in views]
    for start in range(0, len(tasks), batch):
        group = tasks[start : start + batch]
        filled = np.zeros((batch, *images.shape[1:]), np.float32)
        for place, (row, view) in zip(filled, group, strict=False):
            place[:] = view.of(images[row])
        logits = run(filled)
        if not sums.size:
            sums = np.zeros((len(images), *logits.shape[1:]), np.float32)
        for answer, (row, view) in zip(logits, group, strict=False):
            sums[row] += view.undone(answer)
    sums /= len(views)
    return sums
