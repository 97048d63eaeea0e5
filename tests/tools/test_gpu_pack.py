"""tools/gpu_pack.py: parts that make an archive again, and packages for the other machine's Python."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def tool(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/gpu_pack.py")


def test_the_parts_are_one_archive(tool: ModuleType, tmp_path: Path) -> None:
    load, out, there = tmp_path / "load", tmp_path / "out", tmp_path / "there"
    for folder in (load / "site" / "package", out, there):
        folder.mkdir(parents=True)
    content = np.random.default_rng(0).bytes(5 << 19)  # 2.5 MiB, which nothing makes smaller
    (load / "site" / "package" / "large.so").write_bytes(content)
    parts = tool.pack(load, out, 1)
    assert [str(path.relative_to(out)) for path in parts] == ["p0/load-00", "p1/load-01", "p2/load-02"]
    assert max(path.stat().st_size for path in parts) == 1 << 20
    together = b"".join(path.read_bytes() for path in parts)
    subprocess.run(["tar", "-xJ", "-C", str(there)], input=together, check=True)
    assert (there / "site" / "package" / "large.so").read_bytes() == content


def test_packages_are_of_the_other_machines_python(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        asked.append(command)
        about = tmp_path / "pydantic-2.0.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text("Name: pydantic\nRequires-Dist: pydantic-core==2.41.5\nRequires-Dist: other\n")
        (tmp_path / "onnxruntime").mkdir(exist_ok=True)
        for name in (*tool.LEFT_OUT, "libonnxruntime_providers_cuda.so"):
            (tmp_path / "onnxruntime" / name).touch()

    monkeypatch.setattr(subprocess, "run", run)
    tool.fetch(["pydantic", "pydantic-core", "onnxruntime-gpu"], "3.12", tmp_path)
    first, second = asked
    assert first[first.index("--python-version") + 1] == "3.12"
    assert first[-2:] == ["pydantic", "onnxruntime-gpu"]
    assert second[-1] == "pydantic-core==2.41.5"
    assert [path.name for path in (tmp_path / "onnxruntime").iterdir()] == ["libonnxruntime_providers_cuda.so"]
