"""A bundle and images in; a verified FP16 or INT8 graph added to the bundle, or nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto

from espmedsam_edge.bundle import (
    CALIBRATION,
    PICTURES,
    REPORT,
    Bundle,
    BundleDraft,
    Graph,
    Manifest,
    graph_file_name,
    write_bundle,
)
from espmedsam_edge.calibration import modelopt_tools
from espmedsam_edge.calibration.emulation import simulate
from espmedsam_edge.calibration.gate import DEFAULT_BUDGET, Gate, GateResult, checked_budget, open_gate
from espmedsam_edge.calibration.histogram import METHODS, Method
from espmedsam_edge.calibration.images import CalibrationImages
from espmedsam_edge.calibration.lowering import lower
from espmedsam_edge.calibration.network import Network, group_of
from espmedsam_edge.calibration.plan import ALWAYS_FP32, Plan, lowest_plan, quantised_tensors, why_fp32
from espmedsam_edge.calibration.ranges import Ranges, measure_ranges
from espmedsam_edge.calibration.record import Measured, read_record, why_stale
from espmedsam_edge.calibration.report import CalibrationSummary, plot_sensitivity, section, with_section, worst_picture
from espmedsam_edge.calibration.request import CalibrationRequest, Listener
from espmedsam_edge.calibration.resemblance import Resemblance
from espmedsam_edge.calibration.search import Sensitivity, passing_plans, sensitivities
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import sha256_file
from espmedsam_edge.imaging.geometry import Tensor, preprocess
from espmedsam_edge.machine.cores import check_threads, usable_cores
from espmedsam_edge.onnx_header import with_header
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)

_LOW_SHARE = 0.9
_WORTH_INT8 = 0.5


def calibrate(
    path: Path, request: CalibrationRequest, images: CalibrationImages, listener: Listener
) -> CalibrationSummary:
    """Measure ranges, lower the FP32 graph, put it through the gate, and add it to the bundle.

    Raises:
        UserError: no FP32 graph, ModelOpt missing, unreadable images, or no plan that meets the budget; the bundle
            then stays as it was.
    """
    if request.target == "cpu" and request.precision != "int8":
        raise UserError(
            f"a processor gains nothing from {request.precision}.", "Use --precision int8, or leave --target out."
        )
    if request.precision not in DEFAULT_BUDGET:
        raise UserError(f"cannot calibrate to {request.precision}.", "Use --precision fp16 or int8.")
    budget = checked_budget(request.budget, DEFAULT_BUDGET[request.precision])
    check_threads(request.threads)
    bundle = Bundle.open(path)
    graph = fp32_graph(bundle, request.modality)
    modelopt_tools.check_interface()
    return _Calibration(bundle, graph, request, budget, images, listener).run()


def fp32_graph(bundle: Bundle, modality: str) -> Graph:
    """The graph that all others are compared with.

    Raises:
        UserError: the bundle has none.
    """
    held = {graph.precision: graph for graph in bundle.manifest.graphs if graph.modality == modality}
    if held and "fp32" not in held:
        raise UserError(
            f"bundle {bundle.path} holds only {' and '.join(held)} for {modality}; calibrate starts from FP32.",
            "Export it again: espmedsam-edge export WEIGHTS --out BUNDLE",
        )
    return bundle.graph(modality, "fp32")


@dataclass(frozen=True)
class _Found:
    """A plan, its graph, the gate's verdict, and how its activations are clipped."""

    plan: Plan
    model: ModelProto
    result: GateResult
    method: Method


