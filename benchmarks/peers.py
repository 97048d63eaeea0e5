"""The networks of the paper's Table III beside ours, in one run: sizes, encoders, one prompt, and automatic mode whole.

    pip install -e '.[peers]'
    python benchmarks/peers.py measure --name peers-MACHINE
    python benchmarks/peers.py page peers-MACHINE

``measure`` writes benchmarks/results/NAME.json, every figure as soon as it is there, and at the end docs/peers.md with
its plot (``page`` alone draws them anew). A run that died goes on with ``--resume``, on the same machine with the same
packages and settings. About half an hour on two cores that nobody else uses. In every round each network has its turn:

    counts      parameters and multiply-accumulates, by one counter for all; not timed
    encoder     the image encoders in PyTorch, eager (with ``--device cuda`` in FP32, float16 and compiled)
    one box     an RGB picture in, the mask of one box out, in PyTorch; ours needs no box
    automatic   all masks of a picture: 32 x 32 points in batches of 64, measured whole; ours in one pass, before each
    encoder in ONNX Runtime and OpenVINO (FP32, bfloat16): of ours the whole fused network, which has no encoder apart
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_networks import MODALITY, ON, OURS, OURS_RUNTIMES, ROWS, SIDE, UNMADE, Ours, Peer, versions
from peers_page import DOCS, write_page

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.environment import collect_environment, machine_cpu_seconds
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.backends.openvino_api import core
from espmedsam_edge.runtime.onnx_session import open_session

RESULTS = Path(__file__).parent / "results"
ENCODER, BOX, AUTOMATIC = "encoder", "one box", "automatic"
FIGURES = {
    "cpu": (ENCODER, BOX, AUTOMATIC, *ON["cpu"]),
    "cuda": (ENCODER, "encoder float16", "encoder compiled", BOX, AUTOMATIC, "encoder onnxruntime cuda"),
}
SAME = ("cpu", "gpus", "packages")
"""Of two environments whose times may stand in one file."""


@dataclass(frozen=True)
class Turn:
    """What one network does in a round; ``warm`` before it is timed, itself where it is None."""

    name: str
    run: Callable[[], object]
    warm: Callable[[], object] | None = None


class Record:
    """The result file: written after every figure, so that a run that dies leaves what it had.

    Args:
        path: of the file.
        facts: settings and environment of this run.
        resume: go on with the file that is there.

    Raises:
        UserError: the file is of another machine, of other packages or settings, or cannot be read.
    """

    def __init__(self, path: Path, facts: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {**facts, "counts": {}, "seconds": {}, "kept": {}, "failed": {}, "others": {}}
        if resume and path.is_file():
            try:
                found = json.loads(path.read_text())
                for key, value in self._same(facts).items():
                    if self._same(found)[key] != value:
                        raise UserError(f"{path} is of other {key}, so it cannot go on here.", "Leave --resume out.")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is no result of this script ({error}).", "Leave --resume out.") from error
            self.data = {**found, "resumed": [*found.get("resumed", []), facts["environment"]["time"]], "failed": {}}
        self.save()

    @staticmethod
    def _same(facts: dict[str, Any]) -> dict[str, Any]:
        environment = dict(facts["environment"])
        cpu = environment.get("cpu") or {}
        environment["cpu"] = [cpu.get("model"), cpu.get("usable")]  # not its momentary MHz
        gpus = [gpu.get("name") for gpu in environment.get("gpus") or []]
        return {**{key: environment.get(key) for key in SAME}, "gpus": gpus, "settings": facts["settings"]}

    def save(self) -> None:
        """Write it whole."""
        atomic_write(self.path, json.dumps(self.data, indent=1) + "\n")

    def failed(self, figure: str, name: str, error: BaseException) -> None:
        """Note why a network has no such figure."""
        line = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
        self.data["failed"].setdefault(figure, {})[name] = line
        self.save()
        print(f"    {name:<32} left out: {line}", flush=True)

    def take(self, figure: str, turns: list[Turn], rounds: int, synchronise: Callable[[], None]) -> None:
        """Time the turns, round after round, but for those that the file has already."""
        series: dict[str, list[float]] = self.data["seconds"].setdefault(figure, {})
        done, seen, warmed = {name: len(found) for name, found in series.items()}, Counter[str](), set()
        others, begin, own, left_out = machine_cpu_seconds(), time.perf_counter(), time.process_time(), set()
        for turn in turns * rounds:
            seen[turn.name] += 1
            if seen[turn.name] <= done.get(turn.name, 0) or turn.name in left_out:
                continue
            try:
                if turn.name not in warmed:
                    (turn.warm or turn.run)()
                    warmed.add(turn.name)
                synchronise()
                start = time.perf_counter()
                found = turn.run()
                synchronise()
                taken = time.perf_counter() - start
            except UNMADE as error:
                left_out.add(turn.name)
                self.failed(figure, turn.name, error)
                continue
            series.setdefault(turn.name, []).append(round(taken, 6))
            if figure == AUTOMATIC and isinstance(found, int):
                self.data["kept"][turn.name] = found
            self.save()
        for name, times in series.items():
            print(f"    {name:<32} {1000 * float(np.median(times)):10.1f} ms  ({len(times)})", flush=True)
        if others is not None and (now := machine_cpu_seconds()) is not None and warmed:
            busy = sum(now) - sum(others) - (time.process_time() - own)
            found = round(max(0.0, busy / (time.perf_counter() - begin)), 3)
            self.data["others"][figure] = max(found, self.data["others"].get(figure, 0.0))
            self.save()


def encoder_turns(figure: str, networks: list[Peer | Ours], device: str) -> Iterator[Turn]:
    """The encoders in PyTorch: eager, under autocast in float16, or compiled."""
    for network in networks:
        image = torch.randn(1, 3, network.side, network.side, device=device)
        encoder = torch.compile(network.encoder) if figure.endswith("compiled") else network.encoder

        def run(encoder: Any = encoder, image: torch.Tensor = image) -> None:
            with torch.inference_mode(), torch.autocast(device, torch.float16, enabled=figure.endswith("float16")):
                encoder(image)

        yield Turn(network.name, run)


def runtime_turns(figure: str, networks: list[Peer | Ours], threads: int, record: Record) -> Iterator[Turn]:
    """The encoders in ONNX Runtime or OpenVINO; of ours the segmenter's whole graph from frame to mask."""
    runtime, _, arithmetic = figure.removeprefix("encoder ").partition(" ")
    frame = phantom(MODALITY, 1, (SIDE, SIDE))[0]
    for network in networks:
        if isinstance(network, Ours):
            if figure in network.segmenters:
                yield Turn(OURS_RUNTIMES[figure][1], lambda s=network.segmenters[figure]: s.segment(frame))
            else:
                record.failed(figure, OURS_RUNTIMES[figure][1], network.left_out[figure])
            continue
        image = np.random.default_rng(0).standard_normal((1, 3, network.side, network.side)).astype(np.float32)
        try:
            content = _as_onnx(network)
            if runtime == "onnxruntime":
                providers = ["CUDAExecutionProvider"] if arithmetic == "cuda" else []
                session = open_session(content, threads, providers=providers)
                if providers and providers[0] not in session.get_providers():
                    raise RuntimeError("ONNX Runtime's CUDA provider did not start")
                yield Turn(network.name, lambda s=session, x=image: s.run(None, {"image": x}))
                continue
            hints = {"INFERENCE_PRECISION_HINT": arithmetic or "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
                     "ENABLE_CPU_PINNING": False, "INFERENCE_NUM_THREADS": threads}  # fmt: skip
            compiled = core().compile_model(core().read_model(content), "CPU", hints)
            yield Turn(network.name, lambda c=compiled, x=image: c([x]))
        except (*UNMADE, UserError) as error:
            record.failed(figure, network.name, error)


