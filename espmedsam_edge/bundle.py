"""A bundle: the folder that export writes, calibrate extends and the runtime reads.

Layout and every field: ``docs/bundle-format.md``. Reading validates before use: schema, file names, sizes, hashes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.files import (
    ChangedError,
    atomic_directory,
    directory_lock,
    read_checked,
    read_json,
    read_regular,
    sha256_file,
)
from espmedsam_edge.graph_rules import check_graph
from espmedsam_edge.modalities import Scale, choose

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
REPORT, CALIBRATION = "report.md", "calibration.json"
REPORT_TITLE = "# What each step measured"
"""How a bundle's report begins."""
PICTURES = ("worst.jpg", "sensitivity.png")
"""What calibrate draws of a graph: ``MODALITY-PRECISION-worst.jpg``."""
MAX_MANIFEST_BYTES = 4 << 20

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,119}$")]
# Of values from 0 to 1; beyond, their quotient is infinite in float32.
Mean = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]


def _whole_number(value: Any) -> Any:
    if type(value) is not int:  # True and 1.0 are equal to 1
        raise ValueError("a version is a whole number")
    return value


FormatVersion = Annotated[Literal[1], BeforeValidator(_whole_number)]
"""The version of a file's format: 1, and nothing that is only equal to it."""


class Normalization(BaseModel, extra="forbid", frozen=True):
    """Per-channel mean and standard deviation in RGB order, for values scaled to 0..1."""

    mean: tuple[Mean, Mean, Mean] = (0.485, 0.456, 0.406)
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)


class InputSpec(BaseModel, extra="forbid", frozen=True):
    """How a frame becomes the tensor ``image``: stretched to a square, RGB, normalised, NCHW float32."""

    name: Literal["image"] = "image"
    layout: Literal["NCHW"] = "NCHW"
    color: Literal["RGB"] = "RGB"
    dtype: Literal["float32"] = "float32"
    resize: Literal["stretch"] = "stretch"
    interpolation: Literal["bilinear"] = "bilinear"
    normalization: Normalization = Normalization()


class OutputSpec(BaseModel, extra="forbid", frozen=True):
    """The tensor ``logits``: batch x 1 x S/stride x S/stride, float32, foreground where the probability is enough."""

    name: Literal["logits"] = "logits"
    dtype: Literal["float32"] = "float32"
    stride: Literal[4] = 4


