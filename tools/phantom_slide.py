"""Write a synthetic slide: pieces of stained tissue on glass, as a tiled, pyramidal TIFF.

    python tools/phantom_slide.py slide.tif --size 8000x6000
    python tools/phantom_slide.py slide.tif --size 40000x30000 --tissue 0.1

Every tile is made when it is written, so that memory does not grow with the size. Needs the extra slide.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.phantoms import phantom

TILE = 512
PIXEL = 0.5  # micrometres
GLASS = 243
POOL = 6  # pictures that the tissue is put together from
Picture = NDArray[np.uint8]


class PhantomSlide:
    """Ellipses of tissue on glass.

    Args:
        size: (H, W) in pixels.
        tissue: part of the slide that they cover, about.
        seed: of places and pictures.
    """

    def __init__(self, size: tuple[int, int], tissue: float, seed: int = 0) -> None:
        self.size = size
        random = np.random.default_rng(seed)
        self._pool = [phantom("histopathology", seed * POOL + n, (TILE, TILE))[0] for n in range(POOL)]
        self._order = random.integers(0, POOL * 4, (64, 64))
        count = 3
        radius = np.sqrt(tissue * size[0] * size[1] / count / np.pi / 0.7)
        self._pieces = [
            (size[1] * (0.2 + 0.3 * n), size[0] * random.uniform(0.35, 0.65), radius, radius * random.uniform(0.6, 0.8))
            for n in range(count)
        ]

    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the levels, each half of the one before."""
        sizes = [self.size]
        while max(sizes[-1]) > 2048:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        return sizes

    def tiles(self, level: int) -> Iterator[Picture]:
        """The tiles of a level, RGB, row by row."""
        height, width = self.sizes()[level]
        for y in range(0, height, TILE):
            for x in range(0, width, TILE):
                yield self._tile(level, y, x)

    def _tile(self, level: int, y: int, x: int) -> Picture:
        step = 2**level
        down, across = np.mgrid[y : y + TILE, x : x + TILE].astype(np.float32) * step
        inside = np.zeros((TILE, TILE), np.float32)
        for left, top, wide, high in self._pieces:
            distance = 1 - np.hypot((across - left) / wide, (down - top) / high)
            inside = np.maximum(inside, np.clip(distance * 40, 0, 1))
        found = np.full((TILE, TILE, 3), GLASS, np.uint8)
        if not inside.any():
            return found
        block = max(1, TILE // step)
        for top in range(0, TILE, block):
            for left in range(0, TILE, block):
                number = self._order[(y + top) // block % 64, (x + left) // block % 64]
                picture = np.rot90(self._pool[number % POOL], number // POOL)
                if step > 1:
                    picture = cv2.resize(picture, (block, block), interpolation=cv2.INTER_AREA)
                found[top : top + block, left : left + block] = picture[..., ::-1]
        share = inside[..., None]
        return np.asarray(found * share + GLASS * (1 - share), np.uint8)


def write_slide(path: Path, slide: PhantomSlide) -> None:
    """Write all levels."""
    import tifffile

    sizes = slide.sizes()
    common: dict[str, Any] = {"dtype": np.uint8, "photometric": "rgb", "tile": (TILE, TILE), "compression": "jpeg"}
    common |= {"resolution": (10_000 / PIXEL, 10_000 / PIXEL), "resolutionunit": "CENTIMETER", "maxworkers": 1}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level, size in enumerate(sizes):
            below = {"subifds": len(sizes) - 1} if level == 0 else {"subfiletype": 1}
            file.write(slide.tiles(level), shape=(*size, 3), **below, **common)


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", default="8000x6000", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--tissue", type=float, default=0.15, help="part of the slide, 0 to 0.4")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    width, height = (int(side) for side in asked.size.split("x"))
    write_slide(asked.path, PhantomSlide((height, width), asked.tissue, asked.seed))


if __name__ == "__main__":
    main()
