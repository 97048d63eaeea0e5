"""What SIGKILL takes of a run: each command is killed at random moments and started again, until it ends by itself.

    python benchmarks/kills.py --name kills-MACHINE [--kills 50] [--only slide,resume,...]

For each command, so many kills, over the time that it takes alone. After each, what stands under its own name must be
whole; in the end the results must be those of a run left alone. In every second run the time of day, as Python reads
it, goes back by an hour on the way. Needs Debian's mosquitto for ``publish`` and Ray for ``batch``. The DICOM listener
has a script of its own: ``dicom_kill.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from bundle_server import serving
from forked_runs import ForkedRuns
from made_slides import save_slide, tissue_picture
from mosquitto import Mosquitto, hearing
from seg_sources import save_dicom
from toy_bundles import save_toy_bundle
from video_files import save_clip

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment

RESULTS = Path(__file__).parent / "results"
_INFER = ("infer", "toy.bundle", "in", "--threads", "1", "--backend", "onnxruntime-cpu")
_OUT = (
    *("--out", "out/overlays", "--masks", "out/masks", "--labels", "out/labels", "--jsonl", "out/lines.jsonl"),
    *("--csv", "out/areas.csv", "--objects", "out/objects.csv"),
)
_AGAIN = 5  # kills of one folder at most, before it is left to end


@dataclass(frozen=True)
class Case:
    """A command. ``last``: what it is started with at the end, where that differs."""

    arguments: Sequence[str]
    last: Sequence[Sequence[str]] = ()
    modules: Sequence[str] = ()


CASES = {
    "slide": Case(
        (
            "slide",
            "toy.bundle",
            "a.tif",
            "--out",
            "out",
            "--everything",
            "--threads",
            "1",
            "--tile",
            "1024",
            "--no-instances",
        )
    ),
    "resume": Case((*_INFER, "--resume", *_OUT)),
    "shard": Case(
        (*_INFER, "--resume", "--shard", "1/2", *_OUT),
        tuple((*_INFER, "--resume", "--shard", f"{number}/2", *_OUT) for number in (1, 2)),
    ),
    "plain": Case((*_INFER, *_OUT)),
    "export": Case((*_INFER[:2], "in/p*.png", "--export", "coco", "--export-to", "out/coco", "--overwrite")),
    "dicom-sr": Case(("infer", "toy.bundle", "in/d*.dcm", "--dicom-sr", "out/reports", "--resume", "--threads", "1")),
    "batch": Case(("batch", "toy.bundle", "in", "--out", "out", "--workers", "1")),
}


@dataclass
class Outcome:
    """How a command fared."""

    seconds_alone: float
    kills: int = 0
    ended_by_themselves: int = 0
    folders: int = 0
    faults: list[str] = field(default_factory=list)


def prepare(folder: Path) -> None:
    """What all commands work on."""
    save_toy_bundle(folder / "toy.bundle", ("histopathology",))
    (folder / "in").mkdir()
    generator = np.random.default_rng(7)
    for number in range(12):
        cv2.imwrite(str(folder / "in" / f"p{number}.png"), generator.integers(0, 256, (96, 128, 3), np.uint8))
    save_clip(folder / "in" / "c.avi", 30)
    for number in range(4):
        save_dicom(folder / "in" / f"d{number}.dcm", PixelSpacing=[0.5, 0.5])
    save_slide(folder / "a.tif", np.kron(tissue_picture((100, 1200)), np.ones((8, 8, 1), np.uint8)), levels=2)


def tree(folder: Path, *, rests: bool) -> dict[str, str]:
    """Each file, and a hash of what of it is the same for all runs of the same; ``rests``: also what kills left."""
    found = {}
    for path in sorted(folder.rglob("*")):
        left = ".partial" in path.name or path.name.startswith(".")
        if path.suffix == ".parquet":  # named at random; their rows are compared
            continue
        if path.is_file() and not _of_a_journal(path.relative_to(folder)) and (rests or not left):
            found[str(path.relative_to(folder))] = hashlib.sha256(_lasting(path)).hexdigest()[:16]
    return found


def _of_a_journal(place: Path) -> bool:
    return any(part == "journal" or part.endswith(".journal") for part in place.parts)  # ``batch``'s, and ``infer``'s


def _lasting(path: Path) -> bytes:
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return json.dumps([{key: one[key] for key in one if key != "milliseconds"} for one in lines]).encode()
    if path.suffix == ".dcm":
        from pydicom import dcmread

        values = [str(element.value) for element in dcmread(path).iterall() if element.keyword == "NumericValue"]
        return json.dumps(values).encode()
    if path.name.endswith(".ome.tif"):
        import tifffile

        return bytes(tifffile.imread(path, level=0).tobytes())
    return path.read_bytes()


def rows(folder: Path) -> list[str]:
    """A batch's table, a row a line, in order; nothing of other commands."""
    if not (folder / "frames").is_dir():
        return []
    from pyarrow import parquet

    table = parquet.read_table(folder / "frames").to_pylist()
    return sorted(f"{row['source']} {row['frame']} {row['area_px']} {row['error']}" for row in table)


