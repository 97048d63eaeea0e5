"""Fit and measure the classifier that guesses a picture's modality (``imaging/recognition.py``).

    python tools/recognition.py --data DATA --name recognition-MACHINE

Fits on the training images of the dataset folders, chooses the regularisation on their validation images and counts the
errors on their test images. DATA is a folder with MODALITY/DATASET and natural/DATASET as in docs/data.md. Of the
photographs every other one is for testing. Takes a minute.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.recognition import OTHER, SURE, Classifier, features
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.modalities import PAPER_MODALITIES

PACKAGE = Path(__file__).resolve().parents[1] / "espmedsam_edge" / "imaging" / "recognition.json"
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
PER_FOLDER = 300  # images a folder at most: the large sets would drown the small
Set = tuple[NDArray[np.float64], NDArray[np.int64]]


def read(data: Path) -> dict[str, Set]:
    """Features and classes of every split."""
    rows: dict[str, list[NDArray[np.float64]]] = {"train": [], "valid": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    classes = (*PAPER_MODALITIES, OTHER)
    for index, name in enumerate(classes):
        for path in sorted((data / ("natural" if name == OTHER else name)).iterdir()):
            folder = DatasetFolder.open(path)
            for split in rows:
                if name == OTHER or folder.split is None:
                    ids = sorted(folder.image_files)
                    ids = {"train": ids[::2], "valid": [], "test": ids[1::2]}[split]
                else:
                    ids = list(getattr(folder.split, split))
                for id_ in ids[:PER_FOLDER]:
                    image = folder.load_image(id_)
                    # Photographs in grey, too: else whatever is grey would have to be a film or a scan.
                    for frame in (image, to_grey(image)) if name == OTHER else (image,):
                        rows[split].append(features(frame))
                        labels[split].append(index)
    return {split: (np.array(rows[split]), np.array(labels[split])) for split in rows}


def to_grey(image: Frame) -> Frame:
    """(H, W, 3) uint8 BGR with three equal channels."""
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR), np.uint8)


def fit(images: Set, classes: tuple[str, ...], penalty: float) -> Classifier:
    """Multinomial logistic regression, every class weighing alike."""
    x, y = images
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-3
    z = np.clip((x - mean) / scale, -5, 5)
    weight = 1 / np.bincount(y, minlength=len(classes))[y]
    weight /= weight.sum()
    target = np.eye(len(classes))[y]

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w, b = flat[: -len(classes)].reshape(z.shape[1], -1), flat[-len(classes) :]
        scores = z @ w + b
        scores -= scores.max(axis=1, keepdims=True)
        p = np.exp(scores)
        p /= p.sum(axis=1, keepdims=True)
        value = -(weight * np.log(p[np.arange(len(y)), y] + 1e-12)).sum() + penalty * (w**2).sum()
        slope = (p - target) * weight[:, None]
        return float(value), np.concatenate([(z.T @ slope + 2 * penalty * w).ravel(), slope.sum(axis=0)])

    start = np.zeros((z.shape[1] + 1) * len(classes))
    flat = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000}).x
    return Classifier(classes, mean, scale, flat[: -len(classes)].reshape(z.shape[1], -1), flat[-len(classes) :])


def log_loss(classifier: Classifier, images: Set) -> float:
    """Mean negative logarithm of the true class's probability."""
    x, y = images
    return float(-np.log(classifier.probabilities(x)[np.arange(len(y)), y] + 1e-12).mean())


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the result, without its ending")
    arguments = parser.parse_args()
    environment = collect_environment()
    splits = read(arguments.data)
    classes = (*PAPER_MODALITIES, OTHER)
    tried = {penalty: fit(splits["train"], classes, penalty) for penalty in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)}
    penalty = min(tried, key=lambda value: log_loss(tried[value], splits["valid"]))
    classifier = tried[penalty]
    x, y = splits["test"]
    probabilities = classifier.probabilities(x)
    guess = probabilities.argmax(axis=1)
    sure = probabilities.max(axis=1) >= SURE
    table = {
        name: {
            "images": int((y == index).sum()),
            "sure_and_right": int(((y == index) & sure & (guess == y)).sum()),
            "unsure": int(((y == index) & ~sure).sum()),
            "sure_and_wrong": int(((y == index) & sure & (guess != y)).sum()),
        }
        for index, name in enumerate(classes)
    }
    fields = ("mean", "scale", "weights", "bias")
    fitted = {"classes": classes} | {key: np.round(getattr(classifier, key), 5).tolist() for key in fields}
    atomic_write(PACKAGE, json.dumps(fitted) + "\n")
    result = {
        "schema": 1,
        "kind": "recognition",
        "environment": environment,
        "penalty": penalty,
        "train_images": len(splits["train"][1]),
        "sure_from": SURE,
        "test": table,
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=2, default=str) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
