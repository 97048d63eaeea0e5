"""Fit and measure the classifier that guesses a picture's modality (``imaging/recognition.py``).

    python tools/recognition.py --data DATA --name recognition-MACHINE

Fits on the training images of the dataset folders and on changed copies of them (``recognition_pictures``). The penalty
and the temperature are chosen on validation images. Errors are counted by data set: on test images; on sonograms of
other scanners (DATA/video, DATA/dicom) and scikit-image's photographs, on which nothing was fitted; on each microscopy
set by a fit without it. DATA is a folder with MODALITY/DATASET and natural/DATASET as in docs/data.md; of the
photographs every other one is for testing. Takes some minutes.
``confidence.py`` then calibrates anew.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from recognition_pictures import changed, drawn, to_grey
from scipy.optimize import minimize

from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.recognition import ARRAYS, CLIP, OTHER, SURE, Classifier, features
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.sources.opening import open_sources

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "espmedsam_edge" / "imaging" / "recognition.json"
RESULTS = ROOT / "benchmarks" / "results"
CLASSES = (*PAPER_MODALITIES, OTHER)
PENALTIES = (2e-3, 1e-3, 5e-4, 2e-4, 1e-4)
TEMPERATURES = np.exp(np.linspace(0, 1.2, 13)).tolist()
LEFT_OUT = ("dsb2018", "wbc")  # the modality that has two sets for training
PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "clock_motion", "coffee", "coins", "grass", "gravel", "horse")
PHOTOGRAPHS += ("hubble_deep_field", "motorcycle_left", "moon", "page", "rocket", "text")
PER_FOLDER = 300  # images of a list at most: the large sets would drown the small
COPIES = 640  # changed ones of a training list, a few of each image
OWN_PENALTY = 1e-3
KEPT = 0.98  # of the validation images that are sure and right
LONGEST = 400  # pixels: copies are made of pictures of that size
DRAWN_SHARE = 0.15  # what phantoms and drawings weigh beside a set of pictures
Split = Literal["train", "valid", "test", "elsewhere"]


@dataclass
class Pictures:
    """Features and what they are of, a row a picture."""

    rows: list[NDArray[np.float64]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    copies: list[bool] = field(default_factory=list)

    def add(self, image: Frame, name: str, dataset: str, split: Split, *, copy: bool = False) -> None:
        """Take in a picture of a class."""
        self.rows.append(features(image))
        self.labels.append(CLASSES.index(name))
        self.sets.append(dataset)
        self.splits.append(split)
        self.copies.append(copy)

    def table(self) -> Table:
        """As arrays."""
        return Table(*(np.array(part) for part in (self.rows, self.labels, self.sets, self.splits, self.copies)))


@dataclass(frozen=True)
class Table:
    """``Pictures`` as arrays: (N, F) and (N,)."""

    x: NDArray[np.float64]
    y: NDArray[np.int64]
    sets: NDArray[np.str_]
    splits: NDArray[np.str_]
    copies: NDArray[np.bool_]

    def only(self, chosen: NDArray[np.bool_]) -> Table:
        """The rows that are chosen."""
        return Table(*(part[chosen] for part in (self.x, self.y, self.sets, self.splits, self.copies)))

    def weights(self) -> NDArray[np.float64]:
        """Every class alike; in it, sets by the root of their size, and what is drawn less."""
        weights = np.zeros(len(self.y))
        for label in np.unique(self.y):
            for name in np.unique(self.sets[self.y == label]):
                of = (self.y == label) & (self.sets == name)
                share = DRAWN_SHARE if name in ("phantoms", "drawings") else 1.0
                weights[of] = share * np.sqrt((of & ~self.copies).sum()) / of.sum()
            weights[self.y == label] /= weights[self.y == label].sum()
        return weights / weights.sum()


def read(data: Path) -> Table:
    """Everything under DATA and what is drawn."""
    pictures = Pictures()
    for name in CLASSES:
        for path in sorted((data / ("natural" if name == OTHER else name)).iterdir()):
            _read_set(pictures, DatasetFolder.open(path), name)
            print(path.name, len(pictures.rows), flush=True)
    rng = np.random.default_rng(5)
    for number in range(400):
        pictures.add(drawn(rng), OTHER, "drawings", "train" if number % 4 else "valid")
    for name in PAPER_MODALITIES:
        for number in range(40):
            height, width = (int(side) for side in rng.integers(96, 400, 2))
            image, _ = phantom(name, 1000 + number, (height, width))
            split: Split = "train" if number % 4 else "valid"
            pictures.add(image, name, "phantoms", split)
            if split == "train":
                pictures.add(changed(image, name, rng), name, "phantoms", split, copy=True)
    for dataset, image in _sonograms(data):
        pictures.add(image, "ultrasound", dataset, "elsewhere")
    for image in _scikit_photographs():
        pictures.add(image, OTHER, "scikit-image", "elsewhere")
    return pictures.table()


def _read_set(pictures: Pictures, folder: DatasetFolder, name: str) -> None:
    for split, ids in _lists(folder, name).items():
        copies = {"train": round(np.clip(COPIES / max(1, len(ids)), 2, 20)), "valid": 2}.get(split, 0)
        for id_ in ids:
            image = folder.load_image(id_)
            rng = np.random.default_rng(zlib.crc32(f"{folder.name}/{id_}".encode()))
            # Photographs in grey, too: else whatever is grey would have to be a film or a scan.
            for one in (image, to_grey(image)) if name == OTHER else (image,):
                pictures.add(one, name, folder.name, split)
                small = _at_most(one, LONGEST)
                for _ in range(copies):
                    pictures.add(changed(small, name, rng), name, folder.name, split, copy=True)


def _lists(folder: DatasetFolder, name: str) -> dict[Split, Sequence[str]]:
    if name == OTHER or folder.split is None:
        ids = sorted(folder.image_files)
        even = ids[::2]
        valid = even[4::5]
        return {"train": [id_ for id_ in even if id_ not in valid], "valid": valid, "test": ids[1::2]}
    lists = {"train": folder.split.train, "valid": folder.split.valid, "test": folder.split.test}
    return {split: _spread(ids) for split, ids in lists.items()}  # type: ignore[misc]


def _spread(ids: Sequence[str]) -> Sequence[str]:
    if len(ids) <= PER_FOLDER:
        return ids
    return [ids[place] for place in np.linspace(0, len(ids) - 1, PER_FOLDER).astype(int)]


def _at_most(image: Frame, side: int) -> Frame:
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    return np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)


def _sonograms(data: Path) -> Iterator[tuple[str, Frame]]:
    """Every tenth frame of the clips and DICOM files, none of which is of the scanners in the training images."""
    for path in sorted([*(data / "video").glob("*us_*.*"), *(data / "dicom").glob("*.dcm")]):
        (source,), _ = open_sources([str(path)])
        with source:
            for frame in islice(source, 0, None, 10):
                yield "dicom" if path.suffix == ".dcm" else path.stem, frame.image


def _scikit_photographs() -> Iterator[Frame]:
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    for name in PHOTOGRAPHS:
        (file,) = folder.glob(f"{name}.*")
        yield np.asarray(cv2.imread(str(file), cv2.IMREAD_COLOR), np.uint8)


def fit(table: Table, penalty: float) -> Classifier:
    """Multinomial logistic regression."""
    weight = table.weights()
    mean = weight @ table.x
    scale = np.sqrt(weight @ (table.x - mean) ** 2) + 1e-3
    z = np.clip((table.x - mean) / scale, -CLIP, CLIP)
    count = len(CLASSES)
    target = np.eye(count)[table.y]

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w, b = flat[:-count].reshape(z.shape[1], -1), flat[-count:]
        scores = z @ w + b
        scores -= scores.max(axis=1, keepdims=True)
        p = np.exp(scores)
        p /= p.sum(axis=1, keepdims=True)
        value = -(weight * np.log((p * target).sum(axis=1) + 1e-12)).sum() + penalty * (w**2).sum()
        slope = (p - target) * weight[:, None]
        return float(value), np.concatenate([(z.T @ slope + 2 * penalty * w).ravel(), slope.sum(axis=0)])

    start = np.zeros((z.shape[1] + 1) * count)
    flat = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    w, b = flat[:-count].reshape(z.shape[1], -1), flat[-count:]
    return Classifier(CLASSES, mean, scale, w, b, np.zeros_like(w), np.zeros_like(b), -np.inf)


def with_own_scores(classifier: Classifier, train: Table, valid: Table, penalty: float) -> Classifier:
    """With a logistic regression of each class against all others, both weighing as much.

    ``least`` is what so many of the validation images that it is sure of and right keep.
    """
    z, everything = classifier.standardised(train.x), train.weights()
    count = len(CLASSES)
    target = np.eye(count)[train.y]
    weight = np.zeros_like(target)
    for label in np.unique(train.y):
        for part in (train.y == label, train.y != label):
            weight[part, label] = everything[part] / (2 * everything[part].sum())

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w, b = flat[:-count].reshape(z.shape[1], -1), flat[-count:]
        scores = z @ w + b
        value = (weight * (np.logaddexp(0, scores) - target * scores)).sum() + penalty * (w**2).sum()
        slope = weight * (1 / (1 + np.exp(-scores)) - target)
        return float(value), np.concatenate([(z.T @ slope + 2 * penalty * w).ravel(), slope.sum(axis=0)])

    start = np.zeros((z.shape[1] + 1) * count)
    flat = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    w, b = flat[:-count].reshape(z.shape[1], -1), flat[-count:]
    p = classifier.probabilities(valid.x)
    sure = (p.max(axis=1) >= SURE) & (p.argmax(axis=1) == valid.y)
    own = (classifier.standardised(valid.x[sure]) @ w + b)[np.arange(sure.sum()), valid.y[sure]]
    return replace(classifier, own_weights=w, own_bias=b, least=float(np.quantile(own, 1 - KEPT)))


def tempered(classifier: Classifier, temperature: float) -> Classifier:
    """With scores divided by the temperature."""
    return replace(classifier, weights=classifier.weights / temperature, bias=classifier.bias / temperature)


def log_loss(classifier: Classifier, table: Table) -> tuple[float, float]:
    """The mean negative logarithm of the true class's probability, and its standard error."""
    true = classifier.probabilities(table.x)[np.arange(len(table.y)), table.y]
    losses, weights = -np.log(true + 1e-12), table.weights()
    mean = float(weights @ losses)
    return mean, float(np.sqrt((weights**2) @ (losses - mean) ** 2))


