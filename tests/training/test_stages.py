"""The stages end to end on phantoms, what they hand on, and what wrong starts are told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from swapping import swap_when_opened

from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.modalities import Scale
from espmedsam_edge.model.checkpoint import CheckpointInfo, load_checkpoint, read_checkpoint, save_checkpoint
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.model.teacher import TeacherEncoder, teacher_config
from espmedsam_edge.model.teacher_checkpoint import load_teacher
from espmedsam_edge.training.recipe import Recipe
from espmedsam_edge.training.stages import run_all, run_stage, stages_of
from espmedsam_edge.training.start import start_student, student_config

MakeRecipe = Callable[..., Recipe]


pytestmark = pytest.mark.xdist_group("stages")  # one process makes what they share


def run_command(*arguments: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code in (0, None)


@pytest.fixture(scope="module")
def all_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``train all`` with the smoke recipe at 64 pixels, run as a user runs it."""
    changes = ["model.image_size=64", "data.phantoms=4", "run.batch_size=2", "run.sheet_images=1"]
    options = [part for change in (*changes, "run.accelerator=cpu") for part in ("--set", change)]
    folder = tmp_path_factory.mktemp("all")
    run_command("train", "all", "smoke", *options, "--out", str(folder))
    return folder


def test_all_stages_run_and_hand_on(all_stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, info = load_checkpoint(all_stages / "weights.safetensors")
    assert info.origin == "trained"
    assert info.modalities == ["fundus", "dermoscopy"]
    assert info.provenance["stage"] == "segment"
    assert {"recipe_sha256", "seed", "data_fundus_sha256", "init_sha256", "best_score"} <= set(info.provenance)
    teacher, _ = load_teacher(all_stages / "teacher" / "weights.safetensors")
    encoder, partial = read_checkpoint(all_stages / "distill-encoder" / "weights.safetensors")
    assert partial.parts == ["encoder"]
    assert all(key.startswith("encoder.") for key in encoder)
    bags, whole = read_checkpoint(all_stages / "distill-controllers" / "weights.safetensors")
    assert whole.complete
    for key, value in encoder.items():  # the second distillation leaves the encoder alone
        assert torch.equal(bags[key], value), key
    for key, value in teacher.state_dict().items():  # and hands on the teacher's heads
        if key.startswith(("prompt.", "decoder.")):
            assert torch.equal(bags[key], value), key
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 64), "fundus").low_res_logits.isfinite().all()
    for stage, lines in (("teacher", 1 + 2 * 2), ("segment", 1 + 3 * 2)):  # with its start
        folder = all_stages / stage
        assert len((folder / "valid.csv").read_text().splitlines()) == lines
        assert (folder / "sheets" / "epoch-0002.jpg").stat().st_size > 500
        assert list((folder / "tensorboard").iterdir())
        assert json.loads((folder / "recipe.json").read_text())["model"]["image_size"] == 64


