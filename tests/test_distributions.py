"""The wheels: the program and its weights apart, and an installed program that finds them."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import cv2
import pytest

from espmedsam_edge.phantoms import phantom

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77 to build wheels")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        original, copy = ROOT / name, folder / name
        if original.is_file() or original.is_symlink():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(original, copy, follow_symlinks=False)
    return folder


def build(folder: Path, *parts: str | Path, cwd: Path | None = None) -> dict[str, Path]:
    """Wheels by the name of their distribution."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    for part in parts:
        subprocess.run([*pip, "--wheel-dir", folder, part], cwd=cwd, check=True)
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


def hook(folder: Path, name: str, place: Path) -> Path:
    """What setuptools makes of a source folder by one of the hooks that build front ends call."""
    script = f"from setuptools import build_meta; print(build_meta.{name}({str(place)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True, text=True)
    return place / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheels(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("wheels"), ".", "./packages/weights", cwd=source)


@pytest.fixture(scope="module")
def archive(source: Path, wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program's source distribution; after the wheels, which are built in the same folder."""
    return hook(source, "build_sdist", tmp_path_factory.mktemp("archive"))


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_each_wheel_holds_what_is_its_own(wheels: dict[str, Path]) -> None:
    program, weights = files(wheels["espmedsam_edge"]), files(wheels["espmedsam_edge_weights"])
    assert not [name for name in program if name.startswith("espmedsam_edge/weights")]
    for name in (ROOT / "espmedsam_edge").rglob("*"):
        relative = str(name.relative_to(ROOT))
        if name.suffix in (".py", ".toml", ".cu", ".cuh", ".js", ".html", ".css") and "/weights/" not in relative:
            assert relative in program
    kept = {path.name for path in (ROOT / "espmedsam_edge" / "weights").iterdir()}
    assert weights == {f"espmedsam_edge_weights/{name}" for name in kept}
    assert "LICENSE.md" in kept


def test_wheels_pass_their_checker(wheels: dict[str, Path]) -> None:
    pytest.importorskip("check_wheel_contents")
    check = [sys.executable, "-m", "check_wheel_contents"]
    subprocess.run([*check, wheels["espmedsam_edge"]], check=True)
    # Its terms lie beside the weights, too, where the program names them, and there is no Python in it.
    subprocess.run([*check, "--ignore", "W002,W010", wheels["espmedsam_edge_weights"]], check=True)


def description(metadata: str) -> str:
    """What an index shows."""
    message = email.message_from_string(metadata)
    assert message["Description-Content-Type"].startswith("text/markdown")
    return str(message.get_payload())


def targets(markdown: str) -> set[str]:
    """Of links and pictures; places on the page itself are none."""
    return {target for target in re.findall(r"\]\(([^)\s]+)\)", markdown) if not target.startswith("#")}


def test_an_index_shows_no_link_that_leads_nowhere(wheels: dict[str, Path]) -> None:
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            shown = description(archive.read(name).decode())
        assert "Research software" in shown
        assert [target for target in targets(shown) if not target.startswith("https://")] == []


def test_links_lead_into_the_repository_once_it_has_an_address(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns("tests", "benchmarks", "build"))
    project = (copy / "pyproject.toml").read_text()
    address = "https://code.example/edge"
    (copy / "pyproject.toml").write_text(project.replace("[project.urls]\n", f'[project.urls]\nSource = "{address}"\n'))
    shown = description((hook(copy, "prepare_metadata_for_build_wheel", tmp_path) / "METADATA").read_text())
    readme = (ROOT / "README.md").read_text()
    relative = {target for target in targets(readme) if not target.startswith("https://")}
    pictures = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", readme))
    assert len(relative) > 30
    assert len(pictures) > 1
    made = {f"{address}/{'raw' if target in pictures else 'blob'}/v0.2.0/{target}" for target in relative}
    assert targets(shown) == made | (targets(readme) - relative)
    assert re.sub(r"\]\([^)\s]+\)", "", shown).strip() == re.sub(r"\]\([^)\s]+\)", "", readme).strip()


def test_the_source_distribution_is_whole(archive: Path, wheels: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for part in ("docs", "tests", "benchmarks", "tools", "notebooks", "docker"):
        listed = subprocess.run(["git", "ls-files", "-z", part], cwd=ROOT, capture_output=True, check=True)
        assert set(filter(None, listed.stdout.decode().split("\0"))) <= names
    assert {"LICENSE", "NOTICE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "CONTRIBUTING.md", "setup.py"} <= names
    assert not [name for name in names if name.startswith("espmedsam_edge/weights")]  # their terms are their own
    assert files(build(tmp_path, archive)["espmedsam_edge"]) == files(wheels["espmedsam_edge"])


def test_an_index_takes_them(archive: Path, wheels: dict[str, Path]) -> None:
    pytest.importorskip("twine", reason="needs twine (extra dev)")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *wheels.values(), archive], check=True)


@pytest.mark.skipif("ESPMEDSAM_FRESH" not in os.environ, reason="fills an environment from an index: ESPMEDSAM_FRESH=1")
def test_the_wheels_are_all_that_a_fresh_environment_takes(wheels: dict[str, Path], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment["ESPMEDSAM_CACHE"] = str(tmp_path / "cache")
    cv2.imwrite(str(tmp_path / "cells.png"), phantom("microscopy", seed=3, size=(120, 160))[0])

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    run(sys.executable, "-m", "venv", "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *wheels.values())
    assert run(tmp_path / "fresh" / "bin" / "espmedsam-edge", "--version").strip() == "espmedsam-edge 0.2.0"
    run(python, "-m", "espmedsam_edge", "infer", "cells.png", "--masks", "masks")
    assert cv2.imread(str(tmp_path / "masks" / "cells.png"), cv2.IMREAD_UNCHANGED).shape == (120, 160)
    run(python, "-m", "pip", "install", "--quiet", "espmedsam-edge[video]")  # of the one that is installed
    run(python, "-c", "import av")


def test_the_installed_program_runs_with_weights_and_says_what_is_missing_without(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    environment = {**os.environ, "PYTHONPATH": str(site), "ESPMEDSAM_CACHE": str(tmp_path / "cache")}

    def install(name: str) -> None:
        with zipfile.ZipFile(wheels[name]) as archive:
            archive.extractall(site)

    def run(*words: str) -> tuple[int, str, str]:
        command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-m", "espmedsam_edge", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    cv2.imwrite(str(tmp_path / "cells.png"), phantom("microscopy", seed=3, size=(120, 160))[0])
    install("espmedsam_edge")
    code, out, error = run("infer", "cells.png")
    assert (code, out) == (1, "")
    assert error.startswith("error: this installation came without weights. Name a bundle, or install them")
    assert error.endswith("-m pip install espmedsam-edge-weights\n")
    install("espmedsam_edge_weights")
    code, out, error = run("weights")
    assert (code, error) == (0, "")
    assert "dermoscopy is usable for research" in out
    assert f"not for commercial use, whatever the program's license: {site / 'espmedsam_edge_weights'}" in out
    code, out, error = run("infer", "cells.png", "--masks", "masks")
    assert code == 0, error
    assert cv2.imread(str(tmp_path / "masks" / "cells.png"), cv2.IMREAD_UNCHANGED).shape == (120, 160)
