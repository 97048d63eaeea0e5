"""A processor's runtimes against each other, in turn and in one run: ours, PyTorch, peers, many files, first results.

    python benchmarks/processors.py prepare --data ../shared/data --bundles runs/processors
    python benchmarks/processors.py measure --bundles runs/processors --name processors-MACHINE

``prepare`` makes a bundle of the shipped weights at 448 (colonoscopy) and at 1024 pixels (fundus), each with an INT8
graph for processors that passed its gate: a quarter of an hour on two cores; nothing is measured. ``measure`` writes
benchmarks/results/NAME.json; under twelve minutes on two cores that nobody else uses:

    networks    the unfused network eager in PyTorch, FP32 and INT8 in ONNX Runtime and in OpenVINO, and bfloat16; the
                network alone, at both sizes
    without     the same where oneDNN may not use newer instructions (ONEDNN_MAX_CPU_ISA, which PyTorch and OpenVINO
                heed, not in all of OpenVINO's own kernels; ONNX Runtime has no such switch)
    peers       the image encoders of MobileSAM and SAM ViT-B (random weights: time does not depend on them) beside ours
                from end to end, all at 1024 x 1024
    many        files one after the other (read, segment, write) against ``infer``, which has OpenVINO do one frame at a
                time (latency) or several (throughput), and ONNX Runtime; masks alone, and overlays, which ``infer``
                writes unasked; with how many cores each keeps busy, which says what overlap could still gain
    first       the first result of ``infer`` (the mask is written, and said), and its process's end: ONNX Runtime,
                OpenVINO without (cold) and with (warm) its network in the cache, and what ``auto`` takes

``--parts first many`` measures these again, six minutes, and leaves the rest of the file as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge import Bundle, Outputs, Segmenter, infer
from espmedsam_edge.bench.measure import BenchSettings, Sample, run_in_turn
from espmedsam_edge.bench.ratios import ratio_of_medians
from espmedsam_edge.bench.torch_competitor import TorchBackend
from espmedsam_edge.bundle import MANIFEST, Graph
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.decode import read_image
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.imaging.geometry import logit, preprocess
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.metrics import dice
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.backends.backend import load_backend
from espmedsam_edge.runtime.backends.backend_spec import HINTS
from espmedsam_edge.runtime.backends.openvino_api import core
from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.onnx_session import open_session
from espmedsam_edge.shipped.bundles import make_bundle, shipped_checkpoint

RESULTS = Path(__file__).parent / "results"
SIZES = {"448": ("colonoscopy", "cvc_clinicdb"), "1024": ("fundus", "drive")}
CHECKPOINT = "shipped.safetensors"
TORCH, REFERENCE, BEST = "torch eager fp32", "fp32 onnxruntime-cpu", "fp32 openvino:bf16"
NETWORKS = (
    REFERENCE, "fp32 openvino", BEST, "int8 onnxruntime-cpu", "int8 openvino", "int8 openvino:bf16",
)  # fmt: skip
# What oneDNN may use at most, and what is measured then: bfloat16 would be emulated.
WITHOUT = dict.fromkeys(("AVX512_CORE_VNNI", "AVX2"), (REFERENCE, "fp32 openvino", "int8 openvino"))
_FILES = 12
_MANY = "openvino:bf16"  # what many files and first results are measured with
PARTS = ("networks", "without", "peers", "many", "first")
_SEEN = "MEASURED "  # begins a child's line of JSON

Run = Callable[[], object]


def prepare(data: Path, bundles: Path) -> None:
    """Make the bundles and the checkpoint."""
    from espmedsam_edge.cli import main as command

    bundles.mkdir(parents=True, exist_ok=True)
    if not (bundles / CHECKPOINT).is_file():
        shipped_checkpoint(bundles / CHECKPOINT)
    for size, (modality, dataset) in SIZES.items():
        path = bundles / f"{size}.bundle"
        if not (path / MANIFEST).is_file():
            make_bundle([modality], path)
        if not any(graph.precision == "int8" for graph in Bundle.open(path).manifest.graphs):
            try:
                images, options = (
                    str(data / modality / dataset),
                    "--precision int8 --target cpu --images 64 --no-pictures",
                )
                command(["calibrate", str(path), images, *options.split()])
            except SystemExit as ended:
                if ended.code:
                    raise


def in_turn(runs: dict[str, Run], rounds: int, seconds: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each, one a round, in turn; at least so many rounds, and so many seconds of each."""

    def timed(run: Run) -> Callable[[int], Sample]:
        def once(_: int) -> Sample:
            begin = time.perf_counter()
            run()
            taken = time.perf_counter() - begin
            return Sample(taken, (0.0, taken, 0.0, 0.0))

        return once

    for run in runs.values():
        run()
    settings = BenchSettings(duration=max(seconds, 1e-3), min_iterations=rounds)
    measured = run_in_turn([timed(run) for run in runs.values()], settings)
    return {name: [one.total for one in samples] for name, samples in zip(runs, measured, strict=True)}


