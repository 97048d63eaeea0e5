"""What large pictures cost beyond the network's own time on their tiles: a slide, and one picture of 9,000 x 9,000.

    python benchmarks/large_pictures.py --side 9000 --rounds 3 --name large-pictures-MACHINE

Slide: the seconds that the backend takes for as many tiles as the slide has with tissue, and nothing else, over those
of ``slide`` from opening the file to its last result; both by turns. Picture: the seconds of ``infer`` with masks and
overlays, loading the network included, over those of OpenCV and of tifffile to read the picture and write both, plus
the backend's for its tiles, half of these taken before and half after. The weights are those that came with the
program. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from phantom_slide import PhantomSlide, write_slide

from espmedsam_edge import Outputs, infer
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.request import ModelOptions
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.slide.segmenting import SlideOptions, SlideResults, segment_slide
from espmedsam_edge.shipped.bundles import shipped_bundle

RESULTS = Path(__file__).parent / "results"
MODALITY = "microscopy"


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long something takes, and what it gives."""
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found


def network_seconds(segmenter: Segmenter, tiles: int) -> float:
    """The backend's for so many tiles, in groups of the graph's batch."""
    images = np.random.default_rng(0).normal(size=(4, *segmenter.graph.input_shape)).astype(np.float32)
    groups = -(-tiles // segmenter.batch)
    return seconds_of(lambda: [segmenter.choice.backend.run(images[n % 4]) for n in range(groups)])[0]


def measure_slide(segmenter: Segmenter, slide: Path, rounds: int, instances: bool, folder: Path) -> dict[str, Any]:
    """Both by turns."""
    found: dict[str, Any] = {"network_seconds": [], "slide_seconds": []}
    tiles = 0
    for number in range(rounds + 1):  # the first warms up
        results = SlideResults.of(slide, folder / str(number))
        spent, report = seconds_of(
            lambda at=results: segment_slide(slide, segmenter, at, SlideOptions(instances=instances))
        )
        tiles = report.tiles
        alone = network_seconds(segmenter, tiles if number else 4)
        if number:
            found["slide_seconds"].append(round(spent, 3))
            found["network_seconds"].append(round(alone, 3))
            print(f"slide: {tiles} tiles in {spent:.1f} s, the network alone {alone:.1f} s", flush=True)
    rate = sum(found["network_seconds"]) / sum(found["slide_seconds"])
    return {**found, "tiles": tiles, "objects": report.objects, "share_of_the_networks_rate": round(rate, 3)}


def field(side: int) -> np.ndarray:
    """Fields of nuclei side by side, (side, side, 3) BGR."""
    parts = [phantom(MODALITY, seed, (600, 600))[0] for seed in range(4)]
    row = np.hstack([parts[n % 4] for n in range(-(-side // 600))])
    rows = [np.roll(row, 600 * n, axis=1) for n in range(-(-side // 600))]
    return np.ascontiguousarray(np.vstack(rows)[:side, :side])


def read_and_write(path: Path, mask: np.ndarray, folder: Path) -> dict[str, float]:
    """Seconds of each library to read the picture and write it and a mask as it does by itself."""

    def by_opencv() -> None:
        picture = cv2.imread(str(path))
        cv2.imwrite(str(folder / "opencv.png"), picture)
        cv2.imwrite(str(folder / "opencv-mask.png"), mask)

    def by_tifffile() -> None:
        picture = tifffile.imread(path)
        tifffile.imwrite(folder / "tifffile.tif", picture, compression="zlib", photometric="rgb")
        tifffile.imwrite(folder / "tifffile-mask.tif", mask, compression="zlib")

    return {"opencv": seconds_of(by_opencv)[0], "tifffile": seconds_of(by_tifffile)[0]}


def measure_picture(segmenter: Segmenter, side: int, folder: Path) -> dict[str, Any]:
    """A TIFF of so many pixels a side, with and without telling objects apart."""
    path = folder / "field.tif"
    tifffile.imwrite(path, field(side)[..., ::-1], compression="zlib", tile=(512, 512), photometric="rgb")
    tiles = segmenter.tiler.tiles(np.zeros((side, side, 3), np.uint8), segmenter.graph)
    count = len(tiles or [0])
    found: dict[str, Any] = {"side": side, "tiles": count}
    mask = np.zeros((side, side), np.uint8)
    for name, instances in (("masks and overlays", False), ("objects told apart, too", None)):
        before = network_seconds(segmenter, count // 2)
        libraries = [read_and_write(path, mask, folder)]
        out = Outputs(folder / f"overlays-{instances}", masks=folder / f"masks-{instances}")
        model = ModelOptions(segmenter.bundle, MODALITY, objects=ObjectOptions(instances=instances))
        spent, report = seconds_of(lambda model=model, out=out: infer(path, model, out))
        assert report.frames == 1, report
        mask = cv2.imread(str(folder / f"masks-{instances}" / "field.png"), cv2.IMREAD_UNCHANGED)
        libraries.append(read_and_write(path, mask, folder))
        network = before + network_seconds(segmenter, count - count // 2)
        others = {name: round(sum(one[name] for one in libraries) / 2, 2) for name in libraries[0]}
        entry = {"infer_seconds": round(spent, 2), "network_seconds": round(network, 2), "read_and_write": others}
        entry["of_network_and_library"] = {key: round(spent / (network + value), 3) for key, value in others.items()}
        found[name] = entry
        print(f"{side} x {side}, {name}: {json.dumps(entry)}", flush=True)
    return found


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="6000x4000", help="of the slide")
    parser.add_argument("--tissue", type=float, default=0.15, help="part of the slide")
    parser.add_argument("--rounds", type=int, default=3, help="of the slide; 0: leave it out")
    parser.add_argument("--side", type=int, default=9000, help="of the picture; 0: leave it out")
    parser.add_argument("--threads", type=int, help="of the network")
    parser.add_argument("--name", required=True)
    asked = parser.parse_args()
    record: dict[str, Any] = {"environment": collect_environment()}
    bundle = shipped_bundle(MODALITY)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if asked.rounds:
            with Segmenter.load(bundle, MODALITY, threads=asked.threads, tile="off") as segmenter:
                record["backend"] = segmenter.choice.taken
                slide = folder / "slide.tif"
                width, height = (int(side) for side in asked.size.split("x"))
                write_slide(slide, PhantomSlide((height, width), asked.tissue))
                record["slide"] = {"size": asked.size}
                for name, instances in (("outlines of parts", False), ("objects told apart", True)):
                    (place := folder / name).mkdir()
                    record["slide"][name] = measure_slide(segmenter, slide, asked.rounds, instances, place)
        if asked.side:
            with Segmenter.load(bundle, MODALITY, threads=asked.threads) as segmenter:
                record["picture"] = measure_picture(segmenter, asked.side, folder)
    record["load_average_after"] = collect_environment()["load_average_1min"]
    atomic_write(RESULTS / f"{asked.name}.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
