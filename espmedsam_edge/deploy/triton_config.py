"""``config.pbtxt`` of Triton's models: its fields as dictionaries, and their text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from espmedsam_edge.bundle import Graph, ManifestHead
from espmedsam_edge.version import __version__

Engine = Literal["onnxruntime", "tensorrt", "python"]
GRAPH_SHA256 = "graph_sha256"
"""The parameter that says which graph a model serves."""

WARMUP_FILE = "picture"
_DELAY_MICROSECONDS = 2000  # that a request waits for others to make a batch with
_SERVED_BY: dict[Engine, dict[str, Any]] = {
    "onnxruntime": {"platform": "onnxruntime_onnx"},
    "tensorrt": {"platform": "tensorrt_plan"},
    "python": {"backend": "python"},
}


class Word(str):
    """A value of an enumeration, which stands without quotes."""


@dataclass(frozen=True)
class Serving:
    """How models are run.

    Attributes:
        instances: of each model.
        threads: CPU threads of an instance; None: as the server or the program chooses.
        delay: microseconds that a request waits for others to make a batch with.
    """

    instances: int = 1
    threads: int | None = None
    delay: int = _DELAY_MICROSECONDS


def network_config(name: str, graph: Graph, head: ManifestHead, engine: Engine, serving: Serving) -> dict[str, Any]:
    """The network alone: ``image``, normalised planes, in; ``logits`` out.

    The batch is fixed in graphs and in their engines, so clients send whole batches to them; the server may gather
    requests only for the ``python`` engine, which fills batches up.
    """
    batched = engine == "python"
    inside, outside = (shape[batched:] for shape in (graph.input_shape, graph.output_shape))
    config = _common(name, graph, head, serving) | _SERVED_BY[engine]
    config |= {
        "max_batch_size": graph.batch if batched else 0,
        "input": [_tensor("image", "FP32", inside)],
        "output": [_tensor("logits", "FP32", outside)],
        "instance_group": _instances(engine, serving),
        "model_warmup": [_warmup("image", {"data_type": Word("TYPE_FP32"), "dims": list(inside), "random_data": True})],
    }
    if engine == "onnxruntime" and serving.threads is not None:
        config["parameters"] += [_parameter("intra_op_thread_count", str(serving.threads))]
    return config | (_gathering(graph.batch, serving) if batched else {})


def pictures_config(graph: Graph, head: ManifestHead, serving: Serving) -> dict[str, Any]:
    """A picture in, encoded or as a frame; mask, area and boxes out. The model is called as the modality."""
    config = _common(graph.modality, graph, head, serving) | _SERVED_BY["python"]
    return (
        config
        | {
            "max_batch_size": graph.batch,
            "input": [
                _tensor("image", "STRING", [1]) | {"optional": True},
                _tensor("frame_bgr", "UINT8", [-1, -1, 3]) | {"optional": True},
                _tensor("threshold", "FP32", [1]) | {"optional": True},
            ],
            "output": [
                _tensor("mask", "UINT8", [-1, -1]),
                _tensor("mask_png", "STRING", [1]),
                _tensor("area", "INT64", [1]),
                _tensor("boxes", "INT32", [-1, 4]),
                _tensor("json", "STRING", [1]),
            ],
            "instance_group": _instances("python", serving),
            "model_warmup": [
                _warmup("image", {"data_type": Word("TYPE_STRING"), "dims": [1], "input_data_file": WARMUP_FILE})
            ],
        }
        | _gathering(graph.batch, serving)
    )


def _common(name: str, graph: Graph, head: ManifestHead, serving: Serving) -> dict[str, Any]:
    said = head.properties(graph.modality, graph.precision) | {GRAPH_SHA256: graph.sha256, "made_by": __version__}
    if serving.threads is not None:
        said["threads"] = str(serving.threads)
    return {
        "name": name,
        "version_policy": {"latest": {"num_versions": 1}},
        "parameters": [_parameter(key, value) for key, value in said.items()],
    }


def _tensor(name: str, kind: str, dims: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "data_type": Word(f"TYPE_{kind}"), "dims": list(dims)}


def _parameter(key: str, value: str) -> dict[str, Any]:
    return {"key": key, "value": {"string_value": value}}


def _instances(engine: Engine, serving: Serving) -> list[dict[str, Any]]:
    return [{"kind": Word("KIND_GPU" if engine == "tensorrt" else "KIND_AUTO"), "count": serving.instances}]


def _warmup(name: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"name": "first", "batch_size": 1, "inputs": [{"key": name, "value": data}]}


def _gathering(batch: int, serving: Serving) -> dict[str, Any]:
    """Nothing where the graph takes one at a time: waiting for others would only cost time."""
    if batch == 1:
        return {}
    return {"dynamic_batching": {"preferred_batch_size": [batch], "max_queue_delay_microseconds": serving.delay}}


def as_text(config: Mapping[str, Any]) -> str:
    """Protocol Buffers' text form."""
    return "\n".join(_lines(config, "")) + "\n"


def _lines(fields: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(one, indent + "  ")
                yield f"{indent}}}"
            else:
                plain = isinstance(one, Word) or not isinstance(one, str | bool)
                yield f"{indent}{name}: {one if plain else json.dumps(one)}"
