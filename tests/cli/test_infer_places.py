"""Where ``espmedsam-edge infer`` writes: over nothing of the user's, into pipes, and never where another run writes."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from seg_sources import save_dicom
from video_files import save_clip

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.destinations import Claims
from espmedsam_edge.errors import UserError, printable
from espmedsam_edge.runtime.inference import infer as infer_sources
from espmedsam_edge.runtime.request import Outputs
from espmedsam_edge.runtime.run.jobs import RunProgress
from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.reading import open_video

Outcome = tuple[int, str, str]
Infer = Callable[..., Outcome]

# Every output of a file, an option each: its name, a place for it, and an input that has such a result.
FILES = [
    ("--out", "o.png", "a.png"),
    ("--out", "o.jpg", "a.png"),
    ("--out", "o.mkv", "c.avi"),
    ("--mask-video", "o.mp4", "c.avi"),
    ("--jsonl", "o.jsonl", "a.png"),
    ("--csv", "o.csv", "a.png"),
    ("--objects", "o.csv", "a.png"),
    ("--plot", "o.png", "a.png"),
    ("--dicom-seg", "o.dcm", "d.dcm"),
    ("--dicom-sr", "o.dcm", "d.dcm"),
]
FOLDERS = [
    ("--out", "a.png"),
    ("--masks", "a.png"),
    ("--masks", "c.avi"),
    ("--labels", "a.png"),
    ("--labels", "c.avi"),
    ("--mask-video", "c.avi"),
]


@pytest.fixture
def inputs(infer: Infer) -> list[Path]:
    """A picture, a clip and a DICOM file where the command runs."""
    photo = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)
    assert cv2.imwrite("a.png", photo)
    save_clip(Path("c.avi"), 3)
    save_dicom(Path("d.dcm"))
    return [Path(name) for name in ("a.png", "c.avi", "d.dcm")]


def place_of(option: str, source: str) -> Path:
    """The file that a folder's option writes to for an input."""
    if option in ("--masks", "--labels") and source == "c.avi":
        return Path("results/c/000000.png")
    return Path("results") / f"{Path(source).stem}{'.png' if source == 'a.png' else '.mp4'}"


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(("option", "place", "source"), FILES)
def test_a_foreign_file_is_replaced_only_when_told(infer: Infer, option: str, place: str, source: str) -> None:
    for content in (b"chapter one\n", b"\x89PNG\r\n\x1a\n" + bytes(100), b'{"source": "my notes"}\n'):
        Path(place).write_bytes(content)
        for flags in ((), ("--no-overwrite",)):
            code, _, err = infer(source, option, place, *flags)
            assert (code, err.count("\n"), f"{place} exists" in err) == (2, 1, True)
            assert Path(place).read_bytes() == content
    code, _, err = infer(source, option, place, "--overwrite")
    assert (code, err) == (0, "")
    written = Path(place).read_bytes()
    assert infer(source, option, place)[0] == 0  # now it is ours
    assert infer(source, option, place, "--no-overwrite")[0] == 2
    assert len(Path(place).read_bytes()) > 0
    assert written != b'{"source": "my notes"}\n'


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(("option", "source"), FOLDERS)
def test_foreign_files_in_a_folder_are_replaced_only_when_told(infer: Infer, option: str, source: str) -> None:
    place = place_of(option, source)
    place.parent.mkdir(parents=True)
    place.write_bytes(b"drawn by hand")
    neighbour = place.with_name("notes.txt")
    neighbour.write_text("mine")
    code, _, err = infer(source, option, "results")
    assert (code, err.count("\n")) == (2, 1)
    assert "exists and is no" in err
    assert place.read_bytes() == b"drawn by hand"
    assert infer(source, option, "results", "--overwrite")[0] == 0
    assert infer(source, option, "results")[0] == 0
    assert place.read_bytes() != b"drawn by hand"
    assert neighbour.read_text() == "mine"


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("link", ["same", "hard", "soft", "around"])
@pytest.mark.parametrize(("option", "place", "source"), FILES)
def test_no_output_replaces_an_input(infer: Infer, option: str, place: str, source: str, link: str) -> None:
    target = Path(place)
    original = target.with_name(f"input{Path(source).suffix}")
    Path(source).rename(original)
    before = original.read_bytes()
    inputs = [str(original)]
    if link == "same":
        original.rename(target)
        inputs = [place]
    elif link == "hard":
        os.link(original, target)
    elif link == "soft":
        target.symlink_to(original)
    else:
        Path("folder").mkdir()
        os.link(original, target)
        target = Path("folder") / ".." / place
    for flags in ((), ("--overwrite",), ("--no-overwrite",)):
        code, _, err = infer(*inputs, option, str(target), *flags)
        assert (code in (1, 2), err.count("\n")) == (True, 1), err
    assert Path(inputs[0]).read_bytes() == before
    assert "would replace an input" in infer(*inputs, option, str(target), "--overwrite")[2] or link == "same"


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
@pytest.mark.parametrize(("option", "place", "source"), FILES)
def test_nothing_goes_into_a_bundle_or_the_cache(
    infer: Infer,
    toy_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    place: str,
    source: str,
    flags: tuple[str, ...],
) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "engines" / "deep"
    cached.mkdir(parents=True)
    before = {path: path.read_bytes() for path in toy_bundle.path.iterdir()}
    Path("link").symlink_to(toy_bundle.path)
    for folder in (toy_bundle.path, toy_bundle.path / "new", Path("link"), cached):
        code, _, err = infer(source, option, str(folder / place), *flags)
        assert (code, err.count("\n"), "results do not go into it" in err) == (2, 1, True), err
    for file in before:
        code, _, err = infer(source, option, str(file), *flags)
        assert (code, err.count("\n")) == (2, 1), err
    assert {path: path.read_bytes() for path in toy_bundle.path.iterdir()} == before
    assert not any(cached.iterdir())


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(
    ("option", "place"), [("--csv", "f"), ("--jsonl", "hard"), ("--plot", "f"), ("--out", "link.png")]
)
@pytest.mark.parametrize("what", ["config", "password"])
def test_no_output_replaces_what_else_is_read(infer: Infer, option: str, place: str, what: str) -> None:
    Path("f").write_text("threads = 1\n")
    Path("hard").hardlink_to("f")
    Path("link.png").symlink_to("f")
    publish = "mqtt://me@localhost:1/topic?password-file=f"
    also = ("--config", "f") if what == "config" else ("--publish", publish)
    code, _, err = infer("a.png", option, place, "--overwrite", *also)
    assert (code, f"{place} would replace an input" in err) == (2, True), err
    assert Path("f").read_text() == "threads = 1\n"
    assert Path("link.png").is_symlink()


