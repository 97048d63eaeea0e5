"""A bench's result as JSON, as Markdown and as plain text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from espmedsam_edge.bench.hints import interpret
from espmedsam_edge.bench.measure import STAGES, BenchResult, Comparison, Series
from espmedsam_edge.runtime.latency import Latency

SCHEMA = 2  # since 2, frame to mask has the overlay in it
_MIB = 1 << 20
_COLUMNS = ("p50", "p90", "p99", "mean")
_NAME = len("frame to mask and overlay")


def as_json(result: BenchResult) -> dict[str, Any]:
    """Plain values: times in milliseconds, memory in bytes. ``docs`` of the fields: ``benchmarks/README.md``."""
    material = result.material
    return {
        "schema": SCHEMA,
        "kind": "bench",
        "environment": result.environment,
        "bundle": result.bundle,
        "source": {
            "description": material.description,
            "frames": len(material.frames),
            "height": int(material.frames[0].shape[0]),
            "width": int(material.frames[0].shape[1]),
        },
        "settings": asdict(result.settings),
        "contenders": [_series_json(series) for series in result.series],
        "comparisons": [_comparison_json(comparison) for comparison in result.comparisons],
        "decode_ms": Latency.of(material.decode).milliseconds() if len(material.decode) else None,
        "encode_ms": Latency.of(material.encode).milliseconds() if len(material.encode) else None,
        "encoder": material.encoder,
        "roofline": result.roofline.as_json() if result.roofline else None,
        "memory_bytes": result.memory,
        "major_page_faults": result.major_page_faults,
        "other_cores_busy": None if result.other_cores_busy is None else round(result.other_cores_busy, 2),
        "left_out": list(result.left_out),
        "hints": [asdict(hint) for hint in interpret(result)],
    }


def _series_json(series: Series) -> dict[str, Any]:
    contender, segmenter = series.contender, series.contender.segmenter
    return {
        "name": contender.name,
        "backend": segmenter.choice.backend.name,
        "device": segmenter.choice.backend.device,
        "passed_over": list(segmenter.choice.passed_over),
        "modality": segmenter.modality,
        "precision": segmenter.precision,
        "image_size": segmenter.image_size,
        "batch": segmenter.batch,
        "graph_sha256": contender.graph_sha256,
        "load_ms": round(1000 * contender.load_seconds, 1),
        "load_bytes": contender.load_bytes,
        "first_ms": round(1000 * series.first_seconds, 3),
        "frame_to_mask_ms": series.latency.milliseconds(),
        "stages_ms": {stage: Latency.of(series.stage(stage)).milliseconds() for stage in STAGES},
        "fps": round(series.fps, 3),
        "around_model": round(series.around_model, 4),
        "cores_busy": round(series.cores_busy, 2),
        "mask_agreement": series.mask_agreement,
        "device_times": series.device.as_json() if series.device else None,
        "samples_ms": [round(1000 * total, 3) for total in series.totals],
    }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "of": comparison.first,
        "to": comparison.other,
        "frame_to_mask": asdict(comparison.frame_to_mask),
        "inference": asdict(comparison.inference),
        "network_on_gpu": comparison.network,
    }


def _rows(series: Series, result: BenchResult) -> list[tuple[str, Latency]]:
    overlay = series.contender.segmenter.frame_options.overlay is not None
    rows = [("frame to mask and overlay" if overlay else "frame to mask", series.latency)]
    rows += [(f"  {stage}", Latency.of(series.stage(stage))) for stage in STAGES]
    if series is result.series[0]:
        if len(result.material.decode):
            rows.append(("decode", Latency.of(result.material.decode)))
        if len(result.material.encode):
            rows.append(("encode", Latency.of(result.material.encode)))
    return rows


def _cells(latency: Latency) -> list[str]:
    times = [getattr(latency, column) for column in _COLUMNS]
    return [*(_ms(seconds) for seconds in times), f"{latency.cov:.1%}"]


def _ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _title(series: Series) -> str:
    segmenter = series.contender.segmenter
    size = f"{segmenter.image_size} x {segmenter.image_size}"
    batch = f", batch {segmenter.batch}" if segmenter.batch > 1 else ""
    backend = segmenter.choice.backend
    return f"{segmenter.modality} {segmenter.precision} at {size}{batch}, {backend.name} ({backend.device})"


def _machine(result: BenchResult) -> str:
    cpu, memory = result.environment["cpu"], result.environment["memory"]["total"]
    parts = [cpu["model"], f"{cpu['usable']} cores"]
    if memory:
        parts.append(f"{memory / 2**30:.1f} GiB")
    parts += [gpu["name"] for gpu in result.environment["gpus"]]
    load = result.environment["load_average_1min"]
    return ", ".join(parts) + (f"; load before the start {load:.1f}" if load is not None else "")


def _summary(series: Series) -> list[str]:
    batch = series.contender.segmenter.batch
    return [
        f"{series.fps:.2f} FPS one after the other, {series.around_model:.1%} of it around the model, "
        f"{series.latency.samples} runs",
        f"load {_ms(series.contender.load_seconds)} ms, first {'frame' if batch == 1 else 'batch'} "
        f"{_ms(series.first_seconds)} ms, {series.cores_busy:.1f} cores busy",
        *(series.device.lines(series.latency.p50) if series.device else ()),
    ]


def _memory_line(result: BenchResult) -> str | None:
    now, peak = result.memory["at_end"], result.memory["peak"]
    if now is None or peak is None:
        return None
    return f"Memory of the process: {now / _MIB:.0f} MiB at the end, {peak / _MIB:.0f} MiB at most"


def _closing(result: BenchResult) -> list[str]:
    choice = result.series[0].contender.segmenter.choice
    lines = [
        f"Backend: {choice}" if choice.passed_over else None,
        _memory_line(result),
        f"Encoding: {result.material.encoder}" if result.material.encoder else None,
        result.roofline.line if result.roofline else None,
    ]
    networks = [
        f"Networks alone on the GPU: {comparison.first} takes {comparison.network:.3f} of {comparison.other}'s time"
        for comparison in result.comparisons
        if comparison.network is not None
    ]
    return [*filter(None, lines), *networks, *(f"Left out: {line}" for line in result.left_out)]


def as_text(result: BenchResult) -> str:
    """For a terminal of 80 columns (long names and hints apart)."""
    lines = [
        f"Bench of {result.bundle['name']}",
        f"  on      {_machine(result)}",
        f"  frames  {result.material.description}",
    ]
    heading = "".join(f"{column:>10}" for column in (*_COLUMNS, "CoV"))
    for series in result.series:
        lines += ["", f"{series.contender.name}: {_title(series)}", f"  {'milliseconds':<{_NAME}}{heading}"]
        for name, latency in _rows(series, result):
            lines.append(f"  {name:<{_NAME}}" + "".join(f"{cell:>10}" for cell in _cells(latency)))
        lines += [f"  {line}" for line in _summary(series)]
    if result.comparisons:
        first = result.series[0].contender.name
        width = max(len(c.other) for c in result.comparisons)
        lines += ["", f"{first} takes this part of the other's time (medians, measured in turn; 95 % interval)"]
        lines.append(f"  {'':<{width}}  {'frame to overlay':<24}  {'inference':<24}  equal mask pixels")
        for comparison, series in zip(result.comparisons, result.series[1:], strict=True):
            lines.append(
                f"  {comparison.other:<{width}}  {comparison.frame_to_mask!s:<24}  {comparison.inference!s:<24}  "
                f"{series.mask_agreement:.4%}"
            )
    closing = _closing(result)
    lines += ["", *closing] if closing else []
    hints = interpret(result)
    if hints:
        lines += ["", "Hints"]
        for hint in hints:
            lines += textwrap.wrap(f"{hint.kind}: {hint.text}", 96, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def as_markdown(result: BenchResult) -> str:
    """A page for a report: tables a contender, comparisons, hints, environment."""
    lines = [f"# Bench of {result.bundle['name']}", "", f"- Machine: {_machine(result)}"]
    environment = result.environment
    lines += [
        f"- System: {environment['system']}, {environment['machine']}, Python {environment['python']}",
        f"- Frames: {result.material.description}",
        f"- Bundle: preset {result.bundle['preset']}, weights {result.bundle['weights_origin']}, "
        f"manifest SHA-256 `{result.bundle['manifest_sha256'][:16]}`",
        f"- Time: {environment['time']}, source revision {environment['source_revision'] or 'unknown'}",
    ]
    lines += [f"- {line}" for line in _closing(result)]
    for series in result.series:
        lines += ["", f"## {series.contender.name}", "", f"{_title(series)}. {'; '.join(_summary(series))}.", ""]
        lines += markdown_table(
            ["milliseconds", *_COLUMNS, "CoV"],
            [[name.strip(), *_cells(latency)] for name, latency in _rows(series, result)],
        )
    if result.comparisons:
        first = result.series[0].contender.name
        lines += [
            "",
            "## Compared",
            "",
            f"{first} as a part of the other's time, medians of runs in turn, 95 % interval.",
            "",
        ]
        rows = [
            [comparison.other, str(comparison.frame_to_mask), str(comparison.inference), f"{series.mask_agreement:.4%}"]
            for comparison, series in zip(result.comparisons, result.series[1:], strict=True)
        ]
        lines += markdown_table(["compared with", "frame to overlay", "inference", "equal mask pixels"], rows)
    hints = interpret(result)
    if hints:
        lines += ["", "## Hints", "", *(f"- **{hint.kind}**: {hint.text}" for hint in hints)]
    versions = environment["packages"].items()
    lines += ["", "## Packages", "", ", ".join(f"{name} {number}" for name, number in versions)]
    return "\n".join(lines) + "\n"


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: its first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (heading, *rows)) for i in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell for cell in cells)
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(heading), f"| {' | '.join(rule)} |", *(line(row) for row in rows)]
