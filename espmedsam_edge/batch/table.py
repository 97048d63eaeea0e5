"""The table: Parquet files with a row a frame, and a row for what failed; each unit's rows are in it once."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from espmedsam_edge.batch.units import Unit
from espmedsam_edge.batch.worker import Row, UnitResult
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path, write_errors
from espmedsam_edge.runtime.sinks.journal import Journal, Record

log = logging.getLogger(__name__)

FOLDER = "frames"
_PART = re.compile(r"part-[0-9a-f]{16}\.parquet")
_ROWS = 20_000  # of a file
_SECONDS = 10.0  # after which what there is is written: what a kill takes at most

COLUMNS = {
    "source": "string", "frame": "int64", "time_s": "float64", "modality": "string",
    "width": "int32", "height": "int32", "threshold": "float64",
    "area_px": "int64", "area_fraction": "float64", "area_mm2": "float64",
    "box_x": "int32", "box_y": "int32", "box_width": "int32", "box_height": "int32",
    "centroid_x": "float64", "centroid_y": "float64", "mask": "string", "error": "string", "unit": "string",
}  # fmt: skip
"""Names and types; what is not known is null. Of a row that says what failed only source, error and unit are there."""


def _schema() -> Any:
    import pyarrow

    return pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()])


class Table:
    """Rows come unit by unit, and are written some thousand at a time; then their units count as done.

    A file of the table has the rows that its units' records in the journal say, and no others: what a kill left between
    the file and the journal is taken out when the table is opened again.

    Args:
        out: the folder of the results.
        journal: open; says which units are done.
        settings: see ``Record``.
        is_done: whether a record still holds: its content and its results are as they were.
        is_asked: whether a unit's label is of a file that is asked for now; rows of others stay as they are.

    Raises:
        UserError: a file of the table is damaged.
    """

    def __init__(
        self,
        out: Path,
        journal: Journal,
        settings: str,
        is_done: Callable[[Record], bool],
        is_asked: Callable[[str], bool],
    ) -> None:
        self._folder, self._out = out / FOLDER, out
        self._journal, self._settings, self._is_asked = journal, settings, is_asked
        self._rows: list[Row] = []
        self._units: list[tuple[Unit, UnitResult]] = []
        self._last = time.monotonic()
        with write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            places = {path.name for path in self._folder.iterdir() if _PART.fullmatch(path.name)}
            self._done: dict[str, str] = {}  # unit -> its file
            for record in journal.records(settings):
                part = next((str(values[0]) for values in journal.lines(record) if values), "")
                if record.whole and part in places and is_done(record):
                    self._done[record.label] = part
            for name in places:
                self._keep_done(self._folder / name)

    def has(self, unit: Unit) -> bool:
        """Whether a unit is done."""
        return unit.label in self._done

    def _keep_done(self, path: Path) -> None:
        """Leave the rows of units that are done there, and what came of files that are not asked for, no others."""
        import pyarrow
        from pyarrow import parquet

        try:
            table = parquet.read_table(path)
            rows = list(zip(table["unit"].to_pylist(), table["error"].to_pylist(), strict=True))
        except (pyarrow.ArrowException, KeyError) as damage:
            hint = "Take it out of the folder, and what it held is done anew."
            raise UserError(f"{path} is damaged, or none of this program's.", hint, exit_code=1) from damage
        wanted = [
            self._done.get(label) == path.name or (error is None and not self._is_asked(label)) for label, error in rows
        ]
        if not any(wanted):
            path.unlink()
        elif not all(wanted):
            self._write(path, table.filter(pyarrow.array(wanted)))

    def _write(self, path: Path, table: Any) -> None:
        from pyarrow import parquet

        with atomic_path(path) as temporary:
            parquet.write_table(table, temporary)

    def add(self, unit: Unit, result: UnitResult) -> None:
        """Take what came of a unit.

        Raises:
            UserError: the table or the journal cannot be written.
        """
        self._rows += result.rows
        self._rows += [{"source": unit.source, "error": why, "unit": unit.label} for why in result.failures]
        self._units.append((unit, result))
        if len(self._rows) >= _ROWS or time.monotonic() - self._last >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what there is.

        Raises:
            UserError: see ``add``.
        """
        import pyarrow

        self._last = time.monotonic()
        if not self._units:
            return
        name = f"part-{secrets.token_hex(8)}.parquet"
        rows = [{column: row.get(column) for column in COLUMNS} for row in self._rows]
        self._write(self._folder / name, pyarrow.Table.from_pylist(rows, schema=_schema()))
        for number, (unit, result) in enumerate(self._units, 1):
            self._journal.line([name])
            outputs: Sequence[Path] = [self._out / str(row["mask"]) for row in result.rows[:1] if row["mask"]]
            whole = not result.failures and bool(result.sha256)
            last = number == len(self._units)
            self._journal.done(unit.label, self._settings, result.sha256, outputs, result.size, whole=whole, sync=last)
        self._rows, self._units = [], []
