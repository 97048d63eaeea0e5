"""Runs that were killed with SIGKILL go on and end as one left alone; the long version is benchmarks/kills.py."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.parametrize(
    ("command", "needed"),
    [("slide", "tifffile"), ("dicom-sr", "highdicom"), ("push", "huggingface_hub")],
)
def test_it_ends_as_alone(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, command: str, needed: str
) -> None:
    for package in (needed, "tifffile", "pydicom", "onnx"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HOME"):
        monkeypatch.setenv(name, "")  # given back in the end
    found = load_script("benchmarks/kills.py").measure([command], 2)[command]
    assert found["first_faults"] == []
    assert found["kills"] == 2


def test_what_is_half_written_is_seen(load_script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    for package in ("onnx", "pydicom"):
        pytest.importorskip(package, reason=f"needs {package}")
    kills = load_script("benchmarks/kills.py")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "b.geojson").write_text('{"type":')
    (tmp_path / "c.jsonl").write_text('{"frame": 1}\n{"fra')
    (tmp_path / "d.partial.jsonl").write_text('{"frame": 1}\n{"fra')
    found = kills.half_written(tmp_path)
    assert [line.partition(":")[0] for line in found] == ["a.png", "b.geojson", "c.jsonl"]
