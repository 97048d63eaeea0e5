"""A slide's mask as a tiled, pyramidal OME-TIFF, written tile by tile from its regions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from espmedsam_edge.files import atomic_path
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.marks import MARK
from espmedsam_edge.runtime.slide.regions import REMAINS, Mask, Regions

TILE = 512
_SMALLEST = 1024  # pixels, of the last level's longer side at most
_HELD = 8  # times smaller: the level that is held whole, from which smaller ones are made


def write_mask(path: Path, regions: Regions, mpp: float | None) -> None:
    """Write the mask, 0 and 255, with levels of half the size each.

    Args:
        path: ends in .ome.tif.
        regions: of the level that was segmented; its size is the mask's.
        mpp: micrometres a pixel of the mask; None: not known.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """
    import tifffile

    sizes = _sizes(regions.size)
    common: dict[str, Any] = {
        "dtype": np.uint8,
        "photometric": "minisblack",
        "tile": (TILE, TILE),
        "compression": "zlib",
        "compressionargs": {"level": 1},
        "maxworkers": 1,
    }
    if mpp is not None:
        common |= {"resolution": (10_000 / mpp, 10_000 / mpp), "resolutionunit": "CENTIMETER"}
    metadata: dict[str, Any] = {"axes": "YX", "Name": "mask", "Creator": MARK}
    if mpp is not None:
        metadata |= {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    held = _shrunk(regions) if len(sizes) > 3 else np.zeros((0, 0), np.uint8)
    with (
        atomic_path(path, remains=REMAINS) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=True, ome=True) as file,
    ):
        first = _tiles(regions, 1, sizes[0])
        file.write(first, shape=sizes[0], subifds=len(sizes) - 1, metadata=metadata, software=MARK, **common)
        for index, size in enumerate(sizes[1:], 1):
            tiles = _tiles(regions, 2**index, size) if 2**index < _HELD else _held_tiles(held, size)
            file.write(tiles, shape=size, subfiletype=1, **common)


def _sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    sizes = [size]
    while max(sizes[-1]) > _SMALLEST:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def _places(size: tuple[int, int]) -> Iterator[Crop]:
    for y in range(0, size[0], TILE):
        for x in range(0, size[1], TILE):
            yield Crop(x, y, min(TILE, size[1] - x), min(TILE, size[0] - y))


def _tiles(regions: Regions, step: int, size: tuple[int, int]) -> Iterator[Mask]:
    for place in _places(size):
        full = Crop(
            place.x * step,
            place.y * step,
            min(place.width * step, regions.size[1] - place.x * step),
            min(place.height * step, regions.size[0] - place.y * step),
        )
        yield _padded(regions.part(full, step))


def _shrunk(regions: Regions) -> Mask:
    return regions.part(Crop(0, 0, regions.size[1], regions.size[0]), _HELD)


def _held_tiles(held: Mask, size: tuple[int, int]) -> Iterator[Mask]:
    small = held if held.shape == size else cv2.resize(held, size[::-1], interpolation=cv2.INTER_NEAREST)
    for place in _places(size):
        yield _padded(np.ascontiguousarray(place.of(np.asarray(small, np.uint8))))


def _padded(tile: Mask) -> Mask:
    if tile.shape == (TILE, TILE):
        return tile
    whole = np.zeros((TILE, TILE), np.uint8)
    whole[: tile.shape[0], : tile.shape[1]] = tile
    return whole
