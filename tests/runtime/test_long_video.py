"""What benchmarks/long_video.py watches while a run goes on: the lines of a file that grows under another name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.growing_file import GrowingFile

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_video.py"


def test_lines_are_counted_before_and_after_the_file_takes_its_name(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("long_video", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
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
