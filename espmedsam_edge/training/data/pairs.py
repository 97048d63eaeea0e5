"""Anybody's own images and masks: which files belong together by their names, and which values are the target."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import open_regular
from espmedsam_edge.imaging.decode import max_pixels, read_samples
from espmedsam_edge.imaging.masks import Mask, read_mask
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.training.data.layouts import Item, check_unique, is_image
from espmedsam_edge.training.data.prepare import Found, merged, read_published

ANY = "any"
_PARTS = {"{id}": "(?P<id>.+)", "{patient}": "(?P<patient>.+?)", "*": ".*"}
_LOSSY = frozenset({".jpg", ".jpeg"})
_ONLY_PILLOW = frozenset({".gif"})
_PNM = frozenset({".ppm", ".pgm", ".gz"})
_PALETTE = b"\x03"  # a PNG's colour type
_PLACE_OF_TYPE = 25


@dataclass(frozen=True)
class Positive:
    """Which values of a mask file are the target.

    Attributes:
        values: of grey files, and the numbers of a palette's colours.
        colours: (R, G, B).
        anything: whatever is not 0, as of numbered objects.
    """

    values: tuple[int, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    anything: bool = False

    @classmethod
    def parse(cls, text: str) -> Positive:
        """Of ``1,2``, ``#ff0000`` or ``any``.

        Raises:
            UserError: something else.
        """
        if text.strip() == ANY:
            return cls(anything=True)
        values, colours = [], []
        for word in (word.strip() for word in text.split(",")):
            if re.fullmatch(r"\d{1,5}", word):
                values.append(int(word))
            elif re.fullmatch(r"#[0-9a-fA-F]{6}", word):
                red, green, blue = bytes.fromhex(word[1:])
                colours.append((red, green, blue))
            else:
                hint = "Values with commas (1,2), colours (#ff0000), or: any"
                raise UserError(f"'{word}' is no value of a mask.", hint)
        return cls(tuple(values), tuple(colours))

    def of(self, samples: NDArray[Any], name: str) -> Mask:
        """The mask of stored samples, (H, W) or (H, W, BGR[A]).

        Raises:
            UserError: values are asked for, and the file holds colours, or the other way round.
        """
        if samples.ndim == 3 and (samples[..., :3] == samples[..., :1]).all() and not self.colours:
            samples = samples[..., 0]
        if self.anything:
            found = samples[..., :3].any(axis=2) if samples.ndim == 3 else samples != 0
        elif samples.ndim == 2 and not self.colours:
            found = np.isin(samples, self.values)
        elif samples.ndim == 3 and not self.values:
            found = np.zeros(samples.shape[:2], bool)
            for colour in self.colours:
                found |= (samples[..., :3] == colour[::-1]).all(axis=2)
        else:
            holds, hint = ("colours", "#ff0000") if samples.ndim == 3 else ("values", "1,2")
            raise UserError(f"{name} holds {holds}.", f"Say which: --positive {hint}", exit_code=1)
        return np.asarray(found, np.uint8) * np.uint8(255)


def find_pairs(
    images: Path,
    masks: Path,
    *,
    images_named: str = "{id}",
    masks_named: str = "{id}",
    patient: str | None = None,
    positive: Positive | None = None,
    modality: str | None = None,
    seed: int = 0,
) -> Found:
    """List the images of a folder with their masks.

    Names are paths below their folder without the last ending, so patterns may hold ``/``. ``*`` is anything. Several
    masks of an image, as by ``{id}_mask*``, are merged. Where both lie in one folder, what is a mask is no image.

    Args:
        images, masks: the folders, with folders in them.
        images_named: a pattern with ``{id}``; files that it does not fit are no images.
        masks_named: what an image's mask is called, a pattern with ``{id}``.
        patient: a pattern with ``{patient}`` for names of images; None: each image is a patient of its own.
        positive: which values are the target; None: as dataset folders have it (``imaging.masks.read_mask``).
        modality: what the images are; None: that is not said.
        seed: of the lists.

    Raises:
        UserError: no such folder, no such images, a pattern that is none, or two images of one id.
    """
    image_form, mask_form = (_compiled(text, "id") for text in (images_named, masks_named))
    patient_of = patients_of(patient)
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"no folder at {folder}.", "Name the folders of the images and of the masks.")
    named = {name: path for name, path in _names(images, masks) if image_form.fullmatch(name)}
    ids = {name: str(_match(image_form, name)["id"]) for name in named}
    wanted = {id_: name for name, id_ in ids.items()}
    of, unmatched = dict[str, list[Path]](), list[str]()
    for name, path in _names(masks, images):
        owner = next((id_ for id_ in _owners(mask_form, masks_named, name) if id_ in wanted), None)
        if owner is None or named[wanted[owner]] == path:
            unmatched += [str(path)] if owner is None and path not in named.values() else []
        else:
            of.setdefault(owner, []).append(path)
    taken = {path for paths in of.values() for path in paths} if masks_named != images_named else set[Path]()
    items = [
        Item(id_.replace("/", "-"), named[name], tuple(of.get(id_, ())), patient_of(name))
        for name, id_ in sorted(ids.items())
        if named[name] not in taken
    ]
    if not items:
        raise UserError(f"{images} holds no images named '{images_named}'.", "{id} is what differs; * is anything.")
    if patient is not None and all(item.patient is None for item in items):
        raise UserError(f"no image's name fits --patient '{patient}', such as {items[0].image.stem}.", _PATIENTS)
    check_unique(items)
    expected = f"Are the masks named '{masks_named}'? {_values_of(items)}"
    read = partial(_read, positive=positive)
    return Found(
        items,
        images,
        "your own",
        expected,
        modality,
        mask_of=partial(merged, read=read),
        unmatched=unmatched,
        seed=seed,
    )


_PATIENTS = "{patient} is the patient's part of a name; * is anything: --patient '{patient}_*'"


def _compiled(pattern: str, part: str) -> re.Pattern[str]:
    if pattern.count(f"{{{part}}}") != 1:
        raise UserError(
            f"the pattern '{pattern}' has no {{{part}}}, or several.", "Such as '{id}_gt' or '{patient}_*'."
        )
    words = re.split(r"(\{id\}|\{patient\}|\*)", unicodedata.normalize("NFC", pattern))
    return re.compile("".join(_PARTS.get(word, re.escape(word)) for word in words), re.DOTALL)


def _match(form: re.Pattern[str], name: str) -> re.Match[str]:
    found = form.fullmatch(name)
    assert found is not None
    return found


def _owners(form: re.Pattern[str], pattern: str, name: str) -> Iterator[str]:
    """The ids that a mask may be of, by its name: where there is a ``*``, the longest and the shortest."""
    for one in (form, _compiled_short(pattern)) if "*" in pattern else (form,):
        if found := one.fullmatch(name):
            yield found["id"]


def _compiled_short(pattern: str) -> re.Pattern[str]:
    return re.compile(_compiled(pattern, "id").pattern.replace("(?P<id>.+)", "(?P<id>.+?)"), re.DOTALL)


def patients_of(pattern: str | None) -> Callable[[str], str | None]:
    """What tells the patient of an image by its name, and None where the pattern, with ``{patient}``, does not fit.

    Raises:
        UserError: a pattern that is none.
    """
    form = None if pattern is None else _compiled(pattern, "patient")

    def patient_of(name: str) -> str | None:
        found = None if form is None else form.fullmatch(name)
        return None if found is None else found["patient"]

    return patient_of


def _names(folder: Path, other: Path) -> Iterator[tuple[str, Path]]:
    """Pictures at any depth, by their path below the folder without the last ending; not those of one within it."""
    outer, inner = os.path.realpath(folder), os.path.realpath(other)
    within = inner.startswith(os.path.join(outer, ""))
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if within and os.path.realpath(path).startswith(os.path.join(inner, "")):
            continue
        if path.is_file() and is_image(path) and "__MACOSX" not in below.parts:
            whole = below.with_suffix("") if below.suffix.lower() == ".gz" else below
            yield unicodedata.normalize("NFC", whole.with_suffix("").as_posix()), path


def _read(file: Path, positive: Positive | None) -> Mask:
    suffix = file.suffix.lower()
    if positive is None:
        return read_published(file) if suffix in _ONLY_PILLOW | _PNM else read_mask(file).mask
    if suffix in _LOSSY:
        raise UserError(f"{file} is a JPEG, whose values are not exact.", "Leave out --positive.", exit_code=1)
    return positive.of(_samples(file), str(file))


def _samples(file: Path) -> NDArray[Any]:
    """As stored; of a palette the numbers of its colours, which is what programs write classes as."""
    if file.suffix.lower() in _ONLY_PILLOW | _PNM or _has_palette(file):
        return _by_pillow(file)
    return read_samples(file)


def _has_palette(file: Path) -> bool:
    try:
        with open_regular(file) as stream:
            start = stream.read(_PLACE_OF_TYPE + 1)
    except OSError:
        return False  # which ``read_samples`` will say
    return start.startswith(b"\x89PNG") and start[_PLACE_OF_TYPE:] == _PALETTE


def _by_pillow(file: Path) -> NDArray[Any]:
    if (reason := why_missing("PIL", "train")) is not None:
        raise UserError(f"cannot read {file}: {reason}")
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG", "GIF", "PPM"]) as picture:
            if picture.width * picture.height > max_pixels():
                raise UserError(f"{file} has more than {max_pixels()} pixels.", "Shrink it first.", exit_code=1)
            samples = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {file}: {error}.", "Write it again, as PNG.", exit_code=1) from error
    return samples[..., ::-1] if samples.ndim == 3 else samples


def _values_of(items: list[Item]) -> str:
    """What the first mask holds, to say which values there are where none was the target."""
    file = next((path for item in items for path in item.masks), None)
    if file is None:
        return "No mask was found."
    try:
        samples = _samples(file)
    except UserError:
        return ""
    if samples.ndim == 3:
        return f"{file.name} holds colours."
    shown = np.unique(samples)
    return f"{file.name} holds {', '.join(map(str, shown[:8]))}{', ...' if len(shown) > 8 else ''}."
