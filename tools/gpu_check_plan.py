"""What gpu_check.py runs: each step's command, the seconds that are kept for it, and what it needs that is not here."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from espmedsam_edge.files import sha256_file

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("tensorrt", "tensorrt-rtx", "inductor", "onnxruntime-cuda")
"""What runs a network on a GPU, best first."""
COMPILING, CHECKING = 70.0, 40.0
"""Seconds kept for what runs at once: engines with Inductor's compilations, each a minute of a core; tests."""
SANITIZERS = ("memcheck", "racecheck", "initcheck")


@dataclass(frozen=True)
class Step:
    """One command, the seconds that are kept for it, and why it cannot be run here, if it cannot."""

    group: str
    name: str
    command: list[str]
    limit: float
    reason: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    together: bool = False  # with those beside it that are so, too


def engines(out: Path) -> list[Step]:
    """Whether each engine can be built and run here at all, on a small network."""
    own = [sys.executable, str(Path(__file__).with_name("gpu_check_engine.py"))]
    return [
        Step("engines", f"{name} builds and runs", [*own, name, "--out", str(out)], COMPILING, together=True)
        for name in ENGINES
    ]


def compilations(bundles: Sequence[Path], lacking: str | None) -> list[Step]:
    """What Inductor compiles for the benches and for its tests; ``lacking``: why it cannot."""
    found = networks(bundles)
    asked = [(found["fp16"], "inductor") if "fp16" in found else (found["fp32"], "inductor:fp16")]
    asked += [(found["fp32"], "inductor")] if "fp32" in found else []
    builds = [
        Step("builds", f"build {backend} {network.precision}",
             call("build", *network.options(backend)), COMPILING, lacking, together=True)
        for network, backend in asked
    ]  # fmt: skip
    tests, reason = pytest_command()
    command = [*tests, "tests/gpu/test_gpu_inductor.py"]
    return [
        *builds,
        Step("tests", "tests of Inductor on the GPU", command, COMPILING, reason or lacking, together=True),
    ]


def call(command: str, *arguments: str) -> list[str]:
    """One of the program's commands."""
    return [sys.executable, "-m", "espmedsam_edge", command, *arguments]


@dataclass(frozen=True)
class Network:
    """A graph to measure: a bundle's, of its first modality, and the SHA-256 of the checkpoint it was made from."""

    bundle: Path
    modality: str
    precision: str
    checkpoint_sha256: str

    def options(self, backend: str) -> list[str]:
        """It, on a backend, as commands take it."""
        return [str(self.bundle), "--modality", self.modality, "--precision", self.precision, "--backend", backend]


def networks(bundles: Sequence[Path]) -> dict[str, Network]:
    """The graph of each precision, of the first bundle that has it; the best precision to run comes first."""
    found: dict[str, Network] = {}
    for precision in ("fp16", "fp32", "int8"):
        for bundle in bundles:
            manifest = json.loads((bundle / "manifest.json").read_text())
            modality = manifest["graphs"][0]["modality"]
            if any((graph["modality"], graph["precision"]) == (modality, precision) for graph in manifest["graphs"]):
                found[precision] = Network(bundle, modality, precision, manifest["weights"]["checkpoint_sha256"])
                break
    return found


