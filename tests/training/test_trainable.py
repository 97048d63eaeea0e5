"""What each stage may change, by gradients and by the bits of whole checkpoints before and after."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from espmedsam_edge.errors import UserError
from espmedsam_edge.model.checkpoint import load_checkpoint
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.model.teacher import EspMedSamTeacher, teacher_config
from espmedsam_edge.training import loop
from espmedsam_edge.training.losses import MaskLoss, segmentation_loss
from espmedsam_edge.training.recipe import Recipe
from espmedsam_edge.training.stages import run_stage
from espmedsam_edge.training.trainable import (
    default_parts,
    modality_names,
    select,
    set_training_mode,
    share_decoding,
    trainable_names,
    without_self_prompt,
)

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _later_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that a run writes are its last: what they score after so few steps is chance."""
    counted = itertools.count()
    monkeypatch.setattr(loop, "validate", lambda *_: {"every": float(next(counted))})


def gradients(network: EspMedSam | EspMedSamTeacher, modality: str) -> set[str]:
    torch.manual_seed(0)
    mask = (torch.rand(2, 1, 64, 64) > 0.7).float()
    output = network(torch.randn(2, 3, 64, 64), modality)
    segmentation_loss(output, mask, MaskLoss()).total.backward()
    return {name for name, parameter in network.named_parameters() if parameter.grad is not None}


def test_teacher_trains_only_additions_prompt_and_decoder() -> None:
    torch.manual_seed(0)
    teacher = EspMedSamTeacher(teacher_config("vit_tiny"), model_config("espmedsam-tiny"), ["fundus", "xray"])
    select(teacher, trainable_names(teacher, default_parts("teacher", ()), ["fundus", "xray"]))
    got = gradients(teacher, "fundus")
    assert not any(name.startswith("encoder.vit.") for name in got)
    every = {name for name, _ in teacher.named_parameters()}
    named = {name for name in every if name.startswith(("encoder.additions.", "prompt.", "decoder."))}
    others = {name for name in named if ".xray" in name}
    assert got == named - others
    assert default_parts("teacher", {"vit", "prompt", "decoder"}) == ["vit", "additions", "prompt", "decoder"]


def test_segment_trains_only_prompt_and_decoder_of_its_modalities() -> None:
    torch.manual_seed(0)
    network = EspMedSam(model_config("espmedsam-tiny"), ["fundus", "xray"])
    select(network, trainable_names(network, default_parts("segment", ()), ["fundus"]))
    got = gradients(network, "fundus")
    assert all(name.startswith(("prompt.", "decoder.")) and ".xray" not in name for name in got)
    assert {"decoder.queries.fundus", "prompt.patch_generator.0.weight"} <= got


def test_frozen_parts_behave_as_at_inference() -> None:
    network = EspMedSam(model_config("espmedsam-tiny"), ["fundus"])
    select(network, trainable_names(network, ["prompt", "decoder"], ["fundus"]))
    network.encoder.activation_checkpointing = True
    set_training_mode(network)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 10
    assert not any(module.training for module in norms)
    assert network.prompt.training
    select(network, trainable_names(network, ["encoder"], ()))
    set_training_mode(network)
    assert all(module.training for module in norms)
    set_training_mode(network, freeze_batch_norm=True)
    assert not any(module.training for module in norms)
    assert network.encoder.stages[0].training


def test_an_unknown_part_is_named() -> None:
    network = EspMedSam(model_config("espmedsam-tiny"), ["fundus"])
    with pytest.raises(UserError, match="the student has no part 'vit'"):
        trainable_names(network, ["vit"], ["fundus"])


def changed(before: Path, after: Path) -> set[str]:
    old, new = load_checkpoint(before)[0].state_dict(), load_checkpoint(after)[0].state_dict()
    return {key for key in new if key not in old or not torch.equal(old[key], new[key])}


@pytest.mark.usefixtures("always_better")
def test_segment_leaves_encoder_statistics_and_other_modalities_to_the_bit(
    trained_student: Path, tmp_path: Path, small_recipe: MakeRecipe
) -> None:
    recipe = small_recipe(
        f"init={trained_student}", "data.folders={fundus=[]}", "train=['controller', 'prompt', 'decoder']"
    )
    after, _ = run_stage("segment", recipe, tmp_path / "again")
    keys = changed(trained_student, after)
    assert keys
    assert not any(key.startswith("encoder.") or ".dermoscopy" in key for key in keys)
    assert any(key.startswith("controller.fundus.") for key in keys)


