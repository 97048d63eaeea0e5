"""Parsing and building with TensorRT in the test's own process; the program does both in a child."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from espmedsam_edge.runtime.engines.tensorrt_api import (
    Refusal,
    load,
    parse_graph,
    refusal_error,
    resolve_targets,
    set_targets,
)


def check_parse(path: Path, flavour: str | None = None) -> list[Refusal]:
    """The nodes of an ONNX file that the installed parser refuses, and why; empty when it takes the graph."""
    return parse_graph(load(flavour), path.read_bytes(), path).refusals


def build_plan(path: Path, targets: Sequence[str] = (), flavour: str | None = None) -> bytes:
    """A graph's plan; for GPU generations ``targets`` no GPU is needed."""
    api = load(flavour)
    parsed = parse_graph(api, path.read_bytes(), path)
    if parsed.refusals:
        raise refusal_error(path, api, parsed.refusals)
    config = parsed.builder.create_builder_config()
    set_targets(api, config, resolve_targets(api, targets))
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    assert plan is not None, parsed.log.errors()
    return bytes(cast(Any, plan))