def errors(classifier: Classifier, table: Table) -> dict[str, dict[str, dict[str, int]]]:
    """How often it is sure and right, unsure, sure and wrong, by class and set."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for label, name in enumerate(CLASSES):
        for dataset in sorted(set(table.sets[table.y == label])):
            x = table.x[(table.y == label) & (table.sets == dataset)]
            p, familiar = classifier.probabilities(x), classifier.familiar(x)
            best = p.argmax(axis=1)
            sure, right = (p.max(axis=1) >= SURE) & familiar[np.arange(len(x)), best], best == label
            counts = {"sure_and_right": sure & right, "unsure": ~sure, "sure_and_wrong": sure & ~right}
            counted = {what: int(which.sum()) for what, which in counts.items()}
            found.setdefault(name, {})[str(dataset)] = {"images": len(p), **counted}
    return found


def choose(train: Table, valid: Table) -> tuple[float, float]:
    """The penalty and the temperature.

    The penalty is the strongest whose loss on validation images is within a standard error of the least: it says less
    of what nothing like it was seen. The temperature is at least 1, so that nothing is surer than the fit.
    """
    tried = {}
    for penalty in PENALTIES:
        classifier = fit(train, penalty)
        temperature = min(TEMPERATURES, key=lambda value: log_loss(tempered(classifier, value), valid)[0])
        tried[penalty] = (temperature, *log_loss(tempered(classifier, temperature), valid))
        print(f"penalty {penalty}: temperature, loss and its standard error {tried[penalty]}", flush=True)
    _, least, error = min(tried.values(), key=lambda value: value[1])
    penalty = max(value for value, (_, loss, _) in tried.items() if loss <= least + error)
    return penalty, tried[penalty][0]


def measure(table: Table) -> tuple[Classifier, dict[str, Any]]:
    """Fit, and count the errors on what nothing was fitted or chosen on."""
    train, valid = (table.only(table.splits == split) for split in ("train", "valid"))
    penalty, temperature = choose(train, valid)

    def whole(fitted_on: Table, set_by: Table) -> Classifier:
        classifier = tempered(fit(fitted_on, penalty), temperature)
        return with_own_scores(classifier, fitted_on, set_by.only(~set_by.copies), OWN_PENALTY)

    classifier = whole(train, valid)
    unseen = {name: whole(train.only(train.sets != name), valid.only(valid.sets != name)) for name in LEFT_OUT}
    absent = {
        name: whole(train.only(train.y != label), valid.only(valid.y != label)) for label, name in enumerate(CLASSES)
    }
    originals = table.only(~table.copies)
    return classifier, {
        "penalty": penalty,
        "temperature": round(temperature, 3),
        "train_images": int((~train.copies).sum()),
        "train_copies": int(train.copies.sum()),
        "features": table.x.shape[1],
        "sure_from": SURE,
        "own_penalty": OWN_PENALTY,
        "own_least": round(classifier.least, 3),
        "test": errors(classifier, originals.only(originals.splits == "test")),
        "elsewhere": errors(classifier, originals.only(originals.splits == "elsewhere")),
        "set_left_out": _merged(
            errors(one, originals.only((originals.sets == name) & (originals.splits == "test")))
            for name, one in unseen.items()
        ),
        "class_left_out": {name: _taken_for(one, originals, name) for name, one in absent.items()},
    }


def _taken_for(classifier: Classifier, originals: Table, name: str) -> dict[str, int]:
    """What pictures of a class that was not fitted are surely taken for."""
    of = (originals.y == CLASSES.index(name)) & np.isin(originals.splits, ("test", "elsewhere"))
    x = originals.x[of]
    p, familiar = classifier.probabilities(x), classifier.familiar(x)
    best = p.argmax(axis=1)
    sure = (p.max(axis=1) >= SURE) & familiar[np.arange(len(x)), best]
    none = sure & (best == CLASSES.index(OTHER))
    return {
        "images": len(x),
        "unsure": int((~sure).sum()),
        "none": int(none.sum()),
        "a_modality": int((sure & ~none).sum()),
    }


def _merged(tables: Iterable[dict[str, dict[str, dict[str, int]]]]) -> dict[str, dict[str, dict[str, int]]]:
    merged: dict[str, dict[str, dict[str, int]]] = {}
    for table in tables:
        for name, sets in table.items():
            merged.setdefault(name, {}).update(sets)
    return merged


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the result, without its ending")
    arguments = parser.parse_args()
    environment = collect_environment()
    classifier, measured = measure(read(arguments.data))
    fitted = {"classes": CLASSES, "least": round(classifier.least, 5)}
    fitted |= {key: np.round(getattr(classifier, key), 5).tolist() for key in ARRAYS}
    atomic_write(PACKAGE, json.dumps(fitted) + "\n")
    result = {"schema": 2, "kind": "recognition", "environment": environment, **measured}
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=2, default=str) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
