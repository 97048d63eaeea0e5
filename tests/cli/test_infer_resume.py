"""``infer --resume`` and ``--shard``: what is finished stays; runs that were killed or shared end as one left alone."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from video_files import save_clip

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.inference import infer as infer_sources
from espmedsam_edge.runtime.request import InferenceRequest, ModelOptions, Outputs, ReadingOptions
from espmedsam_edge.runtime.resumption import settings_of
from espmedsam_edge.runtime.sinks.journal import Journal

Outcome = tuple[int, str, str]
Infer = Callable[..., Outcome]
WANTED = ("--out", "o", "--masks", "m", "--jsonl", "a.jsonl", "--csv", "a.csv", "--labels", "l", "--objects", "b.csv")

# One process that forks a run for each number: it is killed at its so many-th step that leaves something on the disk.
KILLED = """
import os, signal, sys
from pathlib import Path
from espmedsam_edge.cli import infer, main
from espmedsam_edge.runtime import inference  # with all that a run imports, once
from espmedsam_edge.runtime.backends import onnxruntime_backend
from espmedsam_edge.runtime.sinks import recording
from espmedsam_edge.runtime.video import pyav
from espmedsam_edge.runtime.sinks import growing_file, journal, sink

arguments, numbers = sys.argv[1:-1], [int(word) for word in sys.argv[-1].split(",")]
import onnxruntime
if pyav.has_pyav():
    pyav.load_pyav()
