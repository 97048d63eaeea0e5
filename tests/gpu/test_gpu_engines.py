"""Real TensorRT and TensorRT-RTX engines against ONNX Runtime on the CPU: the same logits, the same masks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hand_graphs import hand_bundle, hand_graph
from numpy.typing import NDArray
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.backends.backend import BackendUnavailable, unavailable
from espmedsam_edge.runtime.backends.device_backend import DeviceBackend
from espmedsam_edge.runtime.engines import tensorrt_api
from espmedsam_edge.runtime.segmenter import Segmenter

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("real_gpu")]

STYLE = OverlayStyle((255, 200, 0))
SIZES = ((64, 64), (480, 640), (77, 333))
# What a precision's own rounding moves the logits by, as part of their spread.
LOGITS = {"fp32": 1e-3, "fp16": 3e-2}
MASKS = {"fp32": 0.9999, "fp16": 0.99}


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def flavour(request: pytest.FixtureRequest) -> str:
    """A TensorRT that runs here. A process loads one of the two: ``-k rtx`` in a second run tests the other."""
    name = str(request.param)
    reason = unavailable(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    try:
        tensorrt_api.load(name)
    except UserError as error:
        pytest.skip(f"{name}: {error}")
    return name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines and bundles of this module, built once."""
    return tmp_path_factory.mktemp("engines")


def _open(bundle: Bundle, flavour: str, precision: str) -> Segmenter:
    try:
        return Segmenter.load(bundle, None, precision, flavour, overlay=STYLE)
    except BackendUnavailable as error:
        if flavour == "tensorrt-rtx" and "support" in str(error).lower():  # it leaves out some GPUs of servers
            pytest.skip(f"{flavour}: {error}")
        raise


def _frames() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(11)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def _compare(bundle: Bundle, flavour: str, precision: str, frames: list[NDArray[np.uint8]]) -> None:
    with (
        _open(bundle, flavour, precision) as segmenter,
        Segmenter.load(bundle, None, precision, "onnxruntime-cpu") as reference,
    ):
        assert isinstance(segmenter.choice.backend, DeviceBackend)
        for frame in frames * 2:
            got, expected = segmenter.segment(frame), reference.segment(frame)
            spread = float(np.ptp(expected.logits)) or 1.0
            assert np.abs(got.logits - expected.logits).max() <= LOGITS[precision] * spread
            assert (got.mask == expected.mask).mean() >= MASKS[precision]
            assert got.area == int(np.count_nonzero(got.mask))
            overlay = draw_overlay(frame, got.mask, STYLE)
            assert np.abs(got.overlay(frame, STYLE).astype(int) - overlay).max() <= 1
        image = np.random.default_rng(2).standard_normal(segmenter.graph.input_shape).astype(np.float32)
        logits = reference.choice.backend.run(image)
        assert np.abs(segmenter.choice.backend.run(image) - logits).max() <= LOGITS[precision] * np.ptp(logits)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_masks_are_those_of_onnxruntime(
    flavour: str, precision: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(folder / "cache"))
    path = folder / f"hand-{precision}.bundle"
    bundle = Bundle.open(path) if path.exists() else hand_bundle(path, {precision: hand_graph(precision)})  # type: ignore[dict-item]
    _compare(bundle, flavour, precision, _frames())


def test_masks_of_the_toy_are_those_of_onnxruntime(flavour: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(folder / "cache"))
    path = folder / "toy.bundle"
    _compare(Bundle.open(path) if path.exists() else save_toy_bundle(path), flavour, "fp32", _frames())


def test_a_bundle_of_ones_own(flavour: str) -> None:
    """ESPMEDSAM_BUNDLE names it; every graph of its first modality is compared, with the engines that there are."""
    if "ESPMEDSAM_BUNDLE" not in os.environ:
        pytest.skip("set ESPMEDSAM_BUNDLE to a bundle to compare its engines")
    bundle = Bundle.open(os.environ["ESPMEDSAM_BUNDLE"])
    modality = bundle.manifest.modalities[0]
    rng = np.random.default_rng(3)
    # Smooth pictures: noise alone is nothing that a network was trained for.
    frames = [np.kron(rng.integers(0, 256, (9, 12, 3)), np.ones((80, 80, 1))).astype(np.uint8)]
    for graph in bundle.manifest.graphs:
        if graph.modality == modality and graph.precision in LOGITS:
            _compare_graph(bundle, flavour, modality, graph.precision, frames)


def _compare_graph(
    bundle: Bundle, flavour: str, modality: str, precision: str, frames: list[NDArray[np.uint8]]
) -> None:
    with (
        Segmenter.load(bundle, modality, precision, flavour) as segmenter,
        Segmenter.load(bundle, modality, precision, "onnxruntime-cpu") as reference,
    ):
        for frame in frames:
            agreement = (segmenter.segment(frame).mask == reference.segment(frame).mask).mean()
            assert agreement >= MASKS[precision], f"{modality} {precision}: {100 * agreement:.3f} %"


def test_the_engine_is_found_again_and_loads_faster(
    flavour: str, folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(folder / "cache"))
    path = folder / "toy.bundle"
    bundle = Bundle.open(path) if path.exists() else save_toy_bundle(path)
    _open(bundle, flavour, "fp32").close()
    with Segmenter.load(bundle, backend=flavour) as segmenter:
        backend = segmenter.choice.backend
        assert isinstance(backend, DeviceBackend)
        assert backend.device_use().loaded > 0
    assert not [line for line in said if "Building" in line]


def test_torch_tensors_are_read_in_place(flavour: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a torch that has CUDA")
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(folder / "cache"))
    path = folder / "toy.bundle"
    bundle = Bundle.open(path) if path.exists() else save_toy_bundle(path)
    with _open(bundle, flavour, "fp32") as segmenter:
        for frame in _frames():
            there = torch.from_numpy(frame).cuda()
            np.testing.assert_array_equal(segmenter.segment(there).mask, segmenter.segment(frame).mask)
