"""How large the pictures were that a modality was trained on, and how larger ones are segmented."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field


class Scale(BaseModel, extra="forbid", frozen=True):
    """Of one modality, in pixels; a part of a bundle's manifest.

    Attributes:
        largest: the long side of the largest picture of the training.
        tile: side of the tiles in which pictures larger than the network's input are segmented; None: they are whole.
    """

    largest: Annotated[int, Field(ge=32, le=65536)]
    tile: Annotated[int, Field(ge=32, le=8192)] | None = None
