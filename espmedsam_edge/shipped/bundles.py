"""The weights that come with the program, as bundles.

A bundle in the user's cache is made from the weights in every process, which takes half a second: what lies there
already is used only where it is the same.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import lzma
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from espmedsam_edge.bundle import (
    MANIFEST,
    REPORT,
    REPORT_TITLE,
    Bundle,
    Graph,
    InputSpec,
    Manifest,
    ManifestHead,
    Name,
    Normalization,
    Weights,
    graph_file_name,
    write_bundle,
)
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import ChangedError, atomic_write, read_checked, temporary_folder, write_errors
from espmedsam_edge.machine.cache import PRIVATE_FILE, PRIVATE_FOLDER, cache_place, make_private
from espmedsam_edge.modalities import choose, register
from espmedsam_edge.onnx_header import with_header
from espmedsam_edge.shipped.assembly import assemble
from espmedsam_edge.shipped.packed import SUFFIX, Arrays, parse, plain_sha256, read_scales, unpack, write_plain
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)

DISTRIBUTION = "espmedsam-edge-weights"
TERMS = "LICENSE.md"
SUMS = "SHA256SUMS"
SCORES = "scores.json"
CHECKS = "checks.json"
"""What ``calibrate --check`` found with these weights, by modality: accuracy entries of the manifest."""


def _weights_folder() -> Path:
    """Where the weights are: in a checkout, or in the distribution that brings them to an installed program."""
    inside = Path(__file__).resolve().parents[1] / "weights"
    if (inside / SCORES).is_file():
        return inside
    spec = find_spec(DISTRIBUTION.replace("-", "_"))
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else inside


WEIGHTS = _weights_folder()
CHECKPOINT = f"espmedsam-s{SUFFIX}"
UNPACKED = CHECKPOINT.removesuffix(".xz")
"""In ``SUMS`` alone: what the checkpoint is once it is unpacked."""

METADATA_KEY = "espmedsam"
_WHERE = "the weights that came with the program"


class _Config(BaseModel, extra="ignore", frozen=True):
    preset: str
    image_size: int
    image_sizes: dict[Name, int] = {}


class _Info(BaseModel, extra="ignore", frozen=True):
    """What a bundle needs of a checkpoint's metadata."""

    config: _Config
    targets: dict[Name, str]
    normalization: Normalization = Normalization()
    origin: Literal["random", "imported", "trained"]


class Score(BaseModel, extra="forbid", frozen=True):
    """What a modality was measured at.

    Attributes:
        dice: mean over the test images at 1024 x 1024, per cent.
        images: how many there were.
        dataset: the test set.
        required: the Dice from which it counts as usable; below it is experimental.
    """

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
            "this installation came without weights.",
            f"Name a bundle, or install them, for research only: {sys.executable} -m pip install {DISTRIBUTION}",
            exit_code=1,
        ) from error


def shipped_bundle(
    modality: str | None,
    out: Path | None = None,
    folder: Path = WEIGHTS,
) -> Bundle:
    """A bundle of one modality (None: of all) of the weights that came with the program.

    Args:
        modality: one of ``shipped_scores``.
        out: where to write it; None: in the cache, where it is written once.
        folder: of the weights.

    Raises:
        UserError: no weights here, an unknown modality, damaged files, or nowhere to write.
    """
    scores = shipped_scores(folder)
    names = list(scores) if modality is None else [choose(modality, scores, _WHERE)]
    note = " ".join(scores[name].line(name) for name in names)
    if out is not None:
        log.info("Preparing %s from %s: %s", ", ".join(names), _WHERE, out)
        return make_bundle(names, out, folder, note)
    root = cache_place()
    where = root / "bundles" / _sums(folder)[CHECKPOINT][:16] / f"{names[0] if len(names) == 1 else 'all'}.bundle"
    there = (where / MANIFEST).is_file()
    if not there:
        log.info("Preparing %s from %s (once): %s", ", ".join(names), _WHERE, where)
    manifest, contents = _assembled(names, folder, note, root)
    # The graphs' hashes are of what these weights make here and now, not what a file in the cache says they are.
    if not _is_kept(Bundle(where, manifest)):
        if there:
            log.warning("%s is not what %s make: it is made anew.", where, _WHERE)
        try:
            with write_errors(where):
                make_private(where.parent, root)
            _write(where, manifest, contents, own=True)
        except UserError as error:  # these weights need no cache
            log.warning("%s Prepared for this run alone. %s", error.message, error.hint)
            where = _passing_folder() / where.name
            _write(where, manifest, contents, own=True)
        for file in where.iterdir():
            file.chmod(PRIVATE_FILE)
        where.chmod(PRIVATE_FOLDER)
    return Bundle(where, manifest)