class _Calibration:
    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        request: CalibrationRequest,
        budget: float,
        images: CalibrationImages,
        listener: Listener,
    ) -> None:
        self.bundle, self.graph, self.request, self.budget = bundle, graph, request, budget
        self.images, self.listener = images, listener
        self.threads = request.threads or usable_cores()
        self.file = bundle.graph_path(graph)
        self.content = bundle.read_graph(graph)
        self.network = Network.parse(self.content, self.file)
        if self.network.is_quantised():
            raise UserError(
                f"{self.file} is already quantised, though its manifest says fp32.",
                "Export it again: espmedsam-edge export WEIGHTS --out BUNDLE",
            )
        self.notes = list(images.notes)
        self.sample: Tensor | None = None

    def run(self) -> CalibrationSummary:
        request = self.request
        measured, reused = self._measured()
        ranges = measured.ranges
        gate = self._gate()
        if gate.blind():
            self._warn("The FP32 masks are all empty or all full on every held-out image: the gate sees little.")
        plan = lowest_plan(self.network, ranges, request.precision, request.target)
        if request.precision == "int8" and not plan.int8:
            raise UserError("no layer of this graph can be quantised to INT8.", "Use --precision fp16.", exit_code=1)
        found, ranking = self._find(plan, ranges, gate)
        return self._write(found, ranking, measured, reused, gate)

    def _warn(self, note: str) -> None:
        self.notes.append(note)
        log.warning("warning: %s", note)

    def _calibrating(self, seen: Resemblance) -> Iterator[Tensor]:
        """The network's input for each calibration image, which ``seen`` looks at, too."""
        for _, frame in self.images.read(self.images.calibration):
            seen.add(frame)
            tensor = preprocess(frame, self.graph.image_size, self.bundle.manifest.input.normalization)
            yield np.repeat(tensor, self.graph.batch, axis=0)

    def _measured(self) -> tuple[Measured, bool]:
        """The record of an earlier run if it still holds, else a new measurement."""
        images, listener = self.images, self.listener
        for note in self.notes:
            log.warning("warning: %s", note)
        wanted = images.content_hash()
        record, reason = read_record(self.bundle.path)
        earlier = record.modalities.get(self.request.modality)
        if earlier is not None:
            reason = why_stale(earlier, self.network, self.graph.sha256, len(images.calibration), wanted)
            if reason is None:
                seen = self._look()
                if seen.count == earlier.images:
                    log.info("ranges: %s reused, measured on %d images", CALIBRATION, earlier.images)
                    self._check_resemblance(seen)
                    return earlier, True
                reason = f"{seen.count} of the images can be read, it was measured on {earlier.images}"
        if reason is not None:
            log.info("ranges: %s not reused: %s; measuring again", CALIBRATION, reason)
        listener.phase("measuring ranges", len(images.calibration))
        seen = Resemblance.of(self.request.modality)
        ranges = measure_ranges(
            self.network,
            self._calibrating(seen),
            quantised_tensors(self.network),
            threads=self.threads,
            on_image=listener.step,
        )
        self._check_resemblance(seen)
        measured = Measured(
            graph_sha256=self.graph.sha256,
            images=seen.count,
            images_sha256=wanted,
            largest=ranges.largest,
            thresholds=ranges.thresholds,
        )
        return measured, False

    def _look(self) -> Resemblance:
        """Read the calibration images without running the graph: what cannot be read, and what they look like."""
        self.listener.phase("reading the images", len(self.images.calibration))
        seen = Resemblance.of(self.request.modality)
        for _, frame in self.images.read(self.images.calibration):
            seen.add(frame)
            self.listener.step()
        return seen

    def _check_resemblance(self, seen: Resemblance) -> None:
        warning = seen.warning()
        if warning:
            self._warn(warning)

    def _gate(self) -> Gate:
        gate, self.gate_pictures = open_gate(
            self.bundle, self.graph, self.images, self.budget, self.threads, self.listener
        )
        self.sample = np.repeat(gate.images[0].tensor, self.graph.batch, axis=0)
        return gate

    def _lower(self, plan: Plan, ranges: Ranges, method: Method, gate: Gate) -> _Found:
        """The plan's graph, and the gate's verdict on it."""
        assert self.sample is not None
        self.listener.phase(f"{plan.precision}: converting and comparing masks", len(gate.images))
        model = lower(self.network, plan, _thresholds(ranges, method), self.sample)
        return _Found(plan, model, gate.judge(model), method)

    def _find(self, plan: Plan, ranges: Ranges, gate: Gate) -> tuple[_Found, list[Sensitivity]]:
        """The first method that passes, else the best one with the cheapest groups kept higher."""
        listener, asked = self.listener, self.request.method
        tried: list[_Found] = []
        for method in ((asked,) if asked else METHODS) if plan.int8 else METHODS[:1]:
            found = self._lower(plan, ranges, method, gate)
            log.info("%s%s: %s", plan.precision, f", {method}" if plan.int8 else "", found.result)
            if found.result.passed:
                return found, []
            tried.append(found)
        best = min(tried, key=lambda found: _badness(found.result))
        log.info("over the budget; measuring which layer groups cause it")
        thresholds = _thresholds(ranges, best.method)

        def on_group(group: str, index: int, count: int) -> None:
            listener.phase(f"sensitivity {index + 1} of {count}: {group}", None)

        def simulated(candidate: Plan) -> ModelProto:
            return simulate(self.network, candidate, thresholds)

        ranking = sensitivities(self.network, best.plan, simulated, gate, on_group)
        for s in sorted(ranking, key=lambda s: s.harm, reverse=True)[:5]:
            log.info("  %s: %+.3f Dice points alone, %.1f %% of the work", s.group, s.loss, 100 * s.share)
        listener.phase("searching the cheapest set to keep higher", None)
        for candidate in passing_plans(self.network, best.plan, simulated, gate, ranking):
            found = self._lower(candidate, ranges, best.method, gate)
            if found.result.passed:
                log.info(
                    "kept in %s: %s",
                    "FP16" if plan.has_fp16(self.network) and plan.int8 else "FP32",
                    ", ".join(candidate.raised),
                )
                return found, ranking
        raise UserError(
            f"no choice of layers brings {plan.precision} within {self.budget:g} Dice points "
            f"(everything lowered: {best.result.loss:+.3f}); nothing was written.",
            "Give more or better images, allow more with --budget, or stay with a higher precision; "
            "see docs/precision.md.",
            exit_code=1,
        )

    def _write(
        self,
        found: _Found,
        ranking: list[Sensitivity],
        measured: Measured,
        reused: bool,
        gate: Gate,
    ) -> CalibrationSummary:
        request, manifest = self.request, self.bundle.manifest
        modality, precision = request.modality, request.precision
        self.listener.phase("writing the bundle", None)
        file = graph_file_name(modality, precision, len(manifest.modalities))
        content = with_header(found.model.SerializeToString(), manifest.properties(modality, precision))
        network = Network.of(found.model)
        macs = network.macs_by_type()
        total = sum(macs.values()) or 1
        share = 1 - macs.get("fp32", 0) / total
        if share < _LOW_SHARE and request.target == "gpu":
            self._warn(f"Only {100 * share:.0f} % of the multiply-accumulates are below FP32.")
        if found.plan.int8 and macs.get("int8", 0) / total < _WORTH_INT8:
            other = "FP16" if request.target == "gpu" else "FP32"
            self._warn(
                f"Only {100 * macs.get('int8', 0) / total:.0f} % of the work is in INT8; {other} is the better choice."
            )
        to_fp16 = [] if request.target == "cpu" else self.network.nodes
        kept = [node for node in to_fp16 if node.name in found.plan.fp32]
        reasons = Counter(
            f"{group_of(node.name)}: {why_fp32(self.network, measured.ranges, node) or 'the gate asked for it'}"
            if node.op_type not in ALWAYS_FP32
            else f"{node.op_type}: its sums pass FP16"
            for node in kept
        )
        summary = CalibrationSummary(
            modality=modality,
            precision=precision,
            file=file,
            size=len(content),
            reference_size=self.network.size,
            macs={name: count / total for name, count in macs.items()},
            network=network,
            result=found.result,
            images=measured.images,
            reused=reused,
            method=found.method if found.plan.int8 else None,
            kept=dict(reasons),
            raised=found.plan.raised,
            target=request.target,
            ranking=ranking,
            notes=tuple(self.notes),
        )
        with write_bundle(self.bundle.path, extend=True) as draft:
            path = draft.new_file(file)
            path.write_bytes(content)
            entry = draft.graph(
                file, modality=modality, precision=precision, image_size=self.graph.image_size, batch=self.graph.batch
            )
            gate.check_written(content, entry)
            assert draft.manifest is not None
            if sha256_file(draft.folder / self.graph.file) != self.graph.sha256:
                raise UserError(f"{self.file} changed while calibrate ran.", "Run it again.", exit_code=1)
            draft.manifest = _extended(draft.manifest, entry, summary)
            record, _ = read_record(draft.folder)
            text = record.with_modality(modality, measured).to_json()
            draft.new_file(CALIBRATION).write_text(text)
            names = self._pictures(draft, summary, found, gate)
            report = draft.folder / REPORT
            before = report.read_text(encoding="utf-8") if report.is_file() else ""
            draft.new_file(REPORT).write_text(with_section(before, section(summary, names)), encoding="utf-8")
        return summary

    def _pictures(self, draft: BundleDraft, summary: CalibrationSummary, found: _Found, gate: Gate) -> list[str]:
        """Draw the sensitivity plot and the worst image; returns their names."""
        names: list[str] = []
        stem = f"{summary.modality}-{summary.precision}"
        for picture in PICTURES:
            draft.new_file(f"{stem}-{picture}")
        folder = draft.folder
        title = f"{summary.modality} {summary.precision}"
        plot = f"{stem}-sensitivity.png"
        if plot_sensitivity(folder / plot, summary.ranking, summary.raised, title):
            names.append(plot)
        if self.request.pictures:
            worst = found.result.worst
            image = gate.images[worst]
            frame = next((frame for _, frame in self.images.read([self.gate_pictures[worst]])), None)
            if frame is not None:
                lowered = gate.lowered_logits(found.model, worst)
                data = worst_picture(
                    summary.modality,
                    frame,
                    image.mask(image.logits, gate.threshold),
                    image.mask(lowered, gate.threshold),
                    summary.precision,
                )
                name = f"{stem}-worst.jpg"
                (folder / name).write_bytes(data)
                names.append(name)
        return names


def _thresholds(ranges: Ranges, method: Method) -> dict[str, float]:
    return {name: values[method] for name, values in ranges.thresholds.items()}


def _badness(result: GateResult) -> tuple[int, int, float]:
    return result.not_finite, result.vanished, result.loss


def _extended(manifest: Manifest, entry: Graph, summary: CalibrationSummary) -> Manifest:
    same = (entry.modality, entry.precision)
    graphs = [graph for graph in manifest.graphs if (graph.modality, graph.precision) != same]
    data = manifest.model_dump()
    data["graphs"] = [graph.model_dump() for graph in [*graphs, entry]]
    data["accuracy"] = {**manifest.accuracy, f"{entry.modality}/{entry.precision}": summary.to_manifest()}
    data["tools"] = {**manifest.tools, "espmedsam-edge": __version__, "nvidia-modelopt": modelopt_tools.version()}
    return Manifest.model_validate(data)