def plan(bundles: Sequence[Path], checkpoint: Path, out: Path, working: Sequence[str]) -> list[Step]:
    """All steps after the first ones, in the order in which they run.

    Args:
        bundles: whose graphs are measured; of the first one engines are compared with ONNX Runtime.
        checkpoint: the weights they were exported from, for PyTorch.
        out: where results go.
        working: the engines that run here, the best first; without any what needs one is left out.
    """
    found = networks(bundles)
    best = next(iter(found.values()))
    none = None if working else "no engine ran here"
    first, *others = working or list(ENGINES)[:1]
    if "fp16" not in found and "inductor" in (first, *others):  # which computes the FP32 graph in FP16 by itself
        others = [*others, "inductor" if first == "inductor" else "inductor:fp16"]
        first = "inductor:fp16" if first == "inductor" else first
    others += ["onnxruntime-cuda:nhwc"] if "onnxruntime-cuda" in working else []

    def missing(precision: str) -> str | None:
        return none or (None if precision in found else f"no bundle here has a {precision} graph: name one, --bundle")

    def graph(precision: str, backend: str = first) -> list[str]:
        return found.get(precision, best).options(backend)

    def bench(precision: str, limit: float, backend: str = first, *options: str) -> Step:
        name = precision if backend == first else f"{precision} {backend}"
        file = f"bench-{name.replace(' ', '-').replace(':', '-')}"
        written = ["--json", str(out / f"{file}.json"), "--markdown", str(out / f"{file}.md")]
        command = call("bench", *graph(precision, backend), *written, *options)
        return Step("bench", f"bench {name}", command, limit, missing(precision))

    def script(name: str, file: str, limit: float, *options: str, reason: str | None = None, title: str = "") -> Step:
        command = [sys.executable, f"benchmarks/{file}.py", *options]
        return Step(name, title or name, command, limit, reason)

    # Engines first: those that the tests and the benches load are then in the cache, and cost none of their time. A
    # builder that times its kernels has the GPU for itself.
    steps = [
        Step("builds", f"build {precision}", call("build", *graph(precision)), limit, missing(precision))
        for precision, limit in (("fp16", 26.0), ("fp32", 8.0))
        if first.startswith("tensorrt")
    ]
    steps += checks(bundles[0])
    reason = none
    if reason is None and sha256_file(checkpoint) != best.checkpoint_sha256:
        reason = f"{best.bundle.name} was not exported from {checkpoint.name}: name its weights, --checkpoint"

    def against(rival: str, limit: float) -> Step:
        written = ["--json", str(out / f"compare-{rival}.json"), "--markdown", str(out / f"compare-{rival}.md")]
        rivals = ["--no-roofline", "--compare", rival, "--checkpoint", str(checkpoint)]
        command = call("bench", *graph(best.precision), *rivals, *written)
        return Step("compare", f"{best.precision} against {rival}", command, limit, reason)

    lacking = "benchmarks/peers.py needs the extra peers: pip install -e '.[peers]'"
    peers = ["measure", "--name", "peers", "--device", "cuda", "--rounds", "5", "--out", str(out), "--docs", str(out)]
    of_video = [*graph(best.precision), "--tile", "off"]
    return [
        *steps,
        bench("fp16", 12),
        *(bench(best.precision, 6, other, "--no-roofline") for other in others),
        script("kernels", "kernels", 7, "--json", str(out / "kernels.json"), title="kernels against the copy rate"),
        script("video", "video_overlap", 9, *of_video, "--rounds", "1", "--json", str(out / "video.json"), reason=none,
               title="video to video"),
        script("streams", "streams", 8, *graph(best.precision), "--seconds", "3", "--json", str(out / "streams.json"),
               reason=none, title="several streams"),
        against("torch-eager", 8),
        bench("fp32", 6, first, "--no-roofline"),
        bench("int8", 6, first, "--no-roofline"),
        script("peers", "peers", 10, *peers, "--figures", "encoder", "encoder float16",
               reason=None if find_spec("mobile_sam") else lacking, title="peers' encoders"),
        against("torch-compile", 8),  # which compiles for as long as it is let
    ]  # fmt: skip


def checks(bundle: Path) -> list[Step]:
    """The tests marked gpu, and compute-sanitizer on those of the kernels."""
    tests, reason = pytest_command()
    command = [*tests, "tests/gpu", "--ignore", "tests/gpu/test_gpu_inductor.py"]
    own = {"ESPMEDSAM_BUNDLE": str(bundle)}
    steps = [Step("tests", "tests on the GPU", command, CHECKING, reason, own, together=True)]
    if shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not on the PATH; the CUDA toolkit has it"
    # Each tool slows kernels down by up to a hundred times: fewer random cases, and no camera-sized ones.
    few = {"ESPMEDSAM_KERNEL_EXAMPLES": os.environ.get("ESPMEDSAM_KERNEL_EXAMPLES", "6")}
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *tests]
        command += ["-x", "-k", "not camera", "tests/gpu/test_gpu_kernels.py"]
        steps.append(Step("sanitizer", f"compute-sanitizer {tool}", command, CHECKING, reason, few, together=True))
    return steps


def pytest_command() -> tuple[list[str], str | None]:
    """What runs tests marked gpu, and why that cannot be."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    # The caches of pytest and hypothesis belong to whoever develops, not to this check.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rs"]
    return command, f"not installed: {', '.join(missing)}" if missing else None
