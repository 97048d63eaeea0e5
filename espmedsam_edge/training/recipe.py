"""Recipes: everything that fixes a training run, typed, read from TOML; defaults are the paper's (Section IV-A.2)."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from espmedsam_edge.bundle import Name
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.model.config import ImageSize
from espmedsam_edge.training.data.augmentation import Augmentation

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Stage = Literal["teacher", "distill-encoder", "distill-controllers", "segment", "add-modality"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SCRATCH = "scratch"

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=64, le=8192, multiple_of=32)]
Part = Literal["vit", "additions", "encoder", "controller", "prompt", "decoder"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The student. None: as the preset has it.

    Attributes:
        preset: a name of ``model_config``.
        variant: "paper", or "published" for the authors' code where it differs.
        image_size: side of the square input in pixels.
        image_sizes: modality -> side, for those that want another (thin structures a larger one).
        drop_path: stochastic depth of the encoder.
        patch_layers: L of the SPPG.
        bag_tokens, bag_mlp_ratio: T and the MLP's hidden width over the channels in a controller bag.
    """

    preset: str = "espmedsam-s"
    variant: Literal["paper", "published"] = "paper"
    image_size: ImageSize | None = None
    image_sizes: dict[Name, ImageSize] = {}
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patch_layers: Annotated[int, Field(ge=0, le=2)] | None = None
    bag_tokens: Count | None = None
    bag_mlp_ratio: Annotated[float, Field(gt=0)] | None = None


class TeacherSection(_Section):
    """ESP-MedSAM-T.

    Attributes:
        preset: a name of ``teacher_config``.
        sam: SAM's checkpoint file of that size (None: random weights, or stored in ``checkpoint``).
        checkpoint: a trained teacher, for the distillations.
        tokens, mlp_ratio: size of the additions in every block.
    """

    preset: str = "vit_b"
    sam: Path | None = None
    checkpoint: Path | None = None
    tokens: Count = 1
    mlp_ratio: Annotated[float, Field(gt=0)] = 0.25


class DataSection(_Section):
    """Where the images are and how they are served.

    Attributes:
        root: what relative folders below start from (a relative root: from the working directory).
        folders: modality -> dataset folders with images/, masks/, split.json.
        natural: dataset folders of photographs for the first distillation; no masks needed.
        targets: modality -> what its mask shows, for modalities that are not the paper's.
        phantoms: so many synthetic images a modality in place of its folders, and a quarter as many for validation;
            without ``folders`` for the paper's six modalities. 0: off.
        limit: at most so many training images a modality, the first by id; 0: all.
        windows: modality -> side in pixels: training sees random windows of that side, cut from the stretched image,
            in place of the whole; for large inputs of fine, repeating structure. Validation sees the whole.
        balance: how far small data sets are repeated: probability of a modality ~ images^balance. 1: as they come,
            0: every modality alike.
        augment: "standard" (each modality's own settings), or "none".
        augmentations: settings for a modality in place of its own.
        workers: threads that read and augment; 0: none, each batch is made when it is needed.
        cache_gb: memory for images as read and stretched; 0: read them anew each time.
    """

    root: Path = Path()
    folders: dict[Name, list[Path]] = {}
    natural: list[Path] = []
    targets: dict[Name, str] = {}
    phantoms: Annotated[int, Field(ge=0, le=4000)] = 0
    limit: Annotated[int, Field(ge=0)] = 0
    windows: dict[Name, Side] = {}
    balance: Fraction = 0.5
    augment: Literal["standard", "none"] = "standard"
    augmentations: dict[Name, Augmentation] = {}
    workers: Annotated[int, Field(ge=0)] = 2
    cache_gb: Annotated[float, Field(ge=0)] = 4.0


