"""Commands that a user can paste: what adds an extra, what calls the program; what counts as installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_environment import program, tools

from espmedsam_edge.machine import installation

__all__ = ["tools"]  # a fixture


def test_the_command_for_an_extra_names_this_python() -> None:
    command = installation.install_command("video")
    assert " -m pip install " in command
    assert command.endswith("[video]'")


def test_paths_are_shown_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert installation.near(tmp_path / "bin" / "tool") == "bin/tool"
    assert installation.near(Path("/etc/os-release")) == "/etc/os-release"


def test_the_program_is_called_by_name_only_where_path_leads_to_it(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv" / "bin" / "python"))
    assert installation.program_command() == "espmedsam-edge"
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    program(tmp_path / "venv" / "bin", "espmedsam-edge", "")
    assert installation.program_command() == "venv/bin/espmedsam-edge"
    program(tools, "espmedsam-edge", "")
    assert installation.program_command() == "espmedsam-edge"


def test_a_left_over_folder_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leftover_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not installation.installed("leftover_package")
    (tmp_path / "leftover_package" / "__init__.py").write_text("")
    assert installation.installed("leftover_package")
