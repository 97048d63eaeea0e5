"""tools/arm_tests.py says in one line what it lacks, and starts the ARM Python through QEMU, children included."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def arm(load_script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_script("tools/arm_tests.py")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "arm")
    for name in ("system", "site", "apt", "host"):
        monkeypatch.setattr(module, name.upper(), tmp_path / "arm" / name)
    machine_is(monkeypatch, "x86_64")
    return module


def machine_is(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))


def put_program(folder: Path, name: str, *lines: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    file.chmod(0o755)
    return file


def told(arm: Any, capsys: pytest.CaptureFixture[str]) -> str:
    assert arm.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("make test-arm: ")
    return line


def test_an_arm_machine_needs_no_emulation(
    arm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_is(monkeypatch, "aarch64")
    assert "make test runs the tests as they are" in told(arm, capsys)


def test_a_system_without_apt_is_told_what_is_needed(
    arm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "it needs Debian or Ubuntu on x86-64, with apt-get." in told(arm, capsys)


def test_what_apt_says_is_told(
    arm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_program(tmp_path / "bin", "apt-get", "echo 'W: a warning' >&2", "echo 'E: Unable to locate it' >&2", "exit 100")
    put_program(tmp_path / "bin", "dpkg-deb")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    line = told(arm, capsys)
    assert "python3:arm64" in line
    assert line.endswith("E: Unable to locate it")


def test_the_launcher_is_python_to_its_children(arm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = put_program(arm.SYSTEM / "usr" / "bin", "python3.11", "echo $PYTHONPATH")
    put_program(arm.SYSTEM / "usr" / "bin", "python3-config")
    qemu = put_program(tmp_path, "qemu", 'echo "$@"', "echo $PYTHONPATH")
    arm.SITE.mkdir()
    monkeypatch.setenv("ESPMEDSAM_QEMU", str(qemu))
    launcher = arm.write_launcher()
    done = subprocess.run([launcher, "-c", "a b"], capture_output=True, text=True, check=True)
    command, path = done.stdout.splitlines()
    assert command == f"-L {arm.SYSTEM} {python} -c a b"
    assert path.split(":") == [str(arm.ROOT), str(arm.ROOT / "tests" / "support"), str(arm.SITE)]
    values: dict[str, Any] = {}
    code = (arm.SITE / "sitecustomize.py").read_text()
    exec(code.replace("import sys", "from types import SimpleNamespace; sys = SimpleNamespace()"), values)
    assert values["sys"].executable == str(launcher)
    cores = (arm.SYSTEM / "proc" / "cpuinfo").read_text().count("CPU implementer")
    assert cores == os.cpu_count()


def test_a_qemu_that_is_not_there_is_told(
    arm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_program(arm.SYSTEM / "usr" / "bin", "python3.11")
    arm.SITE.mkdir()
    (arm.FOLDER / ".done").touch()
    monkeypatch.setattr(arm, "check_machine", lambda: None)
    monkeypatch.setenv("ESPMEDSAM_QEMU", "/nowhere/qemu")
    assert told(arm, capsys).endswith("there is no /nowhere/qemu.")
