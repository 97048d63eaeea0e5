"""The stages: what each trains, on which images, against what, and the checkpoint it writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision.amp import MixedPrecision
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from espmedsam_edge.destinations import claimed
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path
from espmedsam_edge.modalities import LARGEST_SIDE, SMALLEST_SIDE, Scale, register, target_of
from espmedsam_edge.model.checkpoint import PARTS, TEMPLATE, CheckpointInfo, save_checkpoint
from espmedsam_edge.model.teacher import EspMedSamTeacher
from espmedsam_edge.model.teacher_checkpoint import save_teacher, teacher_heads
from espmedsam_edge.training.collection import Collection, labelled_images, modalities_of, natural_images
from espmedsam_edge.training.loop import TrainingLoop
from espmedsam_edge.training.losses import MaskLoss
from espmedsam_edge.training.objectives import (
    ControllerDistillation,
    EncoderDistillation,
    Objective,
    SegmentationObjective,
)
from espmedsam_edge.training.recipe import SCRATCH, Recipe, Stage
from espmedsam_edge.training.run_folder import WEIGHTS, check_folder, check_foreign, check_inputs, prepare_folder
from espmedsam_edge.training.sections import Part, RunSection
from espmedsam_edge.training.start import (
    StudentStart,
    sam_encoder,
    start_new_modality,
    start_student,
    start_teacher,
    student_config,
    trained_teacher,
)
from espmedsam_edge.training.state import TrainingProgress
from espmedsam_edge.training.trainable import (
    PATCH_GENERATOR,
    STUDENT_PREFIXES,
    Network,
    default_parts,
    modality_names,
    select,
    share_decoding,
    trainable_names,
    without_self_prompt,
)
from espmedsam_edge.version import __version__


@dataclass(frozen=True)
class Prepared:
    """A stage ready to run: what is minimised, on what, and how its weights are written to a path."""

    objective: Objective
    images: Collection
    write: Callable[[Path, dict[str, Tensor], dict[str, str]], None]
    provenance: dict[str, str]


def run_stage(
    stage: Stage, recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False
) -> tuple[Path, TrainingProgress]:
    """Run one stage; its best weights are in ``folder/weights.safetensors`` afterwards.

    Args:
        stage: which one.
        recipe: as loaded; ``[stage.<stage>]`` is merged in here.
        folder: of the run.
        resume: go on where an interrupted run of the same recipe in that folder stopped.
        overwrite: throw away a run that is in the folder.

    Returns:
        The checkpoint, and where the run ended.

    Raises:
        UserError: wrong recipe, files or data; see the stages; or another run trains in that folder.
    """
    recipe = recipe.for_stage(stage)
    fabric = make_fabric(recipe.run)
    with claimed([folder / WEIGHTS] if fabric.is_global_zero else []):
        return _run_stage(fabric, stage, recipe, folder, resume=resume, overwrite=overwrite)


def _run_stage(
    fabric: Fabric, stage: Stage, recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool
) -> tuple[Path, TrainingProgress]:
    if fabric.is_global_zero:
        check_folder(folder, recipe, resume=resume, overwrite=overwrite)
    fabric.barrier()
    torch.manual_seed(recipe.run.seed)
    prepared = _PREPARE[stage](recipe)
    fabric.barrier()
    if fabric.is_global_zero:  # what is wrong with the recipe's files was said by now: an old run goes only here
        prepare_folder(folder, recipe, resume=resume, overwrite=overwrite)
    fabric.barrier()
    network = prepared.objective.network
    network.encoder.activation_checkpointing = recipe.run.activation_checkpointing
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    torch.manual_seed(recipe.run.seed + 1 + fabric.global_rank)
    weights = folder / WEIGHTS
    facts = {
        "stage": stage,
        "recipe_sha256": recipe.sha256(),
        "seed": str(recipe.run.seed),
        "epochs": str(recipe.run.epochs),
        "program": __version__,
        **{f"data_{name}_sha256": value for name, value in prepared.images.hashes.items()},
        **prepared.provenance,
    }

    def write(state: dict[str, Tensor], progress: TrainingProgress) -> None:
        reached = {"steps": str(progress.step)}
        if progress.best is not None:
            reached |= {"best_epoch": str(progress.best_epoch), "best_score": f"{progress.best:.4f}"}
        prepared.write(weights, state, {**facts, **reached})

    loop = TrainingLoop(fabric, stage, recipe, prepared.objective, prepared.images, folder, write)
    if resume:
        loop.resume()
    progress = loop.run()
    fabric.barrier()
    return weights, progress


def run_all(
    recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False
) -> tuple[Path, TrainingProgress]:
    """Run the recipe's stages one after the other, each in a folder of its own, handing on what each made.

    A trained teacher named in the recipe stands for the teacher stage; ``ablation.mmdkd=false`` leaves both
    distillations, and with them the teacher, out.

    Returns:
        ``folder/weights.safetensors``, the last stage's checkpoint, and where that stage ended.

    Raises:
        UserError: as ``run_stage``; or the recipe lists no stage, or one that cannot be chained.
    """
    with claimed([folder / WEIGHTS] if os.environ.get("RANK", "0") == "0" else []):
        return _run_all(recipe, folder, resume=resume, overwrite=overwrite)


def _run_all(recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool) -> tuple[Path, TrainingProgress]:
    stages = stages_of(recipe)
    final = folder / WEIGHTS
    check_foreign(folder)
    check_inputs(folder, recipe)
    for stage in stages:
        check_inputs(folder / stage, recipe.for_stage(stage))
    if final.exists() and not (resume or overwrite):
        raise UserError(f"{folder} already holds a run.", "Go on with it: --resume; or start anew: --overwrite")
    _check_later(recipe, stages)
    student: Path | None = None
    teacher: Path | None = recipe.teacher.checkpoint
    done: tuple[Path, TrainingProgress] | None = None
    for stage in stages:
        part = recipe.for_stage(stage)
        changes: dict[str, object] = {"stage": {}}
        if student is not None:
            changes["init"] = str(student)
        if teacher is not None:
            changes["teacher"] = part.teacher.model_copy(update={"checkpoint": teacher})
        part = part.model_copy(update=changes)
        done = run_stage(stage, part, folder / stage, resume=resume, overwrite=overwrite)
        if stage == "teacher":
            teacher = done[0]
        else:
            student = done[0]
    assert done is not None
    with atomic_path(final) as temporary:
        shutil.copyfile(done[0], temporary)
    return final, done[1]


def _check_later(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Look at what the stages after the first will read, which else would be found missing after days of training."""
    first = next((stage for stage in stages if stage != "teacher"), None)
    for stage in stages[1:]:
        part = recipe.for_stage(stage)
        for file in (part.teacher.sam, part.teacher.checkpoint):
            if file is not None and not file.is_file():
                raise UserError(f"no file at {file}.", "Check [teacher] in the recipe.")
        if stage == first and part.init != SCRATCH:
            start_student(part, ())
        if stage == "distill-encoder":
            natural_images(part, student_config(part))
        else:
            labelled_images(part, student_config(part), masks=stage != "distill-controllers")


