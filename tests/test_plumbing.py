"""What a newcomer and continuous integration type: make and the scripts behind it, .ci/run, and the docs' commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt  # rich's

from espmedsam_edge.cli import COMMANDS, build_app

ROOT = Path(__file__).resolve().parents[1]
NEEDS_MAKE = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
# These tests may themselves run under make, whose settings are not theirs.
OUTSIDE_MAKE = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "VENV"))}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def make(*arguments: str, folder: Path = ROOT) -> str:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=OUTSIDE_MAKE).stdout


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@NEEDS_MAKE
def test_make_without_a_target_lists_the_jobs() -> None:
    listing = make()
    for job in ("demo", "test", "test-packages", "check", "clean", "help"):
        assert re.search(rf"^  make {job}\b.+\w", listing, re.M)


@NEEDS_MAKE
def test_the_demo_is_light_and_tests_bring_the_rest(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    demo = make("-n", "demo", folder=tmp_path)
    assert "tools/venv.sh .venv" in demo
    assert "--editable '.[demo]'" in demo
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    light = next(line for line in extras.splitlines() if line.startswith("demo = "))
    assert light == 'demo = ["scikit-image>=0.22"]'  # two pictures; nothing that brings torch
    test = make("-n", "test", folder=tmp_path)
    assert "--editable '.[dev]'" in test
    assert "-m pytest" in test
    check = make("-n", "check", folder=tmp_path)
    for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports"):
        assert tool in check


@pytest.mark.parametrize("extra", ["cuda", "trt", "rtx"])
def test_a_way_to_a_gpu_brings_what_compiles_and_launches_the_kernels(extra: str) -> None:
    line = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith(f"{extra} = "))
    assert '"cuda-python>=' in line
    assert '"nvidia-cuda-nvrtc>=' in line


@NEEDS_MAKE
def test_nothing_is_installed_again_while_pyproject_is_unchanged(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for stamp in ("bin/python", ".base", ".dev", ".rtx"):
        (tmp_path / ".venv" / stamp).touch()
    for job in ("demo", "test", "check"):
        assert "install" not in make("-n", job, folder=tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder to be the whole PATH: with what the script uses besides Python, an ordinary user, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "rm").symlink_to(shutil.which("rm") or "/bin/rm")
    program(folder / "id", "echo 1000")
    return folder


def program(file: Path, body: str) -> None:
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


def python(file: Path, *, venv: str = "true") -> None:
    """A Python that runs code as this one, but notes environments instead of making them; ``venv``: has ensurepip?"""
    program(
        file,
        f"""case "$*" in
