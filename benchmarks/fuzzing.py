"""What the fuzzers share: the process that reads, changes of bytes, JSON and files, counting, and the result's file."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment, process_memory

RESULTS = Path(__file__).parent / "results"
SECONDS = 10.0
MEMORY = 2 << 30
PATIENT = "JANE"
"""Of all DICOM files that are made here; no message may hold it."""

_LONGEST = 5000  # characters of a message
_PIXELS = b"\xe0\x7f\x10\x00"  # the tag of pixels in DICOM; with it 32 bytes at most stand before the first frame
_START = "import sys; sys.path.insert(0, sys.argv[1]); import fuzzing, {0}; fuzzing.answer({0}.read)"
FINE = ("read", "partly", "refused")
"""Outcomes: all of it, some of it with a line about the rest, and one line."""
_HANGS = "hangs over"


def answer(read: Callable[[str], str]) -> None:
    """The process that reads: for each line that comes, the most memory needed so far, a space and the outcome."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for what prints
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:
            outcome = read(line.rstrip("\n"))
        except UserError as error:
            outcome = refused(str(error))
        except BaseException as error:  # noqa: BLE001 (any is a finding)
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:150]
            outcome = f"{type(error).__name__}: {text} ({Path(place.filename).name}, {place.name})"
        own = process_memory()[1] or 0  # not getrusage's, which begins with what the parent held when it forked
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(max(own, children), outcome, file=answers, flush=True)


def refused(message: str) -> str:
    """What a message is: "refused", or what is wrong with it."""
    if PATIENT in message:
        return "quotes the header"
    return "several lines" if "\n" in message else "a long line" if len(message) > _LONGEST else "refused"


def told(lines: Iterable[str]) -> str:
    """The outcome of what was read, by the lines about what could not be."""
    outcomes = sorted(map(refused, lines), key=lambda outcome: outcome == "refused")
    return "read" if not outcomes else "partly" if outcomes[0] == "refused" else outcomes[0]


@dataclass(frozen=True)
class Finding:
    """What went wrong, and how to make it again: ``kinds[kind](random.Random(seed))``."""

    kind: str
    seed: int
    what: str


class Reader:
    """A process that reads, started again after each thing that kills it.

    Args:
        module: of this folder; its ``read`` gives the outcome for a line.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[str] | None = None

    def read(self, what: str, starts: int = 0) -> tuple[str, int]:
        """Read what a line names: the outcome, and the most bytes that the process has needed so far.

        Args:
            what: the line.
            starts: of processes that belong to it, each of which may take as long again on a busy machine.
        """
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        hung = threading.Event()

        def stop() -> None:
            hung.set()
            process.kill()

        timer = threading.Timer((1 + starts) * SECONDS, stop)
        timer.start()
        try:
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            memory, _, outcome = line.rstrip("\n").partition(" ")
            return outcome, int(memory)
        self.close()
        return (f"{_HANGS} {SECONDS:g} s" if hung.is_set() else f"dies with code {process.returncode}"), 0

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START.format(self._module), str(Path(__file__).parent)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()  # ready: starting does not count
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def mutated(content: bytes, seed: int) -> bytes:
    """One to four random changes; the same for the same seed.

    Of a DICOM file every second time in its pixels only: decoders do not see much of a file with a damaged header.
    """
    chance = random.Random(seed)
    start = content.find(_PIXELS) + 32 if _PIXELS in content and chance.random() < 0.5 else 0
    data = bytearray(content[start:])
    changes: list[Callable[[bytearray, random.Random], None]] = [_flip, _extreme, _cut, _repeat, _remove, _foreign]
    if chance.random() < 0.1:
        changes.append(_very_many)
    for _ in range(chance.randint(1, 4)):
        if data:
            chance.choice(changes)(data, chance)
    return content[:start] + bytes(data)


def _place(data: bytearray, chance: random.Random) -> int:
    """Half of the time in the first 512 bytes, where headers are."""
    return chance.randrange(min(len(data), 512) if chance.random() < 0.5 else len(data))


def _flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 16)):
        data[_place(data, chance)] ^= 1 << chance.randrange(8)


def _extreme(data: bytearray, chance: random.Random) -> None:
    place, size = _place(data, chance), chance.choice((1, 2, 4, 8))
    value = chance.choice((0, 1, (1 << (8 * size - 1)) - 1, 1 << (8 * size - 1), (1 << (8 * size)) - 1))
    data[place : place + size] = value.to_bytes(size, chance.choice(("big", "little")))


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[_place(data, chance) :]


def _repeat(data: bytearray, chance: random.Random) -> None:
    place = _place(data, chance)
    piece = data[place : place + chance.randint(1, 256)]
    data[place:place] = piece * chance.randint(1, 20)


def _very_many(data: bytearray, chance: random.Random) -> None:
    """A small piece, a hundred thousand times: an element, an item, a chunk, a segment."""
    place = _place(data, chance)
    data[place:place] = bytes(data[place : place + chance.randint(2, 24)]) * 100_000


def _remove(data: bytearray, chance: random.Random) -> None:
    place = _place(data, chance)
    del data[place : place + chance.randint(1, 64)]


def _foreign(data: bytearray, chance: random.Random) -> None:
    place = _place(data, chance)
    piece = chance.randbytes(chance.randint(1, 64))
    data[place : place + len(piece)] = piece


_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, 2**70, 10**400, 1e308, float("nan"), float("inf"), "", "\x1b]0;a\x07", "=1+1",
    "../../a", "/dev/zero", "a" * 100_000, "\u202e", "\0", "\ud800", [], {}, [[]] * 1000, {"a": {"b": [1]}},
)  # fmt: skip


def changed(value: Any, chance: random.Random) -> Any:
    """JSON with one of its values, at any depth, another one, gone or doubled."""
    places = list(_places(value))
    if not places or chance.random() < 0.05:
        return chance.choice(_VALUES)
    holder, key = chance.choice(places)
    what = chance.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.25 and isinstance(holder, list):
        holder.append(holder[key])
    elif what < 0.35 and isinstance(holder, dict):
        holder[str(chance.choice(_VALUES))[:200]] = holder.pop(key)
    elif what < 0.4:
        holder[key] = _nested(chance.choice((10, 1000, 100_000)))
    else:
        holder[key] = chance.choice(_VALUES)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


class _Raw(str):
    """A text that stands in JSON as it is."""


def _nested(depth: int) -> Any:
    return _Raw("[" * depth + "]" * depth)


def written(value: Any) -> bytes:
    """JSON, with what Python's own writer refuses."""
    raw: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, _Raw):
            raw.append(str(value))
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: marked(one) for key, one in value.items()}
        return [marked(one) for one in value] if isinstance(value, list) else value

    most = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(marked(value), indent=1)
    finally:
        sys.set_int_max_str_digits(most)
    for number, piece in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', piece)
    return text.encode("utf-8", "surrogatepass")