class Graph(BaseModel, extra="forbid", frozen=True):
    """One ONNX file: one modality, one precision, static shape."""

    modality: Name
    precision: Precision
    file: FileName
    sha256: Sha256
    image_size: Annotated[int, Field(ge=64, le=8192, multiple_of=64)]
    batch: Annotated[int, Field(ge=1, le=256)] = 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of ``image``: (batch, 3, S, S)."""
        return (self.batch, 3, self.image_size, self.image_size)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape of ``logits``: (batch, 1, S/4, S/4)."""
        return (self.batch, 1, self.image_size // 4, self.image_size // 4)


class Weights(BaseModel, extra="forbid", frozen=True):
    """Where the weights came from. ``origin`` "random" marks a network that was never trained."""

    checkpoint_sha256: Sha256
    origin: Literal["random", "imported", "trained"]
    note: str = ""


class ManifestHead(BaseModel, extra="forbid", frozen=True):
    """What is true of every graph of a bundle."""

    schema_version: FormatVersion = 1
    preset: str
    input: InputSpec = InputSpec()
    output: OutputSpec = OutputSpec()
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    weights: Weights
    targets: dict[Name, str] = {}

    def properties(self, modality: str, precision: Precision) -> dict[str, str]:
        """What a graph says of itself, in ``metadata_props``; ``normalization`` is JSON."""
        return {
            "modality": modality,
            "target": self.targets.get(modality, ""),
            "precision": precision,
            "normalization": self.input.normalization.model_dump_json(),
            "threshold": str(self.threshold),
            "preset": self.preset,
            "bundle_schema": str(self.schema_version),
            "checkpoint_sha256": self.weights.checkpoint_sha256,
        }


class Manifest(ManifestHead):
    """The contents of ``manifest.json``."""

    scales: dict[Name, Scale] = {}
    graphs: Annotated[list[Graph], Field(min_length=1)]
    tools: dict[str, str] = {}
    accuracy: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _unambiguous(self) -> Manifest:
        files = [graph.file for graph in self.graphs]
        keys = [(graph.modality, graph.precision) for graph in self.graphs]
        if len(set(files)) < len(files) or len(set(keys)) < len(keys):
            raise ValueError("two graphs share a file or a modality and precision")
        if any(not graph.file.endswith(".onnx") for graph in self.graphs):
            raise ValueError("a graph's file name does not end in .onnx")
        return self

    @property
    def modalities(self) -> list[str]:
        """The modalities that have a graph, in the order of the graphs."""
        return list(dict.fromkeys(graph.modality for graph in self.graphs))

    def macs(self, graph: Graph) -> dict[str, float]:
        """Parts (0..1) of a graph's multiply-accumulates by type, as calibrate counted them; empty without a count."""
        counted = self.accuracy.get(f"{graph.modality}/{graph.precision}", {}).get("macs")
        parts = counted.items() if isinstance(counted, dict) else ()
        return {name: part for name, part in parts if isinstance(part, int | float) and 0 <= part <= 1}


class Bundle:
    """A bundle on disk, its manifest validated.

    Examples:
        >>> from espmedsam_edge import Bundle
        >>> bundle = Bundle.open("fundus.bundle")
        >>> bundle.manifest.modalities, bundle.graph("fundus").precision
        (['fundus'], 'fp32')
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and validate a bundle's manifest (graphs are checked when one is asked for).

        Raises:
            UserError: no bundle there, or its manifest is not valid; says which field and why.
        """
        path = Path(path)
        file = path / MANIFEST
        try:
            if not path.exists():
                raise UserError(f"no bundle at {path}.", "Make one: espmedsam-edge export WEIGHTS --out " + str(path))
            if not file.is_file():
                raise UserError(f"{path} is not a bundle: it has no {MANIFEST}.", "Name the folder that export wrote.")
            if file.stat().st_size > MAX_MANIFEST_BYTES:
                raise UserError(f"{file} is over 4 MiB; no manifest is that large.", "Export the bundle again.")
            content = read_regular(file, MAX_MANIFEST_BYTES)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot read {path}: {reason}.", "Check the name and its permissions.") from error
        return cls(path, parse_manifest(content, str(file)))

    def graph(self, modality: str | None = None, precision: str | None = None) -> Graph:
        """The graph of a modality (None: the only one) and a precision (None: fp32, else the best there is).

        Raises:
            UserError: not in the bundle; names the nearest, or the command that adds the precision.
        """
        name = choose(modality, self.manifest.modalities, f"bundle {self.path}")
        graphs = {graph.precision: graph for graph in self.manifest.graphs if graph.modality == name}
        if precision is None:
            return next(graphs[p] for p in PRECISIONS if p in graphs)
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}'.", nearest(precision, PRECISIONS))
        if precision not in graphs:
            raise UserError(
                f"bundle {self.path} has no {precision} graph for {name}, only {', '.join(graphs)}.",
                f"Add it: espmedsam-edge calibrate {self.path} IMAGES --precision {precision}",
            )
        return graphs[precision]

    def graph_path(self, graph: Graph) -> Path:
        """Where the graph's file is, for messages and for what reads and checks it itself: nothing of it is checked."""
        return self.path / graph.file

    def read_graph(self, graph: Graph) -> bytes:
        """The graph as ONNX: read once, its SHA-256 checked against the manifest, and such as this program writes.

        Run these bytes and none that are read again: another process may have put another file in its place.

        Raises:
            UserError: missing, outside the folder (a link), changed, or with operators, sizes or weights elsewhere that
                no graph of this program has.
        """
        file = self.graph_path(graph)
        if not file.is_file():
            raise UserError(f"{file} is missing.", "Copy the whole bundle again, or export it again.", exit_code=1)
        if file.resolve().parent != self.path.resolve():
            raise UserError(f"{file} leads out of the bundle.", "A bundle holds its own files; export it again.")
        try:
            content = read_checked(file, graph.sha256)
        except ChangedError as error:
            raise UserError(
                f"{file} is not the file that export wrote (SHA-256 differs).",
                "Copy or export the bundle again.",
                exit_code=1,
            ) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot read {file}: {reason}.", "Check its permissions.", exit_code=1) from error
        stated = self.manifest.properties(graph.modality, graph.precision)
        check_graph(content, graph.batch, graph.image_size, str(file), stated)
        return content


