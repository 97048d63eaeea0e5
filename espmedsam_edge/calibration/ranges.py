"""Measures on real images how large every tensor of a graph gets, and its distribution where it will be quantised.

One pass, one image at a time, and nothing kept but a number or a histogram, so memory does not grow with the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.calibration.histogram import METHODS, MagnitudeHistogram, Method
from espmedsam_edge.calibration.network import MOVERS, Network
from espmedsam_edge.calibration.segments import SegmentedRunner
from espmedsam_edge.errors import UserError


@dataclass(frozen=True)
class Ranges:
    """What was measured over the calibration images.

    Attributes:
        largest: the largest magnitude of the input and of every float tensor that a node computes (not only moves).
        thresholds: for tensors to be quantised, where each method clips.
    """

    largest: dict[str, float]
    thresholds: dict[str, dict[Method, float]]

    def magnitude(self, network: Network, tensor: str) -> float:
        """The largest magnitude of a tensor, through nodes that only move values; 0 for a constant."""
        if tensor in self.largest:
            return self.largest[tensor]
        producer = network.producers.get(tensor)
        if producer is None:
            return 0.0
        return max((self.magnitude(network, name) for name in producer.input if network.is_float(name)), default=0.0)


def measured_tensors(network: Network) -> list[str]:
    """The tensors whose largest magnitude is measured, in the order of the graph; see ``Ranges.largest``."""
    computed = [name for node in network.nodes if node.op_type not in MOVERS for name in node.output]
    return [network.model.graph.input[0].name, *(name for name in computed if network.is_float(name))]


def measure_ranges(
    network: Network,
    images: Iterable[NDArray[np.float32]],
    quantised: Sequence[str],
    *,
    threads: int,
    on_image: Callable[[], None] = lambda: None,
) -> Ranges:
    """Run the FP32 graph on images and measure.

    Args:
        network: the graph, of one input, float32.
        images: inputs of the graph's shape, taken one at a time.
        quantised: tensors whose distribution is wanted.
        threads: for ONNX Runtime.
        on_image: called after each image.

    Raises:
        UserError: a tensor is not finite, so the FP32 graph itself is broken, or there was no image.
    """
    largest: dict[str, float] = {}
    measured = set(measured_tensors(network))
    histograms = {name: MagnitudeHistogram() for name in quantised}
    runner = SegmentedRunner(network, threads)
    count = 0
    for image in images:
        count += 1
        for name, values in runner.run(image):
            if name in histograms:
                histograms[name].add(values)
            if name not in measured:
                continue
            magnitude = max(float(values.max()), -float(values.min()))
            if not np.isfinite(magnitude):
                raise UserError(
                    f"the FP32 graph's tensor '{name}' is not finite on image {count}.",
                    "The weights are broken; train or import them again.",
                    exit_code=1,
                )
            largest[name] = max(largest.get(name, 0.0), magnitude)
        on_image()
    if count == 0:
        raise UserError("none of the calibration images could be read.", "Give readable images.", exit_code=1)
    ranges = Ranges(largest, {})
    for name, histogram in histograms.items():
        magnitude = ranges.magnitude(network, name)
        ranges.thresholds[name] = {method: histogram.threshold(method, magnitude) for method in METHODS}
    return ranges
