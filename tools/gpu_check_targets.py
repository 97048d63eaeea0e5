"""What the GPU path has to reach, read from the results of gpu_check.py, as values with limits and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["met", "missed", "not measured"]
Found = tuple[float | None, str]
"""A value, and of what it is; or None, and why."""


@dataclass(frozen=True)
class Target:
    """A limit, and what was found.

    Attributes:
        name: what is measured.
        value: in ``unit``; None: not measured.
        limit: in ``unit``.
        at_most: the limit is not to be exceeded; otherwise it is to be reached.
        unit: of both.
        note: of what the value is, or why there is none.
    """

    name: str
    value: float | None
    limit: float
    at_most: bool
    unit: str
    note: str

    @property
    def verdict(self) -> Verdict:
        """Whether the value keeps the limit."""
        if self.value is None:
            return "not measured"
        return "met" if (self.value <= self.limit if self.at_most else self.value >= self.limit) else "missed"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "verdict": self.verdict}

    def cells(self) -> tuple[str, str, str, str, str]:
        """For a table: name, value, limit, verdict, note."""
        value = "-" if self.value is None else self._text(self.value)
        return self.name, value, f"{'≤' if self.at_most else '≥'} {self._text(self.limit)}", self.verdict, self.note

    def _text(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.unit == "%" else f"{value:.4g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Sanitized:
    """One tool of compute-sanitizer: its verdict as a step, and what it said last."""

    verdict: str
    note: str

    @property
    def found_something(self) -> bool:
        """Whether it ran to its end and did not pass."""
        return self.verdict == "FAILED" and not self.note.startswith("stopped after")


def targets(out: Path, sanitized: Sequence[Sanitized]) -> list[Target]:
    """Every target, from the JSON in a results folder.

    Args:
        out: the folder.
        sanitized: the tools of compute-sanitizer, three of them if all were tried.
    """

    def of(name: str, limit: float, unit: str, found: Found, *, at_most: bool = True) -> Target:
        value, note = found
        return Target(name, value, limit, at_most, unit, note)

    bench, kernels = _in_fp16(out), out / "kernels.json"
    eager, compiled = (_read(out / f"compare-{name}.json", _against(name)) for name in ("torch-eager", "torch-compile"))
    limit = 1.5 if _backend(bench).startswith("tensorrt") else 2.0
    return [
        of("engine, FP16, batch 1, 1024 x 1024", limit, "ms", _read(bench, _engine)),
        of("frame to mask and overlay at 1080p, over the engine", 1.25, "x", _read(bench, _whole_frame)),
        of("p99 over p50, frame to mask and overlay", 1.2, "x", _read(bench, _tail)),
        of("ONNX Runtime's CUDA provider, batch 1, 1024 x 1024", 9.7, "ms", _onnxruntime(out)),
        of("faster than eager PyTorch in FP32", 10, "x", eager, at_most=False),
        of("faster than torch.compile in FP16", 2, "x", compiled, at_most=False),
        of("preprocess and postprocess, over the engine", 0.05, "%", _read(bench, _kernels)),
        of("preprocess, over the copy rate", 0.5, "%", _read(kernels, _copy_rate("preprocess")), at_most=False),
        of("postprocess, over the copy rate", 0.35, "%", _read(kernels, _copy_rate("postprocess")), at_most=False),
        of("video to video, over its slowest stage alone", 0.9, "%", _read(out / "video.json", _video), at_most=False),
        of("tools of compute-sanitizer that found something", 0, "", _sanitizer(sanitized)),
    ]


def _in_fp16(out: Path) -> Path:
    """The bench in FP16: of an FP16 graph, else of what Inductor makes of the FP32 one."""
    own = out / "bench-fp16.json"
    made = (path for path in sorted(out.glob("bench-*.json")) if _backend(path) == "inductor:fp16")
    return own if own.is_file() else next(made, own)


def _backend(bench: Path) -> str:
    return str(json.loads(bench.read_text())["contenders"][0]["backend"]) if bench.is_file() else "tensorrt"


def _onnxruntime(out: Path) -> Found:
    """The fastest of its benches: half of what it took with frames and logits through the host's memory."""
    found = []
    for path in sorted(out.glob("bench-*.json")):
        own = json.loads(path.read_text())["contenders"][0]
        if (
            own["backend"] == "onnxruntime-cuda"
            and own["device_times"]
            and (own["batch"], own["image_size"]) == (1, 1024)
        ):
            found.append((_engine_ms(own), f"{own['precision']}, {own['device']}"))
    return min(found) if found else (None, "no bench of it")


def _read(path: Path, take: Callable[[dict[str, Any]], Found]) -> Found:
    if not path.is_file():
        return None, f"there is no {path.name}"
    return take(json.loads(path.read_text()))


