"""What "auto" takes: of all graphs of a modality and all backends, the fastest that is right.

Right is FP32, and what a gate of ``calibrate`` passed: a graph of lower precision when it was written, an arithmetic
that a runtime reduces by itself in ``calibrate --check``. Fastest is what a trial on this machine found (``trial``),
and before there was one what ``ON_GPU`` and ``_EXPECTED`` say, measured on others (docs/engines.md,
docs/intel.md).
"""

from __future__ import annotations

from dataclasses import replace

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.machine.environment import cpu
from espmedsam_edge.runtime.auto.gates import passed
from espmedsam_edge.runtime.auto.kept_trials import find_trial
from espmedsam_edge.runtime.backends.backend import BACKENDS, Candidate, Choice, load_first, unavailable
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec
from espmedsam_edge.runtime.cuda.gpu import find_gpu

REFERENCE = "onnxruntime"
"""What runs where nothing else is known to be faster; nothing that "auto" takes may be slower."""

ON_GPU = ("tensorrt", "tensorrt-rtx", "inductor", "onnxruntime-cuda")
"""What runs on an NVIDIA GPU, the fastest first by what was measured and what their makers say."""

_VARIANTS = ("inductor:fp16", "onnxruntime-cuda:nhwc")
"""More for a trial on a GPU: the first wants its gate, and no measurement ranks the second yet, which comes last."""

IF_BUILT = ("inductor", "inductor:bf16")
"""What is taken only where ``build`` made it: "auto" never waits minutes for a compiler."""

_MEASURE = "espmedsam-edge bench BUNDLE --choose"

_BF16 = frozenset({"amx_bf16", "avx512_bf16"})
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})

_EXPECTED: tuple[tuple[str, str, frozenset[str], frozenset[str]], ...] = (
    ("int8", "openvino:bf16", _BF16, _VNNI),
    ("fp32", "openvino:bf16", _BF16, _BF16),
    ("int8", "openvino", _VNNI, _VNNI),
)
"""Precision and backend, fastest first: each was measured to be faster than FP32 in ONNX Runtime on a processor that
has one of each set of instructions."""


def load_fastest(
    bundle: Bundle,
    modality: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    *,
    many: bool = False,
) -> Choice:
    """Load what is fastest here and right; what fails to load gives way to the next.

    Args:
        bundle: where the graphs are.
        modality: may be None where the bundle has one.
        precision: of the graph; its floating-point part is then computed as the graph has it. None: any that is right.
        threads: as ``load_backend``.
        many: whether several frames will be under way at once.

    Raises:
        UserError: no such graph, or nothing can run it here.
    """
    candidates = rank(bundle, bundle.graph(modality, precision), precision is not None, threads)
    if many:
        candidates = [replace(one, backend=str(BackendSpec.parse(one.backend).for_many())) for one in candidates]
    return load_first(bundle, candidates, threads)


def rank(bundle: Bundle, graph: Graph, only: bool, threads: int | None) -> list[Candidate]:
    """What "auto" tries, in its order.

    Args:
        bundle: where the graphs are.
        graph: of the modality; it runs where nothing else is known to be faster.
        only: whether no other graph may be taken, and no arithmetic but its own.
        threads: as ``load_backend``.
    """
    trial = find_trial(graph, threads) if _several() else None
    if trial is None:
        return [*_on_gpu(bundle, graph), *_expected(bundle, graph, only), Candidate(graph, _last())]
    faster = [
        Candidate(other, tried.backend, f"{_digits(ratio)} of {REFERENCE}'s time, tried on {trial.date}")
        for ratio, tried in trial.faster
        for other in graphs_of(bundle, graph, only)
        if other.sha256 == tried.graph_sha256 and why_not(bundle, other, tried.backend, only) is None
    ]
    why = "" if faster else f"nothing was faster when tried on {trial.date}"
    return [*([] if on_gpu() else _on_gpu(bundle, graph)), *faster, Candidate(graph, _last(), why)]


def _digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def on_gpu() -> list[str]:
    """The backends that "auto" may take on this machine's GPU, best first; without one none."""
    names = (*ON_GPU, *_VARIANTS) if find_gpu() is not None else ()
    return [name for name in names if BackendSpec.parse(name).name in BACKENDS]


def _several() -> bool:
    """Whether there is anything to choose from, so that there may be a trial."""
    return unavailable("openvino") is None or unavailable(IF_BUILT[0]) is None or bool(on_gpu())


def _last() -> str:
    """What is left where nothing else loads; where CUDA is, it has been tried by then."""
    # Without a GPU that question would import ONNX Runtime, which is not needed where another runtime is taken.
    return REFERENCE if find_gpu() is None or unavailable("onnxruntime-cuda") is not None else f"{REFERENCE}-cpu"


def _on_gpu(bundle: Bundle, graph: Graph) -> list[Candidate]:
    """Those of the GPU; without one the two that say why there is none."""
    names = on_gpu() or list(ON_GPU[:2])
    usable = [name for name in names if unavailable(name) is None and why_not(bundle, graph, name, True) is None]
    names = [name for name in names if name in usable or unavailable(name) is not None]
    why = f"expected to be the fastest of {', '.join(usable)}; measure it here: {_MEASURE}" if len(usable) > 1 else ""
    return [Candidate(graph, name, why if name in usable else "") for name in names]


def _expected(bundle: Bundle, graph: Graph, only: bool) -> list[Candidate]:
    """What should be faster here than the reference, by what was measured on other processors."""
    if unavailable("openvino") is not None:
        return []
    simd = frozenset(cpu().simd)
    why = f"expected to be the fastest; measure it here: {_MEASURE}"
    return [
        Candidate(other, backend, why)
        for precision, backend, *instructions in _EXPECTED
        for other in graphs_of(bundle, graph, only)
        if other.precision == precision
        and all(simd & some for some in instructions)
        and why_not(bundle, other, backend, only) is None
    ]


def graphs_of(bundle: Bundle, graph: Graph, only: bool) -> list[Graph]:
    """The graphs that may be taken in place of one: itself first, then, unless it is the only one, its modality's."""
    same = [other for other in bundle.manifest.graphs if other.modality == graph.modality and other != graph]
    return [graph, *([] if only else same)]


def built_here(backend: str, graph: Graph) -> bool:
    """Whether a backend of ``IF_BUILT`` has the graph compiled for this machine."""
    from espmedsam_edge.runtime.backends import inductor_backend  # with the whole way to a GPU, which few need

    return inductor_backend.built_here(backend, graph)


def why_not(bundle: Bundle, graph: Graph, backend: str, only: bool) -> str | None:
    """Why a graph on a backend may not be taken unasked, as a sentence (empty: not worth one).

    Args:
        bundle: where the graph is.
        graph: one of its graphs.
        backend: as ``load_backend`` takes it.
        only: whether it was asked for by its precision.
    """
    if graph.precision != "fp32" and not only and not passed(bundle.manifest, graph):
        return f"calibrate's gate has not passed the {graph.precision} graph."
    spec = BackendSpec.parse(backend)
    reduced = spec.arithmetic not in ("", "fp32")
    if reduced and only:
        return ""
    if reduced and not passed(bundle.manifest, graph, backend):
        option = "" if graph.precision == "fp32" else f" --precision {graph.precision}"
        return (
            f"its arithmetic has not passed the gate. Check it on images: espmedsam-edge calibrate {bundle.path} "
            f"IMAGES --check {backend}{option}"
        )
    return "" if spec.name in IF_BUILT and not built_here(backend, graph) else None