class BundleDraft:
    """The files of a bundle being written, in a folder that is not yet the bundle."""

    def __init__(self, folder: Path, manifest: Manifest | None, foreign: frozenset[str] = frozenset()) -> None:
        self.folder = folder
        self.manifest = manifest
        self._foreign = foreign

    def new_file(self, name: str) -> Path:
        """A path in the draft to write to; the old bundle's file of that name is unlinked first.

        Raises:
            UserError: a file of that name was no part of the old bundle.
        """
        if name in self._foreign:
            raise UserError(
                f"{name} in the bundle's folder is no file of the bundle, and would be replaced.",
                "Move it elsewhere, or choose another folder.",
            )
        path = self.folder / name
        path.unlink(missing_ok=True)
        return path

    def graph(self, file: str, *, modality: str, precision: Precision, image_size: int, batch: int = 1) -> Graph:
        """The manifest entry of a graph file already written to the draft."""
        return Graph(
            modality=modality,
            precision=precision,
            file=file,
            sha256=sha256_file(self.folder / file),
            image_size=image_size,
            batch=batch,
        )


def parse_manifest(content: bytes, name: str) -> Manifest:
    """A manifest from its file's content; ``name`` is what errors call it.

    Raises:
        UserError: it is not valid; says which field and why.
    """
    try:
        data = read_json(content)
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}.", "Export the bundle again.") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(
            f"{name} has schema version {repr(version)[:40]}; this program reads {SCHEMA_VERSION}.",
            "Export the bundle again, or update espmedsam-edge.",
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise UserError(f"{name}: {field}: {first['msg']}.", "Export the bundle again.") from error


def graph_file_name(modality: str, precision: Precision, modalities: int) -> str:
    """``fp16.onnx`` in a bundle of one modality, ``fundus-fp16.onnx`` in one of several."""
    return f"{precision}.onnx" if modalities == 1 else f"{modality}-{precision}.onnx"


def own_files(path: Path, manifest: Manifest) -> set[str]:
    """What of a bundle's folder is the bundle: what its manifest lists, and what this program writes beside that.

    Returns:
        Names of files, there or not.
    """
    names = {MANIFEST} | {graph.file for graph in manifest.graphs}
    for graph in manifest.graphs:
        names |= {f"{graph.modality}-{graph.precision}-{picture}" for picture in PICTURES}
    for name, start in ((REPORT, REPORT_TITLE.encode()), (CALIBRATION, b'{\n "schema_version":')):
        try:
            with (path / name).open("rb") as stream:
                ours = stream.read(len(start)) == start
        except OSError:
            ours = False
        if ours:
            names.add(name)
    return names


def _foreign_files(path: Path) -> frozenset[str]:
    """What in a bundle's folder is no part of it.

    Raises:
        UserError: it is no bundle.
    """
    try:
        manifest = Bundle.open(path).manifest
    except UserError as error:
        raise UserError(
            f"{path} exists and is not a bundle: {error.message}", "Choose another --out; nothing was overwritten."
        ) from error
    return frozenset(entry.name for entry in path.iterdir()) - own_files(path, manifest)


@contextmanager
def write_bundle(path: str | Path, *, extend: bool = False, own: bool = False) -> Iterator[BundleDraft]:
    """Write a new bundle, or with ``extend`` change one; set ``draft.manifest`` before the block ends.

    The folder appears, or changes, in one step when the block ends well; on any error it stays as it was. Of a bundle
    that was there only its own files are replaced; others in its folder stay. Of several processes that write one
    bundle, each waits for those before it, and those that extend it add to what they wrote.

    Args:
        path: the folder.
        extend: start with the bundle that is there.
        own: the folder is a place of the program's own: damaged bundles in it are replaced as well.

    Raises:
        UserError: ``path`` exists and is not a bundle, holds a foreign file where one of the bundle's goes, cannot be
            written, or was replaced while it was extended.
    """
    path = Path(path)
    there = os.path.lexists(path) and not own
    if extend:
        Bundle.open(path)  # says what is wrong where there is none
    elif there:
        _foreign_files(path)
    with ExitStack() as stack:
        unreplaced = stack.enter_context(directory_lock(path)) if extend or there else None
        manifest = Bundle.open(path).manifest if extend else None  # again: it may have had to wait
        foreign = _foreign_files(path) if extend or there else frozenset()
        outdated = own_files(path, Bundle.open(path).manifest) if there and not extend else set()
        folder = stack.enter_context(atomic_directory(path, keep=extend or there or own))
        for name in outdated:
            (folder / name).unlink(missing_ok=True)
        draft = BundleDraft(folder, manifest, foreign)
        yield draft
        if unreplaced is not None and not unreplaced():
            raise UserError(f"another command replaced {path} meanwhile.", "Run this one again.", exit_code=1)
        if draft.manifest is None:
            raise ValueError("write_bundle: the draft's manifest was never set")
        exclude = set() if draft.manifest.scales else {"scales"}  # for programs that do not know it
        text = json.dumps(draft.manifest.model_dump(mode="json", exclude=exclude), indent=2) + "\n"
        draft.new_file(MANIFEST).write_text(text)
