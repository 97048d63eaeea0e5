"""The weights that come with the program, as bundles: made at first use, kept in the user's cache."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from espmedsam_edge.bundle import (
    MANIFEST,
    Bundle,
    Graph,
    InputSpec,
    Manifest,
    Name,
    Normalization,
    Weights,
    graph_file_name,
    write_bundle,
)
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import sha256_file
from espmedsam_edge.machine.cache import cache_place
from espmedsam_edge.modalities import choose, register
from espmedsam_edge.shipped.assembly import assemble
from espmedsam_edge.shipped.packed import SUFFIX, read_packed, write_plain
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
CHECKPOINT = f"espmedsam-s{SUFFIX}"
SUMS = "SHA256SUMS"
SCORES = "scores.json"
METADATA_KEY = "espmedsam"
_WHERE = "the weights that came with the program"


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    preset: str
    image_size: int
    image_sizes: dict[Name, int] = {}


class _Info(BaseModel):
    """What a bundle needs of a checkpoint's metadata."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    config: _Config
    targets: dict[Name, str]
    normalization: Normalization = Normalization()
    origin: Literal["random", "imported", "trained"]


class Score(BaseModel):
    """What a modality was measured at.

    Attributes:
        dice: mean over the test images at 1024 x 1024, per cent.
        images: how many there were.
        dataset: the test set.
        required: the Dice from which it counts as usable; below it is experimental.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dice: Annotated[float, Field(ge=0, le=100)]
    images: Annotated[int, Field(ge=1)]
    dataset: str
    required: Annotated[float, Field(ge=0, le=100)]

    @property
    def experimental(self) -> bool:
        """Whether it is below what may be called usable."""
        return self.dice < self.required

    def line(self, modality: str) -> str:
        """One sentence for the user."""
        kind = "experimental" if self.experimental else "usable for research"
        return f"{modality} is {kind}: Dice {self.dice:.1f} % on {self.images} test images of {self.dataset}."


def shipped_scores(folder: Path = WEIGHTS) -> dict[str, Score]:
    """The modalities of the weights that came with the program, each with its score.

    Raises:
        UserError: this installation came without weights.
    """
    try:
        values = json.loads((folder / SCORES).read_text())
        return {name: Score.model_validate(value) for name, value in values.items()}
    except (OSError, ValueError) as error:
        raise UserError(
            "this installation came without weights.", "Name a bundle, or install the package again.", exit_code=1
        ) from error


def shipped_bundle(
    modality: str | None,
    out: Path | None = None,
    folder: Path = WEIGHTS,
) -> Bundle:
    """A bundle of one modality (None: of all) of the weights that came with the program.

    Args:
        modality: one of ``shipped_scores``.
        out: where to write it; None: in the cache, where it is made once.
        folder: of the weights.

    Raises:
        UserError: no weights here, an unknown modality, damaged files, or nowhere to write.
    """
    scores = shipped_scores(folder)
    names = list(scores) if modality is None else [choose(modality, scores, _WHERE)]
    sums = _sums(folder)
    where = out
    if where is None:
        kept = cache_place() / "bundles" / sums[CHECKPOINT][:16]
        where = kept / f"{names[0] if len(names) == 1 else 'all'}.bundle"
        if (where / MANIFEST).is_file():
            return Bundle.open(where)
    log.info("Preparing %s from %s (once): %s", ", ".join(names), _WHERE, where)
    return make_bundle(names, where, folder, note=" ".join(scores[name].line(name) for name in names))


def make_bundle(names: Sequence[str], out: Path, folder: Path = WEIGHTS, note: str = "") -> Bundle:
    """Write a bundle of modalities of packed weights; ``note`` goes into its manifest.

    Raises:
        UserError: damaged files, or nowhere to write.
    """
    sums = _sums(folder)
    for file, sha256 in sums.items():
        if not (folder / file).is_file() or sha256_file(folder / file) != sha256:
            raise UserError(f"{folder / file} is missing or damaged.", "Install the package again.", exit_code=1)
    arrays, metadata = read_packed(folder / CHECKPOINT)
    try:
        info = _Info.model_validate_json(metadata[METADATA_KEY])
    except (KeyError, ValidationError) as error:
        raise UserError(f"{folder / CHECKPOINT} says nothing of its network.", "Install the package again.") from error
    graphs: list[Graph] = []
    with write_bundle(out) as draft:
        for name in names:
            size = info.config.image_sizes.get(name, info.config.image_size)
            skeleton = lzma.decompress((folder / skeleton_name(size)).read_bytes())
            file = graph_file_name(name, "fp32", len(names))
            assemble(skeleton, arrays, name, draft.new_file(file))
            graphs.append(draft.graph(file, modality=name, precision="fp32", image_size=size))
        draft.manifest = Manifest(
            preset=info.config.preset,
            input=InputSpec(normalization=info.normalization),
            weights=Weights(
                checkpoint_sha256=sums[CHECKPOINT],
                origin=info.origin,
                note=note,
            ),
            targets={name: info.targets[name] for name in names},
            graphs=graphs,
            tools={tool: importlib.metadata.version(tool) for tool in ("onnxruntime",)}
            | {"espmedsam-edge": __version__},
        )
    for name in names:
        register(name, info.targets[name])
    return Bundle.open(out)


def shipped_checkpoint(out: Path, folder: Path = WEIGHTS) -> None:
    """Write the weights that came with the program as a plain safetensors checkpoint (large tensors in float32 again).

    Raises:
        UserError: no weights here, damaged files, a name without ``.safetensors``, or nowhere to write.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"a checkpoint's name must end in .safetensors, not '{out.name}'.")
    shipped_scores(folder)
    write_plain(out, *read_packed(folder / CHECKPOINT))


def skeleton_name(size: int) -> str:
    """The file of the network for an input of ``size`` pixels."""
    return f"network-{size}.onnx.xz"


def _sums(folder: Path) -> dict[str, str]:
    """The weights' files and their SHA-256, as ``sha256sum`` writes them."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        sums = {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SUMS} is missing or damaged.", "Install the package again.", exit_code=1) from error
    if CHECKPOINT not in sums:
        raise UserError(f"{folder / SUMS} does not name {CHECKPOINT}.", "Install the package again.", exit_code=1)
    return sums
