"""Files into a dataset folder: images/, masks/ and split.json, complete or not at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_directory, open_regular, read_regular
from espmedsam_edge.imaging.dataset import IMAGES, MASKS, SPLIT, SPLITS, Split
from espmedsam_edge.imaging.decode import decode_image, max_pixels
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.masks import Mask, binary, resize_mask
from espmedsam_edge.training.data.layouts import Item, Layout, list_items
from espmedsam_edge.training.data.splitting import make_split

_COPIED = frozenset({".jpg", ".jpeg", ".png"})
_REMEDY = "Unpack the archive again."


@dataclass
class Prepared:
    """What a conversion did.

    Attributes:
        images: written.
        split: the lists.
        unmasked: ids left out because they have no mask (or an empty one).
        failures: what could not be read, with the reason; of files, their images are left out.
        unmatched: masks that belong to no image.
    """

    images: int
    split: Split
    unmasked: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """What there is to convert.

    Attributes:
        items: images and what their masks are made from, each id once.
        source: where they are from, for messages.
        title: what they are.
        expected: what that should hold, if nothing can be converted.
        modality: what ``split.json`` will say.
        labelled: whether there are masks.
        mask_of: an image's mask, (H, W), for its item and size; raises UserError.
        failures: what could not be taken in, a line each; may grow as masks are made.
        unmatched: masks that belong to no image.
        seed: of lists that are dealt.
    """

    items: Sequence[Item]
    source: Path
    title: str
    expected: str
    modality: str | None = None
    labelled: bool = True
    mask_of: Callable[[Item, tuple[int, int]], Mask] | None = None
    failures: Sequence[str] = ()
    unmatched: Sequence[str] = ()
    seed: int = 0


def of_layout(layout: Layout, source: Path) -> Found:
    """What a publisher's unpacked archive holds.

    Raises:
        UserError: the source is not of this layout.
    """
    items, form = list_items(layout, source), f"Expected: {layout.form}."
    return Found(items, source, layout.title, form, layout.modality, layout.modality is not None)


def prepare(
    found: Found,
    target: Path,
    *,
    long_side: int = 0,
    split: Split | None = None,
    keep_empty: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Make a dataset folder.

    JPEG and PNG images that need no change are copied byte for byte; others are written as PNG, or as JPEG where the
    source is one. Masks are PNGs of 0 and 255.

    Args:
        found: what there is.
        target: the dataset folder to make; must not exist, or be empty.
        long_side: images whose longer side is more pixels are shrunk to it, masks with them; 0: none.
        split: lists to use instead of the publisher's or derived ones.
        keep_empty: keep images without foreground (with an all-zero mask) instead of leaving them out.
        progress: called with images done and images in all.

    Raises:
        UserError: the target is taken, or nothing could be converted.
    """
    items = found.items
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists.", "Choose another folder, or remove it first.")
    done: list[Item] = []
    result = Prepared(0, Split(), unmatched=list(found.unmatched))
    with atomic_directory(target) as folder:
        (folder / IMAGES).mkdir()
        if found.labelled:
            (folder / MASKS).mkdir()

        def convert(item: Item) -> bool:
            return _convert(item, folder, long_side, found, keep_empty=keep_empty)

        for number, (item, future) in enumerate(_ahead(items, convert), 1):
            try:
                if future.result():
                    done.append(item)
                else:
                    result.unmasked.append(item.id)
            except UserError as error:
                result.failures.append(str(error))
            if progress is not None:
                progress(number, len(items))
        result.failures = [*found.failures, *result.failures]
        if not done:
            reason = result.failures[0] if result.failures else "none has a mask."
            raise UserError(f"nothing in {found.source} could be converted: {reason}", found.expected)
        result.images = len(done)
        result.split = _lists(done, found, split)
        lists = result.split.model_dump(exclude_defaults=False)
        text = json.dumps(lists, indent=1, ensure_ascii=False)
        if any(
            "\ud800" <= sign <= "\udfff" for sign in text
        ):  # names with bytes that are not UTF-8, which JSON holds as escapes
            text = json.dumps(lists, indent=1)
        (folder / SPLIT).write_text(text + "\n", encoding="utf-8")
    return result


def _lists(done: Sequence[Item], found: Found, given: Split | None) -> Split:
    if not found.labelled and given is None:
        return Split(origin="derived", train=[item.id for item in done])
    made = make_split(done, found.modality, given, found.seed)
    if not any(getattr(made, name) for name in SPLITS):
        raise UserError("none of the given split's ids is in the data.", "Are the ids file names without extension?")
    return made


