"""The regions of a slide's mask, each a file as soon as it is finished, so that a run that ended goes on from there."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, read_json, read_regular, write_errors
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.imaging.header_errors import HeaderError
from espmedsam_edge.imaging.headers import read_header
from espmedsam_edge.machine.cache import PRIVATE_FOLDER

log = logging.getLogger(__name__)

Mask = NDArray[np.uint8]
_PLAN = "plan.json"
_LARGEST_PLAN = 1 << 20  # bytes
_REGION = re.compile(r"\d{5,}-\d{5,}\.png")
_REST = re.compile(r"\.(plan|\d{5,}-\d{5,})\.[0-9a-f]{12}\.(json|png)")  # of ``atomic_write``
_KEPT = 24  # decoded regions

REMAINS = "finished regions stay, and the same command goes on from there"
"""What a run that could not write leaves."""


class Regions:
    """Squares that cover a level of a slide, row by row; those at the right and lower end are smaller.

    Attributes:
        size: (H, W) of the level.
        side: of a region, in pixels.
        rows, columns: how many.
    """

    def __init__(self, folder: Path, size: tuple[int, int], side: int) -> None:
        self.size, self.side = size, side
        self.rows, self.columns = -(-size[0] // side), -(-size[1] // side)
        self._folder = folder
        self._decoded: OrderedDict[tuple[int, int], Mask | None] = OrderedDict()
        self._reading = threading.Lock()

    def open(self, plan: Mapping[str, Any], *, anew: bool) -> None:
        """Make the folder, or go on with what is in it.

        Args:
            plan: all that the mask depends on.
            anew: forget what is there.

        Raises:
            UserError: what is there was begun otherwise.
        """
        text = json.dumps(plan, sort_keys=True)
        file = self._folder / _PLAN
        with write_errors(self._folder):
            if anew and _is_ours(file):
                self.remove()
            if _anothers(self._folder) or _anothers(file):
                raise UserError(
                    f"{self._folder} was begun by another user.", "Choose another --out, or have it removed."
                )
            if self._folder.is_symlink() or (self._folder.is_dir() and not self._is_bare()):
                try:
                    same = json.dumps(read_json(read_regular(file, _LARGEST_PLAN)), sort_keys=True) == text
                except (OSError, ValueError):
                    same = False
                if not (same and _is_ours(file)):
                    raise UserError(
                        f"{self._folder} holds a run that was begun with another slide, network or options.",
                        "Repeat it as it was begun, or begin anew (--overwrite). What others put there stays.",
                    )
                there = sum(_REGION.fullmatch(one.name) is not None for one in self._folder.iterdir())
                log.info("%s: %d regions are there already.", self._folder, there)
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._folder.mkdir(PRIVATE_FOLDER, exist_ok=True)  # what lies there becomes part of the mask
            atomic_write(file, text)

    def _is_bare(self) -> bool:
        """Whether nothing is there but what a kill left of files that were being written."""
        return all(_REST.fullmatch(file.name) for file in self._folder.iterdir())

    def place(self, row: int, column: int) -> Crop:
        """Where a region lies in the level."""
        x, y = column * self.side, row * self.side
        return Crop(x, y, min(self.side, self.size[1] - x), min(self.side, self.size[0] - y))

    def _file(self, row: int, column: int) -> Path:
        return self._folder / f"{row:05d}-{column:05d}.png"

    def is_finished(self, row: int, column: int) -> bool:
        """Whether a region was written."""
        return self._file(row, column).is_file()

    def write(self, row: int, column: int, mask: Mask) -> None:
        """Keep a finished region, (h, w) uint8, 0 or 255.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        encoded = cv2.imencode(".png", mask)[1].tobytes()
        atomic_write(self._file(row, column), encoded, remains=REMAINS)

    def read(self, row: int, column: int) -> Mask | None:
        """A region's mask; None: it has no foreground, or nothing was segmented there. From any thread."""
        key = (row, column)
        with self._reading:
            if key in self._decoded:
                self._decoded.move_to_end(key)
                return self._decoded[key]
            file, mask = self._file(row, column), None
            if file.is_file():
                mask = self._decode(file, self.place(row, column))
            self._decoded[key] = mask
            while len(self._decoded) > max(_KEPT, self.columns + 2):
                self._decoded.popitem(last=False)
            return mask

    def _decode(self, file: Path, place: Crop) -> Mask | None:
        """A region's file; its size is looked at first."""
        fault = "is another user's" if _anothers(file) else "is damaged"
        try:
            data = read_regular(file, 2 * place.width * place.height + (1 << 16)) if "user" not in fault else b""
            header = read_header(data)
            fits = (header.format, header.width, header.height) == ("PNG", place.width, place.height)
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if fits else None
        except (OSError, HeaderError):
            decoded = None
        if decoded is None or decoded.dtype != np.uint8 or decoded.shape != (place.height, place.width):
            raise UserError(f"{file} {fault}.", "Delete it and repeat the command.", exit_code=1)
        return np.asarray(decoded, np.uint8) if decoded.any() else None

    def part(self, place: Crop, step: int = 1) -> Mask:
        """The mask of any part of the level, every ``step``-th pixel of it."""
        found = np.zeros((-(-place.height // step), -(-place.width // step)), np.uint8)
        for row in range(place.y // self.side, -(-(place.y + place.height) // self.side)):
            for column in range(place.x // self.side, -(-(place.x + place.width) // self.side)):
                mask, region = self.read(row, column), self.place(row, column)
                if mask is None:
                    continue
                top, left = (-(-max(0, near) // step) for near in (region.y - place.y, region.x - place.x))
                inside = mask[place.y + top * step - region.y :: step, place.x + left * step - region.x :: step]
                inside = inside[: found.shape[0] - top, : found.shape[1] - left]
                found[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return found

    def remove(self) -> None:
        """Remove what was kept: the plan, and the regions."""
        for file in self._folder.iterdir():
            if _REGION.fullmatch(file.name) or _REST.fullmatch(file.name):
                file.unlink()
        (self._folder / _PLAN).unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()


def _anothers(path: Path) -> bool:
    """Whether something is there that belongs to another user than this one and the superuser."""
    try:
        return path.lstat().st_uid not in (os.geteuid(), 0)
    except OSError:
        return False


def _is_ours(plan: Path) -> bool:
    """Whether a folder is one of a run, by its plan; one behind a link is somebody's."""
    if plan.parent.is_symlink() or plan.is_symlink() or not plan.is_file():
        return False
    try:
        found = read_json(read_regular(plan, _LARGEST_PLAN))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"slide", "graph"} <= found.keys()
