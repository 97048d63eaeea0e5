"""Names from outside on the terminal: shown, and without effect there."""

from __future__ import annotations

import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError, printable
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.terminal import progress_bars, tell, terminal_console

NAME = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.\u2066b\u200b\r\x7f"
"""Sets the title, clears the screen, colours (also by C1), turns the direction of reading, goes back to the start."""


def acts(text: str) -> list[str]:
    """The characters that do something on a terminal other than being shown; line ends are the program's own."""
    return [char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char != "\n"]


def test_every_character_that_acts_is_escaped_and_the_others_stay() -> None:
    everything = "".join(chr(code) for code in range(0x110000))
    shown = printable(everything)
    assert not acts(shown)
    assert "\n" not in shown
    kept = "Jané 患者 Ω ’ – ° 😀 a b\\c"
    assert printable(kept) == kept
    assert printable("a\x1bb\u202ec\udce9") == r"a\x1bb\u202ec\udce9"


def test_lines_keep_their_ends(capsys: pytest.CaptureFixture[str]) -> None:
    tell(f"{NAME}\nb")
    tell(NAME, err=True)
    out, err = capsys.readouterr()
    assert out.count("\n") == 2
    assert not acts(out + err)
    assert r"\x1b]0;owned" in out
    assert r"\x1b]0;owned" in err


def test_a_bar_and_a_table_show_names_and_keep_their_own_colours() -> None:
    stream = io.StringIO()
    console = terminal_console(file=stream, force_terminal=True, width=200, color_system="standard")
    with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
        bar.add_task(NAME)
    table = Table(NAME)
    table.add_row(f"x{NAME}", style="red")
    console.print(table)
    written = stream.getvalue()
    assert "\x1b[31mx" in written
    assert "owned" in written
    for sequence in ("\x1b]0", "\x1b[2J", "\x9b", "\u202e", "\u2066", "\u200b", "\x7f"):
        assert sequence not in written


def test_brackets_and_colons_of_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("a[/red]b", "[bold]c[/bold]", "[link=x]d", ":smile:", "e[1]")
    console = terminal_console(width=200)
    table = Table(*names, title=names[0])
    table.add_row(*names)
    console.print(table)
    with progress_bars(TextColumn("{task.description}"), auto_refresh=False) as bars:
        for name in names:
            bars.add_task(name)
        bars.console.print(bars.get_renderable())
    out, err = capsys.readouterr()
    for name in names:
        assert out.count(name) >= 2, name
        assert name in err


def test_errors_are_one_printable_line() -> None:
    error = UserError(f"no file {NAME}.", f"Look at {NAME}.")
    assert not acts(f"{error.message}{error.hint}{error}")
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "arguments",
    [
        [f"{NAME}"],
        ["infer", f"--{NAME}"],
        ["infer", "--precision", NAME, "test://"],
        ["infer", "--modality", NAME, "picture.png"],
        ["infer", f"{NAME}.png"],
        ["infer", f"test://{NAME}"],
        ["infer", f"rtsp://{NAME}/"],
        ["infer", f"{NAME}.png", "picture.png", "--modality", "fundus"],
        ["infer", "picture.png", "--frames", NAME],
        ["infer", "picture.png", "--serve", NAME],
        ["build", NAME],
        ["bench", NAME],
        ["evaluate", NAME, NAME],
        ["data", "check", NAME],
        ["data", "prepare", NAME, NAME, NAME],
        ["engines", "list", NAME],
        ["weights", "--out", f"{NAME}/\x1b/x", "--modality", NAME],
        ["train", NAME, "--set", NAME],
    ],
)  # fmt: skip
def test_what_is_quoted_from_the_command_line_is_printable(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "picture.png", np.full((16, 16, 3), 90, np.uint8))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (1, 2)
    out, err = capfd.readouterr()
    assert err
    assert "Traceback" not in err
    assert not acts(out + err)


@pytest.mark.parametrize(
    "command",
    [
        ("export", "URL", "--out", "new.bundle"),
        ("infer", "URL", "a.png"),
        ("infer", "--config", "URL", "a.png"),
        ("evaluate", "URL", "URL"),
        ("push", "a.bundle", "hf://b/c", "URL"),
        ("bench", "URL", "--precision", "URL"),
        ("bench", "--duration", "URL"),
        ("batch", "a.png", "--out", "out", "--address", "URL"),
        ("data", "check", "URL"),
        ("deploy", "triton", "URL", "--out", "new", "--modality", "URL"),
    ],
)
@pytest.mark.parametrize("url", ["https://me:SEC@RET@127.0.0.1:9/x", "ray://:SECRET@127.0.0.1:9"])
def test_an_address_where_a_name_was_wanted_shows_no_password(
    command: tuple[str, ...],
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image(Path("a.png"), np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(SystemExit) as ended:
        main([url if word == "URL" else word for word in command])
    assert ended.value.code in (1, 2)
    shown = "".join(capsys.readouterr())
    assert "SEC" not in shown
    assert "RET" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "Write it as rtsp://USER:PASSWORD@HOST/PATH.",
        "hf://OWNER/NAME@REVISION and https://host:8080/a, b@c",
        "https://[::1]:9/a.bundle, me@host:/data",
        "toy.bundle: fundus",
    ],
)
def test_what_is_no_login_stays(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    tell(text)
    assert capsys.readouterr().out == f"{text}\n"
    assert UserError(text, text).hint == text


def test_results_of_files_with_such_names_are_told_printably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / NAME
    folder.mkdir()
    write_image(folder / f"{NAME}.png", np.full((16, 16, 3), 90, np.uint8))
    (folder / f"{NAME}2.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as ended:
        main(["infer", str(folder), "--modality", "fundus", "--out", f"{NAME}out"])
    out, err = capfd.readouterr()
    assert ended.value.code == 1
    assert f"overlays: {printable(NAME)}out" in out
    assert r"\x1b]0;owned" in err
    assert not acts(out + err)


def test_a_traceback_quotes_printably() -> None:
    script = (
        "import threading; from espmedsam_edge.terminal import show_tracebacks_printable as f; f()\n"
        "def fail(): raise ValueError('\\x1b[2J\\u202e')\n"
        "t = threading.Thread(target=fail); t.start(); t.join(); fail()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count(r"ValueError: \x1b[2J\u202e") == 2
    assert not acts(done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "espmedsam_edge", "weights"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no space left to write standard output.")
    assert done.stderr.count("\n") == 1