class OptimizerSection(_Section):
    """Adam or AdamW; ``gradient_clip`` is the largest norm of all gradients together, 0: no limit."""

    name: Literal["adam", "adamw"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0


class ScheduleSection(_Section):
    """Learning rate over the run: from ``lr`` down to ``final_factor`` · lr, after a linear warm-up."""

    name: Literal["exponential", "cosine", "constant"] = "exponential"
    final_factor: Annotated[float, Field(gt=0, le=1)] = 0.01
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0


class LossSection(_Section):
    """Eq. 8 and eq. 5: ``weight`` is lambda, ``patch_weight`` the SPPG's."""

    pixel: Literal["focal", "bce"] = "focal"
    weight: Annotated[float, Field(ge=0)] = 20.0
    patch_weight: Annotated[float, Field(ge=0)] = 1.0


class AblationSection(_Section):
    """Table VI's columns; each may be switched off.

    Attributes:
        mmdkd: distillation; off, ``train all`` trains the student on masks alone.
        sppg: off, no dense prompt carries information: the patch prompt is empty for every image.
        qdmd: off, all modalities share one query and one hypernetwork MLP.
    """

    mmdkd: bool = True
    sppg: bool = True
    qdmd: bool = True


class RunSection(_Section):
    """Length, arithmetic and bookkeeping.

    Attributes:
        epochs, batch_size: batch_size is a process's; every batch is of one modality.
        steps_per_epoch: optimiser steps an epoch; 0: as many as it takes to see as many images as there are.
        accumulate: batches an optimiser step.
        precision: fabric's names.
        ema: decay of the averaged weights that are validated and written; 0: off.
        batch_norm_fraction: after this share of the run, the encoder's batch normalisation stops updating and uses
            its running statistics, as at inference; 1: never.
        small_size, small_fraction: for this share of the run, batches are shrunk to that side in pixels first: more
            steps in the same time while the network learns what is coarse; 0: never. Not those of the modalities in
            ``small_except``, whose targets would vanish; of those in ``data.windows`` a part of that side is taken.
        activation_checkpointing: compute the encoder's activations again backwards instead of keeping them.
        seed: of weights, order and augmentation.
        validate_every: epochs between validations; the last epoch always has one.
        save_minutes: the training state is saved at every epoch's end and at least this often.
        sheet_images: images a modality on the contact sheet.
    """

    epochs: Count = 200
    batch_size: Count = 4
    steps_per_epoch: Annotated[int, Field(ge=0)] = 0
    accumulate: Count = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_norm_fraction: Fraction = 1.0
    small_size: Side = 128
    small_fraction: Fraction = 0.0
    small_except: list[Name] = []
    activation_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    validate_every: Count = 1
    save_minutes: Annotated[float, Field(gt=0)] = 10.0
    sheet_images: Annotated[int, Field(ge=0)] = 4


class NewModalitySection(_Section):
    """For add-modality: its name, and whose bag, query and MLP it starts from (None: new ones, or SAM's)."""

    name: Name | None = None
    like: Name | None = None


class Recipe(_Section):
    """A training run.

    Attributes:
        init: "scratch" or a checkpoint file: ours (whole or partial), ``mobile_sam.pt``, ``sam_vit_*.pth``.
        train: the parts that learn; None: what the stage names (``docs/training.md``).
        heads_from_teacher: the second distillation writes the teacher's SPPG and QDMD into its checkpoint, where the
            student's own start.
        stages: what ``train all`` runs, in order.
        stage: changes for one stage, e.g. ``[stage.teacher.run]``.
    """

    init: str = SCRATCH
    train: list[Part] | None = None
    heads_from_teacher: bool = True
    stages: list[Stage] = ["teacher", "distill-encoder", "distill-controllers", "segment"]
    model: ModelSection = ModelSection()
    teacher: TeacherSection = TeacherSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    loss: LossSection = LossSection()
    ablation: AblationSection = AblationSection()
    run: RunSection = RunSection()
    modality: NewModalitySection = NewModalitySection()
    stage: dict[Stage, dict[str, Any]] = {}

    def for_stage(self, stage: Stage) -> Recipe:
        """This recipe with the changes of ``[stage.<stage>]`` merged in, and no others left."""
        values = self.model_dump(exclude={"stage"}, exclude_unset=True)
        return Recipe.model_validate(_merge(values, self.stage.get(stage, {})))

    def identity(self) -> dict[str, Any]:
        """The keys and values that decide what a run computes; a run resumes only under the same ones."""
        values: dict[str, Any] = self.model_dump(mode="json")
        for section, key in _VOLATILE:
            values[section].pop(key)
        return values

    def sha256(self) -> str:
        """Hex SHA-256 of ``identity``."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def data_folders(self) -> dict[str, list[Path]]:
        """Modality -> dataset folders, resolved against ``data.root``."""
        return {name: [self.data.root / path for path in paths] for name, paths in self.data.folders.items()}


_COMMITTED = files(__package__) / "recipes"
_VOLATILE = (
    ("data", "workers"),
    ("data", "cache_gb"),
    ("run", "save_minutes"),
    ("run", "sheet_images"),
    ("run", "accelerator"),
)


def list_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(entry.name[:-5] for entry in _COMMITTED.iterdir() if _is_toml(entry.name))


def load_recipe(source: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``--set`` changes.

    Args:
        source: a TOML file, or the name of one that comes with the package ("segment-tiny").
        changes: each "section.key=value", the value as TOML writes it; bare words are strings.

    Raises:
        UserError: no such recipe, not TOML, an unknown key (names the nearest), a value of the wrong kind or range.
    """
    values = _read(source)
    for change in changes:
        _apply(values, change)
    where = str(source)
    try:
        recipe = Recipe.model_validate(values)
        for stage in recipe.stage:
            where = f"{source} [stage.{stage}]"
            recipe.for_stage(stage)
    except ValidationError as error:
        raise _explain(error, where) from error
    return recipe


def with_new_modality(
    recipe: Recipe, name: str, folders: Sequence[Path], init: Path, *, target: str | None, like: str | None
) -> Recipe:
    """An add-modality recipe for one modality's folders (as given, not below ``data.root``) and a checkpoint."""
    data = {
        "root": Path(),
        "folders": {name: list(folders)},
        "targets": {**recipe.data.targets, **({name: target} if target else {})},
    }
    return recipe.model_copy(
        update={
            "init": str(init),
            "data": recipe.data.model_copy(update=data),
            "modality": NewModalitySection(name=name, like=like),
        }
    )


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    try:
        if path.is_file():
            return tomllib.loads(path.read_text(encoding="utf-8"))
        if path.suffix != ".toml" and str(source) in list_recipes():
            return tomllib.loads((_COMMITTED / f"{source}.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}.", "See docs/training.md for the form of a recipe.") from error
    raise UserError(f"no recipe at {path}.", nearest(str(source), list_recipes()))


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise UserError(f"'--set {change}' has no value.", "Write it as --set run.epochs=50")
    if not _is_known(key):
        raise UserError(f"a recipe has no key '{key}'.", _nearest_key(key))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"'{section}' in '--set {change}' is a value, not a section.")
    table[last] = value


def _is_known(key: str) -> bool:
    """Whether a dotted key exists: sections and their fields, free names below dictionaries."""
    model: type[BaseModel] = Recipe
    parts = key.split(".")
    for index, part in enumerate(parts):
        if part not in model.model_fields:
            return False
        annotation = model.model_fields[part].annotation
        rest = parts[index + 1 :]
        if model is Recipe and part == "stage":
            return len(rest) > 1 and rest[0] in STAGES and rest[1] != "stage" and _is_known(".".join(rest[1:]))
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
            continue
        return not rest or (len(rest) == 1 and getattr(annotation, "__origin__", None) is dict)
    return False  # a section, not a value


def _keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _nearest_key(key: str) -> str:
    keys = list(_keys())
    same_end = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    if same_end:
        return f"Did you mean '{same_end[0]}'?"
    hint = nearest(key, keys).split(" Known:")[0]
    return hint if hint.startswith("Did") else "See docs/training.md for all keys."


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _explain(error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UserError(f"{where}: a recipe has no key '{key}'.", _nearest_key(key))
    if first["type"] == "value_error" or not key:
        return UserError(f"{where}: {first['msg']}.", "See docs/training.md for the form of a recipe.")
    return UserError(f"{where}: {key} = {first['input']!r}: {first['msg']}.", "See docs/training.md for its range.")


def _is_toml(name: str) -> bool:
    return name.endswith(".toml")
