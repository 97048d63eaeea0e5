"""Dice of pictures taken whole and in tiles, for every modality: what ``--tile auto`` is decided on.

    python benchmarks/tiling.py --data data --split valid --name tiling-valid
    python benchmarks/tiling.py --data data --split test --name tiling-test --tiles off auto

Three kinds of pictures of each dataset folder: those as they are (all, and the ones that are larger than the network's
input); mosaics of up to 2048 x 1536 pixels of them, where the field grows and the targets stay (each place is scored as
its picture); and each enlarged twice, where the targets grow as well. Writes JSON into ``benchmarks/results/`` and
prints the table of docs/microscopy.md. The weights are those that came with the program.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.dataset import DatasetFolder, Sample
from espmedsam_edge.imaging.geometry import mask_from_logits
from espmedsam_edge.imaging.masks import resize_mask
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.metrics import scores
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.shipped.bundles import shipped_bundle

RESULTS = Path(__file__).parent / "results"
SETS = (
    "dermoscopy/ph2", "xray/covid_cxr_lungs", "fundus/drive", "colonoscopy/cvc_clinicdb", "colonoscopy/kvasir_seg_mini",
    "ultrasound/busi", "microscopy/dsb2018", "microscopy/wbc",
)  # fmt: skip
TILES: dict[str, Sequence[int]] = {"microscopy": (256, 320, 448), "fundus": (584, 800)}
USUAL = (448,)
PAPER_SIZE = 1024
MOSAIC = (1536, 2048)
Array = NDArray[np.uint8]


def mosaics(samples: Sequence[Sample]) -> Iterator[tuple[Array, list[Sample]]]:
    """Pictures of the commonest size side by side: one mosaic, and what lies in it, row by row."""
    size = Counter((s.image.shape[0], s.image.shape[1]) for s in samples).most_common(1)[0][0]
    alike = [sample for sample in samples if sample.image.shape[:2] == size]
    down, across = MOSAIC[0] // size[0], MOSAIC[1] // size[1]
    across = min(across, len(alike))
    down = min(down, len(alike) // across)
    used = alike[: down * across]
    rows = [np.hstack([one.image for one in used[row * across : (row + 1) * across]]) for row in range(down)]
    if len(used) > 1:
        yield np.vstack(rows), used


def dice(mask: Array, truth: Array) -> float:
    """Per cent, at the size that the paper measures at."""
    return 100 * scores(mask, resize_mask(truth, (PAPER_SIZE, PAPER_SIZE))).dice


def of_picture(segmenter: Segmenter, image: Array, truth: Array) -> float:
    """Dice of one picture as it is taken."""
    return dice(mask_from_logits(segmenter.segment(image).logits, (PAPER_SIZE, PAPER_SIZE), 0.5), truth)


def of_mosaic(segmenter: Segmenter, mosaic: Array, samples: Sequence[Sample]) -> list[float]:
    """Dice of each picture in a mosaic."""
    mask = segmenter.segment(mosaic).mask
    height, width = samples[0].mask.shape
    across = mask.shape[1] // width
    found = []
    for place, sample in enumerate(samples):
        y, x = height * (place // across), width * (place % across)
        part = mask[y : y + height, x : x + width]
        large = cv2.resize(part, (PAPER_SIZE, PAPER_SIZE), interpolation=cv2.INTER_LINEAR)
        found.append(dice(np.asarray(large >= 128, np.uint8), sample.mask))
    return found


def enlarged(image: Array, interpolation: int) -> Array:
    """Twice the size."""
    return np.asarray(cv2.resize(image, None, fx=2, fy=2, interpolation=interpolation), np.uint8)


def measure(folder: DatasetFolder, modality: str, split: str, tiles: Sequence[int | str]) -> dict[str, Any]:
    """Mean Dice by kind of picture and by tile; "images" counts them."""
    samples = [folder.load(id_) for id_ in folder.ids(split)]
    found: dict[str, Any] = {}
    for tile in tiles:
        with Segmenter.load(shipped_bundle(modality), modality, threads=1, tile=tile) as segmenter:

            def mean(kind: str, values: list[float], tile: int | str = tile) -> None:
                if values:
                    found.setdefault(kind, {"images": len(values)})[str(tile)] = round(float(np.mean(values)), 2)

            own = [of_picture(segmenter, sample.image, sample.mask) for sample in samples]
            large = [max(sample.image.shape) > segmenter.image_size for sample in samples]
            mean("all", own)
            mean("larger than the input", [value for value, is_large in zip(own, large, strict=True) if is_large])
            for mosaic, used in mosaics(samples):
                mean("in a mosaic", of_mosaic(segmenter, mosaic, used))
                ids = {sample.id for sample in used}
                mean("the mosaic's one by one", [v for v, s in zip(own, samples, strict=True) if s.id in ids])
            twice = samples[:10]
            mean(
                "enlarged twice",
                [
                    of_picture(segmenter, enlarged(s.image, cv2.INTER_CUBIC), enlarged(s.mask, cv2.INTER_NEAREST))
                    for s in twice
                ],
            )
    return found


def table(results: dict[str, Any]) -> str:
    """As Markdown."""
    lines = []
    for name, kinds in results.items():
        columns = [key for key in next(iter(kinds.values())) if key != "images"]
        lines += [f"| {name} | images | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
        lines += [
            f"| {kind} | {values['images']} | {' | '.join(f'{values[column]:.1f}' for column in columns)} |"
            for kind, values in kinds.items()
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with MODALITY/DATASET")
    parser.add_argument("--split", default="valid")
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--tiles", nargs="*", help="'off', 'auto' or pixels, in place of the usual")
    parser.add_argument("--name", required=True)
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    for name in asked.sets:
        modality = name.split("/")[0]
        folder = DatasetFolder.open(asked.data / name)
        tiles = asked.tiles or ["off", *TILES.get(modality, USUAL)]
        results[name] = measure(folder, modality, asked.split, tiles)
        print(table({name: results[name]}), flush=True)
        record = {"environment": collect_environment(), "split": asked.split, "dice": results}
        atomic_write(RESULTS / f"{asked.name}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
