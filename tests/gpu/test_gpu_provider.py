"""ONNX Runtime's own way to TensorRT-RTX, as a plugin, against its CPU: a check of the graphs that is not ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hand_graphs import hand_bundle, hand_graph
from plugin_provider import LIBRARY, NO_DEVICE, link_libraries, package_folder, run_in_child
from toy_bundles import save_toy_bundle

from espmedsam_edge.runtime.cuda.driver import unavailable
from espmedsam_edge.runtime.segmenter import Segmenter

pytest.importorskip("onnxruntime", minversion="1.23", reason="needs an ONNX Runtime that takes plugins")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("real_gpu")]


@pytest.mark.parametrize("which", ["toy", "hand"])
def test_logits_of_the_plugin_are_those_of_the_cpu(which: str, tmp_path: Path) -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    package = package_folder()
    if package is None:
        pytest.skip("needs the TensorRT-RTX plugin of ONNX Runtime (extra rtx-check)")
    path = tmp_path / f"{which}.bundle"
    bundle = save_toy_bundle(path) if which == "toy" else hand_bundle(path, {"fp32": hand_graph("fp32")})
    graph = bundle.manifest.graphs[0]
    image = np.random.default_rng(7).standard_normal(graph.input_shape).astype(np.float32)
    link_libraries(package, tmp_path / "libraries")
    ended, logits = run_in_child(
        bundle.graph_path(graph), image, tmp_path,
        "--library", str(package / LIBRARY), libraries=(tmp_path / "libraries",),
    )  # fmt: skip
    if ended.returncode == NO_DEVICE:  # TensorRT-RTX leaves out some GPUs of servers
        pytest.skip(ended.stdout.strip())
    assert ended.returncode == 0, ended.stderr[-2000:]
    with Segmenter.load(bundle, backend="onnxruntime-cpu") as segmenter:
        expected = segmenter.choice.backend.run(image)
    assert logits is not None
    # FP32 by other kernels, perhaps in TF32 with its 10 bits of mantissa.
    assert np.abs(logits - expected).max() <= 3e-3 * np.ptp(expected)
