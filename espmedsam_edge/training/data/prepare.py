"""A publisher's files into a dataset folder: images/, masks/ and split.json, complete or not at all."""

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
        failures: files that could not be read, with the reason; their images are left out.
    """

    images: int
    split: Split
    unmasked: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def prepare(
    layout: Layout,
    source: Path,
    target: Path,
    *,
    long_side: int = 0,
    split: Split | None = None,
    keep_empty: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Convert a data set.

    JPEG and PNG images that need no change are copied byte for byte; others are written as PNG, or as JPEG where the
    source is one. Masks are PNGs of 0 and 255.

    Args:
        layout: what the source is.
        source: the unpacked archive.
        target: the dataset folder to make; must not exist, or be empty.
        long_side: images whose longer side is more pixels are shrunk to it, masks with them; 0: none.
        split: lists to use instead of the publisher's or derived ones.
        keep_empty: keep images without foreground (with an all-zero mask) instead of leaving them out.
        progress: called with images done and images in all.

    Raises:
        UserError: the source is not of this layout, the target is taken, or nothing could be converted.
    """
    items = list_items(layout, source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists.", "Choose another folder, or remove it first.")
    labelled = layout.modality is not None
    done: list[Item] = []
    result = Prepared(0, Split())
    with atomic_directory(target) as folder:
        (folder / IMAGES).mkdir()
        if labelled:
            (folder / MASKS).mkdir()

        def convert(item: Item) -> bool:
            return _convert(item, folder, long_side, labelled=labelled, keep_empty=keep_empty)

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
        if not done:
            reason = result.failures[0] if result.failures else "none has a mask."
            raise UserError(f"nothing in {source} could be converted: {reason}", f"Expected: {layout.form}.")
        result.images = len(done)
        result.split = _lists(done, layout, split, labelled)
        lists = result.split.model_dump(exclude_defaults=False)
        text = json.dumps(lists, indent=1, ensure_ascii=False)
        if any(
            "\ud800" <= sign <= "\udfff" for sign in text
        ):  # names with bytes that are not UTF-8, which JSON holds as escapes
            text = json.dumps(lists, indent=1)
        (folder / SPLIT).write_text(text + "\n", encoding="utf-8")
    return result


def _lists(done: Sequence[Item], layout: Layout, given: Split | None, labelled: bool) -> Split:
    if not labelled and given is None:
        return Split(origin="derived", train=[item.id for item in done])
    made = make_split(done, layout.modality, given)
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


def _convert(item: Item, folder: Path, long_side: int, *, labelled: bool, keep_empty: bool) -> bool:
    """Write one image and its mask; False if it has none and is left out."""
    if labelled and not item.masks and not keep_empty:
        return False
    data = _read(item.image)
    frame = _decode(data, item.image)
    mask = _merge(item, frame) if labelled else None
    if mask is not None and not mask.any() and not keep_empty:
        return False
    height, width = frame.shape[:2]
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


def _merge(item: Item, frame: Frame) -> Mask:
    """The union of an image's masks."""
    merged = np.zeros(frame.shape[:2], np.uint8)
    for file in item.masks:
        mask = binary(_decode(_read(file), file).max(axis=2)).mask
        if mask.shape != merged.shape:
            raise UserError(
                f"{file} is {mask.shape[1]}x{mask.shape[0]} pixels but {item.image.name} is "
                f"{frame.shape[1]}x{frame.shape[0]}.",
                "Find the mask that belongs to it; the image was left out.",
                exit_code=1,
            )
        np.bitwise_or(merged, mask, out=merged)
    return merged


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
