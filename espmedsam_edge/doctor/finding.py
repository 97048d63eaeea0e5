"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "absent", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``absent`` is fine unless it is wanted; ``problem`` is there and does not work.

    ``fix`` is the command (or, rarely, the sentence) that adds or mends it.
    """

    area: str
    name: str
    status: Status
    detail: str
    fix: str | None = None
