"""Which images train, which choose and which test: the publisher's lists, given ones, or lists made from the ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from espmedsam_edge.imaging.dataset import SPLITS, Split
from espmedsam_edge.training.data.layouts import Item

DERIVED_SHARES = (0.7, 0.1, 0.2)
"""Of train, valid and test."""

_VALID_OF_TRAIN = 0.2


def make_split(items: Sequence[Item], modality: str | None, given: Split | None = None, seed: int = 0) -> Split:
    """The lists for converted images.

    Given lists win and are cut down to the images there are. Else the publisher's count, where it made any; if it made
    no valid list, a fifth of its training images becomes one. Else patients are put in the order of a hash of their
    names and dealt 70/10/20, so a list depends on nothing but names: not on the order of files, not on chance. Another
    ``seed`` deals otherwise.
    """
    patients = {item.id: item.patient for item in items if item.patient is not None}
    if given is not None:
        present = {item.id for item in items}
        lists = {name: [id_ for id_ in getattr(given, name) if id_ in present] for name in SPLITS}
        return Split(origin=given.origin, modality=modality, patient=patients, **lists)
    if any(item.part is not None for item in items):
        lists = {name: [item.id for item in items if item.part == name] for name in SPLITS}
        if not lists["valid"]:
            groups = _groups([item for item in items if item.part == "train"])
            lists["train"], lists["valid"] = _deal(groups, (1 - _VALID_OF_TRAIN, _VALID_OF_TRAIN), seed)
        return Split(origin="official", modality=modality, patient=patients, **lists)
    train, valid, test = _deal(_groups(items), DERIVED_SHARES, seed)
    return Split(origin="derived", modality=modality, patient=patients, train=train, valid=valid, test=test)


def _groups(items: Sequence[Item]) -> dict[str, list[str]]:
    """Ids by patient; an image whose patient is unknown is a group of its own."""
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item.patient or f"image {item.id}", []).append(item.id)
    return groups


def _deal(groups: Mapping[str, list[str]], shares: Sequence[float], seed: int) -> list[list[str]]:
    """Whole groups, in the order of their names' hashes, into lists of about these shares; each list sorted."""
    salt = f"{seed} " if seed else ""
    order = sorted(groups, key=lambda name: hashlib.sha256((salt + name).encode()).hexdigest())
    total = sum(len(ids) for ids in groups.values())
    lists: list[list[str]] = [[] for _ in shares]
    bounds = [total * sum(shares[: place + 1]) for place in range(len(shares))]
    dealt, place = 0, 0
    for name in order:
        # A group goes where its middle falls.
        while place < len(shares) - 1 and dealt + len(groups[name]) / 2 > bounds[place]:
            place += 1
        lists[place] += groups[name]
        dealt += len(groups[name])
    return [sorted(ids) for ids in lists]
