"""pydicom and highdicom, kept from quoting a header: what they say of a malformed value holds the value.

A value may be a patient's name in a field that is not meant for it, so none is ever shown or logged: errors name the
attribute by its keyword. Everything that reads or writes DICOM goes through here.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.dicom.extent import TooMuch, check_extent, start_of

_LIBRARIES = ("pydicom", "highdicom")
# Warnings are told apart by the module that they point to: the libraries, those that call them, and deepcopy.
_WHERE = rf"({'|'.join(_LIBRARIES)}|copy|espmedsam_edge\.runtime)(\.|$)"
_MOST_NAMED = 3
_MOST_LOOKED_AT = 20_000  # elements, for the one that cannot be understood
_NUMBERS = frozenset({"DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV", "US or SS"})

Told = Callable[[str], UserError]
"""What a user is told of a file, for what is wrong with it (the end of a sentence, "" where that is not known)."""


def load_pydicom() -> Any:
    """pydicom's module, kept from logging and warning, which highdicom then is as well."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for library in _LIBRARIES:
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    first = warnings.filters[0] if warnings.filters else None
    if first is None or getattr(first[3], "pattern", None) != _WHERE:  # somebody else's goes behind it
        warnings.filterwarnings("ignore", module=_WHERE)
    return pydicom


def read_dataset(path: Path, tags: Iterable[str] | None = None) -> Any:
    """A file's dataset without pixels; values over 64 KiB are read when they are asked for.

    Args:
        path: the file.
        tags: the keywords of those that are wanted; None: all of them.

    Raises:
        TooMuch: see ``check_extent``.
        Exception: whatever pydicom raises; its text may quote values.
    """
    pydicom = load_pydicom()
    with path.open("rb") as stream:
        check_extent(stream)
        bare = start_of(stream) == 0  # which pydicom takes for DICOM only when it is told to
    wanted = None if tags is None else list(tags)
    return pydicom.dcmread(path, stop_before_pixels=True, defer_size=1 << 16, force=bare, specific_tags=wanted)


def read_whole(path: Path) -> Any:
    """The dataset of a file of our own, pixels included."""
    return load_pydicom().dcmread(path)


class Dicom:
    """The dataset that is at work, once it is read: for naming the attribute that is at fault."""

    dataset: Any = None


@contextmanager
def discreet(told: Told) -> Iterator[Dicom]:
    """Turn whatever the block raises into ``told``, without its text: there is no class of errors that quotes nothing.

    ``UserError`` goes through. Give the dataset to what this yields, and the fault is named by its keyword.
    """
    load_pydicom()
    at_work = Dicom()
    try:
        yield at_work
    except UserError:
        raise
    except TooMuch as error:
        raise told(f"its header is larger than that of any image ({error})") from None
    except Exception as error:  # noqa: BLE001 (see above)
        raise told(_fault(error, at_work.dataset)) from None


def _fault(error: Exception, dataset: Any) -> str:
    if isinstance(error, AttributeError) and _is_keyword(error.name):
        return f"it has no {error.name}"
    found = [] if dataset is None else malformed(dataset)
    if not found:
        return ""
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return f"{', '.join(found[:_MOST_NAMED])}{more}: malformed"


def _is_keyword(name: object) -> bool:
    from pydicom.datadict import tag_for_keyword

    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9]+", name) is not None and bool(tag_for_keyword(name))


def malformed(dataset: Any) -> list[str]:
    """The keywords of the attributes, those in sequences too, whose values are not what the dictionary says."""
    found: dict[str, None] = {}
    for keyword, read in _elements(dataset, [_MOST_LOOKED_AT]):
        if not _well_formed(keyword, read):
            found[keyword] = None
    return list(found)


def _elements(dataset: Any, left: list[int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Keyword of each public element, and what reads its value."""
    from pydicom.datadict import keyword_for_tag

    for tag in list(dataset.keys()):
        left[0] -= 1
        if left[0] < 0:
            return
        keyword = keyword_for_tag(tag)
        if not keyword:
            continue
        yield keyword, partial(dataset.__getitem__, tag)
        items: list[Any] = []
        with suppress(Exception):  # the element has just been yielded, and is found malformed
            items = list(dataset[tag].value) if dataset[tag].VR == "SQ" else []
        for item in items:
            yield from _elements(item, left)


def _well_formed(keyword: str, read: Callable[[], Any]) -> bool:
    from pydicom import config
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import validate_value

    try:
        element = read()
        expected = dictionary_VR(element.tag)
        if element.value is None or element.VR == "SQ" or isinstance(element.value, bytes):
            return bool((element.VR == "SQ") == (expected == "SQ") or element.value is None)
        values = [element.value] if element.VM <= 1 else list(element.value)
        for value in values:
            if expected in _NUMBERS and value != "":
                float(value)
            elif isinstance(value, str):
                validate_value(expected, value, config.RAISE)
    except Exception:  # noqa: BLE001 (which is the answer)
        return False
    return True
