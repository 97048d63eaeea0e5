"""The paper's Tables I, II, IV and V: published figures to put beside our own, never results of this project."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel

STUDENT, TEACHER = "ESP-MedSAM-S", "ESP-MedSAM-T"


class PublishedScore(BaseModel, extra="forbid", frozen=True):
    """Dice in per cent and HD in pixels at 1024x1024."""

    dice: float
    hd: float


class PublishedRow(BaseModel, extra="forbid", frozen=True):
    """A method's scores by modality; ``prompt`` tells whether it was given points by hand."""

    method: str
    prompt: Literal["point", "none"]
    scores: dict[str, PublishedScore]


class PublishedTable(BaseModel, extra="forbid", frozen=True):
    """One table; ``datasets`` names the data set of each modality."""

    number: str
    caption: str
    datasets: dict[str, str]
    rows: list[PublishedRow]


class PaperTables(BaseModel, extra="forbid", frozen=True):
    """The file ``paper_tables.json``."""

    status: str
    source: str
    units: str
    tables: list[PublishedTable]


class PaperScore(BaseModel, extra="forbid", frozen=True):
    """A method's figure for a modality: where it stands and what it was measured on."""

    method: str
    prompt: Literal["point", "none"]
    table: str
    dataset: str
    dice: float
    hd: float


@cache
def paper_tables() -> PaperTables:
    """The published tables."""
    return PaperTables.model_validate_json((files(__package__) / "paper_tables.json").read_bytes())


def paper_scores(modality: str, dataset: str) -> list[PaperScore]:
    """All published figures for a modality, in the paper's order; a dataset that holds "stare" has Table IV's alone."""
    zero_shot = modality == "fundus" and "stare" in dataset.lower()
    return [
        PaperScore(
            method=row.method,
            prompt=row.prompt,
            table=table.number,
            dataset=table.datasets[modality],
            dice=row.scores[modality].dice,
            hd=row.scores[modality].hd,
        )
        for table in paper_tables().tables
        if (table.number == "IV") == zero_shot
        for row in table.rows
        if modality in row.scores
    ]


def paper_score(modality: str, dataset: str, method: str = STUDENT) -> PaperScore | None:
    """The figure to put beside a result, or None where the paper has none.

    Args:
        modality: the result's.
        dataset: the dataset folder's name.
        method: ``STUDENT`` (Tables I, IV, V) or ``TEACHER`` (Tables II, IV).
    """
    found = (score for score in paper_scores(modality, dataset) if (score.method, score.prompt) == (method, "none"))
    return next(found, None)
