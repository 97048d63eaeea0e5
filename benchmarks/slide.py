"""Memory of a whole slide, killed and run again: the peak of both.

    python benchmarks/slide.py --size 40000x30000 --tissue 0.01 --name slide-MACHINE

Makes the slide (``tools/phantom_slide.py``), starts ``espmedsam-edge slide`` with the weights that came with the
program, kills it (SIGKILL) once some regions are files, and starts it again; then once more elsewhere, which is not
killed, and compares the results. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tifffile import TiffFile

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment

RESULTS = Path(__file__).parent / "results"
MAKER = Path(__file__).parents[1] / "tools" / "phantom_slide.py"


def run(slide: Path, out: Path, kill_after: int | None = None) -> dict[str, Any]:
    """One start of the command: the regions that were there when it began, and the most that were seen."""
    unfinished = out / f"{slide.stem}.unfinished"
    there = len(list(unfinished.glob("*-*.png")))
    command = [sys.executable, "-m", "espmedsam_edge", "slide", str(slide), "--out", str(out), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    regions = there
    while process.poll() is None and (kill_after is None or regions < kill_after):
        time.sleep(0.5)
        regions = max(regions, len(list(unfinished.glob("*-*.png"))))
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    assert process.stdout is not None
    said = process.stdout.read().replace(str(slide), slide.name).strip().splitlines()[:1]
    return {"regions_before": there, "regions_seen": regions, "exit": process.wait(), "said": said}


def same(one: Path, other: Path) -> dict[str, bool]:
    """Whether two runs' outlines are the same bytes, and their masks the same tiles on every level."""
    name = next(one.glob("*.geojson")).name
    with TiffFile(next(one.glob("*.tif"))) as a, TiffFile(next(other.glob("*.tif"))) as b:
        levels = zip(a.series[0].levels, b.series[0].levels, strict=True)
        masks = all(_stored(first) == _stored(second) for first, second in levels)
    return {"outlines": (one / name).read_bytes() == (other / name).read_bytes(), "mask": masks}


def _stored(level: Any) -> list[bytes]:
    page, file = level.keyframe, level.parent.filehandle
    return [data for data, _ in file.read_segments(page.dataoffsets, page.databytecounts)]


def main() -> None:
    """Make, kill, repeat, compare, write."""
    import resource

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="40000x30000")
    parser.add_argument("--tissue", type=float, default=0.01)
    parser.add_argument("--kill-after", type=int, default=2, help="regions")
    parser.add_argument("--name", required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slide, out = Path(folder) / "slide.tif", Path(folder) / "out"
        make = [sys.executable, str(MAKER), str(slide), "--size", asked.size, "--tissue", str(asked.tissue)]
        subprocess.run(make, check=True)
        killed = run(slide, out, asked.kill_after)
        again = run(slide, out)
        whole = run(slide, Path(folder) / "whole")
        record = {
            "environment": collect_environment(),
            "size": asked.size,
            "tissue": asked.tissue,
            "slide_megabytes": round(slide.stat().st_size / 1e6, 1),
            "killed": killed,
            "again": again,
            "not_killed": whole,
            "equal": same(out, Path(folder) / "whole"),
            "peak_memory_megabytes": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
            "results": {file.name: file.stat().st_size for file in sorted(out.iterdir())},
        }
    atomic_write(RESULTS / f"{asked.name}.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