def test_distilled_controllers_leave_encoder_and_other_bags_to_the_bit(
    trained_student: Path, tmp_path: Path, small_recipe: MakeRecipe
) -> None:
    teacher, _ = run_stage("teacher", small_recipe("data.folders={fundus=[]}"), tmp_path / "teacher")
    recipe = small_recipe(
        f"init={trained_student}",
        f"teacher.checkpoint={teacher}",
        "data.folders={fundus=[]}",
        "heads_from_teacher=false",
    )
    after, _ = run_stage("distill-controllers", recipe, tmp_path / "bags")
    keys = changed(trained_student, after)
    assert keys
    assert all(key.startswith("controller.fundus.") for key in keys)


def test_add_modality_changes_nothing_that_was_there(
    trained_student: Path, tmp_path: Path, small_recipe: MakeRecipe
) -> None:
    recipe = small_recipe(
        f"init={trained_student}", "data.folders={histopathology=[]}", "modality.name=histopathology",
        "data.targets.histopathology=cell nuclei", "run.epochs=2",
    )  # fmt: skip
    after, _ = run_stage("add-modality", recipe, tmp_path / "more")
    (old, _), (new, info) = load_checkpoint(trained_student), load_checkpoint(after)
    assert info.targets["histopathology"] == "cell nuclei"
    keys = changed(trained_student, after)
    assert keys == {key for key in new.state_dict() if ".histopathology" in key}
    assert modality_names(new, "histopathology") == keys
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name in old.modalities:
            assert torch.equal(old(images, name).low_res_logits, new(images, name).low_res_logits)


def test_new_modality_starts_as_a_copy_where_asked(
    trained_student: Path, tmp_path: Path, small_recipe: MakeRecipe
) -> None:
    recipe = small_recipe(
        f"init={trained_student}", "data.folders={histopathology=[]}", "modality.name=histopathology",
        "modality.like=fundus", "optimizer.lr=1e-30",
    )  # fmt: skip
    network, _ = load_checkpoint(run_stage("add-modality", recipe, tmp_path / "more")[0])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, fundus = network(images, "histopathology"), network(images, "fundus")
    torch.testing.assert_close(ours.low_res_logits, fundus.low_res_logits)


def test_without_sppg_every_image_gets_the_same_dense_prompt() -> None:
    torch.manual_seed(0)
    network = EspMedSam(model_config("espmedsam-tiny"), ["fundus"])
    without_self_prompt(network)
    logits, prompt = network.prompt(10 * torch.randn(3, 64, 8, 8))
    assert (logits < 0).all()
    torch.testing.assert_close(prompt, prompt[:1, :, :1, :1].expand_as(prompt))


def test_without_qdmd_modalities_share_query_and_mlp(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    network, _ = load_checkpoint(run_stage("segment", small_recipe("ablation.qdmd=false"), tmp_path / "a")[0])
    state = network.state_dict()
    assert torch.equal(state["decoder.queries.fundus"], state["decoder.queries.dermoscopy"])
    mlp = [key for key in state if key.startswith("decoder.hypernetworks.fundus.")]
    assert mlp
    assert all(torch.equal(state[key], state[key.replace("fundus", "dermoscopy")]) for key in mlp)
    with pytest.raises(UserError, match=r"variant=paper"):
        share_decoding(EspMedSam(model_config("espmedsam-tiny", published=True), ["fundus"]))


def test_without_sppg_the_patch_generator_stays_off_in_the_checkpoint(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    network, _ = load_checkpoint(run_stage("segment", small_recipe("ablation.sppg=false"), tmp_path / "a")[0])
    last = network.prompt.patch_generator[-1]
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    assert last.bias.item() == -1
    assert not last.weight.any()


@pytest.mark.usefixtures("always_better")
def test_what_is_one_modalitys_alone_learns_on_its_own(
    trained_student: Path, tmp_path: Path, small_recipe: MakeRecipe
) -> None:
    network = EspMedSam(model_config("espmedsam-tiny"), ["fundus", "xray"])
    select(network, trainable_names(network, ["modality"], ["fundus"]))
    assert gradients(network, "fundus") == modality_names(network, "fundus")
    recipe = small_recipe(
        f"init={trained_student}", 'train=["modality"]', 'data.only=["fundus"]',
        "data.augment=strong", "run.batch_norm_fraction=0",
    )  # fmt: skip
    weights, _ = run_stage("segment", recipe, tmp_path / "run")
    before, after = (load_checkpoint(path)[0].state_dict() for path in (trained_student, weights))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= modality_names(network, "fundus")
    assert {name.split(".")[0] for name in changed} == {"controller", "decoder"}
