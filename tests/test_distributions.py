"""The wheels: the program and its weights apart, and an installed program that finds them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import pytest

from espmedsam_edge.phantoms import phantom

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77 to build wheels")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both, by the name of their distribution, of a copy: building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheels")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, copy = ROOT / name, folder / "source" / name
        if not name.startswith(("tests/", "benchmarks/")) and (source.is_file() or source.is_symlink()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(os.readlink(source)) if source.is_symlink() else copy.write_bytes(source.read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    for part in (".", "./packages/weights"):
        subprocess.run([*pip, "--wheel-dir", folder, part], cwd=folder / "source", check=True)
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


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
