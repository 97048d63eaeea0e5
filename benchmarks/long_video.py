"""Whether memory stays flat over a long video: resident size of `infer` on ten minutes of 1080p, sampled.

    python benchmarks/long_video.py BUNDLE --modality colonoscopy --name long-video-MACHINE

Writes a video of 1920x1080 pictures, runs `espmedsam-edge infer` on it with overlay video and JSON lines, samples the
resident size twice a second, and reports how far it moves after the first 100 frames, into ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.phantoms import phantom_clip
from espmedsam_edge.runtime.video.writing import open_writer

RESULTS = Path(__file__).parent / "results"
SIZE = (1080, 1920)
DIFFERENT_FRAMES = 20


def write_video(path: Path, modality: str, frames: int, fps: int) -> None:
    """A clip of a few different pictures played again and again."""
    pictures = [image for image, _ in phantom_clip(modality, 0, DIFFERENT_FRAMES, SIZE)]
    with contextlib.closing(open_writer(path, SIZE, Fraction(fps))) as writer:
        for number in range(frames):
            writer.write(pictures[number % DIFFERENT_FRAMES], number / fps)
        writer.finish()


def resident_bytes(pid: int) -> int | None:
    """Resident size of a process, or None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return None
    return int(fields[1]) * 4096 if len(fields) > 1 and fields[1] != "0" else None


def frames_done(path: Path) -> int:
    """Lines that the run has written so far, under the final name or the one that the file grows under."""
    files = [*path.parent.glob(f"{path.stem}.partial*{path.suffix}"), path]
    return max((file.read_bytes().count(b"\n") for file in files if file.is_file()), default=0)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--modality")
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--fps", type=int, default=10)
    arguments = parser.parse_args()
    environment = collect_environment()
    frames = int(arguments.minutes * 60 * arguments.fps)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_video(folder / "long.mp4", arguments.modality or "colonoscopy", frames, arguments.fps)
        lines = folder / "out.jsonl"
        command = [sys.executable, "-m", "espmedsam_edge", "infer", str(arguments.bundle), str(folder / "long.mp4")]
        command += ["--out", str(folder / "out.mp4"), "--jsonl", str(lines)]
        command += ["--modality", arguments.modality] if arguments.modality else []
        begin = time.perf_counter()
        samples: list[tuple[float, int]] = []
        warm_at: float | None = None
        with subprocess.Popen(command) as process:
            while process.poll() is None:
                time.sleep(0.5)
                now = time.perf_counter() - begin
                if (size := resident_bytes(process.pid)) is not None:
                    samples.append((round(now, 2), size))
                if warm_at is None and frames_done(lines) >= 100:
                    warm_at = now
            code = process.returncode
        seconds = time.perf_counter() - begin
        written = frames_done(lines)
    assert code == 0, code
    assert written == frames, (written, frames)
    # the last two seconds are the process taking itself down
    warm = np.array([size for at, size in samples if warm_at is not None and warm_at <= at <= seconds - 2])
    if not len(warm):
        raise SystemExit("The run ended within two seconds of its first 100 frames: give more --minutes.")
    first, tenth = warm[0], max(1, len(warm) // 10)
    result = {
        "schema": 1,
        "kind": "long-video",
        "environment": environment,
        "video": {"frames": frames, "fps": arguments.fps, "height": SIZE[0], "width": SIZE[1]},
        "seconds": round(seconds, 1),
        "frames_per_second": round(frames / seconds, 2),
        "resident_bytes_after_100_frames": int(first),
        "lowest": float(warm.min() / first - 1),
        "highest": float(warm.max() / first - 1),
        "last_tenth_over_first_tenth": float(warm[-tenth:].mean() / warm[:tenth].mean() - 1),
        "samples": samples[:: max(1, len(samples) // 200)],
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("environment", "samples")}, indent=1))


if __name__ == "__main__":
    main()
