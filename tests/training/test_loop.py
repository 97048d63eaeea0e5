"""The loop when something goes wrong, and the pieces a state is made of."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.model import tensor_file
from espmedsam_edge.model.checkpoint import read_checkpoint
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.training import loop as loop_module
from espmedsam_edge.training.averaging import WeightAverage
from espmedsam_edge.training.log import RunLog
from espmedsam_edge.training.objectives import SegmentationObjective, Terms
from espmedsam_edge.training.optimizer import make_optimizer
from espmedsam_edge.training.recipe import Recipe
from espmedsam_edge.training.run_folder import STATE, WEIGHTS, prepare_folder
from espmedsam_edge.training.sections import OptimizerSection
from espmedsam_edge.training.stages import run_all, run_stage
from espmedsam_edge.training.state import read_state

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset folder of four training images and two for validation."""
    data = tmp_path / "data"
    for seed in range(6):
        image, mask = phantom("fundus", seed, (64, 64))
        write_image(data / "images" / f"eye {seed}.png", image)
        write_image(data / "masks" / f"eye {seed}.png", mask)
    train, valid = [f'"eye {i}"' for i in range(4)], ['"eye 4"', '"eye 5"']
    (data / "split.json").write_text(f'{{"train": [{", ".join(train)}], "valid": [{", ".join(valid)}], "test": []}}')
    return data


def on_folder(small_recipe: MakeRecipe, folder: Path, *changes: str) -> Recipe:
    return small_recipe("data.phantoms=0", f"data.folders={{fundus=['{folder}']}}", *changes)


def test_a_loss_that_is_not_finite_stops_with_the_files_named(
    folder: Path, tmp_path: Path, small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = SegmentationObjective.forward, []

    def broken(self: SegmentationObjective, images: Tensor, masks: Tensor | None, modality: str) -> Terms:
        terms = forward(self, images, masks, modality)
        calls.append(1)
        return {**terms, "loss": terms["loss"] * float("nan")} if len(calls) == 2 else terms

    monkeypatch.setattr(SegmentationObjective, "forward", broken)
    recipe = on_folder(small_recipe, folder, "run.save_minutes=1e-6")
    with pytest.raises(
        UserError, match=r"step 2: the loss is not finite \(loss nan.*eye \d\.png, .*eye \d\.png"
    ) as stop:
        run_stage("segment", recipe, tmp_path / "run")
    assert stop.value.exit_code == 1
    saved = read_state(tmp_path / "run" / STATE)
    assert saved.progress.step == 1
    assert all(value.isfinite().all() for value in saved.part("network").values())
    monkeypatch.setattr(SegmentationObjective, "forward", forward)
    _, progress = run_stage("segment", recipe, tmp_path / "run", resume=True)
    assert progress.finished


def test_a_folder_that_vanishes_loses_nothing_trained(folder: Path, tmp_path: Path, small_recipe: MakeRecipe) -> None:
    recipe = on_folder(small_recipe, folder, "run.epochs=3", "data.cache_gb=0")
    whole, _ = run_stage("segment", recipe, tmp_path / "whole")
    moved = tmp_path / "elsewhere"
    validate = loop_module.validate

    def vanishing(*arguments: object) -> dict[str, float]:
        scores = validate(*arguments)  # type: ignore[arg-type]
        if folder.exists() and not moved.exists():
            shutil.move(folder, moved)
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "validate", vanishing)
        with pytest.raises(UserError, match=r"eye \d\.png"):
            run_stage("segment", recipe, tmp_path / "run")
    assert read_state(tmp_path / "run" / STATE).progress.step == 2  # the whole first epoch
    shutil.move(moved, folder)
    again, _ = run_stage("segment", recipe, tmp_path / "run", resume=True)
    assert again.read_bytes() == whole.read_bytes()


