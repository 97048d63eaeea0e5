"""From a recipe's data section to the images that a stage trains and validates on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.modalities import PAPER_MODALITIES, register
from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.training.data.augmentation import default_augmentation, strong_augmentation
from espmedsam_edge.training.data.dataset import (
    FolderSource,
    NegativeSource,
    PhantomSource,
    TrainingSet,
    TrainingSource,
)
from espmedsam_edge.training.recipe import Recipe

NATURAL = "natural"
"""What the photographs of the first distillation go by, beside the modalities."""

_FIRST_VALID_PHANTOM = 8_000  # and below 9,000, where the demo's own begin


@dataclass(frozen=True)
class Collection:
    """The images of a stage.

    Attributes:
        train: to learn from.
        valid: to choose the best weights by; None where no folder has any.
        hashes: modality -> SHA-256 of the training images' names and sizes in bytes, for the checkpoint's provenance.
        remarks: what the user should know, a line each.
    """

    train: TrainingSet
    valid: TrainingSet | None
    hashes: dict[str, str]
    remarks: list[str] = field(default_factory=list)


def modalities_of(recipe: Recipe) -> list[str]:
    """The modalities that a recipe has images for.

    Raises:
        UserError: none, or ``data.only`` names one that has none.
    """
    names = list(recipe.data.folders) or (list(PAPER_MODALITIES) if recipe.data.phantoms else [])
    if not names:
        raise UserError("the recipe names no images.", "Fill in [data.folders], or try --set data.phantoms=8.")
    for name in recipe.data.only:
        if name not in names:
            raise UserError(f"data.only: the recipe has no images of '{name}'.", nearest(name, names))
    return [name for name in names if name in recipe.data.only] if recipe.data.only else names


def labelled_images(
    recipe: Recipe, config: ModelConfig, normalization: Normalization | None = None, *, masks: bool = True
) -> Collection:
    """The medical images of every modality of the recipe.

    Args:
        recipe: whose data section counts.
        config: the network's, for the sizes of its input.
        normalization: the network's.
        masks: whether there must be some; a distillation can do without.

    Raises:
        UserError: no images, or a folder or list that is missing or empty.
    """
    folders = recipe.data_folders()
    train: dict[str, list[TrainingSource]] = {}
    valid: dict[str, list[TrainingSource]] = {}
    remarks = []
    for name in modalities_of(recipe):
        if name in recipe.data.targets:
            register(name, recipe.data.targets[name])
        if recipe.data.phantoms:
            train[name], valid[name] = _phantoms(name, recipe.data.phantoms, config.size_of(name))
            continue
        opened = [DatasetFolder.open(path) for path in folders[name]]
        if not opened:
            raise UserError(f"data.folders.{name} is an empty list.", "Name a folder, or leave the modality out.")
        bare = [folder for folder in opened if not folder.mask_files]
        if bare and masks:
            raise UserError(f"{bare[0].path} has no masks/, so {name} cannot be learned from it.", "Take it out.")
        train[name] = [FolderSource(folder, "train", recipe.data.limit) for folder in opened]
        for path in recipe.data.negatives.get(name, ()):
            train[name].append(NegativeSource(*_unlisted(DatasetFolder.open(recipe.data.root / path), recipe)))
        lists = [FolderSource(folder, "valid") for folder in opened if folder.split and folder.split.valid]
        if lists:
            valid[name] = list(lists)
        else:
            remarks.append(f"{name}: no validation images; it does not count when the best weights are chosen.")
    return _collect(recipe, config, normalization, train, valid, remarks)


def natural_images(recipe: Recipe, config: ModelConfig, normalization: Normalization | None = None) -> Collection:
    """The photographs of the first distillation, as one set without masks.

    Raises:
        UserError: none named, or a folder that is missing or empty.
    """
    train: dict[str, list[TrainingSource]] = {NATURAL: []}
    if recipe.data.phantoms:
        train[NATURAL], _ = _phantoms(NATURAL, recipe.data.phantoms, config.image_size)
    for path in recipe.data.natural if not recipe.data.phantoms else ():
        train[NATURAL].append(FolderSource(*_unlisted(DatasetFolder.open(recipe.data.root / path), recipe)))
    if not train[NATURAL]:
        raise UserError("the recipe names no photographs to distil on.", "Fill in data.natural (docs/data.md).")
    return _collect(recipe, config, normalization, train, {}, [])


def _unlisted(folder: DatasetFolder, recipe: Recipe) -> tuple[DatasetFolder, str, int]:
    """What a source of pictures without masks takes: they need no split, or one without lists."""
    listed = folder.split is not None and folder.split.train
    return folder, "train" if listed else "all", recipe.data.limit


def _phantoms(name: str, count: int, size: int) -> tuple[list[TrainingSource], list[TrainingSource]]:
    held_out = PhantomSource(name, max(1, count // 4), _FIRST_VALID_PHANTOM, size)
    return [PhantomSource(name, count, 0, size)], [held_out]


def _collect(
    recipe: Recipe,
    config: ModelConfig,
    normalization: Normalization | None,
    train: dict[str, list[TrainingSource]],
    valid: dict[str, list[TrainingSource]],
    remarks: list[str],
) -> Collection:
    augmentations = {}
    if recipe.data.augment != "none":
        own = strong_augmentation if recipe.data.augment == "strong" else default_augmentation
        augmentations = {name: recipe.data.augmentations.get(name, own(name)) for name in train}
    cache = int(recipe.data.cache_gb * 2**30)
    return Collection(
        TrainingSet(
            train,
            config.image_size,
            normalization,
            augmentations=augmentations,
            cache_bytes=cache * 4 // 5,
            image_sizes=config.image_sizes,
            windows=recipe.data.windows,
        ),
        TrainingSet(valid, config.image_size, normalization, cache_bytes=cache // 5, image_sizes=config.image_sizes)
        if valid
        else None,
        {name: _hash(sources) for name, sources in train.items()},
        remarks,
    )


def _hash(sources: Sequence[TrainingSource]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        for index in range(len(source)):
            name = source.name(index)
            file = Path(name)
            size = file.stat().st_size if isinstance(source, FolderSource) and file.is_file() else 0
            digest.update(f"{file.name}\t{size}\n".encode())
    return digest.hexdigest()
