"""Damaged annotations, pairs, journals, exports and results: what reads them, or writes there, says a line or goes on.

    python benchmarks/fuzz_folders.py --name fuzz-folders-MACHINE [--inputs 5000] [--seed 0]

Whole ones are made by the program itself (COCO, LabelMe, YOLO by ``infer --export``) and changed: a file's bytes, its
JSON's values, its name, or what stands in its place (a link to /dev/zero, a pipe, a folder). Annotations and pairs are
read by ``data prepare``; a run goes on by a changed journal, and writes once more over changed results and exports. A
finding is what it is in ``fuzz.py``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import fuzzing
import numpy as np
from fuzzing import Reader, Tally

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from toy_bundles import save_toy_bundle

from espmedsam_edge.errors import printable
from espmedsam_edge.runtime.inference import infer
from espmedsam_edge.runtime.request import ModelOptions, Outputs
from espmedsam_edge.training.data.annotated import READERS, find_annotated
from espmedsam_edge.training.data.pairs import find_pairs
from espmedsam_edge.training.data.prepare import prepare

EXPORTS = ("coco", "labelme", "yolo", "cvat", "geojson")
SIZE = (96, 128)


def read(line: str) -> str:
    """Read what a line names: a kind, and the folder that holds the inputs, the bundle and what was changed."""
    kind, _, name = line.partition(" ")
    folder = Path(name)
    if kind in (*READERS, "pairs"):
        return _prepared(kind, folder)
    report = infer(
        [folder / "in"],
        ModelOptions(str(folder / "toy.bundle"), backend="onnxruntime-cpu", threads=1),
        _outputs(folder / "made", kind, overwrite=True if kind in EXPORTS else None),
    )
    return fuzzing.told(failure.message for failure in report.failures)


def _prepared(kind: str, folder: Path) -> str:
    target = folder / "prepared"
    shutil.rmtree(target, ignore_errors=True)
    made = folder / "made"
    found = find_pairs(made / "in", made / "masks") if kind == "pairs" else find_annotated(kind, made / "export")
    return fuzzing.told(map(printable, prepare(found, target, keep_empty=True).failures))  # as ``tell_failures`` does


def _outputs(folder: Path, kind: str, overwrite: bool | None = None) -> Outputs:
    """What a run writes: its own results, those of a run with a journal, or an export."""
    if kind in EXPORTS:
        return Outputs(masks=folder / "masks", export=kind, export_to=folder / "export", overwrite=overwrite)
    tables: dict[str, Any] = {name: folder / f"{name}.csv" for name in ("csv", "objects")}
    folders: dict[str, Any] = {name: folder / name for name in ("out", "masks", "labels")}
    plot = folder / "plot.png" if kind == "journal" else None
    return Outputs(jsonl=folder / "lines.jsonl", plot=plot, resume=kind == "journal", **tables, **folders)


class Folders:
    """Whole ones in a folder, and changed ones made of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        save_toy_bundle(folder / "toy.bundle", ("histopathology",))
        (folder / "in").mkdir()
        for number in range(3):
            noise = np.random.default_rng(number).integers(0, 256, (8, 10, 3), np.uint8)
            cv2.imwrite(str(folder / "in" / f"p{number}.png"), cv2.resize(noise, SIZE[::-1]))
        model = ModelOptions(str(folder / "toy.bundle"), backend="onnxruntime-cpu", threads=1)
        for kind in ("journal", "results", *EXPORTS):
            made = folder / "made"
            infer([folder / "in"], model, _outputs(made, kind))  # at the place where it will be read: names are kept
            made.rename(folder / f"whole-{kind}")
        whole = folder / "whole-pairs"
        shutil.copytree(folder / "in", whole / "in")
        shutil.copytree(folder / "whole-journal" / "masks", whole / "masks")

    def kinds(self) -> dict[str, Callable[[random.Random], str]]:
        """What changes one of each kind; gives the reader's line. Journals and annotations take more turns."""
        names = ["pairs", "results", *EXPORTS]
        changed = {f"{name}-written" if name in EXPORTS else name: partial(self._changed, name) for name in names}
        read = {name: partial(self._annotations, name) for name in READERS}
        return changed | read | {"journal": self._journal, "journal-values": self._journal_values}

    def whole(self) -> list[str]:
        """Lines for what is unchanged, each to be read before the next is made."""
        return ["pairs", "results", "journal", *EXPORTS]

    def copy(self, kind: str) -> Path:
        """A whole one where it will be read."""
        made = self._folder / "made"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(self._folder / f"whole-{kind}", made)
        return made

    def _changed(self, kind: str, chance: random.Random) -> str:
        files = sorted(path for path in self.copy(kind).rglob("*") if path.is_file())
        fuzzing.file_changed(chance.choice(files), chance, pipes=kind == "pairs")  # results wait for a pipe's reader
        return f"{kind} {self._folder}"

    def _annotations(self, form: str, chance: random.Random) -> str:
        files = sorted(path for path in (self.copy(form) / "export").rglob("*") if path.is_file())
        texts = [path for path in files if path.suffix in (".json", ".txt", ".yaml")]
        file = chance.choice(files if chance.random() < 0.2 else texts)
        if file.suffix == ".json":
            fuzzing.json_changed(file, chance)
        elif file.suffix == ".txt" and chance.random() < 0.5:
            file.write_text(_line_changed(file.read_text(), chance))
        else:
            fuzzing.file_changed(file, chance)
        return f"{form} {self._folder}"

    def _journal(self, chance: random.Random) -> str:
        (file,) = self.copy("journal").glob("*.journal/*")
        fuzzing.file_changed(file, chance)
        return f"journal {self._folder}"

    def _journal_values(self, chance: random.Random) -> str:
        made = self.copy("journal")
        (file,) = made.glob("*.journal/*")
        lines = file.read_bytes().splitlines()
        number = chance.randrange(len(lines))
        value = fuzzing.changed(json.loads(lines[number]), chance)
        lines[number] = fuzzing.written(value).replace(b"\n", b"")
        file.write_bytes(b"\n".join(lines) + b"\n")
        if chance.random() < 0.3:  # and one of its files is to be done again
            os.unlink(chance.choice(sorted(made.glob("masks/*"))))
        return f"journal {self._folder}"


def _line_changed(text: str, chance: random.Random) -> str:
    """A text of numbers with one of its words another, or very many of them."""
    words = text.split(" ")
    place = chance.randrange(len(words))
    words[place : place + 1] = chance.choice(
        (["nan"], ["1e999"], ["-1"], ["1e-300"], ["9" * 5000], [""], ["0.1 0.9"] * 100_000, ["0.5"] * 3, ["\x1b[2J"])
    )
    return " ".join(words)


def fuzz(inputs: int, seed: int, tell: Callable[[str], None] = print) -> Tally:
    """Read that many changed ones, and all whole ones before.

    Raises:
        AssertionError: a whole one is not read.
    """
    reader = Reader("fuzz_folders")
    with tempfile.TemporaryDirectory() as name:
        folders = Folders(Path(name))
        for kind in folders.whole():
            folders.copy(kind)
            outcome = reader.read(f"{kind} {name}")[0]
            assert outcome == "read", (kind, outcome)
        return fuzzing.count(reader, folders.kinds(), inputs, seed, tell)


if __name__ == "__main__":
    fuzzing.main(__doc__, "fuzz-folders", lambda inputs, seed: fuzz(inputs, seed).to_dict())