def test_a_second_input_taken_for_the_output_stays(infer: Infer, inputs: list[Path]) -> None:
    """``infer a.png --out b.png`` where ``b.png`` was meant to be segmented, too."""
    Path("b.png").write_bytes(Path("a.png").read_bytes())
    code, _, err = infer("a.png", "--out", "b.png")
    assert (code, "b.png exists and is no picture of this program" in err) == (2, True)
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()


def test_a_file_that_could_not_be_read_is_an_input_too(infer: Infer, inputs: list[Path]) -> None:
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    code, _, err = infer("a.png", "broken.png", "--jsonl", "broken.png", "--overwrite")
    assert (code, "would replace an input" in err) == (2, True)
    assert Path("broken.png").read_bytes() == b"\x89PNG\r\n\x1a\nno more"


def read_in_background(path: Path) -> tuple[threading.Thread, list[bytes]]:
    content: list[bytes] = []
    thread = threading.Thread(target=lambda: content.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, content


@pytest.mark.parametrize("place", ["", ".", "/proc/self/mem", "/proc/new", "/dev/fd/99", "open for reading"])
@pytest.mark.parametrize(
    ("option", "source"), [(option, source) for option, place, source in FILES if place != "o.jpg"]
)
def test_what_can_be_no_file_is_one_line(
    infer: Infer, inputs: list[Path], option: str, source: str, place: str
) -> None:
    before = [path.read_bytes() for path in inputs]
    with open(os.devnull, "rb") as stream:
        place = f"/dev/fd/{stream.fileno()}" if place == "open for reading" else place
        code, _, err = infer(source, option, place)
    if place not in ("", ".") or option in ("--jsonl", "--csv", "--objects", "--plot"):  # the others make files in it
        assert code in (1, 2)
        assert [line for line in err.splitlines() if line.startswith(("error: ", "failed: "))], err
    assert [path.read_bytes() for path in inputs] == before


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(("option", "place", "source"), FILES)
def test_a_fifo_is_written_to(infer: Infer, option: str, place: str, source: str) -> None:
    if source == "c.avi" and not has_pyav():
        pytest.skip("needs PyAV")
    os.mkfifo(place)
    thread, content = read_in_background(Path(place))
    code, _, err = infer(source, option, place)
    assert (code, err) == (0, "")
    thread.join(60)
    assert Path(place).is_fifo()
    copy = Path(f"copy{Path(place).suffix}")
    copy.write_bytes(content[0])
    if source == "c.avi":
        assert len(list(open_video(copy))) == 3
    elif copy.suffix in (".png", ".jpg"):
        assert cv2.imread(str(copy)) is not None
    elif copy.suffix == ".dcm":
        assert content[0][128:132] == b"DICM"
    else:
        assert len(copy.read_text().splitlines()) == {"--jsonl": 1, "--csv": 2, "--objects": 8}[option]


@pytest.mark.usefixtures("inputs")
def test_a_socket_gets_the_lines(infer: Infer) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("lines.sock")
        server.listen()
        assert infer("a.png", "--jsonl", "lines.sock")[0] == 0
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as stream:
            assert json.loads(stream.read())["source"] == "a.png"
    assert Path("lines.sock").is_socket()
    code, _, err = infer("a.png", "--jsonl", "lines.sock")
    assert (code, err) == (1, "error: nobody reads lines.sock. Start its reader first, and let it read.\n")


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(("option", "name"), [("--csv", "-"), ("--jsonl", "/dev/stdout"), ("--csv", "/proc/self/fd/1")])
def test_standard_output_holds_the_lines_alone(toy_bundle: Bundle, option: str, name: str) -> None:
    command = [sys.executable, "-m", "espmedsam_edge", "infer", str(toy_bundle.path), "a.png", option, name]
    with open("redirected.txt", "wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, check=True)
    text = Path("redirected.txt").read_text()
    if option == "--csv":
        assert [row["source"] for row in csv.DictReader(text.splitlines())] == ["a.png"]
    else:
        assert [json.loads(line)["source"] for line in text.splitlines()] == ["a.png"]
    assert b"1 frame in" in done.stderr
    assert Path("/dev/stdout").is_symlink()


@pytest.mark.usefixtures("inputs")
def test_two_results_on_standard_output_are_refused(infer: Infer) -> None:
    code, _, err = infer("a.png", "--jsonl", "-", "--csv", "-")
    assert (code, err) == (2, "error: two results would be written to standard output. Write one of them to a file.\n")


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(("option", "place", "source"), FILES)
def test_a_place_another_run_writes_to_is_refused(infer: Infer, option: str, place: str, source: str) -> None:
    with Claims() as other:
        with other.planning():
            other.add([Path(place).absolute()])
        code, _, err = infer(source, option, place)
        assert (code, err.count("\n"), f"another run is writing to {place}." in err) == (1, 1, True)
        assert not Path(place).exists()
    assert infer(source, option, place)[0] == 0


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("planted", ["link", "folder"])
def test_what_others_put_where_runs_tell_their_places_is_not_used(
    infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """In a folder of theirs a run would wait for a lock, or a pipe, as long as they like, and remove what it finds."""
    if os.geteuid() != 0:
        pytest.skip("only the superuser can give a folder away")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(shared))
    theirs = tmp_path / "elsewhere" if planted == "link" else shared / "runs"
    theirs.mkdir()
    (theirs / "holiday.places").write_text("Rome")
    if planted == "link":
        (shared / "runs").symlink_to(theirs)
    else:
        os.chown(theirs, 54321, 54321)
    lock = os.open(theirs / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    release = threading.Timer(20, os.close, [lock])  # so that a run that waits ends
    release.start()
    began = time.monotonic()
    code, _, err = infer("a.png", "--masks", "m")
    waited = time.monotonic() - began
    release.cancel()
    assert (code, waited < 15, "where each of them writes" in err) == (0, True, True)
    assert Path("m/a.png").exists()
    assert (theirs / "holiday.places").read_text() == "Rome"


def test_live_runs_started_together_keep_all_of_theirs(toy_bundle: Bundle, infer: Infer) -> None:
    """Of runs with the same places, each has a number of its own, or with --no-overwrite all but one are refused."""
    places = ["--out", "rec.mkv", "--masks", "m", "--jsonl", "r.jsonl", "--csv", "r.csv"]
    command = [sys.executable, "-m", "espmedsam_edge", "infer", str(toy_bundle.path), "test://fundus?size=64x48&fps=50"]
    limits = ["--frames", "20"]
    stood = ("rec.mkv", "m/test-fundus", "r.jsonl", "r.csv")
    for flags, finished in (([], 3), (["--no-overwrite"], 1)):
        folder = Path("kept" if flags else "numbered")
        folder.mkdir()
        runs = [
            subprocess.Popen([*command, *limits, *places, *flags], cwd=folder, stderr=subprocess.PIPE, text=True)
            for _ in range(2 + (not flags))
        ]
        errors = [run.communicate()[1] for run in runs]
        assert [run.returncode for run in runs].count(0) == finished, errors
        for run, error in zip(runs, errors, strict=True):
            # A run that comes while another writes names the first of its places that stands by then.
            assert run.returncode == 0 or (error.count("\n") == 1 and any(place in error for place in stood)), error
        names = ["r.jsonl", *(f"r-{number}.jsonl" for number in range(2, finished + 1))]
        assert sorted(path.name for path in folder.glob("*.jsonl")) == sorted(names)
        for name in names:
            number = name.removeprefix("r").removesuffix(".jsonl")
            lines = (folder / name).read_text().splitlines()
            masks = {path.name for path in (folder / "m" / f"test-fundus{number}").iterdir()}
            assert masks == {f"{json.loads(line)['frame']:06d}.png" for line in lines}
            assert len(lines) == 20
            assert (folder / f"rec{number}.mkv").is_file()
            assert len((folder / f"r{number}.csv").read_text().splitlines()) == 21


def test_a_file_that_came_meanwhile_stays(toy_bundle: Bundle, inputs: list[Path], said: list[str]) -> None:
    def interfere(_: object) -> None:
        Path("r.jsonl").write_text("written by someone else\n")

    infer_sources("c.avi", toy_bundle, Outputs(jsonl="r.jsonl"), on_progress=interfere)
    assert Path("r.jsonl").read_text() == "written by someone else\n"
    assert len(Path("r-2.jsonl").read_text().splitlines()) == 3
    assert said[-1] == "r.jsonl was written by another program meanwhile; this run's is r-2.jsonl."


@pytest.mark.parametrize("option", ["out", "masks", "plot", "dicom_seg"])
@pytest.mark.parametrize("came", ["text", "picture", "link"])
def test_a_picture_that_came_meanwhile_stays(toy_bundle: Bundle, inputs: list[Path], option: str, came: str) -> None:
    """Decided again when it is written, by the same rule: one of ours is replaced, and with ``overwrite`` any file."""
    names = ["d.dcm", "e.dcm", "f.dcm"] if option == "dicom_seg" else ["a.png", "b.png", "c.png"]
    for name in names[1:]:
        Path(name).unlink(missing_ok=True)
        Path(name).write_bytes(Path(names[0]).read_bytes())
    folder = Path("o")
    places = {name: folder / (f"{name[0]}-seg.dcm" if option == "dicom_seg" else name) for name in names}
    place = places[names[1]]
    if option == "plot":
        place = folder / "plot.png"
    foreign = Path("mine")
    foreign.write_bytes(Path("a.png").read_bytes() if came == "picture" else b"mine")
    before = foreign.read_bytes()

    def interfere(progress: RunProgress) -> None:
        if progress.job == 0:
            folder.mkdir(exist_ok=True)
            place.symlink_to(foreign.absolute()) if came == "link" else place.write_bytes(before)

    def run(overwrite: bool | None) -> list[str]:
        outputs = Outputs(**{option: place if option == "plot" else folder}, overwrite=overwrite)
        try:
            report = infer_sources(names, toy_bundle, outputs, on_progress=interfere)
        except UserError as error:  # of a result of all inputs
            return [str(error)]
        return [failure.message for failure in report.failures]

    (failure,) = run(None)
    assert f"{place} was put there meanwhile, not by this run, and stays." in failure
    assert (place.read_bytes(), place.is_symlink()) == (before, came == "link")
    if option != "plot":
        assert places[names[2]].is_file()
    place.unlink()
    assert run(True) == []
    assert place.read_bytes() != before
    assert not place.is_symlink()
    assert foreign.read_bytes() == before


def test_names_stay_what_they_are(toy_bundle: Bundle, infer: Infer) -> None:
    """Bytes that are not UTF-8, accents composed otherwise, brackets, per cent, a newline, 250 letters."""
    photo = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))[1].tobytes()
    names = [
        *(b"Aufnahme_M\xfcller.png", "\u00e9-nfc.png".encode(), "e\u0301-nfd.png".encode(), b"scan [1] (copy).png"),
        *(
            b"100%d frame_%04d.png",
            b"two\nlines.png",
            b"a;rm -rf b.png",
            b"trailing .png",
            b"a?b*c.png",
            b"x" * 250 + b".png",
        ),
    ]
    Path("in").mkdir()
    for name in names:
        Path(os.fsdecode(b"in/" + name)).write_bytes(photo)
    code, _, err = infer("in", "--masks", "m", "--csv", "r.csv", "--jsonl", "r.jsonl", "--plot", "r.png")
    assert (code, err) == (0, "")
    assert set(os.listdir(b"m")) == set(names)
    with open("r.csv", encoding="utf-8", newline="") as stream:
        shown = {row["source"] for row in csv.DictReader(stream)}
    assert shown == {printable(os.fsdecode(b"in/" + name)) for name in names}
    sources = {json.loads(line)["source"] for line in Path("r.jsonl").read_text().splitlines()}
    assert sources == {os.fsdecode(b"in/" + name) for name in names}


def test_a_run_refuses_from_python_as_well(toy_bundle: Bundle, inputs: list[Path]) -> None:
    with pytest.raises(UserError, match="would replace an input"):
        infer_sources("a.png", toy_bundle, Outputs(out="a.png", overwrite=True))
