"""A slide's file, opened and decoded in a child process: what strangers' tiles cost ends there, and is bounded.

Each tile may take some seconds, the child 1.3 GB; a slide whose tiles use them up again and again is refused.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.child import Child, limit_memory, no_core_dumps, receive, send
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.dicom.reading import is_dicom

log = logging.getLogger(__name__)

_MEMORY = 5 << 28  # bytes of address space beyond those at the child's start, libraries of codecs among them
_OPENING_SECONDS, _A_GIGABYTE = 10.0, 10.0
_TILE_SECONDS, _A_MEGAPIXEL = 5.0, 1.0
_FAIR_SECONDS = 0.5  # of the processor's time for a tile, beside those for its megapixels
_PATIENCE = 10.0  # seconds, of all tiles together, beyond what is fair


class SlideProcess:
    """See ``pyramid.Storage``.

    Raises:
        UserError: not such a file, or one that can only be read whole, or opening it takes too much.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._child, self._patience = path, Child(__name__), _PATIENCE
        self._opening, self._to_open = _seconds_to_open(path), 0.0
        try:
            opened, there = self._child.ask({"path": str(path)}, b"", self._opening)
        except (OSError, EOFError):
            raise UserError(
                f"cannot read {path} as a slide: opening it takes too long or too much memory.",
                "Copy it again.",
                exit_code=1,
            ) from None
        if "levels" not in opened:
            self.close()
            message = opened.get("error", f"cannot read {path} as a slide: its folder or its tags cannot be read.")
            raise UserError(message, opened.get("hint", "Check its permissions, or copy it again."), exit_code=1)
        for line in opened["warnings"]:
            log.warning("%s", line)
        self.levels: list[_Level] = []
        for size, tile, tiles in opened["levels"]:
            packed, there = there[: -(-tiles // 8)], there[-(-tiles // 8) :]
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=tiles)
            self.levels.append(_Level(self, len(self.levels), tuple(size), tuple(tile), bits))
        self.stated: float | None = opened["stated"]

    def part(self, level: int, index: int, pixels: int) -> Frame:
        """A tile of so many pixels.

        Raises:
            ValueError: it is damaged.
            UserError: too many of the tiles took too long.
        """
        begin = time.monotonic()
        question = {"path": str(self._path), "level": level, "index": index}
        try:
            seconds = _TILE_SECONDS + _A_MEGAPIXEL * pixels / 1e6 + self._to_open
            answer, data = self._child.ask(question, b"", seconds)
            self._to_open = 0.0
        except (OSError, EOFError):
            self._to_open = self._opening  # anew, by another child
            self._wait(time.monotonic() - begin)
            raise ValueError("it ended the decoder, or was not decoded in time") from None
        self._wait(answer.get("seconds", 0.0) - _FAIR_SECONDS - _A_MEGAPIXEL * pixels / 1e6)
        if "shape" not in answer:
            raise ValueError(answer.get("fault", "the file has changed"))
        frame: Frame = np.frombuffer(data, np.uint8).reshape(answer["shape"])
        return frame

    def _wait(self, seconds: float) -> None:
        self._patience -= max(0.0, seconds)
        if self._patience < 0:
            raise UserError(
                f"cannot read {self._path}: decoding its tiles takes far longer than their size accounts for.",
                "Convert it to a new file with a program that you trust. What is finished stays.",
                exit_code=1,
            )

    def close(self) -> None:
        """End the child."""
        self._child.close()


class _Level:
    """See ``pyramid.StoredLevel``. Args: ``there``, for each tile 0 or 1."""

    def __init__(
        self, process: SlideProcess, number: int, size: tuple[int, int], tile: tuple[int, int], there: NDArray[np.uint8]
    ) -> None:
        self._process, self._number, self.there = process, number, there
        self.size, self.tile = size, tile

    def part(self, index: int) -> Frame:
        """See ``StoredLevel.part``."""
        return self._process.part(self._number, index, self.tile[0] * self.tile[1])


def files_of(path: Path) -> list[Path]:
    """The files that a slide may be read from: of DICOM all that lie in its folder."""
    if path.is_dir() or is_dicom(path):
        return [file for file in (path if path.is_dir() else path.parent).iterdir() if file.is_file()]
    return [path]


def _seconds_to_open(path: Path) -> float:
    files = [file for file in files_of(path) if file.exists()]
    return _OPENING_SECONDS + _A_GIGABYTE * sum(file.stat().st_size for file in files) / 1e9


def open_slide(path: Path) -> Any:
    """An open file of a slide, in this process: ``TiffLevels`` or ``DicomLevels``.

    Raises:
        UserError: as for ``SlideProcess``.
    """
    if path.is_dir() or is_dicom(path):
        from espmedsam_edge.runtime.slide.dicom_levels import DicomLevels

        return DicomLevels(path)
    from espmedsam_edge.runtime.slide.tiff_levels import TiffLevels

    return TiffLevels(path)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    """The child: opens a slide, then decodes the tiles that it is asked for, until the parent is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for native code that prints
    no_core_dumps()
    cv2.setNumThreads(1)
    limit_memory(_MEMORY)
    warnings = _Warnings()
    logging.getLogger("espmedsam_edge").addHandler(warnings)
    storage: Any = None
    send(answers, {"ready": True})
    while True:
        try:
            question, _ = receive(sys.stdin.buffer)
        except EOFError:
            return
        begin = time.process_time()
        try:
            if storage is None:
                storage = open_slide(Path(question["path"]))
            if "level" in question:
                pixels = np.ascontiguousarray(storage.levels[question["level"]].part(question["index"]))
                send(answers, {"shape": pixels.shape, "seconds": time.process_time() - begin}, pixels.tobytes())
            else:
                send(answers, *_opened(storage, warnings.lines))
        except UserError as error:
            send(answers, {"error": error.message, "hint": error.hint})
        except MemoryError:
            send(answers, {"error": f"cannot read {question['path']}: it takes too much memory."})
        except Exception as error:  # noqa: BLE001 (each codec has errors of its own; their texts may quote a header)
            send(answers, {"fault": type(error).__name__, "seconds": time.process_time() - begin})


def _opened(storage: Any, warnings: list[str]) -> tuple[dict[str, Any], bytes]:
    levels = [(level.size, level.tile, len(level.there)) for level in storage.levels]
    there = b"".join(np.packbits(level.there).tobytes() for level in storage.levels)
    return {"levels": levels, "stated": storage.stated, "warnings": warnings}, there
