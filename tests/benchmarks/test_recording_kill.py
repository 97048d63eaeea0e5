"""Recordings that were killed with SIGKILL play; the long version is benchmarks/recording_kill.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.reading import open_video


@pytest.fixture
def benchmark(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/recording_kill.py")


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name what was synchronised")
@pytest.mark.parametrize("seconds", [1.5, 2.8])
def test_every_file_plays_after_a_kill(benchmark: ModuleType, tmp_path: Path, seconds: float) -> None:
    """How much is lacking depends on how busy the machine is, so it is measured, not tested."""
    killed = benchmark.record_and_kill(tmp_path, seconds)
    assert set(killed.kill_lacks) == {"overlay", "masks", "lines"}
    assert sorted(path.name for path in tmp_path.glob("[!c]*")) == sorted(benchmark.FILES.values())
    for name in ("overlay", "masks"):
        reader = open_video(tmp_path / benchmark.FILES[name])
        assert 1 <= sum(1 for _ in reader) <= killed.frames
        reader.close()
