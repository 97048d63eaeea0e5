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
    """The paper's figure for a modality: where it stands and what it was measured on."""

    method: str
    table: str
    dataset: str
    dice: float
    hd: float


@cache
def paper_tables() -> PaperTables:
    """The published tables."""
    return PaperTables.model_validate_json((files(__package__) / "paper_tables.json").read_bytes())


def paper_score(modality: str, dataset: str, method: str = STUDENT) -> PaperScore | None:
    """The figure to put beside a result, or None where the paper has none.

    Args:
        modality: the result's.
        dataset: the dataset folder's name; one that holds "stare" is compared with Table IV.
        method: ``STUDENT`` (Tables I, IV, V) or ``TEACHER`` (Tables II, IV).
    """
    for table in sorted(paper_tables().tables, key=lambda table: table.number != "IV"):
        if table.number == "IV" and "stare" not in dataset.lower():
            continue
        for row in table.rows:
            score = row.scores.get(modality)
            if row.method == method and row.prompt == "none" and score is not None:
                return PaperScore(
                    method=method,
                    table=table.number,
                    dataset=table.datasets[modality],
                    dice=score.dice,
                    hd=score.hd,
                )
    return None
