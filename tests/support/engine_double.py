"""TensorRT's double with an engine that computes something on the GPU: logits are the first numbers of the input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.imaging.geometry import preprocess
from espmedsam_edge.runtime.cuda.driver import cuda_driver

SIZE = 64  # of the double's engine


def give_it_work(monkeypatch: Any, module: Any, batch: int = 1) -> None:
    """Let the double's engine copy the start of each image, its red plane's first rows, to the logits."""
    context = module.IExecutionContext
    names = ("image", (batch, 3, SIZE, SIZE)), ("logits", (batch, 1, SIZE // 4, SIZE // 4))
    monkeypatch.setattr(module.ICudaEngine, "_tensors", names)

    def set_tensor_address(self: Any, name: str, memory: int) -> bool:
        self._addresses = {**getattr(self, "_addresses", {}), name: memory}
        return True

    def execute_async_v3(self: Any, stream_handle: int) -> bool:
        driver = cuda_driver()
        each = [4 * math.prod(shape[1:]) for _, shape in names]
        for row in range(batch):
            source, target = (self._addresses[name] + row * size for (name, _), size in zip(names, each, strict=True))
            driver.call("cuMemcpyDtoDAsync", target, source, each[1], driver.handle("CUstream", stream_handle))
        return True

    monkeypatch.setattr(context, "set_tensor_address", set_tensor_address)
    monkeypatch.setattr(context, "execute_async_v3", execute_async_v3)


def expected_logits(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What that engine makes of a frame, (16, 16)."""
    side = SIZE // 4
    return preprocess(frame, SIZE, Normalization())[0, 0].ravel()[: side * side].reshape(side, side)
