"""Another engine than TensorRT's on the frames' path: one module, one line in the registry, and all of it works."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from engine_double import SIZE
from gpu_memory import GpuMemory
from test_gpu_arrays import InterfaceArray
from test_gpu_backend import bundle, check, frame_of

from espmedsam_edge.bench import device as bench_device
from espmedsam_edge.bench.device import measure_device
from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.backends.backend import BACKENDS
from espmedsam_edge.runtime.backends.device_backend import DeviceBackend, open_device_backend
from espmedsam_edge.runtime.backends.frame_graph import STAGES
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.kernels.launch import FrameKernels
from espmedsam_edge.runtime.segmenter import Segmenter

__all__ = ["bundle"]  # a fixture

pytestmark = pytest.mark.gpu

STYLE = OverlayStyle((0, 200, 255))


class CopyingEngine:
    """A network that copies the start of each image to its logits, as ``engine_double.expected_logits`` says."""

    title, activation_bytes = "copies", 0

    def __init__(self, graph: Graph, stream: Stream, *, capturable: bool = True) -> None:
        self.logits_shape, self.capturable = graph.output_shape, capturable
        self._image = DeviceBuffer(stream.device, 4 * int(np.prod(graph.input_shape)))
        self._logits = DeviceBuffer(stream.device, 4 * int(np.prod(self.logits_shape)))
        self.image, self.logits = self._image.address, self._logits.address
        self.closed = False

    def enqueue(self, stream: Stream) -> None:
        """See ``DeviceEngine``."""
        if self.closed:
            raise UserError("the engine is closed.")
        batch = self.logits_shape[0]
        for row in range(batch):
            source, target = (buffer.address + row * buffer.size // batch for buffer in (self._image, self._logits))
            stream.copy_on_device(target, source, self._logits.size // batch)

    def close(self) -> None:
        """See ``DeviceEngine``."""
        self.closed = True


@pytest.fixture(params=[True, False], ids=["captured", "not captured"])
def segmenter(
    request: pytest.FixtureRequest,
    device: CudaDevice,
    kernels: FrameKernels,
    cache: Path,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Segmenter]:
    """On a backend of its own, known by a line in the registry."""
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(cache))

    def load(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> DeviceBackend:
        return open_device_backend(
            name, graph, lambda stream: CopyingEngine(graph, stream, capturable=bool(request.param))
        )

    module: Any = ModuleType("copying_backend")
    module.unavailable, module.load = lambda name: None, load
    monkeypatch.setitem(sys.modules, "copying_backend", module)
    monkeypatch.setitem(BACKENDS, "copying", "copying_backend")
    with Segmenter.load(bundle, "fundus", backend="copying", overlay=STYLE) as opened:
        yield opened


def test_frames_masks_and_overlays(segmenter: Segmenter, device: CudaDevice) -> None:
    assert segmenter.choice.taken == f"copying ({device.gpu.name}, copies)"
    for seed, size in enumerate([(64, 64), (77, 333), (200, 320)]):
        frame = frame_of(*size, seed)
        result = segmenter.segment(frame)
        check(result, frame)
        assert np.abs(result.overlay(frame, STYLE).astype(int) - draw_overlay(frame, result.mask, STYLE)).max() <= 1


def test_several_frames_overlap(segmenter: Segmenter) -> None:
    assert segmenter.in_flight > 1
    frames = [frame_of(60, 80, seed) for seed in range(7)]
    for frame, group in [(frame, segmenter.start([frame])) for frame in frames]:
        check(group.results()[0], frame)


def test_arrays_in_place(segmenter: Segmenter, memory: GpuMemory) -> None:
    frame = frame_of(72, 96)
    check(segmenter.segment(InterfaceArray(memory.put(frame), frame.shape)), frame)


def test_tensors(segmenter: Segmenter) -> None:
    image = np.random.default_rng(1).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    logits = segmenter.choice.backend.run(image)
    np.testing.assert_array_equal(logits[0, 0].ravel(), image[0, 0].ravel()[: logits.size])


def test_the_bench_measures_its_stages(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "_STAGE_SECONDS", 0.05)
    monkeypatch.setattr(bench_device, "find_sensor", lambda: None)
    times = measure_device(segmenter, [frame_of(50, 60)])
    assert times is not None
    assert tuple(times.stages) == STAGES
    assert times.use is not None
    assert times.use.activations == 0


def test_the_engine_is_closed_with_the_segmenter(
    segmenter: Segmenter, machine: Any, device: CudaDevice, bundle: Bundle
) -> None:
    backend = segmenter.choice.backend
    assert isinstance(backend, DeviceBackend)
    engine = backend._machine.engine.engine
    assert isinstance(engine, CopyingEngine)
    segmenter.segment(frame_of(40, 40))
    opened = machine.open()
    segmenter.close()
    assert engine.closed
    assert machine.open() < opened
