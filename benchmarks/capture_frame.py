"""What a capture card costs, and what ``--crop auto`` gives back: Dice of polyps in 1920x1080 with a text panel.

    python benchmarks/capture_frame.py --data ../shared/data --name capture-frame-HOST

Test pictures of CVC-ClinicDB are enlarged to 972 rows and put beside lines of text into a black frame of 1920x1080, as
an endoscope's processor puts out. They are segmented by the weights that came with the program: the pictures alone, the
frames whole, the frames with ``--crop auto``, as pictures (looked at one by one) and as one video (H.264, the crop held
from its first ten frames). Dice is of the foreground, the mean over pictures. Writes JSON into ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from espmedsam_edge import ModelOptions, ReadingOptions, infer_frames
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.metrics import dice
from espmedsam_edge.runtime.video.writing import open_writer

RESULTS = Path(__file__).parent / "results"
PICTURES = 24
SIZE, PLACE, SHOWN = (1080, 1920), (520, 54), (972, 1296)
"""(H, W) of the frame; (x, y) of the picture in it; (H, W) of the picture there."""


def captured(picture: np.ndarray, number: int) -> np.ndarray:
    """A picture as a capture card sees it: (1080, 1920, 3) BGR."""
    frame = np.zeros((*SIZE, 3), np.uint8)
    lines = (f"ID: 0071{number:04d}", "Name: A. SAMPLE", "Sex: F  Age: 61", "28/11/2026", f"10:14:{number % 60:02d}",
             "SCV: 12", "CVP: A5/1", "Ce: --  G: N", "Eh: A3", "Comment:", "Physician: B. C.")  # fmt: skip
    for row, line in enumerate(lines):
        cv2.putText(frame, line, (30, 120 + 78 * row), cv2.FONT_HERSHEY_SIMPLEX, 1.4, (235, 235, 235), 3, cv2.LINE_AA)
    return placed(frame, cv2.resize(picture, SHOWN[::-1], interpolation=cv2.INTER_CUBIC))


def placed(frame: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Put a picture to its place in a frame."""
    x, y = PLACE
    frame[y : y + SHOWN[0], x : x + SHOWN[1]] = picture
    return frame


def truth_there(truth: np.ndarray) -> np.ndarray:
    """A mask at its place in the frame."""
    return placed(np.zeros(SIZE, np.uint8), cv2.resize(truth, SHOWN[::-1], interpolation=cv2.INTER_NEAREST))


def mean_dice(source: Path, truths: list[np.ndarray], crop: str | None) -> tuple[float, list[list[int] | None]]:
    """In percent, and the crop of each frame."""
    reading = ReadingOptions(crop=crop)
    values, crops = [], []
    for (frame, result), truth in zip(
        infer_frames(source, ModelOptions(modality="colonoscopy"), reading=reading), truths, strict=True
    ):
        values.append(dice(result.mask > 0, truth > 0))
        crops.append(None if frame.crop is None else list(frame.crop))
    return 100 * float(np.mean(values)), crops


def measure(data: Path, count: int = PICTURES) -> dict[str, Any]:
    """Dice of each way, and the crops that were found."""
    folder = data / "colonoscopy/cvc_clinicdb"
    names = json.loads((folder / "split.json").read_text())["test"]
    chosen = sorted(names, key=int)[:: max(1, len(names) // count)][:count]
    pictures = [cv2.imread(str(next((folder / "images").glob(f"{name}.*")))) for name in chosen]
    truths = [cv2.imread(str(next((folder / "masks").glob(f"{name}.*"))), cv2.IMREAD_GRAYSCALE) for name in chosen]
    there = [truth_there(truth) for truth in truths]
    with tempfile.TemporaryDirectory() as temporary:
        alone, frames, clip = (Path(temporary) / name for name in ("alone", "frames", "clip.mkv"))
        alone.mkdir()
        frames.mkdir()
        writer = open_writer(clip, SIZE, Fraction(25), crf=18)
        for number, picture in enumerate(pictures):
            cv2.imwrite(str(alone / f"{number:03d}.png"), picture)
            frame = captured(picture, number)
            cv2.imwrite(str(frames / f"{number:03d}.png"), frame)
            writer.write(frame, number / 25)
        writer.finish()
        writer.close()
        ways = {
            "picture alone": (alone, truths, None),
            "frame whole": (frames, there, None),
            "frame, crop auto": (frames, there, "auto"),
            "video whole": (clip, there, None),
            "video, crop auto": (clip, there, "auto"),
            "picture alone, crop auto": (alone, truths, "auto"),
        }
        found: dict[str, Any] = {}
        for way, (source, masks, crop) in ways.items():
            value, crops = mean_dice(source, masks, crop)
            found[way] = {"dice_percent": round(value, 2), **({} if crop is None else {"crops": crops})}
    return {"pictures": [str(name) for name in chosen], "dice": found}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with colonoscopy/cvc_clinicdb")
    parser.add_argument("--name", required=True, help="of the result's file, without .json")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    options = parser.parse_args()
    result = {**measure(options.data, options.pictures), "environment": collect_environment()}
    atomic_write(RESULTS / f"{options.name}.json", json.dumps(result, indent=2) + "\n")
    for way, value in result["dice"].items():
        print(f"{way}: {value['dice_percent']}")


if __name__ == "__main__":
    main()
