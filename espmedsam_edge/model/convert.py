"""Foreign checkpoint files in, checkpoint files of this project out; each returns the line that says what was done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.model.checkpoint import CheckpointInfo, load_state, read_hashed_foreign, save_checkpoint
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.model.published import infer_config, is_published, merge_published
from espmedsam_edge.model.sam import import_mobilesam, import_sam


def convert_reference(files: Sequence[Path], modalities: Sequence[str], out: Path, image_size: int = 1024) -> str:
    """Merge the authors' single-modality checkpoints into one.

    Raises:
        UserError: counts differ, an unknown or repeated modality, a foreign layout, or shared parts that differ.
    """
    if len(files) != len(modalities):
        raise UserError(
            f"{len(files)} files but {len(modalities)} modalities.", "Give --modality NAME once a file, in order."
        )
    for name in modalities:
        if name not in PAPER_MODALITIES:
            raise UserError(f"the published code has no modality '{name}'.", nearest(name, PAPER_MODALITIES))
    if len(set(modalities)) < len(modalities):
        raise UserError("the same modality was named twice.", "Name each file's own modality.")
    states, hashes = {}, {}
    for name, file in zip(modalities, files, strict=True):
        states[name], hashes[f"{name}_sha256"] = read_hashed_foreign(file)
        if not is_published(states[name]):
            raise UserError(f"{file} is not a published ESP-MedSAM checkpoint (no key SemiTViT.*).")
    state = merge_published(states, {name: file.name for name, file in zip(modalities, files, strict=True)})
    config = infer_config(state, image_size=image_size)
    model = EspMedSam(config, modalities)
    load_state(model, state, ", ".join(file.name for file in files))
    info = CheckpointInfo(
        config=config,
        origin="imported",
        provenance=hashes,
    )
    save_checkpoint(out, model, info)
    return f"{out}: {config.preset} (published variant), modalities: {', '.join(modalities)}"


def convert_mobilesam(file: Path, out: Path) -> str:
    """MobileSAM's checkpoint to a start for training: encoder, decoder, template."""
    return _convert(file, out, import_mobilesam)


def convert_sam(file: Path, out: Path) -> str:
    """SAM's checkpoint to a start for training: decoder, template."""
    return _convert(file, out, import_sam)


def _convert(
    file: Path, out: Path, convert: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], CheckpointInfo]]
) -> str:
    foreign, sha256 = read_hashed_foreign(file)
    state, info = convert(foreign)
    info = info.model_copy(update={"provenance": {"source_sha256": sha256}})
    save_checkpoint(out, state, info)
    return f"{out}: {', '.join(info.parts)} to start training from (no modality yet)"