def _passing_folder() -> Path:
    """A folder of the user's alone that goes when the program ends.

    Raises:
        UserError: there is no place for temporary files.
    """
    kept = ExitStack()
    folder = kept.enter_context(temporary_folder())
    atexit.register(kept.close)
    return folder


def make_bundle(names: Sequence[str], out: Path, folder: Path = WEIGHTS, note: str = "") -> Bundle:
    """Write a bundle of modalities of packed weights; ``note`` goes into its manifest.

    Raises:
        UserError: damaged files, or nowhere to write.
    """
    _write(out, *_assembled(names, folder, note, None))
    return Bundle.open(out)


def _assembled(names: Sequence[str], folder: Path, note: str, cache: Path | None) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and the graphs by file of modalities of packed weights; unpacked weights are kept in the cache."""
    sums = _sums(folder)
    for file, sha256 in sums.items():
        if file not in (CHECKPOINT, UNPACKED):
            _read(folder, file, sha256)
    arrays, metadata = _weights(folder, sums, cache)
    try:
        info = _Info.model_validate_json(metadata[METADATA_KEY])
    except (KeyError, ValidationError) as error:
        raise UserError(f"{folder / CHECKPOINT} says nothing of its network.", "Install the package again.") from error
    head = ManifestHead(
        preset=info.config.preset,
        input=InputSpec(normalization=info.normalization),
        weights=Weights(checkpoint_sha256=sums[CHECKPOINT], origin=info.origin, note=note),
        targets={name: info.targets[name] for name in names},
    )
    graphs: list[Graph] = []
    contents: dict[str, bytes] = {}
    for name in names:
        size = info.config.image_sizes.get(name, info.config.image_size)
        network = skeleton_name(size)
        skeleton = lzma.decompress(_read(folder, network, sums.get(network, "")))
        file = graph_file_name(name, "fp32", len(names))
        contents[file] = with_header(assemble(skeleton, arrays, name), head.properties(name, "fp32"))
        digest = hashlib.sha256(contents[file]).hexdigest()
        graphs.append(Graph(modality=name, precision="fp32", file=file, sha256=digest, image_size=size))
    for name in names:
        register(name, info.targets[name])
    accuracy = {
        f"{graph.modality}/{key}": {**entry, "graph_sha256": graph.sha256}
        for graph in graphs
        for key, entry in checks_of(folder, sums[CHECKPOINT]).get(graph.modality, {}).items()
    }
    manifest = Manifest(
        **dict(head),
        graphs=graphs,
        accuracy=accuracy,
        scales={name: scale for name, scale in read_scales(folder).items() if name in names},
        tools={tool: importlib.metadata.version(tool) for tool in ("onnxruntime",)} | {"espmedsam-edge": __version__},
    )
    return manifest, contents


class _Checks(BaseModel, extra="forbid", frozen=True):
    """``CHECKS``: the checkpoint that was checked, and by modality the entries by ``fp32@BACKEND``."""

    checkpoint_sha256: str
    checks: dict[Name, dict[str, dict[str, Any]]]


def checks_of(folder: Path, checkpoint: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What was checked with a checkpoint; nothing where the file is missing or of another one."""
    try:
        found = _Checks.model_validate_json((folder / CHECKS).read_bytes())
    except (OSError, ValidationError):
        return {}
    return found.checks if found.checkpoint_sha256 == checkpoint else {}


def _write(out: Path, manifest: Manifest, contents: Mapping[str, bytes], *, own: bool = False) -> None:
    with write_bundle(out, own=own) as draft:
        for file, content in contents.items():
            draft.new_file(file).write_bytes(content)
        draft.new_file(REPORT).write_text(_report(manifest), encoding="utf-8")
        draft.manifest = manifest


