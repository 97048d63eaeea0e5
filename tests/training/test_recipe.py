"""Recipes: the paper's defaults, overrides, and what a mistyped one is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.training.recipe import STAGES, Recipe, list_recipes, load_recipe, with_new_modality


@pytest.mark.parametrize("like", ["", "=1+1", "../fundus", "a\x1b[2J", "x" * 300])
def test_a_modality_to_start_from_that_can_be_none_is_one_line(like: str) -> None:
    with pytest.raises(UserError, match="cannot name a modality"):
        with_new_modality(load_recipe("add-modality"), "tissue", [], Path("i.safetensors"), target=None, like=like)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text('[run]\nepochs = 3\n[data.folders]\nfundus = ["a/b"]\n[stage.teacher.run]\nepochs = 7\n')
    return path


def test_defaults_are_the_papers() -> None:
    recipe = Recipe()
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.schedule.name) == ("adam", 1e-4, "exponential")
    assert (recipe.run.epochs, recipe.run.batch_size, recipe.loss.pixel, recipe.loss.weight) == (200, 4, "focal", 20)
    assert recipe.model.preset == "espmedsam-s"


@pytest.mark.parametrize("name", list_recipes())
def test_committed_recipes_are_valid_for_every_stage(name: str) -> None:
    recipe = load_recipe(name)
    for stage in STAGES:
        recipe.for_stage(stage)


def test_changes_are_read_as_toml_values_or_words(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            "optimizer.lr=3e-4",
            "optimizer.name=adamw",
            "init=weights/mobile_sam.pt",
            "data.folders.xray=['c', 'd']",
            "train=['prompt', 'decoder']",
            "stage.segment.run.epochs=9",
        ],
    )
    assert recipe.optimizer.lr == 3e-4
    assert recipe.optimizer.name == "adamw"
    assert recipe.init == "weights/mobile_sam.pt"
    assert recipe.data.folders == {"fundus": [Path("a/b")], "xray": [Path("c"), Path("d")]}
    assert recipe.train == ["prompt", "decoder"]
    assert recipe.for_stage("segment").run.epochs == 9


def test_a_stages_changes_apply_to_that_stage_alone(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.for_stage("teacher").run.epochs == 7
    assert recipe.for_stage("segment").run.epochs == 3
    assert recipe.for_stage("teacher").data == recipe.data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.epoch=3", r"no key 'run\.epoch'.*run\.epochs"),
        ("lr=3", r"no key 'lr'.*optimizer\.lr"),
        ("run=3", "no key 'run'"),
        ("zzz.qqq=1", "no key"),
        ("run.epochs", "has no value"),
        ("run.epochs=0", r"run\.epochs = 0: .*greater than or equal to 1"),
        ("run.epochs=many", r"run\.epochs = 'many'"),
        ("optimizer.name=adma", r"optimizer\.name = 'adma': .*'adam'"),
        ("model.image_size=100", r"model\.image_size = 100: .*multiple of 64"),
        ("data.folders.X-Ray=['a']", "X-Ray"),
        ("stage.teacher.run.epoch=1", "no key"),
        ("stage.techer.run.epochs=1", "no key"),
        ("run.epochs.x=1", "no key"),
        ("stage=1", "no key 'stage'.*Did you mean 'stages'"),
    ],
)
def test_wrong_changes_are_named(file: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(file, [change])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nepoch = 3", r"no key 'run\.epoch'.*Did you mean 'run\.epochs'"),
        ("[run\n", "is not TOML"),
        ("[stage.teacher.run]\nepochs = -1", r"\[stage\.teacher\]: run\.epochs = -1"),
        ("[stage.techer.run]\nepochs = 1", "techer"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "r.toml")


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no recipe at smok.*'smoke'"):
        load_recipe("smok")


def test_identity_ignores_what_changes_no_weight() -> None:
    base = load_recipe("smoke")
    assert base.sha256() == load_recipe("smoke", ["data.workers=7", "run.save_minutes=1"]).sha256()
    assert base.sha256() != load_recipe("smoke", ["run.seed=7"]).sha256()


@pytest.mark.parametrize(
    "change",
    [
        "run.epochs=1e29", "run.epochs=2000000", "run.steps_per_epoch=1e29", "data.workers=9999",
        "model.bag_mlp_ratio=1e308", "model.bag_tokens=100000", "teacher.mlp_ratio=17", "teacher.tokens=100000",
    ],
)  # fmt: skip
def test_numbers_that_no_run_has_are_refused_before_it_starts(change: str) -> None:
    words = "less than or equal to|exceeded maximum size"  # pydantic's own limit comes first for 1e29
    with pytest.raises(UserError, match=rf"{change.partition('=')[0]} = .*({words})"):
        load_recipe("segment-tiny", [change])


@pytest.mark.parametrize(
    "text",
    [
        "init = " + "[" * 100_000,
        "init = " + "[" * 5_000 + "]" * 5_000,
        "[run]\nepochs = " + "9" * 6_000,
        "[run]\nepochs = 0x" + "f" * 100_000,
        "init = '\xff'".encode("latin-1"),
        "a" + ".a" * 300_000 + " = 1",
    ],
    ids=["open lists", "lists in lists", "digits", "hexadecimal digits", "not UTF-8", "parts of a key"],
)
def test_a_file_that_tomls_reader_chokes_on_is_one_line(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="is not TOML: ") as refused:
        load_recipe(path)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 6_000, "0x" + "f" * 100_000])
def test_a_change_that_tomls_reader_chokes_on_is_one_line(value: str) -> None:
    with pytest.raises(UserError, match=r"value of '--set run\.epochs' cannot be read") as refused:
        load_recipe("smoke", [f"run.epochs={value}"])
    assert len(str(refused.value)) < 500


def test_what_is_no_file_to_read_is_no_recipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path, Path("/dev/zero"), "x" * 5_000, tmp_path / "nothing.toml"):
        with pytest.raises(UserError, match="no recipe at"):
            load_recipe(place)
    large = tmp_path / "large.toml"
    large.touch()
    os.truncate(large, 1 << 33)
    with pytest.raises(UserError, match=r"large\.toml"):
        load_recipe(large)


def test_an_editors_mark_before_a_recipe_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[run]\nepochs = 7\n", encoding="utf-8-sig")
    assert load_recipe(path, []).run.epochs == 7