log = os.open("steps.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def arm(number):
    steps = [0]
    def counted(function):
        def call(*arguments, **named):
            for _ in range(2):  # before it and behind it
                steps[0] += 1
                if steps[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                if _ == 0:
                    result = function(*arguments, **named)
            return result
        return call
    def told(word, function, name):
        def call(*arguments, **named):
            result = function(*arguments, **named)
            os.write(log, f"{word} {name(arguments)}\\n".encode())
            return result
        return call
    for owner, name in ((Path, "replace"), (os, "fsync"), (os, "link"), (journal.Journal, "_append")):
        setattr(owner, name, counted(getattr(owner, name)))
    journal.Journal.done = told("done", journal.Journal.done, lambda arguments: arguments[1])
    sink._write = told("wrote", sink._write, lambda arguments: arguments[0].stem)

for number in numbers:
    child = os.fork()
    if child == 0:
        arm(number)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main(arguments)
        except SystemExit as ended:
            os._exit(ended.code or 0)
        os._exit(70)
    status = os.waitpid(child, 0)[1]
    print("killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""


@pytest.fixture
def inputs(infer: Infer) -> Path:
    """A folder of five pictures and a clip where the command runs."""
    generator = np.random.default_rng(11)
    Path("in").mkdir()
    for number in range(5):
        assert cv2.imwrite(f"in/p{number}.png", generator.integers(0, 256, (48, 64, 3), np.uint8))
    save_clip(Path("in/c.avi"), 4)
    return Path("in")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON without what differs between two runs of the same."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "milliseconds"} for line in lines]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_at_any_step_it_ends_as_a_run_left_alone(inputs: Path, infer: Infer, toy_bundle: Bundle) -> None:
    os.mkdir("alone")
    assert infer(inputs, *(f"alone/{w}" if not w.startswith("-") else w for w in WANTED))[0] == 0
    whole = infer_steps(["infer", str(toy_bundle.path), str(inputs), "--resume", *in_folder("count")], [10**6])
    assert whole == ["0"]
    generator = random.Random(5)
    ends: list[str] = []
    for trial in range(2):
        Path("steps.log").unlink()
        folder = f"t{trial}"
        numbers = [generator.randrange(1, 30) for _ in range(6)] + [10**6]
        arguments = ["infer", str(toy_bundle.path), str(inputs), "--resume", *in_folder(folder)]
        ends += infer_steps(arguments, numbers)
        assert ends[-1] == "0"
        for made in ("o", "m"):
            expected, found = files_of(Path("alone", made)), files_of(Path(folder, made))
            assert list(found) == list(expected)  # nothing half-written stays either
            assert {name: data for name, data in found.items() if name.endswith(".png")} == {
                name: data for name, data in expected.items() if name.endswith(".png")
            }
        assert Path(folder, "a.csv").read_bytes() == Path("alone/a.csv").read_bytes()
        assert lines_of(Path(folder, "a.jsonl")) == lines_of(Path("alone/a.jsonl"))
        assert sorted(path.name for path in Path(folder).iterdir()) == [
            "a.csv", "a.jsonl", "b.csv", "l", "m", "o", "o.journal",
        ]  # fmt: skip
        done: set[str] = set()
        for line in Path("steps.log").read_text().splitlines():
            word, name = line.split()
            assert word == "done" or name not in done
            if word == "done":
                done.add(Path(name).stem)
        assert done <= {"p0", "p1", "p2", "p3", "p4", "c"}  # without what was killed right behind it
    assert ends.count("killed") > 5


def in_folder(folder: str) -> list[str]:
    return [word if word.startswith("-") else f"{folder}/{word}" for word in WANTED]


def infer_steps(arguments: list[str], numbers: list[int]) -> list[str]:
    command = [sys.executable, "-c", KILLED, *arguments, ",".join(map(str, numbers))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def changed(before: dict[str, int]) -> set[str]:
    return {name for name, time in times().items() if before.get(name) != time}


def times() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for folder in ("o", "m") for path in Path(folder).rglob("*.*")}


def test_what_is_done_again_is_what_changed(inputs: Path, infer: Infer) -> None:
    assert infer(inputs, *WANTED, "--resume")[0] == 0
    before, table = times(), Path("a.csv").read_bytes()
    code, _, err = infer(inputs, *WANTED, "--resume")
    assert (code, err) == (0, "o.journal: 6 of 6 files are done already.\n")
    assert (changed(before), Path("a.csv").read_bytes()) == (set(), table)

    picture = np.full((48, 64, 3), 255, np.uint8)
    assert cv2.imwrite("in/p1.png", picture)
    Path("m/p3.png").unlink()
    assert cv2.imwrite("in/p9.png", picture)
    os.utime("in/p0.png")  # the same content
    assert infer(inputs, *WANTED, "--resume")[0] == 0
    assert changed(before) == {f"{folder}/p{number}.png" for folder in "om" for number in (1, 3, 9)}
    sources = [line["source"] for line in lines_of(Path("a.jsonl"))]
    assert sources == [*(f"in/p{number}.png" for number in (0, 1, 2, 3, 4, 9)), *["in/c.avi"] * 4]
    with open("a.csv", newline="") as stream:
        assert [row["source"] for row in csv.DictReader(stream)] == sources

    before = times()
    assert infer(inputs, *WANTED, "--resume", "--threshold", "0.9")[0] == 0
    assert len(changed(before)) == len(before)
    assert all(line["threshold"] == 0.9 for line in lines_of(Path("a.jsonl")))


def test_a_failed_file_is_tried_again_and_its_lines_count_once(inputs: Path, infer: Infer) -> None:
    Path("in/p2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    clip = Path("in/c.avi").read_bytes()
    Path("in/c.avi").write_bytes(clip[: len(clip) // 2])
    for _ in range(2):
        code, _, err = infer(inputs, "--masks", "m", "--csv", "a.csv", "--resume")
        assert code == 1
        assert err.count("failed: ") == len([line for line in err.splitlines() if line.startswith("failed")]) >= 1
        rows = Path("a.csv").read_text().splitlines()
        assert len(rows) == len(set(rows))
        assert len([row for row in rows if row.startswith("in/p")]) == 4
    Path("in/c.avi").write_bytes(clip)
    assert cv2.imwrite("in/p2.png", np.zeros((48, 64, 3), np.uint8))
    assert infer(inputs, "--masks", "m", "--csv", "a.csv", "--resume")[0] == 0
    assert len(Path("a.csv").read_text().splitlines()) == 1 + 5 + 4


def test_shards_are_the_whole_and_names_do_not_collide(inputs: Path, infer: Infer) -> None:
    os.mkdir("other")
    for number in range(3):
        assert cv2.imwrite(f"other/p{number}.png", np.full((48, 64, 3), 80 * number, np.uint8))
    assert infer(inputs, "other", "--masks", "whole", "--jsonl", "whole.jsonl")[0] == 0
    for number in (1, 2, 3, 4):
        arguments = (inputs, "other", "--masks", "m", "--jsonl", "a.jsonl", "--shard", f"{number}/4", "--resume")
        assert infer(*arguments)[0] == 0
    assert files_of(Path("m")) == files_of(Path("whole"))
    shards = [lines_of(Path(f"a-{number}-of-4.jsonl")) for number in (1, 2, 3, 4)]
    assert not Path("a.jsonl").exists()
    together = sorted((line for lines in shards for line in lines), key=lambda line: (line["source"], line["frame"]))
    assert together == sorted(lines_of(Path("whole.jsonl")), key=lambda line: (line["source"], line["frame"]))
    before = times()
    code, _, err = infer(inputs, "other", "--masks", "m", "--jsonl", "a.jsonl", "--shard", "1/2", "--resume")
    assert code == 0
    assert err == ""
    assert changed(before) == set()  # what other numbers of shards had done is known
    assert len(lines_of(Path("a-1-of-2.jsonl"))) == 5  # every second of nine files, which are pictures
    code, _, err = infer(inputs, "--csv", "t.csv", "--shard", "9/9")
    assert (code, err) == (0, "")
    assert Path("t-9-of-9.csv").read_text().count("\n") == 1  # there are six files


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1/0", "two", "1", "-1/3", "1/3/5", "1/9999999"])
def test_a_shard_that_is_none_is_one_line(inputs: Path, infer: Infer, shard: str) -> None:
    code, out, err = infer(inputs, "--masks", "m", f"--shard={shard}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"shard {shard} is " in err
    assert not Path("m").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["in", "--masks", "m", "--frames", "2"], "whole files"),
        (["in", "--masks", "m", "--duration", "2"], "whole files"),
        (["in", "--masks", "m", "--no-overwrite"], "--no-overwrite"),
        (["in", "--jsonl", "-"], "- is none"),
        (["in"], "a place"),
        (["test://fundus", "--masks", "m"], "is none"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(inputs: Path, infer: Infer, arguments: list[str], told: str) -> None:
    code, _, err = infer(*arguments, "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert told in err


def test_pictures_are_shown_on_the_scale_of_all_in_every_shard(infer: Infer) -> None:
    os.mkdir("deep")
    for number, most in enumerate((1000, 20000, 65535)):
        picture = np.random.default_rng(number).integers(0, most, (48, 64), np.uint16)
        assert cv2.imwrite(f"deep/s{number}.png", picture)
    assert infer("deep", "--out", "whole")[0] == 0
    for number in (1, 2, 3):
        assert infer("deep", "--out", "o", "--shard", f"{number}/3")[0] == 0
    assert files_of(Path("o")) == files_of(Path("whole"))
    assert infer("deep", "--out", "r", "--resume")[0] == 0
    Path("r/s0.png").unlink()
    assert infer("deep", "--out", "r", "--resume")[0] == 0
    assert files_of(Path("r")) == files_of(Path("whole"))


def test_the_size_that_a_crop_holds_for_is_remembered(infer: Infer) -> None:
    os.mkdir("in")
    for name, size in (("a", (48, 64)), ("b", (48, 64)), ("c", (64, 80)), ("d", (48, 64))):
        assert cv2.imwrite(f"in/{name}.png", np.full((*size, 3), 90, np.uint8))
    for _ in range(2):
        code, _, err = infer("in", "--masks", "m", "--crop", "0,0,32,32", "--resume")
        assert (code, "cannot crop in/c.png" in err) == (1, True)
        assert sorted(path.name for path in Path("m").iterdir()) == ["a.png", "b.png", "d.png"]
        Path("m/d.png").unlink()


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.done("a", "s", "0" * 64, [], (1, 2))
        with pytest.raises(UserError, match="another run is writing"):
            Journal(tmp_path / "j")
        with Journal(tmp_path / "j", "1-of-2") as other:
            assert other.record("a", "s") is not None
            assert (other.found, other.record("a", "t")) == (False, None)
    with Journal(tmp_path / "j") as journal:
        assert journal.found


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "notes.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match="no journal"):
        Journal(tmp_path / "j")
    for mine in ("my notes\n", "my notes", "7\n{}\n", '{"journal"'):
        place = tmp_path / "mine" / "all.jsonl"
        place.parent.mkdir(exist_ok=True)
        place.write_text(mine)
        if mine == '{"journal"':  # what a kill leaves of the first line
            Journal(place.parent).close()
            continue
        with pytest.raises(UserError, match="no journal"):
            Journal(place.parent)
        assert place.read_text() == mine
    for name in ("pipe", "folder"):
        (tmp_path / name).mkdir()
        place = tmp_path / name / "all.jsonl"
        os.mkfifo(place) if name == "pipe" else place.mkdir()
        for run in ("all", "1-of-2"):
            with pytest.raises(UserError, match="no ordinary file"):
                Journal(tmp_path / name, run)
    (tmp_path / "link").symlink_to(tmp_path / "j")
    with pytest.raises(UserError, match="link"):
        Journal(tmp_path / "link")


@pytest.mark.parametrize(
    "entry",
    [
        {"done": 1},
        {"done": ["a", "s", "h", [1], [1, 2], True]},
        {"done": ["a", "s", "h", [], [float("inf"), 2], True]},
        {"began": []},
        {"done": {}},
        {"done": [7, "s", "h", [], [1, 2], True]},
        {"done": ["a", None, "h", [], [1, 2], True]},
        {"done": ["a", "s", ["h"], [], [1, 2], True]},
        {"done": ["a", "s", "h", [["m/\0", 1]], [1, 2], True]},
        {"done": ["a", "s", "h", [[3, 1]], [1, 2], True]},
        {"done": ["a", "s", "h", [], [-1, 2], True]},
        {"done": ["a", "s", "h", [], [10**20, 2], True]},
    ],
)
def test_a_damaged_journal_is_one_line(tmp_path: Path, entry: dict[str, Any]) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.done("a", "s", "0" * 64, [], (1, 2))
    with (tmp_path / "j" / "all.jsonl").open("a") as stream:
        stream.write(json.dumps(entry) + "\n")
    with pytest.raises(UserError, match="damaged"):
        Journal(tmp_path / "j")


@pytest.mark.parametrize(
    "entries",
    [[], ["a"], [1, 2], [None, {}], "ab", [{"a": 1}, "b"]]
    + [["x", point] for point in (["p", 1, {}, 0], [7, 1, 2, 0], ["p", None, 7], [], {})],
)
def test_damaged_lines_of_a_journal_are_one_line(inputs: Path, infer: Infer, entries: object) -> None:
    arguments = (inputs, "--jsonl", "a.jsonl", "--plot", "p.png", "--resume")
    assert infer(*arguments)[0] == 0
    (journal,) = Path().glob("*.journal/all.jsonl")
    lines = journal.read_text().splitlines()
    (place, *_) = (number for number, line in enumerate(lines) if line.startswith("["))
    lines[place] = json.dumps(list(entries) if isinstance(entries, str) else entries)
    journal.write_text("\n".join(lines) + "\n")
    code, _, err = infer(*arguments)
    assert code == 1
    assert "a.jsonl.journal is damaged" in err
    assert "Traceback" not in err


def test_what_a_damaged_journal_says_of_places_is_done_again(inputs: Path, infer: Infer) -> None:
    """Nothing that it names elsewhere is touched."""
    wanted = ("--masks", "m", "--csv", "a.csv", "--plot", "p.png")
    Path("mine").mkdir()
    Path("mine/notes.partial.csv").write_text("mine")
    Path("mine/.p0.0123456789ab.png").write_text("mine")
    assert infer(inputs, *wanted, "--resume")[0] == 0
    place = Path("m.journal/all.jsonl")
    sound = place.read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(sound) if line.startswith("["))
    done = next(number for number, line in enumerate(sound) if line.startswith('{"done"'))
    label, *others = json.loads(sound[done])["done"]
    for outputs in ([["../mine/notes.partial.csv", 4]], [["/etc/passwd", None]], [["m/p0.png", 1]], []):
        again = {"done": [label, *others[:2], outputs, *others[3:]]}
        place.write_text("".join([*sound, sound[first], json.dumps(again) + "\n"]))
        assert infer(inputs, *wanted, "--resume")[0] == 0
    for line in ("[" * 100_000 + "\n", "9" * 10_000 + "\n", '["half'):  # what comes after it is done again
        place.write_text("".join([*sound[: done + 1], line]))
        code, _, err = infer(inputs, *wanted, "--resume")
        assert (code, err) == (0, "m.journal: 1 of 6 files are done already.\n")
    assert [path.read_text() for path in Path("mine").iterdir()] == ["mine", "mine"]


def test_every_option_counts_but_those_that_change_nothing(toy_bundle: Bundle) -> None:
    """A new option counts unless it is put into the list of those that do not."""

    def settings(**changed: object) -> str:
        parts = [ModelOptions(), ReadingOptions(), Outputs()]
        for part in parts:
            for name in vars(part):
                if f"{type(part).__name__}.{name}" in changed:
                    object.__setattr__(part, name, changed[f"{type(part).__name__}.{name}"])
        return settings_of(InferenceRequest([], parts[0], parts[2], parts[1]), toy_bundle)

    before = settings()
    counts = {
        name: settings(**{name: "other"}) != before
        for part in (ModelOptions(), ReadingOptions(), Outputs())
        for name in (f"{type(part).__name__}.{field}" for field in vars(part))
    }
    without = {name for name, matters in counts.items() if not matters}
    places = {"out", "masks", "mask_video", "dicom_seg", "dicom_sr", "labels"}  # which the records name themselves
    ways = {"overwrite", "resume", "stream", "publish", "export", "export_to"}
    limits = {"frames", "duration", "max_latency", "give_up", "decoder", "shard"}
    assert without <= {
        "ModelOptions.threads",
        "ModelOptions.url",
        *(f"ReadingOptions.{name}" for name in limits),
        *(f"Outputs.{name}" for name in places | ways),
    }
    assert {"ModelOptions.threshold", "ModelOptions.tta", "ReadingOptions.crop", "Outputs.contours"} <= {
        *counts
    } - without


def test_names_that_are_hidden_are_not_in_the_journal(inputs: Path, infer: Infer) -> None:
    (inputs / "p0.png").rename(inputs / "DOE_JANE.png")
    for _ in range(2):
        assert infer(inputs, "--masks", "m", "--anonymous-names", "--resume", "--csv", "a.csv")[0] == 0
    text = Path("m.journal/all.jsonl").read_text()
    assert "source-1-0001" in text
    assert not {"DOE", "in/"} & {word for word in ("DOE", "in/") if word in text}


def test_from_python_the_report_says_what_was_done_before(inputs: Path, toy_bundle: Bundle) -> None:
    model, outputs = ModelOptions(toy_bundle), Outputs(masks="m", plot="p.png", resume=True)
    first = infer_sources([inputs], model, outputs, ReadingOptions(shard="1/2"))
    assert (first.done, first.frames) == (0, 3)
    picture = Path("p-1-of-2.png").read_bytes()
    again = infer_sources([inputs], model, outputs, ReadingOptions(shard="1/2"))
    assert (again.done, again.frames, Path("p-1-of-2.png").read_bytes() == picture) == (3, 0, True)
