"""Recipes: everything that fixes a training run, typed, read from TOML; defaults are the paper's (Section IV-A.2)."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.files import NotTomlError, read_regular, read_toml
from espmedsam_edge.modalities import check_name
from espmedsam_edge.training.sections import (
    AblationSection,
    DataSection,
    LossSection,
    ModelSection,
    NewModalitySection,
    OptimizerSection,
    Part,
    RunSection,
    ScheduleSection,
    TeacherSection,
)

Stage = Literal["teacher", "distill-encoder", "distill-controllers", "segment", "add-modality"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SCRATCH = "scratch"
_MAX_RECIPE_BYTES = 4 << 20
_KEYS_HINT = "See docs/training.md for all keys."


class Recipe(BaseModel, extra="forbid", frozen=True):
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
    ("run", "read_every"),
    ("run", "sheet_images"),
    ("run", "accelerator"),
)


def list_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(entry.name[:-5] for entry in _COMMITTED.iterdir() if entry.name.endswith(".toml"))


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
    """An add-modality recipe for one modality's folders (as given, not below ``data.root``) and a checkpoint.

    Raises:
        UserError: ``name`` or ``like`` can name no modality.
    """
    for given in (name, like):
        if given is not None:
            check_name(given)
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
    if path.suffix != ".toml" and str(source) in list_recipes() and not path.is_file():
        return read_toml((_COMMITTED / f"{source}.toml").read_text(encoding="utf-8"))
    try:
        return read_toml(read_regular(path, _MAX_RECIPE_BYTES))
    except ValueError as error:  # of UTF-8, too
        raise UserError(f"{path} is not TOML: {error}.", "See docs/training.md for the form of a recipe.") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL):
            raise UserError(f"no recipe at {path}.", nearest(str(source), list_recipes())) from error
        raise UserError(f"cannot read {path}: {error.strerror}.", "Check the file and its permissions.") from error


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise UserError(f"'--set {change}' has no value.", "Write it as --set run.epochs=50")
    if not _is_known(key):
        raise UserError(f"a recipe has no key '{key}'.", _nearest_key(key))
    try:
        value = read_toml(f"value = {text}")["value"]
    except NotTomlError:
        value = text
    except ValueError as error:
        raise UserError(f"the value of '--set {key}' cannot be read: {error}.", _KEYS_HINT) from error
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
    keys = [known for known in _keys() if known != key]
    same_end = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    if same_end:
        return f"Did you mean '{same_end[0]}'?"
    hint = nearest(key, keys).split(" Known:")[0]
    return hint if hint.startswith("Did") else _KEYS_HINT


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