def test_all_resumes_where_it_stands_and_refuses_to_start_over(
    all_stages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (all_stages / "weights.safetensors").read_bytes()
    arguments = ["train", "all", "smoke", "--out", str(all_stages)]
    for change in ("model.image_size=64", "data.phantoms=4", "run.batch_size=2", "run.sheet_images=1"):
        arguments += ["--set", change]
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert "already holds a run" in capsys.readouterr().err
    run_command(*arguments, "--set", "run.accelerator=cpu", "--resume")  # nothing is left to do
    assert (all_stages / "weights.safetensors").read_bytes() == before
    with pytest.raises(SystemExit):
        main([*arguments, "--set", "run.epochs=3", "--resume"])
    assert "run.epochs: 2, now 3" in capsys.readouterr().err


def test_ablation_and_given_teacher_shorten_the_chain(small_recipe: MakeRecipe) -> None:
    assert stages_of(small_recipe("ablation.mmdkd=false")) == ["segment"]
    assert stages_of(small_recipe("teacher.checkpoint=t.safetensors"))[0] == "distill-encoder"
    with pytest.raises(UserError, match="stages must name"):
        stages_of(small_recipe("stages=[]"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["init=nowhere.safetensors"], "nowhere.safetensors"),
        (["init=picture.png"], "picture.png"),
        (["stage.distill-encoder.data.phantoms=0"], "names no photographs"),
        (["stage.distill-controllers.teacher.sam=nowhere.pth"], "nowhere.pth"),
    ],
)
def test_what_later_stages_lack_is_said_before_the_first(
    tmp_path: Path, small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, changes: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=reason):
        run_all(small_recipe(*changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_notes_the_hash_of_what_it_started_from(
    tmp_path: Path, small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network, path = EspMedSam(student_config(small_recipe()), ["fundus"]), tmp_path / "w.safetensors"
        save_checkpoint(path, network, CheckpointInfo(config=network.config, origin="trained"))
        contents.append(path.read_bytes())
        last = network.state_dict()
    opened = swap_when_opened(monkeypatch, path, [contents[1], contents[0]])
    start = start_student(small_recipe(f"init={path}"), ["fundus"])
    assert len(opened) == 1
    assert start.provenance["init_sha256"] == hashlib.sha256(contents[1]).hexdigest()
    assert all(torch.equal(value, last[key]) for key, value in start.network.state_dict().items())


def test_teacher_on_a_sam_file_keeps_sam_outside(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    torch.manual_seed(1)
    vit = TeacherEncoder(teacher_config("vit_tiny")).vit.state_dict()
    state = {f"image_encoder.{key}": value for key, value in vit.items()}
    heads = EspMedSam(model_config("espmedsam-tiny"), ["fundus"]).decoder
    for ours, theirs in (("transformer", "mask_decoder.transformer"), ("upscaling", "mask_decoder.output_upscaling")):
        part = getattr(heads, ours).state_dict()
        state.update({f"{theirs}.{key}": value for key, value in part.items()})
    state["mask_decoder.mask_tokens.weight"] = torch.randn(4, 64)
    mlp = heads.hypernetwork("fundus").state_dict()
    state.update({f"mask_decoder.output_hypernetworks_mlps.0.{key}": value for key, value in mlp.items()})
    torch.save(state, tmp_path / "sam.pth")
    recipe = small_recipe(f"teacher.sam={tmp_path / 'sam.pth'}", "optimizer.lr=1e-30")
    path, _ = run_stage("teacher", recipe, tmp_path / "teacher")
    with pytest.raises(UserError, match="holds what was trained beside"):
        load_teacher(path)
    teacher, info = load_teacher(path, tmp_path / "sam.pth")
    assert not info.vit_stored
    assert info.provenance["sam"] == "sam.pth"
    assert info.provenance["sam_sha256"] == hashlib.sha256((tmp_path / "sam.pth").read_bytes()).hexdigest()
    trained = teacher.state_dict()
    for key, value in vit.items():
        assert torch.equal(trained[f"encoder.vit.{key}"], value)
    # SAM's mask token and its MLP start every modality
    token = state["mask_decoder.mask_tokens.weight"][:1]
    torch.testing.assert_close(teacher.decoder.queries["dermoscopy"].data, token)
    torch.testing.assert_close(trained["decoder.hypernetworks.fundus.layers.0.weight"], mlp["layers.0.weight"])
    # and the same file serves the first distillation
    done, _ = run_stage("distill-encoder", recipe, tmp_path / "encoder")
    assert read_checkpoint(done)[1].provenance["sam_sha256"]


def test_segment_from_a_partial_start_trains_what_is_missing(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    distilled, _ = run_stage("teacher", small_recipe(), tmp_path / "t")
    encoder, _ = run_stage("distill-encoder", small_recipe(f"teacher.checkpoint={distilled}"), tmp_path / "e")
    recipe = small_recipe(f"init={encoder}")
    path, _ = run_stage("segment", recipe, tmp_path / "s")
    before, after = read_checkpoint(encoder)[0], load_checkpoint(path)[0].state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("distill-controllers", (), "need an encoder that has learned"),
        ("distill-encoder", (), r"names no SAM checkpoint"),
        ("segment", ("init=nowhere.safetensors",), "no checkpoint at nowhere"),
        ("segment", ("init=nowhere.pth",), r"no file at nowhere\.pth"),
        ("segment", ("data.phantoms=0", "data.folders={}"), "names no images"),
        ("segment", ("data.phantoms=0", "data.folders={fundus=['nowhere']}"), "no dataset folder at nowhere"),
        ("segment", ("data.phantoms=0",), "is an empty list"),
        ("segment", ("model.preset=espmedsam-tini",), "unknown preset"),
        ("teacher", ("teacher.preset=vit_b",), "256 channels"),
        ("segment", ("run.precision=16-mixed",), "needs a GPU"),
        ("add-modality", (), "needs a name and a checkpoint"),
    ],
)
def test_wrong_starts_are_one_line(
    stage: str, changes: tuple[str, ...], message: str, tmp_path: Path, small_recipe: MakeRecipe
) -> None:
    with pytest.raises(UserError, match=message):
        run_stage(stage, small_recipe(*changes), tmp_path / "run")  # type: ignore[arg-type]


def test_a_checkpoint_of_another_preset_is_refused(
    trained_student: Path, tmp_path: Path, small_recipe: MakeRecipe
) -> None:
    with pytest.raises(UserError, match=r"patch_layers 1\), the recipe asks for 2"):
        run_stage("segment", small_recipe(f"init={trained_student}", "model.patch_layers=2"), tmp_path / "run")
    state, info = read_checkpoint(trained_student)
    encoder = {key: value for key, value in state.items() if key.startswith("encoder.")}
    partial = info.model_copy(update={"parts": ["encoder"], "targets": {}})
    save_checkpoint(tmp_path / "encoder.safetensors", encoder, partial)
    recipe = small_recipe(f"init={tmp_path / 'encoder.safetensors'}", "model.preset=espmedsam-s")
    with pytest.raises(UserError, match=r"not of preset 'espmedsam-s': encoder\..* does not fit"):
        run_stage("segment", recipe, tmp_path / "run2")


def test_add_modality_as_a_user(trained_student: Path, tmp_path: Path, small_recipe: MakeRecipe) -> None:
    from espmedsam_edge.imaging.encode import write_image
    from espmedsam_edge.phantoms import phantom

    data, init = tmp_path / "tissue", tmp_path / "init.safetensors"
    state, before = read_checkpoint(trained_student)
    known = {"fundus": Scale(largest=300, tile=150)}
    save_checkpoint(init, state, before.model_copy(update={"scales": known}))
    for seed in range(3):
        image, mask = phantom("histopathology", seed, (64, 64 + 8 * seed))
        write_image(data / "images" / f"{seed}.png", image)
        write_image(data / "masks" / f"{seed}.png", mask)
    (data / "split.json").write_text('{"train": ["0", "1"], "valid": [], "test": ["2"]}')
    run_command(
        "train", "add-modality", "tissue", str(data), "--init", str(init), "--target", "cell nuclei",
        "--set", "run.epochs=1", "--set", "run.accelerator=cpu", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    _, info = load_checkpoint(tmp_path / "run" / "weights.safetensors")
    assert info.targets == {"fundus": "retinal vessels", "dermoscopy": "skin lesion", "tissue": "cell nuclei"}
    assert "best_score" not in info.provenance  # no validation images: the last weights
    assert info.scales == {**known, "tissue": Scale(largest=72)}  # of those trained on


def test_bf16_runs_on_a_cpu(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    path, progress = run_stage("segment", small_recipe("run.precision=bf16-mixed"), tmp_path / "run")
    assert progress.finished
    assert all(value.dtype != torch.bfloat16 for value in read_checkpoint(path)[0].values())


def test_all_with_one_stage_writes_where_it_says(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    path, _ = run_all(small_recipe("ablation.mmdkd=false"), tmp_path / "all")
    assert path == tmp_path / "all" / "weights.safetensors"
    assert path.read_bytes() == (tmp_path / "all" / "segment" / "weights.safetensors").read_bytes()
