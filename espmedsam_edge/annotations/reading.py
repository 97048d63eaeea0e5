"""What annotation tools wrote, read back: the pictures that are there, and their objects' masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.files import read_json, read_regular
from espmedsam_edge.imaging.headers import IMAGE_SUFFIXES

Mask = NDArray[np.uint8]  # (H, W), 0 or 255
Draw = Callable[[Mask], int]
"""Draws into a mask; gives how many pixels it took: of its box, and for what else takes time."""
Part = Literal["train", "valid", "test"]

MOST_BYTES = 512 << 20
"""Of a file of annotations."""

_MOST_MEMORY = 1_500_000_000
_MEMORY = {b"{": 500, b"[": 90, b",": 40, b'"': 25, b"\n": 8}
"""Bytes that Python takes at most for what stands before or behind a sign of JSON, an object to draw included."""
_A_LINE = 350  # bytes that a line of YOLO's takes beside its text
_MOST_LINES = 3  # of what is wrong with one picture
_MOST_TOLD = 100  # lines of what is wrong with the files
_MOST_WORK = 1 << 34  # pixels that are drawn for one picture: a minute
_AN_OBJECT = 1 << 14  # pixels that an object of any size counts as
_LONGEST_NAME = 4096
_PARTS: dict[str, Part] = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test"}


@dataclass
class Annotated:
    """A picture and what is drawn in it.

    Attributes:
        image: its file.
        objects: what names each in messages, and draws it into a mask of the picture's size, of 0 and 255; that raises
            ValueError with what is wrong in a few words.
        size: (H, W) as the annotations have it; None: they do not say.
        part: the list that its place or its file's name says.
    """

    image: Path
    objects: list[tuple[str, Draw]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    part: Part | None = None

    def mask(self, size: tuple[int, int], problems: list[str]) -> Mask:
        """The union of its objects; what cannot be drawn is added to ``problems``, a line each, but for many.

        Raises:
            UserError: the picture is of another size, or has more than can be drawn.
        """
        if self.size not in (None, size):
            theirs = f"{self.size[1]}x{self.size[0]}" if self.size else ""
            raise UserError(
                f"{self.image} is {size[1]}x{size[0]} pixels, and its annotations are of {theirs}.",
                "Annotate it again, or find the picture that they were made on; it was left out.",
                exit_code=1,
            )
        union, wrong, work = np.zeros(size, np.uint8), list[str](), 0
        for name, draw in self.objects:
            if work > _MOST_WORK:
                raise UserError(
                    f"{self.image} has {len(self.objects)} objects, which are more or larger than can be drawn.",
                    "Cut the picture into parts; it was left out.",
                    exit_code=1,
                )
            work += _AN_OBJECT
            try:
                work += draw(union)
            except ValueError as error:
                wrong.append(f"{self.image.name}: {name}: {error}; it is left out.")
        shown = wrong if len(wrong) <= _MOST_LINES + 1 else wrong[:_MOST_LINES]
        problems += shown
        if len(wrong) > len(shown):
            problems.append(f"{self.image.name}: {len(wrong) - len(shown)} more objects are left out.")
        return union


@dataclass
class AnnotationSet:
    """All that was read.

    Attributes:
        pictures: each file once.
        problems: what was left out, a line each, but for many.
    """

    pictures: list[Annotated] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _told: int = 0
    _left: int = field(default_factory=lambda: _MOST_MEMORY)

    def tell(self, line: str) -> None:
        """Something was left out."""
        self._told += 1
        if self._told > _MOST_TOLD:
            line = f"{self._told - _MOST_TOLD} more of the annotations' entries are left out."
            del self.problems[_MOST_TOLD:]
        self.problems.append(line)

    def load(self, file: Path, *, left_out: str = "") -> Any:
        """A JSON file, if it and those before it fit into memory.

        Args:
            file: its path.
            left_out: the key of a text that is not kept, and becomes None.

        Raises:
            ValueError: it cannot be read, is too large, or is no JSON; says so in a few words.
        """
        content = self._read(file)
        needed = self._check(content, sum(content.count(sign) * cost for sign, cost in _MEMORY.items()))
        try:
            value = read_json(content, edited=True)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON: {error}") from error
        if isinstance(value, dict) and isinstance(value.get(left_out), str):
            needed -= len(value[left_out])
            value[left_out] = None
        self._left -= needed
        return value

    def lines(self, file: Path) -> list[str]:
        """A text's lines, if it and those before it fit into memory.

        Raises:
            ValueError: it cannot be read or is too large; says so in a few words.
        """
        content = self._read(file).replace(b"\r", b"\n")
        self._left -= self._check(content, _A_LINE * (content.count(b"\n") + 1))
        return content.decode("utf-8", "replace").split("\n")

    def _check(self, content: bytes, beside: int) -> int:
        """The bytes that a file's text takes, with what it takes beside it, while there is room for twice the text."""
        text = len(content) * (1 if content.isascii() and b"\\u" not in content else 4)  # one sign makes all as wide
        if 2 * text + len(content) + beside > self._left:
            raise ValueError("with what was read before it would take over 1.5 GB of memory: split it, or give fewer")
        return text + beside

    @staticmethod
    def _read(file: Path) -> bytes:
        try:
            return read_regular(file, MOST_BYTES)
        except OSError as error:
            raise ValueError(str(error.strerror)) from error


class Pictures:
    """The pictures below a folder, found by the names that annotations give them, never outside it."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in self.files:
            self._by_name[path.name].append(path)

    def find(self, name: str, near: Path) -> Path:
        """The picture of a name, which may have folders.

        Args:
            name: as the annotations have it.
            near: their file, for several of one name.

        Raises:
            ValueError: it is not there, or several are.
        """
        if len(name) > _LONGEST_NAME:
            raise ValueError(f"a name of {len(name)} characters is no picture's")
        parts = (PureWindowsPath(name) if "\\" in name else PurePosixPath(name)).parts
        found = self._by_name.get(parts[-1], []) if parts else []
        for length in range(len(parts), 0, -1):
            fitting = [path for path in found if path.parts[-length:] == parts[-length:]]
            if fitting:
                closest = max(_shared(path, near) for path in fitting)
                fitting = [path for path in fitting if _shared(path, near) == closest]
                if len(fitting) > 1:
                    raise ValueError(f"several pictures are called {name[:200]}")
                return fitting[0]
        raise ValueError(f"there is no picture {name[:200]!r}")


def _shared(path: Path, other: Path) -> int:
    """How many folders two paths have in common."""
    return next((n for n, (a, b) in enumerate(zip(path.parts, other.parts, strict=False)) if a != b), len(other.parts))


def part_of(place: Path, below: Path) -> Part | None:
    """Which list the names of a file and of its folders, below another one, say it is for."""
    names = [name for part in place.relative_to(below).parts for name in _words(part)]
    return next((_PARTS[name] for name in reversed(names) if name in _PARTS), None)


def _words(name: str) -> list[str]:
    words = "".join(sign if sign.isalpha() else " " for sign in name.lower())
    return words.split()


def check_wanted(wanted: Collection[str], known: Sequence[str]) -> None:
    """Raise UserError where a label that is asked for is none."""
    for name in wanted:
        if name not in known:
            raise UserError(f"no object is labelled '{name}'.", nearest(name, known))


def whole(value: Any) -> int | None:
    """A side in pixels from outside; None for anything that is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1 << 31:
        return None
    return int(value) if value == int(value) else None