def stages_of(recipe: Recipe) -> list[Stage]:
    """What ``train all`` runs under a recipe.

    Raises:
        UserError: nothing is left, or add-modality is among them.
    """
    stages: list[Stage] = list(recipe.stages)
    if not recipe.ablation.mmdkd:
        stages = [stage for stage in stages if stage == "segment"]
    elif recipe.teacher.checkpoint is not None:
        stages = [stage for stage in stages if stage != "teacher"]
    if not stages or "add-modality" in stages:
        raise UserError("stages must name some of teacher, distill-encoder, distill-controllers, segment.")
    return stages


def _teacher(recipe: Recipe) -> Prepared:
    teacher, fresh, provenance = start_teacher(recipe, modalities_of(recipe))
    objective = _segmentation(recipe, teacher)
    parts = recipe.train or default_parts("teacher", fresh)
    _select(teacher, parts, recipe)
    store_vit = recipe.teacher.sam is None or "vit" in parts

    def write(path: Path, state: dict[str, Tensor], facts: dict[str, str]) -> None:
        save_teacher(path, teacher, store_vit=store_vit, state=state, provenance=facts)

    return Prepared(objective, labelled_images(recipe, student_config(recipe)), write, provenance)


def _distill_encoder(recipe: Recipe) -> Prepared:
    start = start_student(recipe, ())
    teacher, hashes = sam_encoder(recipe)
    parts = recipe.train or default_parts("distill-encoder", start.fresh)
    select(start.network, trainable_names(start.network, parts, ()))
    images = natural_images(recipe, start.network.config, start.normalization)
    objective = EncoderDistillation(start.network, teacher.encoder)
    return Prepared(objective, images, _writer(start, parts, images), {**start.provenance, **hashes})


def _distill_controllers(recipe: Recipe) -> Prepared:
    modalities = modalities_of(recipe)
    start = start_student(recipe, modalities)
    if "encoder" in start.fresh:
        raise UserError(
            "the controller bags need an encoder that has learned something.",
            "Set init to what train distill-encoder wrote, or to mobile_sam.pt.",
        )
    teacher, hashes = trained_teacher(recipe)
    parts = recipe.train or default_parts("distill-controllers", start.fresh)
    select(start.network, trainable_names(start.network, parts, modalities))
    made = list(parts)
    if recipe.heads_from_teacher:
        made += _take_heads(start, teacher)
    objective = ControllerDistillation(start.network, teacher)
    images = labelled_images(recipe, start.network.config, start.normalization, masks=False)
    return Prepared(objective, images, _writer(start, made, images), {**start.provenance, **hashes})


def _segment(recipe: Recipe) -> Prepared:
    start = start_student(recipe, modalities_of(recipe))
    parts = recipe.train or default_parts("segment", start.fresh)
    objective = _segmentation(recipe, start.network)
    _select(start.network, parts, recipe)
    images = labelled_images(recipe, start.network.config, start.normalization)
    return Prepared(objective, images, _writer(start, PARTS, images), start.provenance)


