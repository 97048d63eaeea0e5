"""A shell completes commands and their options; nothing but the completed command is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from espmedsam_edge.cli import main


def _completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> list[str]:
    words = line.split(" ")
    monkeypatch.setenv("_ESPMEDSAM_EDGE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit):
        main([])
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("espmedsam-edge inf", ["infer"]),
        ("espmedsam-edge infer --max", ["--max-latency"]),
        ("espmedsam-edge -v infer a.png --decoder h", ["hardware"]),
        ("espmedsam-edge engines cl", ["clean"]),
        ("espmedsam-edge nothing --x", []),
    ],
)
def test_words_are_completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, words: list[str]
) -> None:
    assert _completed(monkeypatch, capsys, line) == words


def test_the_printed_script_completes_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "espmedsam-edge"
    program.write_text(f"#!{sys.executable}\nfrom espmedsam_edge.cli import main\nmain()\n")
    program.chmod(0o755)
    in_bash = ["bash", "--norc", "-c", f"{program} --show-completion; true"]  # the program finds the shell above it
    script = subprocess.run(in_bash, check=True, capture_output=True, text=True).stdout
    function = script.split("complete -o default -F ")[1].split()[0]
    asked = f"{script}\nCOMP_WORDS=({program} infer --max)\nCOMP_CWORD=2\n{function} {program}\necho ${{COMPREPLY[@]}}"
    shown = subprocess.run(["bash", "--norc", "-c", asked], check=True, capture_output=True, text=True).stdout
    assert shown.split() == ["--max-latency"]