def _own(contender: dict[str, Any]) -> str | None:
    """Why a contender is not the engine that the targets are of; None if it is."""
    if contender["device_times"] is None:
        return f"{contender['backend']} has no times of a GPU"
    precision = "fp16" if contender["backend"].endswith(":fp16") else contender["precision"]
    kind = (precision, contender["batch"], contender["image_size"])
    return None if kind == ("fp16", 1, 1024) else "measured was {}, batch {}, at {} pixels".format(*kind)


def _engine_ms(contender: dict[str, Any]) -> float:
    return float(contender["device_times"]["stages_ms"]["engine"]["p50"])


def _engine(bench: dict[str, Any]) -> Found:
    own = bench["contenders"][0]
    reason = _own(own)
    return (None, reason) if reason else (_engine_ms(own), f"median, {own['backend']}, {own['device']}")


def _whole_frame(bench: dict[str, Any]) -> Found:
    own, source = bench["contenders"][0], bench["source"]
    reason = _own(own)
    if reason is None and (source["width"], source["height"]) != (1920, 1080):
        reason = f"frames were {source['width']} x {source['height']}"
    if reason is None and bench["schema"] < 2:
        reason = "measured without the overlay"
    if reason:
        return None, reason
    milliseconds = float(own["frame_to_mask_ms"]["p50"])
    return milliseconds / _engine_ms(own), f"{milliseconds:.3f} ms, median"


def _tail(bench: dict[str, Any]) -> Found:
    own = bench["contenders"][0]
    times = own["frame_to_mask_ms"]
    reason = _own(own)
    return (None, reason) if reason else (times["p99"] / times["p50"], f"{times['samples']} runs")


def _kernels(bench: dict[str, Any]) -> Found:
    own = bench["contenders"][0]
    reason = _own(own)
    return (None, reason) if reason else (own["device_times"]["kernels_to_engine"], "medians")


def _against(rival: str) -> Callable[[dict[str, Any]], Found]:
    """Against eager PyTorch in FP32, or compiled in FP16."""
    other = "torch compile fp16" if rival == "torch-compile" else "torch eager"

    def take(compare: dict[str, Any]) -> Found:
        reason = _own(compare["contenders"][0])
        if reason:
            return None, reason
        for comparison in compare["comparisons"]:
            if comparison["to"] == other and comparison["network_on_gpu"]:
                whole = 1 / comparison["frame_to_mask"]["value"]
                return 1 / comparison["network_on_gpu"], f"networks alone; frame to mask and overlay {whole:.3g} x"
        return None, next((line for line in compare["left_out"] if line.startswith(f"{rival}:")), f"no {other}")

    return take


def _copy_rate(kernel: str) -> Callable[[dict[str, Any]], Found]:
    def take(kernels: dict[str, Any]) -> Found:
        rows = [row for row in kernels["rows"] if row["name"].startswith(kernel)]
        if not rows:
            return None, f"no {kernel}"
        worst = min(rows, key=lambda row: row["of_copy"])
        return worst["of_copy"], f"the slowest of {len(rows)}: {worst['name']}"

    return take


def _video(video: dict[str, Any]) -> Found:
    return video["of_slowest"], f"slowest alone: {video['slowest']}"


def _sanitizer(tools: Sequence[Sanitized]) -> Found:
    found = [tool for tool in tools if tool.found_something]
    if found:
        return len(found), found[0].note
    open_ = next((tool for tool in tools if tool.verdict != "passed"), None)
    if open_ is not None or len(tools) < 3:
        return None, open_.note if open_ else "not all were run"
    return 0, "memcheck, racecheck, initcheck"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells for a terminal; the last cell is as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(result: dict[str, Any], found: Sequence[Target]) -> str:
    """The summary as a page."""

    def lines(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        cells = [[cell.replace("|", "/") for cell in row] for row in rows]
        return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *cells)]

    gpus = ", ".join(gpu["name"] for gpu in result["environment"]["gpus"]) or "no GPU"
    steps = [[step["name"], step["verdict"], f"{step['seconds']:.1f}", step["note"]] for step in result["steps"]]
    return "\n".join(
        [
            "# GPU check",
            "",
            f"{gpus}; {', '.join(result['engines']) or 'no engine'}; bundles: {', '.join(result['bundles'])}; "
            f"{result['environment']['time']}, source revision {result['environment']['source_revision'] or 'unknown'}",
            "",
            *lines(("target", "value", "limit", "verdict", "note"), [target.cells() for target in found]),
            "",
            *lines(("step", "verdict", "seconds", "note"), steps),
            "",
        ]
    )
