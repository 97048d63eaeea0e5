"""What benchmarks/long_video.py watches while a run goes on: the lines of a file that grows under another name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sinks.growing_file import GrowingFile


def test_lines_are_counted_before_and_after_the_file_takes_its_name(
    tmp_path: Path, load_script: Callable[[str], ModuleType]
) -> None:
    benchmark = load_script("benchmarks/long_video.py")
    path = tmp_path / "out.jsonl"
    assert benchmark.frames_done(path) == 0
    failed, file = GrowingFile(path), GrowingFile(path)
    failed.begin().write_text("{}\n" * 3)
    assert benchmark.frames_done(path) == 3
    failed.end(UserError)
    file.begin().write_text("{}\n" * 5)  # under another partial name, as the failed run's file is there
    assert benchmark.frames_done(path) == 5
    file.end(None)
    assert path.exists()
    assert benchmark.frames_done(path) == 5
