"""The held-out check through a backend: what it makes of a graph beside the FP32 graph, noted in the bundle."""

from __future__ import annotations

from pathlib import Path

from espmedsam_edge.bundle import REPORT, Bundle, Manifest, write_bundle
from espmedsam_edge.calibration.calibrator import fp32_graph
from espmedsam_edge.calibration.gate import DEFAULT_BUDGET, GateResult, checked_budget, open_gate
from espmedsam_edge.calibration.images import CalibrationImages
from espmedsam_edge.calibration.report import gate_entry, gate_lines, with_section
from espmedsam_edge.calibration.request import CheckRequest, Listener
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import sha256_file
from espmedsam_edge.machine.cores import check_threads, usable_cores
from espmedsam_edge.machine.environment import cpu, packages
from espmedsam_edge.runtime.auto.gates import accuracy_key
from espmedsam_edge.runtime.backends.backend import ReducingBackend, load_backend
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec


def check_backend(path: Path, request: CheckRequest, images: CalibrationImages, listener: Listener) -> GateResult:
    """Run a bundle's graph on a backend over the held-out images and note in the bundle whether it passed the gate.

    A failure is noted, too: what was right with other weights or another version is not right any more.

    Raises:
        UserError: no such graph, no FP32 graph to compare with, or a backend that cannot run here.
    """
    usual = DEFAULT_BUDGET["int8" if request.precision == "int8" else "fp16"]
    budget = checked_budget(request.budget, usual)
    check_threads(request.threads)
    bundle = Bundle.open(path)
    graph = bundle.graph(request.modality, request.precision)
    threads = request.threads or usable_cores()
    backend = load_backend(bundle, graph, request.backend, threads).backend
    try:
        asked = BackendSpec.parse(request.backend).arithmetic
        if asked and isinstance(backend, ReducingBackend) and backend.arithmetic != asked:
            raise UserError(
                f"{request.backend} computes in {backend.arithmetic} here, so {asked} cannot be checked.",
                "Check it on a machine that has it.",
                exit_code=1,
            )
        gate, _ = open_gate(bundle, fp32_graph(bundle, request.modality), images, budget, threads, listener)
        listener.phase(f"masks of {request.precision} on {request.backend}", len(gate.images))
        result = gate.judge_runs(backend.run)
    finally:
        backend.close()
    title = f"{graph.modality} {graph.precision} on {request.backend}"
    runtime = backend.name.partition("-")[0].partition(":")[0]
    runtimes = ("onnxruntime", "torch" if runtime == "inductor" else runtime)
    lines = [f"## Check: {title}", "", f"Ran on {backend.device}.", "", *gate_lines(result)]
    entry = {
        "against": f"FP32 graph in ONNX Runtime, run on {backend.name}, held-out images",
        **gate_entry(result),
        "passed": result.passed,
        "graph_sha256": graph.sha256,
        "device": f"{backend.device}; {cpu().model}",
        "versions": {name: version for name, version in packages().items() if name.startswith(runtimes)},
    }
    with write_bundle(path, extend=True) as draft:
        assert draft.manifest is not None
        if sha256_file(draft.folder / graph.file) != graph.sha256:
            raise UserError(f"{bundle.graph_path(graph)} changed while it was checked.", "Run it again.", exit_code=1)
        key = accuracy_key(graph, request.backend)
        accuracy = {**draft.manifest.accuracy, key: entry}
        draft.manifest = Manifest.model_validate(draft.manifest.model_dump() | {"accuracy": accuracy})
        report = draft.folder / REPORT
        before = report.read_text(encoding="utf-8") if report.is_file() else ""
        draft.new_file(REPORT).write_text(with_section(before, "\n".join(lines) + "\n"), encoding="utf-8")
    return result
