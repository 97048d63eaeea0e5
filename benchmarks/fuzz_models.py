"""Damaged bundles, graphs, checkpoints, recipes and dataset folders: a line each, no crash, no hang, bounded memory.

    python benchmarks/fuzz_models.py --name fuzz-models-MACHINE [--inputs 5000] [--seed 0]

Whole ones are generated and changed by a seeded generator: their bytes as ``fuzzing.py`` does, their values (extreme
numbers, other types, nesting, escapes, long names) and, of graphs, their parts (operators, attributes, sizes, edges,
branches, data elsewhere). A graph's hash in its manifest is made right again, so that what is left to refuse it are the
rules; what they accept runs in ONNX Runtime. A finding is what it is in ``fuzz.py``, or a message of several lines or
of over 5,000 characters.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import fuzzing
import numpy as np
import onnx
import torch
from fuzzing import Reader, Tally, changed, mutated, written

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.export.exporter import export_bundle
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.model.checkpoint import CheckpointInfo, load_checkpoint, read_foreign, save_checkpoint
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.shipped.bundles import METADATA_KEY
from espmedsam_edge.shipped.packed import SUFFIX, write_packed
from espmedsam_edge.training.data.check import check
from espmedsam_edge.training.recipe import load_recipe
from espmedsam_edge.training.start import student_config

RECIPES = Path(__file__).parents[1] / "espmedsam_edge" / "training" / "recipes"

_FRAME = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def _bundle(path: Path) -> None:
    for graph in Bundle.open(path).manifest.graphs:
        with Segmenter.load(path, graph.modality, graph.precision, "onnxruntime-cpu", threads=1) as segmenter:
            segmenter.segment(_FRAME).to_dict()


def _dataset(path: Path) -> None:
    folder = DatasetFolder.open(path)
    check(folder, threads=1)
    for name in ("train", "valid", "test", "all"):
        folder.ids(name)


_READ: dict[str, Callable[[Path], object]] = {
    "bundle": _bundle,
    "checkpoint": load_checkpoint,
    "foreign": read_foreign,
    "recipe": lambda path: student_config(load_recipe(path)),
    "dataset": _dataset,
}


def read(line: str) -> str:
    """Read what a line names, a kind and a path."""
    kind, _, path = line.partition(" ")
    _READ[kind](Path(path))
    return "read"


_OPERATORS = (
    "Loop", "If", "Scan", "ConstantOfShape", "Tile", "Resize", "Range", "NonZero", "RandomNormal", "Einsum", "Where",
    "Expand", "Pad", "Reshape", "Conv", "MatMul", "Slice", "Split", "Concat", "Gelu", "Cast", "Softmax", "Identity",
    "Transpose",
)  # fmt: skip
_SIZES = (0, -1, 1, 2, 7, 64, 1024, 1 << 20, 1 << 31, (1 << 63) - 1, -(1 << 63))


def graph_changed(content: bytes, chance: random.Random) -> bytes:
    """A graph with one to three of its parts another."""
    model = onnx.load_from_string(content)
    for _ in range(chance.randint(1, 3)):
        chance.choice(_GRAPH_CHANGES)(model, chance)
    return bytes(model.SerializeToString())


def _other_node(model: Any, chance: random.Random) -> None:
    node = chance.choice(model.graph.node)
    node.op_type = chance.choice(_OPERATORS)
    if chance.random() < 0.2:
        node.domain = chance.choice(("com.microsoft", "ai.onnx.ml", "x" * 5000, "\x1b[2J"))


def _other_attribute(model: Any, chance: random.Random) -> None:
    node = chance.choice([node for node in model.graph.node if node.attribute] or list(model.graph.node))
    if node.attribute and chance.random() < 0.7:
        attribute = chance.choice(node.attribute)
        attribute.i = chance.choice(_SIZES)
        if attribute.ints:
            attribute.ints[chance.randrange(len(attribute.ints))] = chance.choice(_SIZES)
    else:
        names = (
            "axis",
            "perm",
            "to",
            "group",
            "pads",
            "strides",
            "dilations",
            "kernel_shape",
            "allowzero",
            "auto_pad",
            "body",
        )
        value = chance.choice(
            ([chance.choice(_SIZES) for _ in range(chance.randint(1, 9))], chance.choice(_SIZES), "SAME_UPPER")
        )
        node.attribute.append(onnx.helper.make_attribute(chance.choice(names), value))


def _other_tensor(model: Any, chance: random.Random) -> None:
    tensor = chance.choice(model.graph.initializer)
    what = chance.randrange(5)
    if what == 0 and tensor.dims:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(_SIZES)
    elif what == 1:
        tensor.data_type = chance.randrange(30)
    elif what == 2:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", chance.choice(("/dev/zero", "../../a", "/etc/passwd"))),
            ("length", "99999999999"),
        ):
            tensor.external_data.add(key=key, value=value)
    elif what == 3 and tensor.raw_data:
        tensor.raw_data = mutated(tensor.raw_data, chance.randrange(1 << 30))
    else:
        tensor.name = chance.choice(model.graph.initializer).name


def _other_edge(model: Any, chance: random.Random) -> None:
    node, other = chance.choice(model.graph.node), chance.choice(model.graph.node)
    side = chance.choice((node.input, node.output))
    if side:
        side[chance.randrange(len(side))] = chance.choice(
            [*other.output, *other.input, "", "x" * 100_000, "image", "logits"]
        )


def _branch(model: Any, chance: random.Random) -> None:
    inner = onnx.helper.make_graph([], "g", [], [])
    for _ in range(chance.choice((1, 10, 20))):
        node = onnx.helper.make_node(chance.choice(("If", "Loop", "Identity")), ["image"], ["image2"])
        node.attribute.append(onnx.helper.make_attribute("body", inner))
        inner = onnx.helper.make_graph([node], "g", [], [])
    chance.choice(model.graph.node).attribute.append(onnx.helper.make_attribute("then_branch", inner))


def _beside(model: Any, chance: random.Random) -> None:
    what = chance.randrange(5)
    if what == 0:
        model.functions.add(name="f", domain="").node.add(op_type="f")
    elif what == 1:
        sparse = model.graph.sparse_initializer.add(dims=[1 << 40])
        sparse.values.name = chance.choice(model.graph.initializer).name
    elif what == 2:
        model.opset_import.add(domain=chance.choice(("", "x", "com.microsoft")), version=chance.choice((1, 20, 99, -1)))
    elif what == 3:
        model.metadata_props.add(
            key=chance.choice(("a", "modality", "\x1b[2J")), value="x" * chance.choice((1, 1_000_000))
        )
    else:
        model.ir_version = chance.choice((0, 3, 99))


def _many(model: Any, chance: random.Random) -> None:
    node = chance.choice(model.graph.node)
    last = node.output[0]
    for number in range(chance.choice((10, 1000, 30_000))):
        model.graph.node.add(op_type="Add", input=[last, last], output=[f"more{number}"])
        last = f"more{number}"


_GRAPH_CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (
    _other_node, _other_attribute, _other_tensor, _other_edge, _branch, _beside, _many,
)  # fmt: skip


class Things:
    """Whole bundles, checkpoints, recipes and dataset folders in a folder, and changed ones made of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        torch.manual_seed(0)
        model = EspMedSam(model_config("espmedsam-tiny").model_copy(update={"image_size": 64}), ["fundus", "xray"])
        self.checkpoint = folder / "w.safetensors"
        save_checkpoint(self.checkpoint, model, CheckpointInfo(config=model.config, origin="trained"))
        torch.save(
            {f"image_encoder.{key}": value for key, value in model.encoder.state_dict().items()}, folder / "sam.pth"
        )
        info = CheckpointInfo(config=model.config, origin="trained", targets={"fundus": "vessels", "xray": "lungs"})
        arrays = {key: value.numpy() for key, value in model.state_dict().items()}
        write_packed(folder / f"w{SUFFIX}", arrays, {METADATA_KEY: info.model_dump_json()})
        export_bundle(self.checkpoint, folder / "whole.bundle", modalities=["fundus"], image_size=64)
        save_toy_bundle(folder / "toy.bundle")
        self.dataset = folder / "fundus" / "set"
        ids = [f"{number:02d}" for number in range(4)]
        for name in ("images", "masks"):
            (self.dataset / name).mkdir(parents=True)
        for number, name in enumerate(ids):
            for part, picture in zip(("images", "masks"), phantom("fundus", number, (48, 64)), strict=True):
                cv2.imwrite(str(self.dataset / part / f"{name}.png"), picture)
        split = {"origin": "derived", "train": ids[:2], "valid": ids[2:3], "test": ids[3:]}
        (self.dataset / "split.json").write_text(json.dumps(split))

    def kinds(self) -> dict[str, Callable[[random.Random], str]]:
        """What makes a changed thing of each kind; gives the reader's line."""
        return {
            "manifest": self._manifest,
            "graph": self._graph,
            "graph-bytes": self._graph_bytes,
            "checkpoint": self._safetensors,
            "header": self._header,
            "packed": self._packed,
            "foreign": self._foreign,
            "recipe": self._recipe,
            "dataset": self._dataset,
        }

    def whole(self) -> list[str]:
        """Lines for what is unchanged."""
        bundles = [f"bundle {self._folder / name}" for name in ("whole.bundle", "toy.bundle")]
        checkpoints = [f"checkpoint {self.checkpoint}", f"checkpoint {self._folder / f'w{SUFFIX}'}"]
        recipes = [f"recipe {path}" for path in sorted(RECIPES.glob("*.toml"))]
        return [*bundles, *checkpoints, f"foreign {self._folder / 'sam.pth'}", *recipes, f"dataset {self.dataset}"]

    def _copy(self, chance: random.Random) -> Path:
        bundle = self._folder / "changed.bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(self._folder / chance.choice(("whole.bundle", "toy.bundle")), bundle)
        return bundle

    def _manifest(self, chance: random.Random) -> str:
        bundle = self._copy(chance)
        file = bundle / "manifest.json"
        if chance.random() < 0.7:
            file.write_bytes(written(changed(json.loads(file.read_bytes()), chance)))
        else:
            file.write_bytes(mutated(file.read_bytes(), chance.randrange(1 << 30)))
        return f"bundle {bundle}"

    def _with_graph(self, bundle: Path, content: bytes) -> str:
        manifest = json.loads((bundle / "manifest.json").read_bytes())
        entry = manifest["graphs"][0]
        (bundle / entry["file"]).write_bytes(content)
        entry["sha256"] = hashlib.sha256(content).hexdigest()
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        return f"bundle {bundle}"

    def _graph(self, chance: random.Random) -> str:
        bundle = self._copy(chance)
        return self._with_graph(bundle, graph_changed(next(bundle.glob("*.onnx")).read_bytes(), chance))

    def _graph_bytes(self, chance: random.Random) -> str:
        bundle = self._copy(chance)
        return self._with_graph(bundle, mutated(next(bundle.glob("*.onnx")).read_bytes(), chance.randrange(1 << 30)))

    def _file(self, kind: str, name: str, content: bytes) -> str:
        file = self._folder / name
        file.write_bytes(content)
        return f"{kind} {file}"

    def _safetensors(self, chance: random.Random) -> str:
        return self._file(
            "checkpoint", "c.safetensors", mutated(self.checkpoint.read_bytes(), chance.randrange(1 << 30))
        )

    def _header(self, chance: random.Random) -> str:
        """Values of the header and of the metadata in it; the tensors stay."""
        content = self.checkpoint.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        if chance.random() < 0.6:
            about = json.loads(header["__metadata__"]["espmedsam"])
            header["__metadata__"]["espmedsam"] = written(changed(about, chance)).decode("utf-8", "replace")
        else:
            header = changed(header, chance)
        text = written(header)
        return self._file("checkpoint", "c.safetensors", len(text).to_bytes(8, "little") + text + content[8 + length :])

    def _packed(self, chance: random.Random) -> str:
        content = (self._folder / f"w{SUFFIX}").read_bytes()
        return self._file("checkpoint", f"c{SUFFIX}", mutated(content, chance.randrange(1 << 30)))

    def _foreign(self, chance: random.Random) -> str:
        content = mutated((self._folder / "sam.pth").read_bytes(), chance.randrange(1 << 30))
        return self._file("foreign", "c.pth", content if chance.random() < 0.9 else gzip.compress(content))

    def _recipe(self, chance: random.Random) -> str:
        content = chance.choice(sorted(RECIPES.glob("*.toml"))).read_bytes()
        if chance.random() < 0.5:
            return self._file("recipe", "r.toml", mutated(content, chance.randrange(1 << 30)))
        lines = content.decode().splitlines()
        numbers = [number for number, line in enumerate(lines) if "=" in line and not line.startswith("#")]
        number = chance.choice(numbers)
        values = (
            "1e29",
            "-1",
            "nan",
            "inf",
            "0",
            "9" * 5000,
            '""',
            '"\\u001b[2J"',
            "[" * 5000,
            "true",
            "{a={b={}}}",
            "1979-05-27",
        )
        lines[number] = f"{lines[number].partition('=')[0]}= {chance.choice(values)}"
        return self._file("recipe", "r.toml", "\n".join(lines).encode())

    def _dataset(self, chance: random.Random) -> str:
        folder = self._folder / "fundus" / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.dataset, folder)
        if chance.random() < 0.5:
            file = folder / "split.json"
            value = changed(json.loads(file.read_bytes()), chance)
            file.write_bytes(
                written(value) if chance.random() < 0.8 else mutated(written(value), chance.randrange(1 << 30))
            )
            return f"dataset {folder}"
        files = sorted((folder / chance.choice(("images", "masks"))).iterdir())
        fuzzing.file_changed(chance.choice(files), chance)
        return f"dataset {folder}"


def fuzz(inputs: int, seed: int, tell: Callable[[str], None] = print) -> Tally:
    """Read that many changed things, and all whole ones before.

    Raises:
        AssertionError: a whole one is not read.
    """
    reader = Reader("fuzz_models")
    with tempfile.TemporaryDirectory() as name:
        things = Things(Path(name))
        for line in things.whole():
            assert reader.read(line)[0] == "read", line
        return fuzzing.count(reader, things.kinds(), inputs, seed, tell)


if __name__ == "__main__":
    fuzzing.main(__doc__, "fuzz-models", lambda inputs, seed: fuzz(inputs, seed).to_dict())
