"""Calibrate and measure the confidence that a picture is of a network's kind (``imaging/recognition.py``).

    python tools/confidence.py --data DATA --name confidence-MACHINE [--plot docs/images/confidence.png]

Uses the classifier that ``recognition.py`` fitted, whose training pictures are not looked at here. Of each modality the
bound is the lowest score among its validation images and phantoms, or that of one in a hundred of them and their
changed copies, if that is lower; the slope is a logistic regression's on validation images against those of the other
modalities and photographs. Counted on what neither was fitted nor chosen on: test images, every other photograph of
BSDS500, and scikit-image's. Takes some minutes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recognition import PACKAGE, RESULTS, Table, read
from scipy.optimize import minimize_scalar

from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.recognition import DOUBTFUL, OTHER, Classifier, fitted
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.modalities import PAPER_MODALITIES

LOWEST_SHARE = 0.01
UNSEEN = ("test", "elsewhere")


def calibrate(classifier: Classifier, table: Table) -> dict[str, tuple[float, float]]:
    """Slope and bound of each modality, from validation pictures."""
    valid = table.only(table.splits == "valid")
    odds = classifier.log_odds(valid.x)
    kinds = {}
    for name in PAPER_MODALITIES:
        place = classifier.classes.index(name)
        own = valid.y == place
        scores = odds[:, place]
        bound = float(min(scores[own & ~valid.copies].min(), np.quantile(scores[own], LOWEST_SHARE)))
        weight = np.where(own, 1 / own.sum(), 1 / (~own).sum())

        def loss(slope: float, z: NDArray[np.float64] = scores - bound, own: Any = own, weight: Any = weight) -> float:
            return float((weight * (np.logaddexp(0, slope * z) - own * slope * z)).sum())

        kinds[name] = (round(float(minimize_scalar(loss, bounds=(0.1, 5), method="bounded").x), 4), round(bound, 4))
    return kinds


def confidence(classifier: Classifier, table: Table, name: str) -> NDArray[np.float64]:
    """Of each picture, (N,), that it is of a modality's kind."""
    slope, bound = classifier.kinds[name]
    odds = classifier.log_odds(table.x)[:, classifier.classes.index(name)]
    return np.asarray(1 / (1 + np.exp(-slope * (odds - bound))))


def curve(own: NDArray[np.float64], others: NDArray[np.float64]) -> dict[str, Any]:
    """The ROC, from "none is refused" on: the share of others that is refused against that of the own; its area."""
    thresholds = np.unique(np.concatenate([own, others, [0.0, 1.1]]))
    refused = np.array([[(own < at).mean(), (others < at).mean()] for at in thresholds])
    area = float((own[:, None] > others[None]).mean() + (own[:, None] == others[None]).mean() / 2)
    corners = [place for place in range(len(refused)) if place in (0, len(refused) - 1) or _corner(refused, place)]
    return {"area": round(area, 5), "points": np.round(refused[corners], 4).tolist()}


def _corner(points: NDArray[np.float64], place: int) -> bool:
    before, here, after = points[place - 1 : place + 2]
    return bool((here != before).any() and (here != after).any() and not (before[0] == here[0] == after[0]))


def measure(classifier: Classifier, table: Table) -> dict[str, Any]:
    """What is refused at ``DOUBTFUL``, by modality, and the ROC, on pictures that were not fitted or chosen on."""
    unseen = table.only(~table.copies & np.isin(table.splits, UNSEEN))
    photographs = unseen.y == classifier.classes.index(OTHER)
    found: dict[str, Any] = {}
    for name in PAPER_MODALITIES:
        values, kind = confidence(classifier, unseen, name), unseen.y == classifier.classes.index(name)
        own = kind & (unseen.splits == "test")
        groups = {
            "own_test_images": own,
            "own_of_other_scanners": kind & (unseen.splits == "elsewhere"),
            "photographs": photographs,
            "photographs_of_scikit_image": photographs & (unseen.sets == "scikit-image"),
            "other_modalities": ~photographs & ~kind,
        }
        counts = {
            what: {"images": int(which.sum()), "refused": int((values[which] < DOUBTFUL).sum())}
            for what, which in groups.items()
            if which.any()
        }
        others = values[photographs | ~kind]
        found[name] = {**counts, "roc": curve(values[own], others)}
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """The ROC of each modality, the corner that matters enlarged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, values in found.items():
        own, others = np.array(values["roc"]["points"]).T
        axes.step(100 * own, 100 * others, where="post", label=f"{name} ({values['roc']['area']:.4f})")
    axes.axvline(2, color="grey", linestyle=":", linewidth=1)
    axes.axhline(90, color="grey", linestyle=":", linewidth=1)
    axes.set(xlim=(-0.3, 20), ylim=(60, 100.5))
    axes.set_xlabel("refused of the modality's own test images, %")
    axes.set_ylabel("refused of all other pictures, %")
    axes.legend(title="area under the curve", fontsize=8, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Calibrate, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the result, without its ending")
    parser.add_argument("--plot", type=Path, help="a PNG of the curves")
    arguments = parser.parse_args()
    environment = collect_environment()
    table = read(arguments.data)
    classifier = replace(fitted(), kinds=calibrate(fitted(), table))
    found = measure(classifier, table)
    atomic_write(PACKAGE, json.dumps(json.loads(PACKAGE.read_text()) | {"kinds": classifier.kinds}) + "\n")
    result = {"schema": 1, "kind": "confidence", "environment": environment, "refused_below": DOUBTFUL}
    result |= {"calibration": classifier.kinds, "modalities": found}
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1, default=str) + "\n")
    if arguments.plot is not None:
        draw(found, arguments.plot)
    print(json.dumps({name: {k: v for k, v in one.items() if k != "roc"} for name, one in found.items()}, indent=1))


if __name__ == "__main__":
    main()