def _add_modality(recipe: Recipe) -> Prepared:
    name = recipe.modality.name
    if name is not None and name in recipe.data.targets:
        register(name, recipe.data.targets[name])
    start = start_new_modality(recipe)
    assert name is not None
    if modalities_of(recipe) != [name]:
        raise UserError(f"add-modality trains '{name}' alone.", f"Give data.folders.{name} and no other.")
    select(start.network, modality_names(start.network, name))
    objective = _segmentation(recipe, start.network)
    images = labelled_images(recipe, start.network.config, start.normalization)
    return Prepared(objective, images, _writer(start, PARTS, images), {**start.provenance, "new_modality": name})


_PREPARE: dict[Stage, Callable[[Recipe], Prepared]] = {
    "teacher": _teacher,
    "distill-encoder": _distill_encoder,
    "distill-controllers": _distill_controllers,
    "segment": _segment,
    "add-modality": _add_modality,
}


def _segmentation(recipe: Recipe, network: Network) -> SegmentationObjective:
    loss = recipe.loss
    return SegmentationObjective(
        network, MaskLoss(loss.pixel, loss.weight), loss.patch_weight if recipe.ablation.sppg else 0.0
    )


def _select(network: Network, parts: Sequence[Part], recipe: Recipe) -> None:
    """Apply the ablations and leave only the recipe's parts, and of them only its modalities', trainable."""
    if not recipe.ablation.qdmd:
        share_decoding(network)
    names = trainable_names(network, parts, modalities_of(recipe))
    if not recipe.ablation.sppg:
        without_self_prompt(network)
        names = {name for name in names if not name.startswith(PATCH_GENERATOR)}
    select(network, names)


def _take_heads(start: StudentStart, teacher: EspMedSamTeacher) -> list[Part]:
    """The teacher's SPPG and QDMD into the student: its features will be the teacher's, so they fit.

    Raises:
        UserError: the two are not of one size.
    """
    own = start.network.state_dict()
    heads = {key: value for key, value in teacher_heads(teacher).items() if key in own}
    wrong = [key for key, value in heads.items() if own[key].shape != value.shape]
    if wrong:
        raise UserError(
            f"the teacher's prompt generator and decoder do not fit the student's ({wrong[0]}).",
            "Train both with one [model] section, or set heads_from_teacher=false.",
        )
    start.network.load_state_dict({**own, **heads})
    return ["prompt", "decoder"]


def _writer(
    start: StudentStart, made: Sequence[str], images: Collection
) -> Callable[[Path, dict[str, Tensor], dict[str, str]], None]:
    """Writes the student's parts that were loaded or made; the others are random and stay out of the file."""
    scales: dict[str, Scale] = {}  # looked for when they are first written: every picture was read by then
    parts = [part for part in PARTS if part not in start.fresh or part in made]

    def write(path: Path, state: dict[str, Tensor], facts: dict[str, str]) -> None:
        if not scales:
            scales.update(_scales(start, images))
        prefixes = tuple(prefix for part, prefix in STUDENT_PREFIXES.items() if part in parts)
        kept = {key: value for key, value in state.items() if key.startswith(prefixes)} | start.template
        info = CheckpointInfo(
            config=start.network.config,
            targets={name: target_of(name) for name in start.network.modalities} if "controller" in parts else {},
            normalization=start.normalization,
            origin="trained",
            provenance=facts,
            parts=[*parts, TEMPLATE] if start.template else parts,
            scales=scales,
        )
        save_checkpoint(path, kept, info)

    return write


def _scales(start: StudentStart, images: Collection) -> dict[str, Scale]:
    """Those of the start, and of what was trained since; the tiles that were measured before stay."""
    found = dict(start.scales)
    for name in start.network.modalities:
        if longest := images.train.longest(name):
            before = found.get(name, Scale(largest=SMALLEST_SIDE))
            found[name] = before.model_copy(update={"largest": max(before.largest, min(longest, LARGEST_SIDE))})
    return found


def make_fabric(run: RunSection) -> Fabric:
    """Fabric for this process: alone, or as torchrun started it (any number of processes and machines).

    Raises:
        UserError: CUDA asked for where there is none, or a precision that the processor cannot train in.
    """
    cuda = torch.cuda.is_available()
    if run.accelerator == "cuda" and not cuda:
        raise UserError("run.accelerator=cuda, but torch sees no GPU.", "Check the driver, or set run.accelerator=cpu.")
    accelerator = "cuda" if cuda and run.accelerator != "cpu" else "cpu"
    if run.precision == "16-mixed" and accelerator == "cpu":
        raise UserError("run.precision=16-mixed needs a GPU.", "Use bf16-mixed or 32-true.")
    plugins = None if run.precision == "32-true" else MixedPrecision(run.precision, accelerator)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # A batch is of one modality, so the other modalities' bags get no gradient in that step.
    strategy = DDPStrategy(find_unused_parameters=True) if world > 1 else "auto"
    fabric = Fabric(
        accelerator=accelerator, strategy=strategy, devices=local, num_nodes=max(1, world // local), plugins=plugins
    )
    fabric.launch()
    return fabric
