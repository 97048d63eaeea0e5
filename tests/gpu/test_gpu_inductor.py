"""Inductor's engine on the frames' path: torch on our memory and our stream, inside our CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_bundles import save_toy_bundle

pytest.importorskip("torch", reason="needs torch (extra inductor)")

import torch

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import mask_from_logits, preprocess
from espmedsam_edge.runtime.backends import inductor_backend
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.memory import PinnedBuffer
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.inductor import device_engine
from espmedsam_edge.runtime.inductor.building import Built
from espmedsam_edge.runtime.inductor.device_engine import InductorEngine
from espmedsam_edge.runtime.inductor.network import GraphNetwork
from espmedsam_edge.runtime.kernels.launch import FrameKernels
from espmedsam_edge.runtime.onnx_session import reference_logits
from espmedsam_edge.runtime.segmenter import Segmenter

pytestmark = pytest.mark.gpu


class UncompiledPackage:
    """A network that torch computes as it stands, in place of a compiled one."""

    def __init__(self, content: bytes) -> None:
        self._network = GraphNetwork(content, "fp32", "toy")
        self.streams: list[int] = []
        self.warmed = self.closed = 0

    def run(self, image: Any, stream: int) -> Any:
        """As ``Package.run``."""
        if self.closed:
            raise UserError("it is closed.")
        self.streams.append(stream)
        return self._network(image)

    def warm(self) -> None:
        """As ``Package.warm``."""
        self.warmed += 1

    def close(self) -> None:
        """As ``Package.close``."""
        self.closed += 1


class OnTheHost(InductorEngine):
    """The engine on the software driver, whose memory and streams torch cannot reach: it works beside, on copies."""

    capturable = False
    reached: dict[int, PinnedBuffer]

    def _torchs_device(self) -> Any:
        return torch.device("cpu")

    def _new_pool(self) -> Any:
        return None

    def _in_place(self, address: int, shape: tuple[int, ...]) -> Any:
        buffer = PinnedBuffer(self._stream.device, 4 * int(np.prod(shape)))
        vars(self).setdefault("reached", {})[address] = buffer
        return torch.from_numpy(buffer.array(shape, np.float32))

    @contextmanager
    def _on(self, stream: Stream) -> Any:
        source, target = self.reached[self.image], self.reached[self.logits]
        stream.copy_to_host(source.address, self.image, source.size)
        stream.synchronize()
        yield
        stream.copy_to_device(self.logits, target.address, target.size)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return save_toy_bundle(tmp_path / "toy.bundle", batch=2)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[UncompiledPackage]:
    made: list[UncompiledPackage] = []

    def load(content: bytes, graph: Any, device: str) -> UncompiledPackage:
        assert device == "cuda"
        made.append(UncompiledPackage(content))
        return made[-1]

    monkeypatch.setattr(device_engine, "load_package", load)
    return made


@pytest.fixture
def segmenter(
    machine: Any,
    device: CudaDevice,
    kernels: FrameKernels,
    cache: Path,
    bundle: Bundle,
    packages: list[UncompiledPackage],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Segmenter]:
    """On the backend as it is, with the engine on the software driver."""
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(cache))
    monkeypatch.setattr(inductor_backend, "why_no_cuda", lambda: None)
    monkeypatch.setattr(
        inductor_backend,
        "find_or_build",
        lambda bundle, graph, *_, **__: Built(bundle.read_graph(graph), {}, Path()),
    )
    monkeypatch.setattr(device_engine, "InductorEngine", OnTheHost)
    with Segmenter.load(bundle, "fundus", backend="inductor") as opened:
        yield opened


def frame_of(height: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def check(segmenter: Segmenter, bundle: Bundle, frames: list[Any]) -> None:
    """Masks are those of ONNX Runtime; logits, too, but for what the kernel rounds another way."""
    graph = bundle.graph()
    images = np.concatenate([preprocess(f, graph.image_size, bundle.manifest.input.normalization) for f in frames])
    expected = reference_logits(graph, bundle.read_graph(graph), images)
    for frame, result, logits in zip(frames, segmenter.segment_batch(frames), expected[:, 0], strict=True):
        np.testing.assert_allclose(result.logits, logits, atol=0.02, rtol=0)
        assert (result.mask != mask_from_logits(result.logits, frame.shape[:2])).sum() <= 1e-4 * result.mask.size


def test_frames_in_and_masks_out(segmenter: Segmenter, bundle: Bundle, packages: list[UncompiledPackage]) -> None:
    assert "torch" in segmenter.choice.taken
    assert "fp32 arithmetic" in segmenter.choice.taken
    check(segmenter, bundle, [frame_of(70, 90), frame_of(64, 64, 1)])
    check(segmenter, bundle, [frame_of(33, 120, 2), frame_of(200, 100, 3)])
    (package,) = packages
    assert package.warmed == 1
    assert len(set(package.streams)) == 1  # ours, of the first run on
    assert package.streams[0] != 0


def test_it_is_closed_with_its_segmenter(machine: Any, segmenter: Segmenter, packages: list[UncompiledPackage]) -> None:
    segmenter.segment(frame_of(50, 50))
    segmenter.close()
    assert packages[0].closed >= 1


def test_what_torch_refuses_is_one_line(segmenter: Segmenter, packages: list[UncompiledPackage]) -> None:
    def fail(image: Any, stream: int) -> Any:
        raise RuntimeError("CUDA error: something\nand a page of advice")

    packages[0].run = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^torch did not run the network: CUDA error: something") as caught:
        segmenter.segment(frame_of(50, 50))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arithmetic", ["fp32", "fp16", "bf16"])
def test_on_a_real_gpu(real_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arithmetic: str) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    bundle = save_toy_bundle(tmp_path / "toy.bundle", batch=2)
    with Segmenter.load(bundle, "fundus", backend=f"inductor:cuda:{arithmetic}") as segmenter:
        machine = segmenter.choice.backend._machine  # type: ignore[attr-defined]
        assert machine.engine.capturable
        for seed in range(3):
            frames = [frame_of(70, 90, seed), frame_of(64, 64, seed + 9)]
            graph = bundle.graph()
            images = [preprocess(f, graph.image_size, bundle.manifest.input.normalization) for f in frames]
            expected = reference_logits(graph, bundle.read_graph(graph), np.concatenate(images))
            for result, logits in zip(segmenter.segment_batch(frames), expected[:, 0], strict=True):
                np.testing.assert_allclose(result.logits, logits, atol=0.02 if arithmetic != "bf16" else 0.1, rtol=0)
