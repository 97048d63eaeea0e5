"""Dataset folders through a model: scores for every image, the worst cases, and what could not be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.evaluation.candidates import Candidate
from espmedsam_edge.imaging.dataset import DatasetFolder, Sample, stated_modality
from espmedsam_edge.imaging.geometry import Tensor, mask_from_logits
from espmedsam_edge.imaging.masks import resize_mask
from espmedsam_edge.imaging.recognition import likeliest, recognisable, recognise
from espmedsam_edge.metrics import Scores, scores
from espmedsam_edge.modalities import choose

log = logging.getLogger(__name__)

PAPER_SIZE = 1024
"""Pixels: the paper resizes every image and mask to 1024x1024 before it measures."""


@dataclass(frozen=True)
class Task:
    """The images of one dataset folder to evaluate as one modality.

    Attributes:
        refused: why images that were to be recognised are not among ``ids``, a line each.
    """

    folder: DatasetFolder
    modality: str
    ids: list[str]
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageResult:
    """One image's scores at the common size and, when asked for, at its own."""

    modality: str
    dataset: str
    id: str
    scores: Scores
    native: Scores | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Case:
    """An image, its truth and its prediction at the common size, for a picture."""

    result: ImageResult
    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]


@dataclass(frozen=True)
class Failure:
    """An image that could not be evaluated, and why."""

    modality: str
    dataset: str
    message: str


@dataclass
class Evaluation:
    """Everything one run found out."""

    candidate: str
    method: str
    untrained: bool
    split: str
    size: int
    results: list[ImageResult] = field(default_factory=list)
    worst: dict[tuple[str, str], list[Case]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def groups(self) -> dict[tuple[str, str], list[ImageResult]]:
        """The results by (modality, dataset), in the order they were evaluated."""
        groups: dict[tuple[str, str], list[ImageResult]] = {}
        for result in self.results:
            groups.setdefault((result.modality, result.dataset), []).append(result)
        return groups


def plan_tasks(
    candidate: Candidate, paths: Sequence[Path], modality: str | None = None, split: str = "test", limit: int = 0
) -> list[Task]:
    """What to evaluate, checked before anything runs.

    Args:
        candidate: the model.
        paths: dataset folders.
        modality: of all of them; None: the model's only one, or as ``stated_modality`` finds it, else what each image
            is recognised as: then a folder has a task for each modality in it.
        split: "train", "valid", "test" or "all".
        limit: at most so many images a folder; 0: all.

    Raises:
        UserError: a folder or split that is missing or empty, a modality the model lacks, two folders of one name.
    """
    tasks: list[Task] = []
    for path in paths:
        folder = DatasetFolder.open(path)
        if not folder.mask_files:
            raise UserError(f"{path} has no masks to compare with.", "Name a folder with images/ and masks/.")
        where = f"model {candidate.name}"
        ids = folder.ids(split)
        ids = ids[:limit] if limit else ids
        if modality is not None or len(candidate.modalities) == 1:
            found = [Task(folder, choose(modality, candidate.modalities, where), ids)]
        elif (name := stated_modality(folder, candidate.modalities, where)) is not None:
            found = [Task(folder, name, ids)]
        else:
            found = _recognised(folder, ids, candidate.modalities, where)
        for task in found:
            candidate.check(task.modality)
            if any(other.modality == task.modality and other.folder.name == folder.name for other in tasks):
                raise UserError(
                    f"two {task.modality} folders are called '{folder.name}'.", "Evaluate them one at a time."
                )
            tasks.append(task)
    return tasks


def _recognised(folder: DatasetFolder, ids: Sequence[str], modalities: Sequence[str], where: str) -> list[Task]:
    """A folder's images by what each looks like; those that cannot be read are left to the first task to report."""
    say = f"{where} has {', '.join(modalities)}. Say it: --modality NAME."
    if len(recognisable(modalities)) < len(modalities):
        raise UserError(f"cannot tell the modality of {folder.path}; {say}")
    by_modality: dict[str, list[str]] = {}
    unread: list[str] = []
    refused: list[str] = []
    for id_ in ids:
        try:
            image = folder.load_image(id_)
        except UserError:
            unread.append(id_)
            continue
        guess = recognise(image, modalities)
        if guess is not None and guess.sure:
            by_modality.setdefault(guess.modality, []).append(id_)
        else:
            what = f"looks like none of the modalities with certainty{likeliest(image, modalities)}"
            refused.append(f"{folder.image_files[id_]} {what}. Say it: --modality NAME.")
    if not by_modality:
        raise UserError(f"cannot tell the modality of {folder.path} by its images; {say}")
    first = next(iter(by_modality))
    told = ", ".join(f"{len(found)} {name}" for name, found in by_modality.items())
    log.info("%s looks like this: %s. Another: --modality NAME", folder.path, told)
    return [
        Task(folder, name, found + unread if name == first else found, tuple(refused) if name == first else ())
        for name, found in by_modality.items()
    ]


def evaluate(
    candidate: Candidate,
    tasks: Sequence[Task],
    *,
    split: str = "test",
    size: int = PAPER_SIZE,
    native: bool = False,
    worst: int = 0,
    progress: Callable[[Task], None] | None = None,
) -> Evaluation:
    """Segment and score every image of the tasks.

    Prediction and truth are brought to ``size`` x ``size``: the logits by linear interpolation before the threshold,
    the mask by ``resize_mask``.

    Args:
        candidate: the model.
        tasks: from ``plan_tasks``.
        split: for the report.
        size: side of the square in pixels at which the scores are taken.
        native: also score at each image's own size.
        worst: keep so many cases a dataset with the lowest Dice.
        progress: called after every image.

    Returns:
        The evaluation; images that could not be read are in its ``failures``.
    """
    evaluation = Evaluation(candidate.name, candidate.method, candidate.untrained, split, size)
    for task in tasks:
        evaluation.failures += [Failure(task.modality, task.folder.name, line) for line in task.refused]
        with candidate.predictor(task.modality) as predict:
            for id_ in task.ids:
                try:
                    sample = task.folder.load(id_)
                except UserError as error:
                    evaluation.failures.append(Failure(task.modality, task.folder.name, str(error)))
                else:
                    logits = predict(sample.image)
                    case = _score(task, sample, logits, candidate.threshold, size, native)
                    evaluation.results.append(case.result)
                    _keep_worst(evaluation, case, worst)
                if progress is not None:
                    progress(task)
    return evaluation


def _score(task: Task, sample: Sample, logits: Tensor, threshold: float, size: int, native: bool) -> Case:
    prediction = mask_from_logits(logits, (size, size), threshold)
    truth = resize_mask(sample.mask, (size, size))
    own = None
    if native:
        own = scores(mask_from_logits(logits, sample.mask.shape, threshold), sample.mask)
    result = ImageResult(task.modality, task.folder.name, sample.id, scores(prediction, truth), own, sample.note)
    return Case(result, sample.image, truth, prediction)


def _keep_worst(evaluation: Evaluation, case: Case, count: int) -> None:
    if count < 1:
        return
    kept = evaluation.worst.setdefault((case.result.modality, case.result.dataset), [])
    kept.append(case)
    kept.sort(key=lambda case: case.result.scores.dice)
    del kept[count:]
