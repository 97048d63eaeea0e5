"""What is wrong with a dataset folder: pairs, sizes, values, duplicates, and images that leak between its lists."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.dataset import SPLITS, DatasetFolder, turned_apart
from espmedsam_edge.imaging.decode import file_header, read_image
from espmedsam_edge.imaging.masks import read_mask

DEFAULT_SIMILARITY = 0.95
"""Correlation of two thumbnails' details from which images count as the same picture."""

_THUMBNAIL = 48  # pixels a side
_ENOUGH_FOR_A_MEAN = 8  # images
_BLOCK = 1024  # rows of the similarity matrix at a time: 4 MiB for a thousand columns


@dataclass(frozen=True)
class Finding:
    """One kind of trouble.

    Attributes:
        kind: what it is, in words.
        advice: what to do about it.
        examples: every case, by id or file.
    """

    kind: str
    advice: str
    examples: list[str]


@dataclass
class CheckReport:
    """The findings of a folder; without any, the folder is in order."""

    images: int
    lists: dict[str, int]
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, advice: str, examples: Sequence[str]) -> None:
        """Record a finding if there is a case of it."""
        if examples:
            self.findings.append(Finding(kind, advice, list(examples)))


@dataclass
class _Facts:
    """What one image and its mask turned out to be."""

    id: str
    problem: tuple[str, str] | None = None
    grey: int = 0
    turned_apart: bool = False
    from_white: bool = False
    pictures: int = 1
    foreground: float | None = None
    digest: str = ""
    details: NDArray[np.float32] | None = None


