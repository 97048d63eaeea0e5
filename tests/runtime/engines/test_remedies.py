"""What TensorRT's log says becomes a remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines.remedies import remedy, tells_of_full_memory
from espmedsam_edge.runtime.engines.tensorrt_api import parse_graph

LOGS = [
    ("CUDA initialization failure with error: 35. Please check your CUDA installation", "driver is too old"),
    ("Error Code 6: API Usage Error (CUDA driver version is insufficient for CUDA runtime version)", "is too old"),
    ("Target GPU SM 53 is not supported by this TensorRT release.", "does not run on this GPU"),
    ("Cuda Runtime (no kernel image is available for execution on the device)", "does not run on this GPU"),
    ("CUDA initialization failure with error: 100", "cannot reach the GPU"),
    ("Cuda failure: no CUDA-capable device is detected", "cannot reach the GPU"),
    ("CUDA initialization failure with error: 803", "reboot, or reinstall"),
    ("Serialization assertion failed", "Try again."),
]


@pytest.mark.parametrize(("said", "words"), LOGS)
def test_each_has_its_remedy(said: str, words: str) -> None:
    assert words in remedy(said, "Try again.")


@pytest.mark.parametrize(
    "said", ["Cuda Runtime (out of memory)", "OutOfMemory (no sufficient)", "cudaMalloc of 5 failed"]
)
def test_full_memory_is_recognised(said: str) -> None:
    assert tells_of_full_memory(said)
    assert not tells_of_full_memory("a node of unknown type")


@pytest.mark.parametrize(("said", "words"), LOGS[:6])
def test_a_builder_that_cannot_read_the_gpu_says_what_to_do(
    double: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, words: str
) -> None:
    api = double()

    def refusing(logger: Any) -> None:
        logger.log(api.module.ILogger.Severity.ERROR, said)

    monkeypatch.setattr(api.module, "Builder", refusing)
    with pytest.raises(UserError, match=r"^TensorRT .* could not start: ") as caught:
        parse_graph(api, b"", tmp_path / "any.onnx")
    assert said.rstrip(".") in caught.value.message
    assert words in caught.value.hint