def _report(manifest: Manifest) -> str:
    """What was measured of the weights, as ``export`` writes it of a checkpoint."""
    weights = manifest.weights
    return "\n".join(
        [
            REPORT_TITLE,
            "",
            f"Weights: {weights.origin}, checkpoint SHA-256 {weights.checkpoint_sha256}, that came with "
            f"espmedsam-edge {__version__}.",
            "",
            "## Test images",
            "",
            weights.note,
            "",
            "The graphs were made of them without a checkpoint's network to compare with.",
            "",
        ]
    )


def _is_kept(bundle: Bundle) -> bool:
    """Whether the graphs of a bundle in the cache are the ones in its manifest."""
    try:
        for graph in bundle.manifest.graphs:
            read_checked(bundle.graph_path(graph), graph.sha256)
    except (OSError, ChangedError):
        return False
    return (bundle.path / MANIFEST).is_file()


def _weights(folder: Path, sums: Mapping[str, str], cache: Path | None) -> tuple[Arrays, dict[str, str]]:
    """The tensors and metadata of packed weights. Unpacking takes a second, so what it gives is kept, and checked."""
    sha256 = sums.get(UNPACKED)
    kept = None if cache is None or sha256 is None else cache / "weights" / f"{sha256[:16]}.safetensors"
    if kept is not None and sha256 is not None:
        with contextlib.suppress(OSError, ChangedError):
            return parse(read_checked(kept, sha256))
    packed = _read(folder, CHECKPOINT, sums[CHECKPOINT])
    try:
        content = unpack(packed)
        found = parse(content)
    except ValueError as error:
        raise UserError(f"{folder / CHECKPOINT} is damaged ({error}).", "Install the package again.") from error
    if kept is not None and cache is not None and hashlib.sha256(content).hexdigest() == sha256:
        with contextlib.suppress(OSError, UserError):  # then it is unpacked each time
            make_private(kept.parent, cache)
            atomic_write(kept, content, PRIVATE_FILE)
    return found


def _read(folder: Path, file: str, sha256: str) -> bytes:
    """A file of the weights, checked.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return read_checked(folder / file, sha256)
    except (OSError, ChangedError) as error:
        raise UserError(f"{folder / file} is missing or damaged.", "Install the package again.", exit_code=1) from error


def check_checkpoint_name(out: Path) -> None:
    """Refuse, before any work, a name that a checkpoint cannot have."""
    if out.suffix != ".safetensors":
        raise UserError(f"a checkpoint's name must end in .safetensors, not '{out.name}'.")


def shipped_checkpoint(out: Path, folder: Path = WEIGHTS) -> None:
    """Write the weights that came with the program as a plain safetensors checkpoint (large tensors in float32 again).

    Raises:
        UserError: no weights here, damaged files, a name without ``.safetensors``, or nowhere to write.
    """
    check_checkpoint_name(out)
    shipped_scores(folder)
    write_plain(out, *_with_scales(folder, *_weights(folder, _sums(folder), None)))


def _with_scales(folder: Path, arrays: Arrays, metadata: dict[str, str]) -> tuple[Arrays, dict[str, str]]:
    """Tensors and metadata with what lies beside the packed checkpoint."""
    scales = {name: scale.model_dump(exclude_none=True) for name, scale in read_scales(folder).items()}
    if not scales:
        return arrays, metadata
    return arrays, metadata | {METADATA_KEY: json.dumps(json.loads(metadata[METADATA_KEY]) | {"scales": scales})}


def is_checkpoint(sha256: str, named: str, folder: Path = WEIGHTS) -> bool:
    """Whether a file is the checkpoint that a bundle names, as it came or as ``shipped_checkpoint`` writes it.

    Args:
        sha256: of the file.
        named: the checkpoint's hash in the bundle's manifest.
        folder: of the weights that came with the program.
    """
    if sha256 == named:
        return True
    try:
        sums = _sums(folder)
        return (
            sums[CHECKPOINT] == named and plain_sha256(*_with_scales(folder, *_weights(folder, sums, None))) == sha256
        )
    except UserError:
        return False


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