def test_a_full_disk_keeps_the_last_state(
    folder: Path, tmp_path: Path, small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = on_folder(small_recipe, folder, "run.epochs=3")
    save, states = tensor_file.save_file, []

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        states.extend([path] if "state" in path.name else [])
        if len(states) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(UserError, match="no space left to write"):
        run_stage("segment", recipe, tmp_path / "run")
    monkeypatch.setattr(tensor_file, "save_file", save)
    assert read_state(tmp_path / "run" / STATE).progress.step == 2
    assert run_stage("segment", recipe, tmp_path / "run", resume=True)[1].finished


def test_a_missing_mask_is_named(folder: Path, tmp_path: Path, small_recipe: MakeRecipe) -> None:
    (folder / "masks" / "eye 1.png").unlink()
    with pytest.raises(UserError, match=r"eye 1\.png has no mask"):
        run_stage("segment", on_folder(small_recipe, folder), tmp_path / "run")


@pytest.mark.parametrize("damage", ["network.", "optimizer.", "average.", "random.", "shape", "sampler"])
def test_a_state_that_lacks_something_is_one_line(tmp_path: Path, small_recipe: MakeRecipe, damage: str) -> None:
    recipe = small_recipe("run.ema=0.9")
    run_stage("segment", recipe, tmp_path / "run")
    state = tmp_path / "run" / STATE
    tensors, metadata, _ = tensor_file.read_tensor_file(state)
    if damage == "shape":
        name = next(name for name, value in tensors.items() if name.startswith("network.") and value.ndim == 4)
        tensors[name] = tensors[name][:1]
    elif damage == "sampler":
        progress = json.loads(metadata["espmedsam-training"])
        progress["sampler"]["epoch"] = "x"
        metadata["espmedsam-training"] = json.dumps(progress)
    else:
        del tensors[next(name for name in sorted(tensors) if name.startswith(damage))]
    tensor_file.save_file({name: value.contiguous() for name, value in tensors.items()}, state, metadata)
    with pytest.raises(UserError, match=f"{STATE} is damaged: it does not fit its recipe") as refused:
        run_stage("segment", recipe, tmp_path / "run", resume=True)
    assert "\n" not in refused.value.message


def test_a_log_that_is_no_text_is_gone_on_with(tmp_path: Path) -> None:
    table = tmp_path / "valid.csv"
    rows = b"step,epoch,modality,score\n1,1,fundus,0.5\n"
    table.write_bytes(rows + b"1,\xff\n2,1,fundus,0.6\n")
    with RunLog(tmp_path, 2, 1):
        pass
    assert table.read_bytes() == rows


def test_more_data_than_before_cannot_resume(folder: Path, tmp_path: Path, small_recipe: MakeRecipe) -> None:
    run_stage("segment", on_folder(small_recipe, folder), tmp_path / "run")
    split = (folder / "split.json").read_text().replace('["eye 4", "eye 5"]', '["eye 5"]')
    (folder / "split.json").write_text(split.replace('"eye 3"]', '"eye 3", "eye 4"]'))
    with pytest.raises(UserError, match="numbers of training images changed"):
        run_stage("segment", on_folder(small_recipe, folder), tmp_path / "run", resume=True)


def test_a_truncated_state_is_one_line(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    run_stage("segment", small_recipe(), tmp_path / "run")
    state = tmp_path / "run" / STATE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable training state"):
        run_stage("segment", small_recipe(), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="already holds"):
        run_stage("segment", small_recipe(), tmp_path / "run")


def test_overwrite_starts_anew(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    first, _ = run_stage("segment", small_recipe(), tmp_path / "run")
    before = first.read_bytes()
    again, _ = run_stage("segment", small_recipe(), tmp_path / "run", overwrite=True)
    assert again.read_bytes() == before  # the same seed, the same run
    other, _ = run_stage("segment", small_recipe("run.seed=1"), tmp_path / "run", overwrite=True)
    assert other.read_bytes() != before
    assert other.name == WEIGHTS


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize(("slope", "best"), [(-1.0, 0), (1.0, 2)])
def test_a_run_writes_its_best_epoch_and_the_start_is_one(
    ema: float,
    slope: float,
    best: int,
    trained_student: Path,
    tmp_path: Path,
    small_recipe: MakeRecipe,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[dict[str, float]] = []

    def scored(*_: object) -> dict[str, float]:
        measured.append({"fundus": slope * len(measured), "dermoscopy": 0.5 + slope * len(measured)})
        return measured[-1]

    monkeypatch.setattr(loop_module, "validate", scored)
    start, _ = read_checkpoint(trained_student)
    recipe = small_recipe(f"init={trained_student}", f"run.ema={ema}", "run.epochs=2")
    path, progress = run_stage("segment", recipe, tmp_path / "run")
    kept, info = read_checkpoint(path)
    assert (progress.best_epoch, progress.best) == (best, 0.25 + slope * best)
    assert (info.provenance["best_epoch"], info.provenance["steps"]) == (str(best), str(4 * best))
    assert all(torch.equal(kept[name], start[name]) for name in start) == (best == 0)
    with (tmp_path / "run" / "valid.csv").open(newline="") as stream:
        rows = [(int(row["epoch"]), row["modality"], float(row["score"])) for row in csv.DictReader(stream)]
    assert rows == [(epoch, name, score) for epoch, scores in enumerate(measured) for name, score in scores.items()]
    assert sum(line.startswith("start  Dice 0.2500") for line in said) == 1


def test_without_tensorboard_there_are_tables(
    tmp_path: Path, small_recipe: MakeRecipe, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run_stage("segment", small_recipe(), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len((tmp_path / "run" / "train.csv").read_text().splitlines()) == 1 + 4
    assert len((tmp_path / "run" / "valid.csv").read_text().splitlines()) == 1 + 2
    assert sum("TensorBoard is not installed" in line for line in said) == 1


def test_average_is_of_what_training_moves() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    network[0].bias.requires_grad_(False)
    average = WeightAverage(network, 0.9)
    assert set(average.shadow) == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    before = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1
    average.update(0)  # decay min(0.9, 1/10)
    torch.testing.assert_close(average.shadow["0.weight"], before + 0.9)
    own = network[0].weight.detach().clone()
    with average.applied(network):
        torch.testing.assert_close(network[0].weight.data, before + 0.9)
    assert torch.equal(network[0].weight.data, own)


def test_adamw_does_not_decay_vectors() -> None:
    network = torch.nn.Linear(3, 3)
    optimizer = make_optimizer(network, OptimizerSection(name="adamw", weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(network.weight): 0.1, id(network.bias): 0.0}
    with pytest.raises(UserError, match="freezes every part"):
        make_optimizer(network.requires_grad_(False), OptimizerSection())


def test_state_files_hold_no_pickle(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    run_stage("segment", small_recipe("run.ema=0.9"), tmp_path / "run")
    raw = (tmp_path / "run" / STATE).read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert raw[8:9] == b"{"
    assert b"\x80\x02" not in raw[8 : 8 + header]  # safetensors: JSON, then raw numbers
    saved = read_state(tmp_path / "run" / STATE)
    assert saved.part("optimizer")
    assert saved.part("average")
    assert saved.part("random")["cpu.0"].dtype == torch.uint8


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("weights.safetensors", "written by hand"),
        ("state.safetensors", "written by hand"),
        ("recipe.json", "written by hand"),
        ("recipe.json", '{"title": "Apple pie", "data": "six apples"}'),
        ("recipe.json", "[" * 100_000),
        ("recipe.json", '{"init": "scratch", "a_key_of_an_earlier_version": 3}'),
        ("train.csv", "written by hand"),
        ("sheets/epoch-0001.jpg", "drawn by hand"),
    ],
)
def test_a_run_replaces_no_foreign_file(
    tmp_path: Path, small_recipe: MakeRecipe, name: str, text: str, overwrite: bool
) -> None:
    (tmp_path / "sheets").mkdir()
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"a run's of an earlier version can be moved away|already holds a run"):
        prepare_folder(tmp_path, small_recipe(), resume=False, overwrite=overwrite)
    assert [(path, path.read_text()) for path in tmp_path.rglob("*") if path.is_file()] == [(tmp_path / name, text)]


def test_a_run_waits_for_no_pipe(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    os.mkfifo(tmp_path / "train.csv")
    with pytest.raises(UserError, match=r"train\.csv is not of a training run"):
        prepare_folder(tmp_path, small_recipe(), resume=False, overwrite=True)


@pytest.mark.parametrize("name", ["weights.safetensors", "train.csv", "valid.csv"])
def test_a_run_that_goes_on_replaces_no_foreign_file(tmp_path: Path, small_recipe: MakeRecipe, name: str) -> None:
    recipe = small_recipe()
    prepare_folder(tmp_path, recipe, resume=False, overwrite=False)
    tensor_file.write_tensor_file(tmp_path / STATE, {}, {"espmedsam-training": "{}"})
    (tmp_path / name).write_text("written by hand")
    with pytest.raises(UserError, match="is not of a training run"):
        prepare_folder(tmp_path, recipe, resume=True, overwrite=False)
    assert (tmp_path / name).read_text() == "written by hand"
    (tmp_path / name).unlink()
    (tmp_path / "train.csv").write_text("step,ep")  # a kill while it was begun
    prepare_folder(tmp_path, recipe, resume=True, overwrite=False)


def test_starting_anew_removes_a_runs_sheets_alone(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    recipe = small_recipe()
    prepare_folder(tmp_path, recipe, resume=False, overwrite=False)
    tensor_file.write_tensor_file(tmp_path / STATE, {}, {"espmedsam-training": "{}"})
    write_image(tmp_path / "sheets" / "epoch-0001.jpg", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "sheets" / "epoch-of-trilobites.jpg").write_text("drawn by hand")
    events = tmp_path / "tensorboard" / "events.out.tfevents.1700000000.tower.41.0"
    events.parent.mkdir()
    events.write_bytes(b"of another program's run")
    prepare_folder(tmp_path, recipe, resume=False, overwrite=True)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "epoch-of-trilobites.jpg",
        events.name,
        "recipe.json",
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.phantoms=0", "is an empty list"),
        ("init=nowhere.safetensors", "no checkpoint"),
        ("init={link}", "is what the run reads, and would be replaced"),
        ("teacher.checkpoint={link}", "is what the run reads, and would be replaced"),
    ],
)
def test_a_run_stays_until_what_replaces_it_can_begin(
    tmp_path: Path, small_recipe: MakeRecipe, change: str, said: str
) -> None:
    run_stage("segment", small_recipe(), tmp_path / "run")
    before = contents(tmp_path / "run")
    assert any(name.startswith("tensorboard") for name in before)
    (tmp_path / "link").hardlink_to(tmp_path / "run" / WEIGHTS)
    recipe = small_recipe(change.replace("{link}", str(tmp_path / "link")))
    with pytest.raises(UserError, match=said):
        run_stage("segment", recipe, tmp_path / "run", overwrite=True)
    assert contents(tmp_path / "run") == before


def test_all_stages_start_from_none_of_the_weights_that_they_replace(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    first, _ = run_stage("segment", small_recipe(), tmp_path / "run" / "segment")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="is what the run reads, and would be replaced"):
        run_all(small_recipe(f"init={first}"), tmp_path / "run", overwrite=True)
    assert contents(tmp_path / "run") == before