def check(
    folder: DatasetFolder,
    *,
    similarity: float = DEFAULT_SIMILARITY,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read every image and mask of a folder and say what is wrong.

    Two images are duplicates when their pixels are the same; near duplicates when their details, at 48 pixels and
    without the slow changes of brightness that all images of a modality share, correlate by at least ``similarity``.
    The latter finds re-compressed, resized and re-exposed copies and neighbouring frames of a video, not mirrored ones.

    Args:
        folder: the folder.
        similarity: 0..1; 1 looks for exact copies only.
        threads: that read.
        progress: called with images done and images in all.
    """
    ids = list(folder.image_files)
    lists = {name: list(getattr(folder.split, name)) if folder.split else [] for name in SPLITS}
    report = CheckReport(len(ids), {name: len(members) for name, members in lists.items()})
    _check_names(folder, lists, report)
    facts: list[_Facts] = []
    with ThreadPoolExecutor(threads) as pool:
        for number, fact in enumerate(pool.map(lambda id_: _examine(folder, id_), ids), 1):
            facts.append(fact)
            if progress is not None:
                progress(number, len(ids))
    _check_pixels(facts, report)
    _check_copies(facts, lists, similarity, report)
    return report


def _check_names(folder: DatasetFolder, lists: dict[str, list[str]], report: CheckReport) -> None:
    images, masks = folder.image_files, folder.mask_files
    if masks:
        report.add("image without mask", "add the mask, or remove the image", [i for i in images if i not in masks])
        report.add("mask without image", "add the image, or remove the mask", [m for m in masks if m not in images])
    if folder.split is None:
        report.add("no split.json", "write one, or prepare the folder again", [str(folder.path)])
        return
    missing = [f"{id_} ({name})" for name, members in lists.items() for id_ in members if id_ not in images]
    report.add("listed in split.json but not there", "copy the images again, or take them out of the lists", missing)
    report.add("empty lists", "fill train, valid or test", [] if any(lists.values()) else ["split.json"])
    homes: defaultdict[str, set[str]] = defaultdict(set)
    for name, members in lists.items():
        for id_ in members:
            if id_ in folder.split.patient:
                homes[folder.split.patient[id_]].add(name)
    shared = [f"{patient} ({', '.join(sorted(names))})" for patient, names in homes.items() if len(names) > 1]
    report.add("patient in several lists", "keep each patient in one list", shared)


def _examine(folder: DatasetFolder, id_: str) -> _Facts:
    facts = _Facts(id_)
    try:
        image = read_image(folder.image_files[id_])
    except UserError as error:
        facts.problem = ("image that cannot be read", error.message)
        return facts
    facts.digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
    facts.details = _details(image)
    file = folder.mask_files.get(id_)
    if file is None:
        return facts
    try:
        header = file_header(file)
        facts.pictures, facts.from_white = header.pictures, header.white_is_zero
        mask, facts.grey = read_mask(file)
        facts.turned_apart = turned_apart(folder.image_files[id_], file)
    except UserError as error:
        facts.problem = ("mask that cannot be read", error.message)
        return facts
    if mask.shape != image.shape[:2]:
        sizes = f"{mask.shape[1]}x{mask.shape[0]}, image {image.shape[1]}x{image.shape[0]}"
        facts.problem = ("mask of another size than its image", f"{id_} ({sizes})")
    facts.foreground = float(np.count_nonzero(mask)) / mask.size
    return facts


def _details(image: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """A unit vector of what is fine in a small grey copy; None for a picture without any."""
    grey: Any = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    small: Any = cv2.resize(grey, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32)
    fine = (small - cv2.GaussianBlur(small, (0, 0), 3)).ravel()
    length = float(np.linalg.norm(fine))
    return np.asarray(fine / length, np.float32) if length > _THUMBNAIL else None


def _check_pixels(facts: Sequence[_Facts], report: CheckReport) -> None:
    problems: defaultdict[str, list[str]] = defaultdict(list)
    for fact in facts:
        if fact.problem:
            problems[fact.problem[0]].append(fact.problem[1])
    for kind in ("image that cannot be read", "mask that cannot be read", "mask of another size than its image"):
        report.add(kind, "replace the file" if "read" in kind else "find the right mask", problems[kind])
    grey = [f"{fact.id} ({fact.grey} pixels)" for fact in facts if fact.grey]
    report.add(
        "photograph turned by its Exif tag, its mask not",
        "look at them together; if the mask was drawn on the pixels as stored, turn it, or remove the tag",
        [fact.id for fact in facts if fact.turned_apart],
    )
    report.add(
        "mask of several pictures",
        "the first is read; save one picture a mask",
        [f"{fact.id} ({fact.pictures} pictures)" for fact in facts if fact.pictures > 1],
    )
    report.add(
        "mask that counts down from white (MinIsWhite)",
        "it is read as it looks, of ImageJ and tifffile as stored; look at it together with its image",
        [fact.id for fact in facts if fact.from_white],
    )
    report.add("mask with grey values", "it is cut at half; save masks as PNG of 0 and 255", grey)
    report.add(
        "empty mask", "remove the image, unless 'nothing there' is meant", [f.id for f in facts if f.foreground == 0]
    )
    report.add(
        "mask that covers the whole image", "look at it: is it inverted?", [f.id for f in facts if f.foreground == 1]
    )


def _check_copies(facts: Sequence[_Facts], lists: dict[str, list[str]], similarity: float, report: CheckReport) -> None:
    home = {id_: name for name, members in lists.items() for id_ in members}
    exact: defaultdict[str, list[str]] = defaultdict(list)
    for fact in facts:
        if fact.digest:
            exact[fact.digest].append(fact.id)
    copies = [ids for ids in exact.values() if len(ids) > 1]
    leaks, within = _sort_out(((ids[0], other, 1.0) for ids in copies for other in ids[1:]), home)
    report.add("same image in two lists", "remove one of them: the test has seen its training", leaks)
    report.add("same image twice", "remove one of them", within)
    if similarity < 1:
        near = [pair for pair in _similar(facts, similarity) if pair[0] not in _group_of(pair[1], copies)]
        leaks, within = _sort_out(near, home)
        report.add("nearly the same image in two lists", "keep copies and video frames together in one list", leaks)
        report.add("nearly the same image twice", "look at them; keep one if they are copies", within)


def _group_of(id_: str, groups: Sequence[list[str]]) -> list[str]:
    return next((ids for ids in groups if id_ in ids), [])


def _sort_out(pairs: Any, home: dict[str, str]) -> tuple[list[str], list[str]]:
    """Pairs in two different lists, and the others, as lines."""
    leaks, within = [], []
    for first, second, likeness in pairs:
        where = f"{home.get(first, 'no list')}, {home.get(second, 'no list')}"
        line = f"{first} = {second}" if likeness == 1 else f"{first} ~ {second} ({likeness:.2f})"
        if home.get(first) and home.get(second) and home[first] != home[second]:
            leaks.append(f"{line} [{where}]")
        else:
            within.append(line)
    return leaks, within


def _similar(facts: Sequence[_Facts], similarity: float) -> list[tuple[str, str, float]]:
    """Pairs whose details correlate by at least ``similarity``, the most alike first."""
    known = [fact for fact in facts if fact.details is not None]
    if len(known) < 2:
        return []
    vectors = np.stack([fact.details for fact in known if fact.details is not None])
    # All fundus images share their round rim, all fans their edges: what the folder has in common is no likeness.
    own = vectors - vectors.mean(axis=0) if len(known) >= _ENOUGH_FOR_A_MEAN else vectors
    own = own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-6)
    pairs: list[tuple[str, str, float]] = []
    for start in range(0, len(known), _BLOCK):
        block = vectors[start : start + _BLOCK] @ vectors[start:].T
        alike = (block >= similarity) & (own[start : start + _BLOCK] @ own[start:].T >= similarity - 0.05)
        for row, column in np.argwhere(alike):
            if column > row:
                pairs.append((known[start + row].id, known[start + column].id, float(block[row, column])))
    return sorted(pairs, key=lambda pair: -pair[2])
