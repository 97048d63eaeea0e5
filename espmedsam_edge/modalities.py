"""The registry of modalities: the paper's six, in the order of the published query tokens, and any a user adds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from espmedsam_edge.errors import UserError, nearest

Views = Literal["none", "mirror", "flips", "turns"]
"""Which copies of a picture may stand for it: only itself; mirrored left to right; top to bottom, too; and turned by
quarters."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class Modality:
    """One imaging domain with its own controller bag, query and output.

    Attributes:
        name, target: what it is, and what its mask shows, in words.
        published_query: the row of the authors' ``mask_query`` that decodes it; None for modalities they lack.
        views: what ``--tta`` may average over: what helped on validation images (docs/accuracy.md); "turns" for a
            modality of which nothing is known, since training mirrors and turns its pictures, too.
        many: whether its pictures show many objects, which are counted one by one, those that touch taken apart.
    """

    name: str
    target: str
    published_query: int | None = None
    views: Views = "turns"
    many: bool = False


SMALLEST_SIDE, LARGEST_SIDE = 32, 65536
"""Pixels, of what a ``Scale`` can state."""


class Scale(BaseModel, extra="forbid", frozen=True):
    """Of one modality, in pixels; a part of a bundle's manifest.

    Attributes:
        largest: the long side of the largest picture of the training.
        tile: side of the tiles in which pictures larger than the network's input are segmented; None: they are whole.
    """

    largest: Annotated[int, Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)]
    tile: Annotated[int, Field(ge=32, le=8192)] | None = None


_REGISTRY: dict[str, Modality] = {
    m.name: m
    for m in (
        Modality("dermoscopy", "skin lesion", 0, "none"),
        Modality("xray", "lung fields", 1, "none"),
        Modality("ultrasound", "breast lesion", 2, "mirror"),
        Modality("fundus", "retinal vessels", 3, "flips"),
        Modality("microscopy", "cell nuclei", 4, many=True),
        Modality("colonoscopy", "polyp", 5, "flips"),
    )
}

PAPER_MODALITIES: tuple[str, ...] = ("dermoscopy", "xray", "fundus", "colonoscopy", "ultrasound", "microscopy")
"""The paper's six in the order of its Table I."""


def check_name(name: str) -> str:
    """Return ``name`` if it can name a modality (file names are made from it), else raise UserError."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"'{name}' cannot name a modality.", "Use 1 to 40 lower-case letters, digits or '_', a letter first."
        )
    return name


def register(name: str, target: str) -> Modality:
    """Add a modality of the user's own, or say what a known one segments here; the last word counts."""
    modality = Modality(check_name(name), target, published_query(name), views_of(name), many_of(name))
    _REGISTRY[name] = modality
    return modality


def target_of(name: str) -> str:
    """What a modality's mask shows, in words ("retinal vessels"); the name itself for one that is not registered."""
    modality = _REGISTRY.get(name)
    return modality.target if modality else name


def views_of(name: str) -> Views:
    """The views of a modality's pictures that may stand for one another."""
    modality = _REGISTRY.get(name)
    return modality.views if modality else Modality.views


def many_of(name: str) -> bool:
    """Whether a modality's pictures show many objects."""
    modality = _REGISTRY.get(name)
    return modality is not None and modality.many


def published_query(name: str) -> int | None:
    """The row of the published ``mask_query`` that decodes this modality, or None."""
    modality = _REGISTRY.get(name)
    return modality.published_query if modality else None


def choose(name: str | None, available: Iterable[str], where: str) -> str:
    """The modality to use out of ``available``: ``name``, or the only one when ``name`` is None.

    Raises:
        UserError: unknown name (with the nearest one), or no name where there are several.
    """
    names = list(available)
    if name is None:
        if len(names) == 1:
            return names[0]
        raise UserError(f"{where} holds {len(names)} modalities: {', '.join(names)}.", "Pick one with --modality NAME.")
    if name not in names:
        raise UserError(f"{where} has no modality '{name}'.", nearest(name, names))
    return name