def _as_onnx(peer: Peer) -> bytes:
    file, device = io.BytesIO(), next(peer.encoder.parameters()).device
    image = torch.zeros(1, 3, peer.side, peer.side, device=device)
    with torch.inference_mode():
        torch.onnx.export(
            peer.encoder, (image,), file, input_names=["image"], output_names=["embedding"], opset_version=17,
            dynamo=False,
        )  # fmt: skip
    return file.getvalue()


def picture_turns(figure: str, networks: list[Peer | Ours], points: int) -> list[Turn]:
    """From a picture to its mask or masks; in automatic mode ours has its turn before every other's."""
    frame = phantom(MODALITY, 1, (SIDE, SIDE))[0]
    picture = np.ascontiguousarray(frame[..., ::-1])
    own: list[Turn] = []
    others: list[Turn] = []
    for network in networks:
        if isinstance(network, Ours):
            own.append(Turn(OURS, lambda n=network: n.one_pass(frame)))
            for runtime, segmenter in network.segmenters.items():
                own.append(Turn(OURS_RUNTIMES[runtime][1], lambda s=segmenter: s.segment(frame)))
        elif figure == BOX:
            others.append(Turn(network.name, lambda n=network: n.one_box(picture)))
        else:
            box = lambda n=network: n.one_box(picture)  # noqa: E731
            others.append(Turn(network.name, lambda n=network: n.everything(picture, points), box))
    return [*own, *others] if figure == BOX else [turn for other in others for turn in (*own, other)] or own