def _ahead(items: Sequence[Item], work: Callable[[Item], bool]) -> Iterator[tuple[Item, Future[bool]]]:
    """Results in order, a few items ahead on as many threads as there are cores."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        source = iter(items)
        pending = [(item, pool.submit(work, item)) for item in islice(source, 4 * threads)]
        try:
            while pending:
                yield pending.pop(0)
                pending += [(item, pool.submit(work, item)) for item in islice(source, 1)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _convert(item: Item, folder: Path, long_side: int, found: Found, *, keep_empty: bool) -> bool:
    """Write one image and its mask; False if it has none and is left out."""
    if found.labelled and not item.masks and not keep_empty:
        return False
    data = _read(item.image)
    frame = _decode(data, item.image)
    size = (frame.shape[0], frame.shape[1])
    mask = (found.mask_of or merged)(item, size) if found.labelled else None
    if mask is not None and not mask.any() and not keep_empty:
        return False
    height, width = size
    scale = long_side / max(height, width) if long_side else 1.0
    name = _file_name(item.id)
    jpeg = item.image.suffix.lower() in (".jpg", ".jpeg")
    if scale >= 1 and item.image.suffix.lower() in _COPIED:
        (folder / IMAGES / f"{name}{item.image.suffix.lower()}").write_bytes(data)
    else:
        if scale < 1:
            size = (max(8, round(height * scale)), max(8, round(width * scale)))
            resized: Any = cv2.resize(frame, (size[1], size[0]), interpolation=cv2.INTER_AREA)
            frame = np.asarray(resized, np.uint8)
            mask = None if mask is None else resize_mask(mask, size)
        suffix = ".jpg" if jpeg else ".png"
        (folder / IMAGES / f"{name}{suffix}").write_bytes(encode_image(_one_channel_if_grey(frame), suffix))
    if mask is not None:
        (folder / MASKS / f"{name}.png").write_bytes(encode_image(mask, ".png"))
    return True


def merged(item: Item, size: tuple[int, int], read: Callable[[Path], Mask] | None = None) -> Mask:
    """The union of an image's mask files, (H, W).

    Args:
        item: the image.
        size: its (H, W).
        read: reads one file; None: as the publishers write them.

    Raises:
        UserError: a mask cannot be read, or is of another size.
    """
    union = np.zeros(size, np.uint8)
    for file in item.masks:
        mask = read_published(file) if read is None else read(file)
        if mask.shape != union.shape:
            raise UserError(
                f"{file} is {mask.shape[1]}x{mask.shape[0]} pixels but {item.image.name} is {size[1]}x{size[0]}.",
                "Find the mask that belongs to it; the image was left out.",
                exit_code=1,
            )
        np.bitwise_or(union, mask, out=union)
    return union


def read_published(file: Path) -> Mask:
    """A mask file of any format that publishers use, GIF, PPM and ``.gz`` among them.

    Raises:
        UserError: it cannot be read, or is no mask.
    """
    return binary(_decode(_read(file), file).max(axis=2), str(file)).mask


def _one_channel_if_grey(frame: Frame) -> NDArray[np.uint8]:
    same = np.array_equal(frame[..., 0], frame[..., 1]) and np.array_equal(frame[..., 0], frame[..., 2])
    return np.ascontiguousarray(frame[..., 0]) if same else frame


def _file_name(id_: str) -> str:
    if not id_ or id_ in (".", "..") or any(character in id_ for character in "/\\\0") or len(id_) > 200:
        raise UserError(f"'{id_[:80]}' cannot name a file.", "Rename the image.", exit_code=1)
    return id_


def _read(path: Path) -> bytes:
    limit = 8 * max_pixels() + (64 << 20)
    try:
        if path.suffix.lower() != ".gz":
            return read_regular(path, limit)
        with open_regular(path) as packed, gzip.open(packed) as stream:
            data = stream.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}.", _REMEDY, exit_code=1) from error
    if len(data) > limit:
        raise UserError(f"{path} unpacks to more than an image takes.", _REMEDY, exit_code=1)
    return data


def _decode(data: bytes, path: Path) -> Frame:
    """The formats of ``decode_image`` and, for the publishers that use them, PPM/PGM and GIF (by Pillow)."""
    if data[:3] == b"GIF":
        return _decode_gif(data, path)
    if data[:2] in (b"P5", b"P6"):
        return _decode_pnm(data, path)
    return decode_image(data, str(path))


def _decode_pnm(data: bytes, path: Path) -> Frame:
    fields = data[:200].split()
    if len(fields) < 4 or not all(field.isdigit() for field in fields[1:3]):
        raise UserError(f"cannot read {path}: its header is damaged.", _REMEDY, exit_code=1)
    if int(fields[1]) * int(fields[2]) > max_pixels():
        raise UserError(f"{path} has more than {max_pixels()} pixels.", "Shrink it first.", exit_code=1)
    if len(data) < int(fields[1]) * int(fields[2]) * (3 if data[:2] == b"P6" else 1):
        raise UserError(f"cannot read {path}: it is cut off.", _REMEDY, exit_code=1)
    pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise UserError(f"cannot read {path}: its data cannot be decoded.", _REMEDY, exit_code=1)
    return np.asarray(pixels, np.uint8)


def _decode_gif(data: bytes, path: Path) -> Frame:
    """Pillow, because OpenCV reads GIF from 4.11 only and then not in every build."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=["GIF"]) as picture:
            if picture.width * picture.height > max_pixels():
                raise UserError(f"{path} has more than {max_pixels()} pixels.", "Shrink it first.", exit_code=1)
            pixels = np.asarray(picture.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more than {max_pixels()} pixels.", "Shrink it first.", exit_code=1) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}.", _REMEDY, exit_code=1) from error
    return np.ascontiguousarray(pixels[..., ::-1])
