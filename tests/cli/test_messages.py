"""What the package tells: records for who asks, bare lines on standard error for the commands."""

from __future__ import annotations

import errno
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge import Segmenter
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import COMMANDS, main
from espmedsam_edge.cli.messages import Messages, once, tell_failures
from espmedsam_edge.runtime.backends import backend
from espmedsam_edge.runtime.sources.source import Failure

PACKAGE = logging.getLogger("espmedsam_edge")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    cv2.imwrite(str(tmp_path / "100%s.png"), np.zeros((8, 8, 3), np.uint8))
    return str(tmp_path / "100%s.png")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def python(code: str) -> str:
    """What a fresh Python prints, on both streams."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


LOADED = "import espmedsam_edge as e, numpy as np\nwith e.Segmenter.load({!r}, threads=1) as s: s.choice.tell()"


def test_a_program_that_did_not_ask_sees_nothing(toy_bundle: Bundle) -> None:
    code = LOADED.format(str(toy_bundle.path))
    warn = "\nfrom espmedsam_edge.runtime.sources import live; live.log.warning('it dropped out')"
    assert python(code + warn) == ""
    asked = "import logging; logging.basicConfig(level=logging.INFO, format='%(name)s|%(message)s')\n" + code
    first = python(asked).splitlines()[0]
    assert first.startswith("espmedsam_edge.runtime.backends.backend|Running on onnxruntime")


def test_a_record_carries_its_modules_name(toy_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "espmedsam_edge")
    with Segmenter.load(toy_bundle, backend="onnxruntime-cpu", threads=1) as segmenter:
        segmenter.choice.tell()
    told = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert (backend.__name__, "DEBUG", "histopathology fp32 is loaded on onnxruntime-cpu (CPU, 1 thread)") in told
    assert (backend.__name__, "INFO", "Running on onnxruntime-cpu (CPU, 1 thread).") in told


@pytest.mark.parametrize("command", ["evaluate", "bench"])
@pytest.mark.usefixtures("no_gpu")
def test_quiet_and_verbose_stand_before_or_after_the_command(
    command: str, toy_bundle: Bundle, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "set"
    for folder in ("images", "masks"):
        (data / folder).mkdir(parents=True)
        cv2.imwrite(str(data / folder / "a.png"), np.eye(40, dtype=np.uint8) * 255)
    (data / "split.json").write_text('{"train": [], "valid": [], "test": ["a"]}')
    arguments: dict[str, tuple[object, ...]] = {
        "evaluate": (toy_bundle.path, data, "--modality", "histopathology", "--size", 32),
        "bench": (toy_bundle.path, picture, "--duration", "0.01", "--no-roofline"),
    }
    shown = {}
    for options in ((), ("--quiet", ""), ("", "-q"), ("-v", ""), ("", "--verbose")):
        before, after = options or ("", "")
        assert run(*filter(None, (before, command, after)), *arguments[command]) == 0
        shown[options] = capsys.readouterr().err.splitlines()
    usual = shown[()]
    assert usual[0].startswith("Running on onnxruntime (CPU")
    assert usual[1].startswith("not tensorrt")
    for options, lines in shown.items():
        if "q" in "".join(options):
            assert lines == []
        elif options:
            assert [line for line in usual if f"espmedsam_edge.runtime.backends.backend: {line}" not in lines] == []
            assert any("is loaded on onnxruntime" in line for line in lines)
            assert all(re.match(r"espmedsam_edge(\.\w+)+: ", line) for line in lines)


def test_results_and_failures_are_shown_to_the_quiet(
    toy_bundle: Bundle, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code = run("infer", "-q", toy_bundle.path, picture, tmp_path / "bad.png", "--masks", tmp_path / "masks")
    shown = capsys.readouterr()
    assert code == 1
    assert "1 frame in " in shown.out
    assert shown.err.startswith("failed: ")
    assert shown.err.count("\n") == 1


def test_they_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-q", "weights", "--verbose") == 2
    assert capsys.readouterr().err == "error: --verbose and --quiet exclude each other. Leave one of them out.\n"


GROUPS = {
    "import": ["sam"],
    "train": ["segment", "all"],
    "data": ["check", "layouts"],
    "engines": ["list", "clean"],
    "deploy": ["triton"],
    "dicom": ["listen"],
}


@pytest.mark.parametrize(
    "words", [(name, below) for name in COMMANDS for below in GROUPS.get(name, [""])], ids=lambda words: " ".join(words)
)
def test_every_command_has_both(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*filter(None, words), "--help") == 0
    out = capsys.readouterr().out
    assert "-v, --verbose" in out
    assert "-q, --quiet" in out


def test_two_runs_in_a_process_leave_no_handler_and_print_a_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(PACKAGE.handlers), PACKAGE.level, PACKAGE.propagate
    for _ in range(2):
        assert run("data", "layouts", "--verbose") == 0
    assert (list(PACKAGE.handlers), PACKAGE.level, PACKAGE.propagate) == before
    assert run("weights", "--modality", "nosuch", "--out", "x") == 2
    assert (list(PACKAGE.handlers), PACKAGE.level, PACKAGE.propagate) == before
    capsys.readouterr()
    root = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(root)  # as a library may
    try:
        with Messages():
            PACKAGE.info("only once")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err == "only once\n"


def test_names_with_percent_signs_and_escapes_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with Messages() as messages:
        for verbose in (False, True):
            messages.choose(verbose=verbose)
            PACKAGE.getChild("x").info("%s dropped out", "rtsp://h/50%s%d\x1b[2J")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("rtsp")[0] for line in lines] == ["", "espmedsam_edge.x: "]
    assert all("rtsp://h/50%s%d" in line and "\x1b" not in line and "dropped out" in line for line in lines)


def test_what_was_told_is_told_once_within_a_block_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with Messages():
        for _ in range(2):
            with once():
                for _ in range(3):
                    PACKAGE.info("for every %s", "graph")
        PACKAGE.info("after it")
        PACKAGE.info("after it")
    assert capsys.readouterr().err.splitlines() == ["for every graph"] * 2 + ["after it"] * 2


def test_lines_of_other_rooms_may_come_again(capsys: pytest.CaptureFixture[str]) -> None:
    with Messages(), once("imaging"):
        for room in ("imaging.decode", "runtime.sources.live") * 2:
            PACKAGE.getChild(room).info("from %s", room)
    live = "from runtime.sources.live"
    assert capsys.readouterr().err.splitlines() == ["from imaging.decode", live, live]


def test_lines_stand_above_a_progress_bar() -> None:
    code = (
        "import logging\n"
        "from espmedsam_edge.cli.messages import Messages\n"
        "from espmedsam_edge.terminal import progress_bars\n"
        "with Messages(), progress_bars(auto_refresh=False) as bars:\n"
        "    task = bars.add_task('working', total=9)\n"
        "    for number in range(3):\n"
        "        bars.update(task, advance=1, refresh=True)\n"
        "        logging.getLogger('espmedsam_edge.x').info('line %d ' + 200 * 'x', number)\n"
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert child.wait(60) == 0
    assert b"working" in shown
    for number in range(3):  # on a line of its own that was cleared, and not broken by us
        assert re.search(rb"(\x1b\[2K|\n)line %d x{200}\r?\n" % number, shown), shown


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 400. KiB for an array"),
        ImportError("libXau.so.6: failed to map segment from shared object"),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_memory_that_runs_out_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("espmedsam_edge.shipped.bundles.shipped_scores", full)
    with pytest.raises(SystemExit) as caught:
        main(["weights"])
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: memory ran out. Close other programs")
    assert told.count("\n") == 1


@pytest.mark.parametrize("in_numpy", [False, True])
def test_a_command_that_is_interrupted_while_it_is_loaded_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_numpy: bool
) -> None:
    def interrupted(name: str) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            if in_numpy:
                raise ImportError("initialization failed") from error
            raise

    monkeypatch.setattr("espmedsam_edge.cli.import_module", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["weights"])
    assert (caught.value.code, capsys.readouterr().err) == (130, "Aborted!\n")


@pytest.mark.parametrize("count", [0, 300, 1000, 1001])
def test_every_failure_is_listed_up_to_a_thousand(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    tell_failures([f"cannot read {number}." for number in range(count)])
    listed = [f"failed: cannot read {number}." for number in range(min(count, 1000))]
    assert capsys.readouterr().err.splitlines() == listed + ["failed: 1 more."] * (count > 1000)


@pytest.mark.parametrize(
    "words",
    [
        "infer BUNDLE PICTURE --masks LONG",
        "infer BUNDLE PICTURE --out LONG/a.png",
        "infer BUNDLE PICTURE --jsonl LONG",
        "infer LONG PICTURE",
        "slide LONG",
        "slide BUNDLE PICTURE --out LONG",
        "data check LONG",
        "demo --out LONG",
        "evaluate LONG LONG",
        "export LONG --out o",
        "bench LONG",
    ],
)
def test_a_name_that_is_too_long_is_one_line(
    words: str, toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("picture.png", np.zeros((40, 50), np.uint8))
    names = {
        "BUNDLE": str(toy_bundle.path),
        "PICTURE": "picture.png",
        "LONG": "a" * 300,
        "LONG/a.png": "a" * 300 + "/a.png",
    }
    with pytest.raises(SystemExit) as left:
        main([names.get(word, word) for word in words.split()])
    assert left.value.code in (1, 2)
    error = capsys.readouterr().err
    assert "aaa" in error
    assert "too long" in error
    lines = [line for line in error.splitlines() if not line.startswith("Preparing ")]  # the shipped weights, once
    assert len(lines) == 1


@pytest.mark.parametrize("duration", ["inf", "1e300"])
def test_a_duration_without_end_is_none(
    duration: str, toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("picture.png", np.zeros((40, 50), np.uint8))
    with pytest.raises(SystemExit) as left:
        main(["infer", str(toy_bundle.path), "picture.png", "--masks", "masks", "--duration", duration])
    assert not left.value.code


def test_a_line_end_in_a_name_forges_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    named = Failure("a", "cannot read a\nfailed: all of it.png: it is damaged.").message
    tell_failures([named, "b\r\nfailed: c"])
    assert capsys.readouterr().err.splitlines() == [
        "failed: cannot read a\\nfailed: all of it.png: it is damaged.",
        "failed: b\\r\\nfailed: c",
    ]


WRONG = (
    "infer a.png --pixel-size 0", "infer a.png --frames 0", "infer a.png --frames x", "infer --every", "infer --nope",
    "infer --frame 3", "batch x", "evaluate", "deploy triton b --out o --engine none", "deploy nope", "deploy triton",
    "train segment --nope", "data check --similarity 2", "slide a.svs --level -1", "dicom listen --port 70000",
    "--nope", "demo --out", "weights --nope=a\nb", "bench --backend", "engines show \x1b[2J",
)  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_wrong_options_are_one_line_as_all_else(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*line.split(" ")) == 2
    out, told = capsys.readouterr()
    assert (out, told[:7], told.count("\n"), told[-1]) == ("", "error: ", 1, "\n")
    assert not any(word in told for word in ("Value error", "\x1b", "Usage"))


def test_a_group_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy") == 2
    assert "\n  triton " in capsys.readouterr().err


def test_what_was_written_is_not_said_to_be_gone(toy_bundle: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "espmedsam_edge", "deploy", "triton", str(toy_bundle.path), "--out"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, str(tmp_path / "out")], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "standard output" in done.stderr
    assert "what was written elsewhere stays" in done.stderr
    assert any((tmp_path / "out").iterdir())