def measure(options: argparse.Namespace) -> None:
    """Everything, into one file."""
    device, threads = options.device, usable_cores()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # FP32 is FP32
    torch.backends.cudnn.benchmark = True
    wanted = FIGURES[device] if options.figures is None else options.figures
    if elsewhere := [figure for figure in wanted if figure in OURS_RUNTIMES and figure not in ON[device]]:
        raise UserError(f"'{elsewhere[0]}' is not of {device}.", f"There are {', '.join(FIGURES[device])}.")
    settings = {
        "device": device, "threads": threads, "seed": options.seed, "points_per_side": options.points,
        "rounds": options.rounds, "automatic_rounds": options.automatic_rounds, "picture": [SIDE, SIDE],
    }  # fmt: skip
    environment = collect_environment()
    environment["packages"] |= versions()
    facts = {"schema": 1, "kind": "peers", "settings": settings, "environment": environment}
    record = Record(options.out / f"{options.name}.json", facts, options.resume)
    begin = time.monotonic()
    networks = load(options, record, threads)
    synchronise = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for figure in wanted:
        print(figure, flush=True)
        if figure in (BOX, AUTOMATIC):
            turns = picture_turns(figure, networks, options.points)
        elif figure in OURS_RUNTIMES:
            turns = list(runtime_turns(figure, networks, threads, record))
        else:
            turns = list(encoder_turns(figure, networks, device))
        rounds = options.automatic_rounds if figure == AUTOMATIC else options.rounds
        record.take(figure, turns, rounds, synchronise)
        del turns
        gc.collect()
    record.data["minutes"] = round(record.data.get("minutes", 0) + (time.monotonic() - begin) / 60, 1)
    record.save()
    print(f"{record.data['minutes']} minutes, {record.path}")


def load(options: argparse.Namespace, record: Record, threads: int) -> list[Peer | Ours]:
    """Ours and the peers asked for, and their sizes."""
    networks: list[Peer | Ours] = [Ours(options.device, threads)]
    for row in ROWS:
        if row.build is None or (options.peers and row.name not in options.peers):
            continue
        try:
            networks.append(Peer(row, options.seed, options.device))
        except UNMADE as error:
            record.failed("counts", row.name, error)
    print("counts", flush=True)
    for network in networks:
        if network.name not in record.data["counts"]:
            record.data["counts"][network.name] = network.counts(options.device)
            record.save()
    return networks


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def main() -> None:
    """Measure, or draw the page."""
    warnings.simplefilter("ignore")  # of the peers' packages and of their export
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    measuring.add_argument("--device", choices=FIGURES, default="cpu")
    measuring.add_argument("--rounds", type=_positive, default=5)
    measuring.add_argument("--automatic-rounds", type=_positive, default=1)
    measuring.add_argument("--points", type=_positive, default=32, help="a side; the paper's automatic mode has 32")
    measuring.add_argument("--seed", type=int, default=0)
    measuring.add_argument("--peers", nargs="*", choices=[row.name for row in ROWS if row.build], metavar="NAME")
    figures = sorted({figure for kind in FIGURES.values() for figure in kind})
    measuring.add_argument("--figures", nargs="*", choices=figures, metavar="FIGURE", help="none: counts alone")
    measuring.add_argument("--resume", action="store_true")
    drawing = commands.add_parser("page")
    drawing.add_argument("names", nargs="+", metavar="NAME", help="of files in benchmarks/results/; a section each")
    for command in (measuring, drawing):
        command.add_argument("--out", type=Path, default=RESULTS, help="where results are")
        command.add_argument("--docs", type=Path, default=DOCS, help="where the page goes, and images/ beside it")
    options = parser.parse_args()
    try:
        if options.command == "measure":
            if options.device == "cuda" and not torch.cuda.is_available():
                raise UserError("PyTorch sees no CUDA GPU here.", "Leave --device out.")
            measure(options)
            options.names = [options.name]
        write_page([options.out / f"{name}.json" for name in options.names], options.docs)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
