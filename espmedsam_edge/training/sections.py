"""A recipe's sections: every key typed, with its meaning, range and default; defaults are the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from espmedsam_edge.bundle import Name
from espmedsam_edge.model.config import ImageSize, Ratio, Tokens
from espmedsam_edge.training.data.augmentation import Augmentation

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=64, le=8192, multiple_of=32)]
Part = Literal["vit", "additions", "encoder", "controller", "prompt", "decoder", "modality"]


class ModelSection(BaseModel, extra="forbid", frozen=True):
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
    bag_tokens: Tokens | None = None
    bag_mlp_ratio: Ratio | None = None


class TeacherSection(BaseModel, extra="forbid", frozen=True):
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
    tokens: Tokens = 1
    mlp_ratio: Ratio = 0.25


class DataSection(BaseModel, extra="forbid", frozen=True):
    """Where the images are and how they are served.

    Attributes:
        root: what relative folders below start from (a relative root: from the working directory).
        folders: modality -> dataset folders with images/, masks/, split.json.
        natural: dataset folders of photographs for the first distillation; no masks needed.
        targets: modality -> what its mask shows, for modalities that are not the paper's.
        phantoms: so many synthetic images a modality in place of its folders, and a quarter as many for validation;
            without ``folders`` for the paper's six modalities. 0: off.
        only: of ``folders``, these modalities alone; empty: all.
        negatives: modality -> dataset folders of pictures that show nothing of its target (other organs, empty
            views); they are learned from beside its images, with empty masks, and need no ``masks/``.
        limit: at most so many training images a modality, the first by id; 0: all.
        windows: modality -> side in pixels: training sees random windows of that side, cut from the stretched image,
            in place of the whole; for large inputs of fine, repeating structure. Validation sees the whole.
        balance: how far small data sets are repeated: probability of a modality ~ images^balance. 1: as they come,
            0: every modality alike.
        augment: "standard" (each modality's own settings), "strong" (more of all, and bending, uneven light, turns,
            pasted rectangles), or "none".
        augmentations: settings for a modality in place of its own.
        feeding: "device": all images are kept on the GPU as bytes and batches are made there, where they fit; "images":
            each image is made on the processor by ``workers`` threads, as always where there is no GPU.
        device_gb: what the images may take there; a larger set is fed as "images".
        workers: threads that read and augment; 0: none, each batch is made when it is needed.
        cache_gb: memory for images as read and stretched; 0: read them anew each time.
    """

    root: Path = Path()
    folders: dict[Name, list[Path]] = {}
    only: list[Name] = []
    negatives: dict[Name, list[Path]] = {}
    natural: list[Path] = []
    targets: dict[Name, str] = {}
    phantoms: Annotated[int, Field(ge=0, le=4000)] = 0
    limit: Annotated[int, Field(ge=0)] = 0
    windows: dict[Name, Side] = {}
    balance: Fraction = 0.5
    augment: Literal["standard", "strong", "none"] = "standard"
    augmentations: dict[Name, Augmentation] = {}
    feeding: Literal["device", "images"] = "device"
    device_gb: Annotated[float, Field(gt=0)] = 8.0
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    cache_gb: Annotated[float, Field(ge=0)] = 4.0


class OptimizerSection(BaseModel, extra="forbid", frozen=True):
    """Adam or AdamW; ``gradient_clip`` is the largest norm of all gradients together, 0: no limit."""

    name: Literal["adam", "adamw"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0


class ScheduleSection(BaseModel, extra="forbid", frozen=True):
    """Learning rate over the run: from ``lr`` down to ``final_factor`` · lr, after a linear warm-up.

    Attributes:
        name: its shape.
        final_factor: what is left of ``lr`` at the run's end.
        warmup_epochs: length of the warm-up, in a run by epochs.
        warmup_minutes: and in a run by time.
    """

    name: Literal["exponential", "cosine", "constant"] = "exponential"
    final_factor: Annotated[float, Field(gt=0, le=1)] = 0.01
    warmup_epochs: Annotated[float, Field(ge=0, le=1_000_000)] = 0.0
    warmup_minutes: Annotated[float, Field(ge=0)] = 0.0


class LossSection(BaseModel, extra="forbid", frozen=True):
    """Eq. 8 and eq. 5: ``weight`` is lambda, ``patch_weight`` the SPPG's."""

    pixel: Literal["focal", "bce"] = "focal"
    weight: Annotated[float, Field(ge=0)] = 20.0
    patch_weight: Annotated[float, Field(ge=0)] = 1.0


class AblationSection(BaseModel, extra="forbid", frozen=True):
    """Table VI's columns; each may be switched off.

    Attributes:
        mmdkd: distillation; off, ``train all`` trains the student on masks alone.
        sppg: off, no dense prompt carries information: the patch prompt is empty for every image.
        qdmd: off, all modalities share one query and one hypernetwork MLP.
    """

    mmdkd: bool = True
    sppg: bool = True
    qdmd: bool = True


class RunSection(BaseModel, extra="forbid", frozen=True):
    """Length, arithmetic and bookkeeping.

    Attributes:
        epochs, batch_size: batch_size is a process's; every batch is of one modality.
        minutes: the run ends after so many minutes of training steps, whatever ``epochs`` says, and what changes over
            the run follows the time; validation, saving and a process that is stopped do not count. 0: by epochs.
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
        compile: the training step's forward and backward pass are compiled by torch; minutes at the start.
        read_every: steps between readings of the losses, each of which makes the processor wait for the device; a loss
            that is not finite stops the run at the next reading.
        seed: of weights, order and augmentation.
        validate_every: epochs between validations; the last epoch always has one.
        save_minutes: the training state is saved at every epoch's end and at least this often.
        sheet_images: images a modality on the contact sheet.
    """

    epochs: Count = 200
    minutes: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Count = 4
    steps_per_epoch: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    accumulate: Count = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_norm_fraction: Fraction = 1.0
    small_size: Side = 128
    small_fraction: Fraction = 0.0
    small_except: list[Name] = []
    activation_checkpointing: bool = False
    compile: bool = False
    read_every: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    validate_every: Count = 1
    save_minutes: Annotated[float, Field(gt=0)] = 10.0
    sheet_images: Annotated[int, Field(ge=0, le=1000)] = 4


class NewModalitySection(BaseModel, extra="forbid", frozen=True):
    """For add-modality: its name, and whose bag, query and MLP it starts from (None: new ones, or SAM's)."""

    name: Name | None = None
    like: Name | None = None