def summary(series: dict[str, list[float]], *references: str) -> dict[str, Any]:
    """Milliseconds, and the part of each reference's time with its 95 % interval."""
    found: dict[str, Any] = {}
    for name, seconds in series.items():
        ratios = {one: ratio_of_medians(seconds, series[one]) for one in references if one in series}
        found[name] = {
            "ms": Latency.of(seconds).milliseconds(),
            "of": {one: [round(value, 4) for value in (r.value, r.low, r.high)] for one, r in ratios.items()},
        }
        print(f"    {name:<28} {1000 * np.median(seconds):8.1f} ms   ", end="")
        print("   ".join(f"{r.value:.3f} of {one}" for one, r in ratios.items()), flush=True)
    return found


def image_of(bundle: Bundle, graph: Graph) -> np.ndarray:
    """A phantom as the network's input."""
    frame, _ = phantom(graph.modality, 1, (graph.image_size, graph.image_size))
    return preprocess(frame, graph.image_size, bundle.manifest.input.normalization)


def networks(bundles: Path, size: str, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Each runtime and arithmetic of one bundle, and PyTorch."""
    bundle, threads = Bundle.open(bundles / f"{size}.bundle"), usable_cores()
    graph = bundle.graph(None, "fp32")
    image, edge = image_of(bundle, graph), logit(bundle.manifest.threshold)
    loaded = {TORCH: TorchBackend(bundles / CHECKPOINT, graph, threads)}
    for name in names:
        precision, _, backend = name.partition(" ")
        loaded[name] = load_backend(bundle, bundle.graph(None, precision), backend, threads).backend  # type: ignore[assignment]
    expected = loaded[REFERENCE].run(image)[0, 0] >= edge
    found = summary(in_turn({name: lambda b=b: b.run(image) for name, b in loaded.items()}, rounds), TORCH, REFERENCE)
    for name, backend in loaded.items():
        found[name] |= {
            "device": backend.device,
            "dice_to_fp32": round(dice(backend.run(image)[0, 0] >= edge, expected), 5),
        }
        backend.close()
    return found


def without(bundles: Path, isa: str, rounds: int) -> dict[str, Any]:
    """``networks`` in a process of its own where oneDNN may use no more than ``isa``."""
    print(f"  at most {isa}", flush=True)
    command = [sys.executable, __file__, "without", "--bundles", str(bundles), "--isa", isa, "--rounds", str(rounds)]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "ESPMEDSAM_CACHE": os.environ["ESPMEDSAM_CACHE"] + isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_SEEN)]
    if not lines:
        print(f"    failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(_SEEN))
    for size, rows in found.items():
        for name, row in rows.items():
            print(
                f"    {size} {name:<28} {row['ms']['p50']:8.1f} ms   {row['of'][TORCH][0]:.3f} of {TORCH}", flush=True
            )
    return found


def peers(bundles: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Image encoders of others, and all of ours from a frame to its mask, at 1024 x 1024."""
    import torch
    from mobile_sam import sam_model_registry as mobile
    from segment_anything import sam_model_registry as sam

    threads, image = usable_cores(), np.random.default_rng(0).standard_normal((1, 3, 1024, 1024)).astype(np.float32)
    frame, _ = phantom("fundus", 1, (1024, 1024))
    runs: dict[str, Run] = {}
    segmenters = []
    for name in (REFERENCE, BEST):
        precision, _, backend = name.partition(" ")
        segmenters.append(
            Segmenter.load(bundles / "1024.bundle", precision=precision, backend=backend, threads=threads)
        )
        runs[f"ours, end to end, {name}"] = lambda s=segmenters[-1]: s.segment(frame)
    for title, build in (("MobileSAM encoder", mobile["vit_t"]), ("SAM ViT-B encoder", sam["vit_b"])):
        file = folder / f"{title.split()[0]}.onnx"
        with torch.inference_mode():
            torch.onnx.export(
                build().image_encoder.eval(), (torch.zeros(1, 3, 1024, 1024),), str(file), input_names=["image"],
                output_names=["embedding"], opset_version=17, dynamo=False,
            )  # fmt: skip
        session = open_session(file.read_bytes(), threads)
        runs[f"{title}, onnxruntime fp32"] = lambda s=session: s.run(None, {"image": image})
        for arithmetic in ("f32", "bf16"):
            settings = {"INFERENCE_PRECISION_HINT": arithmetic, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
                        "ENABLE_CPU_PINNING": False, "INFERENCE_NUM_THREADS": threads}  # fmt: skip
            compiled = core().compile_model(core().read_model(file.read_bytes()), "CPU", settings)
            runs[f"{title}, openvino {arithmetic}"] = lambda c=compiled: c([image])
    return summary(in_turn(runs, rounds), f"ours, end to end, {BEST}")


def many(bundles: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Files one after the other and by ``infer``: seconds for all, and how many cores were busy."""
    found: dict[str, Any] = {}
    for size, (modality, _) in SIZES.items():
        pictures = []
        for number in range(_FILES):
            pictures.append(folder / f"{size}-{number}.png")
            write_image(pictures[-1], phantom(modality, number, (576, 720))[0])
        found[size] = {
            what: _many(bundles / f"{size}.bundle", pictures, folder / f"{size}-{what}", what, rounds)
            for what in ("masks", "overlays")
        }
    return found


def _many(bundle: Path, pictures: list[Path], place: Path, what: str, rounds: int) -> dict[str, Any]:
    """One size and one kind of result."""
    place.mkdir()
    style = OverlayStyle(color_of(Bundle.open(bundle).manifest.modalities[0]))
    outputs = Outputs(**({"masks": place} if what == "masks" else {"out": place}), overwrite=True)
    busy: dict[str, list[tuple[float, float]]] = {}  # seconds of the processor, and of the clock

    def counted(name: str, run: Run) -> Run:
        def once() -> None:
            begin, clock = time.process_time(), time.perf_counter()
            run()
            busy.setdefault(name, []).append((time.process_time() - begin, time.perf_counter() - clock))

        return once

    def one_by_one(segmenter: Segmenter) -> None:
        for picture in pictures:
            frame = read_image(picture)
            mask = segmenter.segment(frame).mask
            write_image(place / picture.name, mask if what == "masks" else draw_overlay(frame, mask, style))

    one, ort = "one after the other", "onnxruntime-cpu"
    with ExitStack() as stack:
        loaded = {
            name: stack.enter_context(Segmenter.load(bundle, precision="fp32", backend=name))
            for name in (ort, *(f"{_MANY}:{hint}" for hint in HINTS))
        }
        runs: dict[str, Run] = {
            f"{one}, {ort}": lambda: one_by_one(loaded[ort]),
            f"{one}, {_MANY}": lambda: one_by_one(loaded[f"{_MANY}:latency"]),
        }
        for name, segmenter in loaded.items():
            runs[f"infer, {name}"] = lambda s=segmenter: infer(pictures, s, outputs)
        print(f"  {bundle.stem}, {len(pictures)} files, {what}", flush=True)
        series = in_turn({name: counted(name, run) for name, run in runs.items()}, rounds)
    rows = summary(series, f"{one}, {ort}", f"{one}, {_MANY}")
    for name, row in rows.items():
        processor, clock = (sum(seconds) for seconds in zip(*busy[name][1:], strict=True))  # without the first
        row["cores_busy"], row["processor_ms"] = (
            round(processor / clock, 3),
            round(1000 * processor / len(busy[name][1:])),
        )
        print(f"    {name:<44} {row['cores_busy']} cores busy, {row['processor_ms']} ms of the processor", flush=True)
    return rows


def first(bundles: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """``infer`` with one picture, from the start of its process to the result and to its end."""
    found: dict[str, Any] = {}
    for size, (modality, _) in SIZES.items():
        picture, cache, bytecode = folder / f"first-{size}.png", folder / "cache", folder / "bytecode"
        write_image(picture, phantom(modality, 0, (576, 720))[0])
        command = [sys.executable, "-m", "espmedsam_edge", "infer", str(bundles / f"{size}.bundle"), str(picture),
                   "--masks", str(folder / "first")]  # fmt: skip

        def run(
            case: str, command: list[str] = command, cache: Path = cache, bytecode: Path = bytecode
        ) -> tuple[float, float]:
            backend, _, state = case.partition(", ")
            if state == "cold":
                shutil.rmtree(cache, ignore_errors=True)
            options = ["--backend", backend, *([] if backend == "auto" else ["--precision", "fp32"])]
            # As where it is installed: compiled to bytecode, by the first run of each case, which is not timed.
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
            environment |= {"ESPMEDSAM_CACHE": str(cache), "PYTHONPYCACHEPREFIX": str(bytecode)}
            begin, result = time.perf_counter(), 0.0
            with subprocess.Popen(
                [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as process:
                for line in process.stdout or ():
                    if line.startswith("masks: "):
                        result = time.perf_counter() - begin
            if process.returncode or not result:
                raise RuntimeError(f"{case} failed")
            return result, time.perf_counter() - begin

        cases = ["onnxruntime", *(f"{name}, {state}" for name in (_MANY, "auto") for state in ("cold", "warm"))]
        series: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        for case in cases:
            run(case)
        for _ in range(rounds):
            for case, seconds in series.items():
                seconds.append(run(case))
        for place, what in enumerate(("result", "end")):
            print(f"  {size}, {what}", flush=True)
            rows = summary({case: [one[place] for one in seconds] for case, seconds in series.items()}, "onnxruntime")
            found.setdefault(size, {})[what] = rows
    return found


def measure(bundles: Path, name: str, rounds: int, parts: Sequence[str] = PARTS) -> None:
    """Everything, into one file; of some parts alone, in place of those in that file."""
    result: dict[str, Any] = {"schema": 1, "kind": "processors", "environment": collect_environment(), "rounds": rounds}
    file = RESULTS / f"{name}.json"
    if set(parts) != set(PARTS) and file.is_file():
        kept = json.loads(file.read_text())
        apart = dict.fromkeys(parts, result["environment"]["time"])
        result = {**kept, "measured_apart": {**kept.get("measured_apart", {}), **apart}}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="espmedsam-") as temporary:
        folder = Path(temporary)
        os.environ["ESPMEDSAM_CACHE"] = str(folder / "kept")
        several = max(3, rounds // 2)
        for part in parts:
            print(part, flush=True)
            if part == "networks":
                result[part] = {size: networks(bundles, size, NETWORKS, rounds) for size in SIZES}
            elif part == "without":
                result[part] = {isa: without(bundles, isa, rounds) for isa in WITHOUT}
            elif part == "peers":
                result[part] = peers(bundles, folder, max(3, rounds // 3))
            elif part == "many":
                result[part] = many(bundles, folder, several)
            else:
                result[part] = first(bundles, folder, several)
    seconds = round(time.monotonic() - begin)
    if set(parts) == set(PARTS):
        result["seconds"] = seconds
    atomic_write(file, json.dumps(result, indent=1) + "\n")
    print(f"{seconds} s, {file}")


def main() -> None:
    """Prepare, or measure."""
    warnings.simplefilter("ignore")  # of the peers' packages and of their export
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("prepare", "measure", "without"):
        options = commands.add_parser(command)
        options.add_argument("--bundles", type=Path, default=Path("runs/processors"))
        options.add_argument("--rounds", type=int, default=10)
        if command == "prepare":
            options.add_argument("--data", type=Path, required=True)
        elif command == "measure":
            options.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
            options.add_argument(
                "--parts", nargs="+", choices=PARTS, default=PARTS, help="only these, in place of those in the file"
            )
        else:
            options.add_argument("--isa", choices=WITHOUT, required=True)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.data, arguments.bundles)
    elif arguments.command == "measure":
        measure(arguments.bundles, arguments.name, arguments.rounds, arguments.parts)
    else:
        names = WITHOUT[arguments.isa]
        found = {size: networks(arguments.bundles, size, names, arguments.rounds) for size in SIZES}
        print(_SEEN + json.dumps(found))


if __name__ == "__main__":
    main()