*"import ensurepip"*) {venv} ;;
*"-m venv"*) for last; do :; done; echo "{file.name} $*" > "$last.made" ;;
*) exec {sys.executable} "$@" ;;
esac""",
    )


def run_venv(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", str(ROOT / "tools" / "venv.sh"), str(path.parent / "venv")]
    return subprocess.run(command, env={"PATH": str(path), **environment}, capture_output=True, text=True)


ON_JETSON = pytest.mark.skipif(Path("/etc/nv_tegra_release").exists(), reason="a Jetson takes its system's own Python")


@ON_JETSON
def test_the_newest_python_that_runs_makes_the_environment(path: Path) -> None:
    program(path / "python3.13", "echo 'shim: command not found' >&2; exit 127")
    for name in ("python3", "python3.10", "python3.12"):
        python(path / name)
    done = run_venv(path)
    assert done.returncode == 0, done.stderr
    assert (path.parent / "venv.made").read_text().startswith("python3.12 -m venv --clear ")
    assert "Making" in done.stdout


@ON_JETSON
def test_one_without_venv_is_passed_over_when_another_has_it(path: Path) -> None:
    python(path / "python3.13", venv="false")
    python(path / "python3.11")
    assert run_venv(path).returncode == 0
    assert (path.parent / "venv.made").read_text().startswith("python3.11 ")


@ON_JETSON
def test_no_python_is_one_line(path: Path) -> None:
    program(path / "python3", "exit 1")  # too old: the version test fails
    done = run_venv(path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: found no Python 3.10 or newer")
    assert len(done.stderr.splitlines()) == 1


@ON_JETSON
def test_an_ordinary_user_is_told_what_to_install(path: Path) -> None:
    python(path / "python3", venv="false")
    done = run_venv(path)
    version = "{}.{}".format(*sys.version_info)
    assert done.returncode == 2
    assert f"sudo apt-get install python{version}-venv" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@ON_JETSON
def test_root_gets_it_installed(path: Path, tmp_path: Path) -> None:
    program(path / "id", "echo 0")
    program(path / "apt-get", f'echo "$*" >> {tmp_path}/apt.log')
    python(path / "python3", venv=f"test -s {tmp_path}/apt.log")
    done = run_venv(path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"install .*python3\.\d+-venv", (tmp_path / "apt.log").read_text())
    assert (path.parent / "venv.made").exists()


def test_a_python_named_by_the_user_is_taken_or_refused(path: Path) -> None:
    python(path / "mine")
    assert run_venv(path, PYTHON=str(path / "mine")).returncode == 0
    assert (path.parent / "venv.made").read_text().startswith("mine ")
    refused = run_venv(path, PYTHON="/no/such/python")
    assert refused.returncode == 2
    assert "PYTHON=/no/such/python" in refused.stderr


SYSTEM_GI = Path("/usr/lib/python3/dist-packages/gi")


@pytest.fixture
def packages(path: Path) -> Path:
    """``path``, made ready for tools/test_packages.sh: no package is installed, apt-get logs what it is asked."""
    for name in ("grep", "ln"):
        (path / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    program(path / "dpkg-query", "exit 1")
    program(path / "apt-get", f'echo "$*" >> {path.parent}/apt.log')
    venv = path.parent / "venv" / "bin"
    venv.mkdir(parents=True)
    program(venv / "python", "exit 0")  # sees gi already
    triton = path.parent / "venv-triton"
    triton.mkdir()
    (triton / ".done").touch()
    return path


def run_packages(path: Path) -> tuple[list[str], str]:
    """The lines that the script printed, and the calls of apt-get; it never fails."""
    command = ["/bin/sh", str(ROOT / "tools" / "test_packages.sh"), str(path.parent / "venv")]
    done = subprocess.run(command, env={"PATH": str(path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    log = path.parent / "apt.log"
    return done.stdout.splitlines(), log.read_text() if log.exists() else ""


def test_packages_for_tests_are_installed_for_root(packages: Path) -> None:
    program(packages / "id", "echo 0")
    lines, log = run_packages(packages)
    assert [line.split(":")[0] for line in lines] == ["Installing with apt-get, for tests"] * 4
    assert re.search(r"install --yes --no-install-recommends python3-gi .* gstreamer1\.0-rtsp$", log, re.M)
    assert re.search(r"install --yes --no-install-recommends chromium$", log, re.M)
    assert re.search(r"install --yes --no-install-recommends dicom3tools dcmtk$", log, re.M)
    assert re.search(r"install --yes --no-install-recommends nginx-light mosquitto$", log, re.M)


def test_packages_that_cannot_be_had_cost_a_line(packages: Path) -> None:
    lines, log = run_packages(packages)
    assert all(" sudo apt-get install --no-install-recommends " in line for line in lines)
    assert (len(lines), log) == (4, "")
    program(packages / "id", "echo 0")
    program(packages / "apt-get", "echo offline >&2; exit 100")
    assert sum(line.startswith("That failed") for line in run_packages(packages)[0]) == 4
    (packages / "apt-get").unlink()
    assert all(line.startswith("No apt-get here") for line in run_packages(packages)[0])


def test_packages_that_are_there_are_left_alone(packages: Path) -> None:
    program(packages / "dpkg-query", 'for name; do case "$name" in --*) ;; *) echo installed ;; esac; done')
    program(packages / "google-chrome", "")
    program(packages / "dciodvfy", "")
    program(packages / "storescu", "")
    assert run_packages(packages) == ([], "")


def test_a_triton_that_cannot_be_had_costs_a_line(packages: Path) -> None:
    (packages.parent / "venv-triton" / ".done").unlink()
    lines = [line for line in run_packages(packages)[0] if "Triton" in line]
    assert len(lines) == 2
    assert lines[0].startswith("Installing Triton into ")
    assert lines[1] == "That failed; the tests that need Triton are skipped."


@pytest.mark.skipif(not any(SYSTEM_GI.glob("_gi.*.so")), reason="needs python3-gi")
def test_the_environment_sees_pygobject_if_its_python_is_the_systems(packages: Path) -> None:
    suffix = next(SYSTEM_GI.glob("_gi.*.so")).name.removeprefix("_gi")
    python, site = packages.parent / "venv" / "bin" / "python", packages.parent / "venv"
    answers = 'case "$*" in *"import gi"*) exit 1 ;; *EXT_SUFFIX*) echo {} ;; *purelib*) echo {} ;; esac'
    program(python, answers.format(".another.so", site))
    assert run_packages(packages)[0][-1].startswith("PyGObject is of the system's Python")
    assert not (site / "gi").exists()
    program(python, answers.format(suffix, site))
    for _ in range(2):
        assert len(run_packages(packages)[0]) == 4
        assert (site / "gi").resolve() == SYSTEM_GI


@NEEDS_MAKE
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("code", "closing"),
    [(0, "12 passed, 3 skipped in 1.25s"), (1, "2 failed, 12 passed in 1.2s")],
    ids=["passed", "failed"],
)
def test_ci_prints_pytests_closing_line_last_and_leaves_with_its_verdict(
    tmp_path: Path, code: int, closing: str
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    jobs = {"test-packages": "echo installed", "check": "echo checked", "docs": "echo made", "notebooks": "echo run"}
    jobs["test"] = f"echo '{closing}'; exit {code}"
    (tmp_path / "Makefile").write_text("".join(f"{job}:\n\t@{does}\n" for job, does in jobs.items()))
    command = ["bash", str(tmp_path / ".ci" / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=OUTSIDE_MAKE)
    assert done.stdout.splitlines()[:4] == ["installed", "checked", "made", "run"]
    assert done.stdout.splitlines()[-1] == closing
    assert (done.returncode != 0) == (code != 0)


MARKDOWN = MarkdownIt("commonmark").enable("table")
# The program with or without a prompt, sudo or its folder, in a comment or a unit; within text also its command alone.
COMMAND = re.compile(r"(?:\$ )?make( .*)?|(?:[$#] |sudo |ExecStart=)?(?:\S*/)?espmedsam-edge( .*)?")
SHORT = re.compile(rf"(?:{'|'.join(COMMANDS)}) .*--.*")


def code(text: str) -> Iterator[str]:
    """The code of a page, line by line, continued ones joined: blocks, fenced or indented, and code within text."""
    for token in MARKDOWN.parse(text):
        if token.type in ("fence", "code_block"):
            yield from (line.strip() for line in token.content.replace("\\\n", " ").splitlines())
        for child in token.children or ():
            if child.type == "code_inline":
                yield f"espmedsam-edge {child.content}" if SHORT.fullmatch(child.content) else child.content


def documented() -> list[tuple[str, str]]:
    """Every command line in the code of a page: (page, line from the program's name on), each once a page."""
    found = {}
    for page in PAGES:
        for line in code(page.read_text()):
            if COMMAND.fullmatch(line):
                command = re.sub(r"^.*?(make|espmedsam-edge)(?= |$)", r"\1", line)
                found[str(page.relative_to(ROOT)), command] = None
    return list(found)


def test_code_of_every_kind_is_looked_into() -> None:
    page = """
`bench X --json a.json`, and in a | table:

| x | y |
|---|---|
| `make test` | `$ espmedsam-edge weights` |

1. A list:

       .venv/bin/espmedsam-edge infer a \\
           --out b

```ini
ExecStart=/opt/espmedsam-edge doctor
```

    sudo espmedsam-edge engines list
"""
    assert [line for line in code(page) if COMMAND.fullmatch(line)] == [
        "espmedsam-edge bench X --json a.json",
        "make test",
        "$ espmedsam-edge weights",
        ".venv/bin/espmedsam-edge infer a      --out b",
        "ExecStart=/opt/espmedsam-edge doctor",
        "sudo espmedsam-edge engines list",
    ]


@pytest.mark.parametrize(("page", "line"), documented())
def test_a_command_in_the_documentation_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(re.sub(r"[\[\]<>|]|\.\.\.", " ", line), comments=True)
    if words[0] == "make":
        jobs = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        assert set(jobs) <= targets(), f"{page}: {line}"
        return
    assert len(words) == 1 or words[1] in COMMANDS or words[1].startswith("-"), f"{page}: {line}"
    if len(words) == 1 or words[1].startswith("-"):
        return
    found: Any = typer.main.get_command(build_app(words[1])).commands[words[1]]  # type: ignore[attr-defined]
    rest = words[2:]
    while rest and hasattr(found, "commands"):
        assert rest[0] in found.commands, f"{page}: {line}"
        found, rest = found.commands[rest[0]], rest[1:]
    known = {"--help", *(name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts))}
    used = {word.split("=")[0] for word in rest if word.startswith("-") and word != "-"}
    assert used <= known, f"{page}: {line}"
