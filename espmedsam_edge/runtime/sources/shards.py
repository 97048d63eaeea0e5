"""A part of a run's files: a share of several, or those that are not done yet."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sources.source import Narrowable, Source

_MOST = 100_000


class Shard(NamedTuple):
    """One of several runs that share their files: every ``of``-th, from the ``number``-th, which counts from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``2/8`` is the second of eight.

        Raises:
            UserError: it is not written so, or is out of range.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        shard = None if match is None else cls(int(match[1]), int(match[2]))
        if shard is None or not 1 <= shard.of <= _MOST:
            raise UserError(f"shard {text} is not I/N.", "The second of eight runs that share the files: 2/8")
        if not 1 <= shard.number <= shard.of:
            raise UserError(f"shard {text} is out of range.", f"There are 1/{shard.of} to {shard.of}/{shard.of}.")
        return shard

    def share(self, files: Sequence[Path]) -> list[Path]:
        """Its files, by their places in the list of all."""
        return list(files[self.number - 1 :: self.of])

    def named(self, path: Path) -> Path:
        """A table's name, which is the shard's own: ``areas.csv`` as ``areas-2-of-8.csv``."""
        return path.with_name(f"{path.stem}-{self.number}-of-{self.of}{path.suffix}")


def narrowed(sources: Sequence[Source], wanted: Collection[Path]) -> list[Source]:
    """Sources with the wanted files alone, each read as if all were; those that have none are left out."""
    kept = []
    for source in sources:
        those = [file for file in source.files if file in wanted]
        if those and len(those) < len(source.files) and isinstance(source, Narrowable):
            source.narrow(frozenset(those))
        if those:
            kept.append(source)
    return kept