def half_written(folder: Path) -> list[str]:
    """Files under their own names that cannot be read to their ends."""
    found = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in place.parts) or _of_a_journal(place)
        if not path.is_file() or hidden or ".partial" in path.name:
            continue
        try:
            if path.suffix in (".png", ".jpg"):
                assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is not None
            elif path.suffix in (".json", ".geojson"):
                json.loads(path.read_bytes())
            else:
                _lasting(path)
        except Exception as error:  # noqa: BLE001 (any is a fault, which is told)
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}")
    return found


def kill_and_go_on(case: Case, inputs: Path, folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Kill a command so often, and compare what it ends with."""
    chance = random.Random(seed)
    last = case.last or (case.arguments,)
    rests = "--resume" in case.arguments  # no other run removes what an earlier one left
    with ForkedRuns() as forked:

        def begun(name: str) -> Path:
            place = folder / name
            place.mkdir()
            for path in inputs.iterdir():
                (place / path.name).symlink_to(path)
            return place

        for name in ("warm", "alone"):
            alone = begun(name)
            ended = [forked.run(alone, arguments) for arguments in last]
            assert not any(one.code for one in ended), ended
        outcome = Outcome(round(ended[0].seconds, 2))
        wanted = tree(alone / "out", rests=rests), rows(alone / "out")
        while outcome.kills < kills:
            place = begun(f"killed-{outcome.folders}")
            outcome.folders += 1
            for number in range(min(_AGAIN, kills - outcome.kills)):
                after = chance.uniform(0.02, 1.1 * ended[0].seconds)
                back = chance.uniform(0, after) if number % 2 else None
                code = forked.run(place, case.arguments, kill_after=after, clock_back_after=back).code
                outcome.kills += code == -9
                outcome.ended_by_themselves += code != -9
                if code not in (-9, 0):
                    outcome.faults.append(f"ended with {code}")
                outcome.faults += half_written(place / "out")
                if code == 0:
                    break
            for arguments in last:
                done = forked.run(place, arguments, clock_back_after=0.1)
                if done.code:
                    outcome.faults.append(f"could not go on: {done.err[-300:]}")
            found = tree(place / "out", rests=rests), rows(place / "out")
            if found != wanted:
                names = sorted(set(found[0].items()) ^ set(wanted[0].items())) + sorted(set(found[1]) ^ set(wanted[1]))
                outcome.faults.append(f"ends otherwise: {names[:4]}")
            shutil.rmtree(place)
    return outcome


def kill_publishers(inputs: Path, folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Runs that publish: what came is in order and without a gap, and the broker says that they are lost."""
    chance, outcome = random.Random(seed), Outcome(0)
    (folder / "broker").mkdir()
    source = "test://histopathology?fps=30&size=160x120"
    with ExitStack() as stack:
        broker = stack.enter_context(Mosquitto(folder / "broker"))
        forked = stack.enter_context(ForkedRuns())
        heard = stack.enter_context(hearing(broker.port, "t"))
        for number in range(kills):
            topic = f"t/{number}"
            arguments = [
                "infer",
                str(inputs / "toy.bundle"),
                source,
                "--publish",
                f"mqtt://127.0.0.1:{broker.port}/{topic}",
            ]
            back = 0.5 if number % 2 else None
            code = forked.run(
                folder, [*arguments, "--threads", "1"], kill_after=chance.uniform(1, 12), clock_back_after=back
            ).code
            outcome.kills += code == -9
            outcome.faults += [f"ended with {code}"] * (code != -9)
            until = time.monotonic() + 5
            while time.monotonic() < until and not [s for s in heard.of(f"{topic}/status") if s["status"] == "lost"]:
                time.sleep(0.02)
            said = [status["status"] for status in heard.of(f"{topic}/status")]
            if said and said != ["running", "lost"]:
                outcome.faults.append(f"status {said}")
            frames = [line["frame"] for line in heard.of(topic)]
            outcome.folders += bool(frames)
            if sorted(set(frames)) != frames:
                outcome.faults.append(f"out of order: {frames[:20]}")
    return outcome


def kill_pushes(inputs: Path, folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Pushes: each commit that stands on the server holds a whole bundle, and another push is enough."""
    chance, wanted = random.Random(seed), {path.name: path.read_bytes() for path in (inputs / "toy.bundle").iterdir()}
    with serving() as server:
        os.environ |= {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_none", "HF_HOME": str(folder / "hub")}
        with ForkedRuns(modules=("espmedsam_edge.cli.push", "huggingface_hub")) as forked:
            ended = [forked.run(folder, ["push", str(inputs / "toy.bundle"), f"hf://owner/warm-{n}"]) for n in (0, 1)]
            assert not any(one.code for one in ended), ended
            outcome = Outcome(round(ended[1].seconds, 2))
            while outcome.kills < kills:
                name = f"owner/killed-{outcome.folders}"
                outcome.folders += 1
                arguments = ["push", str(inputs / "toy.bundle"), f"hf://{name}"]
                code = forked.run(folder, arguments, kill_after=chance.uniform(0.01, 1.1 * ended[1].seconds)).code
                outcome.kills += code == -9
                outcome.ended_by_themselves += code == 0
                for _, files in server.repositories.get(name, []):
                    if not wanted.items() <= files.items():
                        outcome.faults.append(f"a commit without {sorted(wanted.keys() - files.keys())}")
                again = forked.run(folder, arguments)
                if again.code or not wanted.items() <= server.repositories[name][-1][1].items():
                    outcome.faults.append(f"could not go on: {again.err[-300:]}")
    return outcome


SPECIAL: dict[str, Callable[[Path, Path, int], Outcome]] = {"publish": kill_publishers, "push": kill_pushes}


def measure(names: Sequence[str], kills: int) -> dict[str, dict[str, Any]]:
    """Each command's outcome."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name, "inputs")
        inputs.mkdir()
        prepare(inputs)
        for one in names:
            place = Path(name, one)
            place.mkdir()
            if one in SPECIAL:
                outcome = SPECIAL[one](inputs, place, kills)
            else:
                outcome = kill_and_go_on(CASES[one], inputs, place, kills)
            found[one] = vars(outcome) | {"faults": len(outcome.faults), "first_faults": outcome.faults[:3]}
            print(one, found[one], flush=True)
            shutil.rmtree(place)
    return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--only", default=",".join((*CASES, *SPECIAL)), help="commands, with commas")
    parser.add_argument("--note", help="what should be known of the circumstances")
    arguments = parser.parse_args()
    environment = collect_environment()
    commands = measure(arguments.only.split(","), arguments.kills)
    note = {"note": arguments.note} if arguments.note else {}
    document = {"schema": 1, "kind": "kills", "environment": environment, **note, "commands": commands}
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