_NAMES = ("a\x1b[2J.png", "=1.png", "a\u202eb.png", "b" * 240 + ".png", ".png", "a\udcff.json", "a\nb.txt")


def file_changed(file: Path, chance: random.Random, *, pipes: bool = True) -> None:
    """A file with other bytes, under another name, gone, or something else in its place; also a pipe, unless not."""
    what = chance.randrange(6)
    if what == 0:
        file.rename(file.with_name(chance.choice(_NAMES)))
    elif what == 1:
        file.unlink()
        if chance.random() < 0.8:
            file.symlink_to(chance.choice(("/dev/zero", "nowhere", ".", "/etc/passwd")))
    elif what == 2:
        file.unlink()
        os.mkfifo(file) if pipes and chance.random() < 0.5 else file.mkdir()
    else:
        file.write_bytes(mutated(file.read_bytes(), chance.randrange(1 << 30)))


def json_changed(file: Path, chance: random.Random) -> None:
    """A file of JSON with another value in it, or with other bytes."""
    content = file.read_bytes()
    if chance.random() < 0.75:
        content = written(changed(json.loads(content), chance))
    if chance.random() < 0.3:
        content = mutated(content, chance.randrange(1 << 30))
    file.write_bytes(content)


Kinds = Mapping[str, Callable[[random.Random], str]]
"""What makes a changed thing of each kind, and gives the reader's line for it."""


@dataclass
class Tally:
    """How often which outcome, by kind; the findings; the most memory that was needed."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    slow: list[Finding] = field(default_factory=list)  # took too long once, and not when made and read again
    most_memory: int = 0

    def of(self, outcome: str) -> int:
        """How often, of all kinds."""
        return sum(counts[outcome] for counts in self.outcomes.values())

    def to_dict(self) -> dict[str, Any]:
        """As the result has it."""
        return {
            "outcomes": {kind: dict(sorted(counts.items())) for kind, counts in sorted(self.outcomes.items())},
            "most_memory_bytes": self.most_memory,
            "findings": [vars(finding) for finding in self.findings],
            "too_slow_once": [vars(finding) for finding in self.slow],
        }


def count(reader: Reader, kinds: Kinds, inputs: int, seed: int, tell: Callable[[str], None] = print) -> Tally:
    """Have so many changed things read, of each kind in turn; each has the seed after that of the one before.

    Args:
        reader: closed in the end.
        kinds: of things.
        inputs: how many.
        seed: of the first.
        tell: of each finding.
    """
    tally, names = Tally({kind: Counter() for kind in kinds}), list(kinds)
    try:
        for number in range(inputs):
            kind = names[number % len(names)]
            outcome, memory = reader.read(kinds[kind](random.Random(seed + number)))
            if outcome.startswith(_HANGS):  # as anything does while the machine stands still
                tally.slow.append(Finding(kind, seed + number, outcome))
                outcome, memory = reader.read(kinds[kind](random.Random(seed + number)))
                if outcome.startswith(_HANGS):
                    tally.slow.pop()
            if outcome in FINE and memory > MEMORY:
                outcome = f"needs {memory / 1e9:.1f} GB"
                reader.close()  # the most is remembered: a fresh process for what follows
            if outcome not in FINE:
                tally.findings.append(Finding(kind, seed + number, outcome))
                tell(str(tally.findings[-1]))
                outcome = "finding"
            tally.outcomes[kind][outcome] += 1
            tally.most_memory = max(tally.most_memory, memory)
    finally:
        reader.close()
    return tally


def main(about: str | None, kind: str, measure: Callable[[int, int], dict[str, Any]]) -> None:
    """The command of a fuzzer: measure and write the result.

    Args:
        about: the script's own words.
        kind: of the result.
        measure: given how many inputs and the seed, what was found.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    environment = collect_environment()
    given = {"inputs": arguments.inputs, "seed": arguments.seed}
    result = {"schema": 2, "kind": kind, **given, **measure(arguments.inputs, arguments.seed)}
    document = {"environment": environment, **result}
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(document, indent=1) + "\n")
    print(json.dumps(result, indent=1))
