"""Train for a fixed time on a machine with a GPU that is lent for a while, and bring home what is worth it.

    python tools/train_gpu.py --data DATA --out DIR [--init WEIGHTS] [--seconds 570] [--wheels DIR] [--set KEY=VALUE]...

All of it fits into ``--seconds`` of wall time, installing wheels included; training takes what is left, and the
recipe's schedule follows that. From the weights that ship unless others are named. Afterwards --out holds the best
weights by validation (its start, where no epoch was better) as float16 in parts, ``cat weights16-* > w.safetensors``,
the curves, the last pictures and the log; a run that failed or was cut off leaves what there is. Without a GPU:

    python tools/train_gpu.py --data DATA --out runs/rehearsal --init scratch --seconds 120 --set data.limit=8 \\
        --set model.preset=espmedsam-tiny --set model.image_size=64 --set 'model.image_sizes={}' \\
        --set 'data.windows={}' --set run.batch_size=4 --set run.steps_per_epoch=10
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AFTER = 25.0  # seconds kept for the last validation and for writing
STARTING = 40.0  # and for the program's start, reading images and scoring what it starts from
BETWEEN = 0.2  # share of the rest that validations and saving may take: a run that is cut off has not cooled down
NAMES = ("train.csv", "valid.csv", "recipe.json")


def install(wheels: Path, site: Path) -> None:
    """The wheels of a folder into a folder of their own, without a network and beside the machine's own packages."""
    files = sorted(map(str, wheels.glob("*.whl")))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(site),
        *files,
    ]
    subprocess.run(command, check=True)


def train(arguments: argparse.Namespace, run: Path, environment: dict[str, str], end: float, log: Path) -> int:
    """Train until shortly before ``end`` (of ``time.monotonic``); the exit code."""
    program = [sys.executable, "-m", "espmedsam_edge"]
    init = arguments.init
    if init is None:
        init = str(run.parent / "shipped.safetensors")
        subprocess.run([*program, "weights", "--checkpoint", init], env=environment, check=True)
    left = end - time.monotonic() - AFTER
    minutes = max(0.05, (left - STARTING) * (1 - BETWEEN) / 60)
    changes = [f"run.minutes={minutes:.3f}", "run.save_minutes=1000", *arguments.changes]
    command = [*program, "train", "segment", arguments.recipe, "--data", str(arguments.data.resolve()), "--init", init]
    command += ["--out", str(run), *(part for change in changes for part in ("--set", change))]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            return process.wait(max(1.0, left))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it finishes its step; the best weights are written already
        try:
            return process.wait(0.8 * AFTER)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def bring_home(run: Path, out: Path, part_bytes: int) -> None:
    """Weights as float16 in parts, curves and the last pictures into ``out``."""
    for name in NAMES:
        if (run / name).is_file():
            shutil.copyfile(run / name, out / name)
    for sheet in sorted((run / "sheets").glob("*.jpg"))[-1:]:
        shutil.copyfile(sheet, out / sheet.name)
    if not (run / "weights.safetensors").is_file():
        return
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(run / "weights.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        content = save({n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, file.metadata())
    for number, start in enumerate(range(0, len(content), part_bytes)):
        (out / f"weights16-{number:02d}").write_bytes(content[start : start + part_bytes])


def main() -> int:
    """Install, train, bring home."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MODALITY/DATASET as in docs/data.md")
    parser.add_argument("--out", type=Path, required=True, help="what is brought home")
    parser.add_argument("--init", help="weights to start from, or scratch [default: those that ship]")
    parser.add_argument("--seconds", type=float, default=570, help="of wall time, for everything")
    parser.add_argument("--recipe", default="segment-s-gpu")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="where the run is")
    parser.add_argument("--part-mb", type=int, default=15, help="largest file of the weights")
    arguments = parser.parse_args()
    work, out = arguments.work.resolve(), arguments.out.resolve()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if arguments.wheels is not None:
        install(arguments.wheels, work / "site")
        paths.insert(0, str(work / "site"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    run, log = work / f"run-{time.strftime('%H%M%S')}", out / "log.txt"
    code = train(arguments, run, environment, begin + arguments.seconds, log)
    sys.path[:0] = paths
    bring_home(run, out, arguments.part_mb << 20)
    print(log.read_text(errors="replace")[-4000:])
    print(f"training ended with {code} after {time.monotonic() - begin:.0f} s:", *sorted(os.listdir(out)))
    return code


if __name__ == "__main__":
    sys.exit(main())
