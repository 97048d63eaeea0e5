"""Which nodes compute in INT8, FP16 and FP32: what must not be lowered, by kind and by measured range."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from espmedsam_edge.bundle import Precision
from espmedsam_edge.calibration.network import Network, group_of
from espmedsam_edge.calibration.ranges import Ranges
from espmedsam_edge.calibration.request import Target

FP16_MAX = 65504.0

HEADROOM = 4.0
"""Magnitudes over ``FP16_MAX / HEADROOM`` on the calibration images stay in FP32: other images go further."""

SMALLEST = 2.0**-13
"""Tensors that never pass this magnitude would lie among FP16's subnormal numbers and lose their digits."""

_WEIGHT_ERROR = 2.0**-10  # relative root mean square; FP16's own rounding is 2**-12.3, subnormal weights lose more

_SMALLEST_SCALE = 2.0**-16  # Q/DQ scales are FP16: below, rounding moves them by over 0.2 %

# Values there never leave float32: a reduction over squares overflows FP16 for magnitudes over 256.
ALWAYS_FP32 = frozenset({"LayerNormalization"})

# Excluded from INT8 by name. The decoder's token side: a few rows against constants, where INT8 saves nothing and costs
# accuracy where the mask is decided. The downsamplings: no skip branch carries the signal past them, so their error is
# everyone's: a network trained on phantoms lost ten times as much there as in any attention or MLP, for 3 % of work.
_NEVER_INT8 = re.compile(r"decoder\.(layers|final|hypernetwork)|encoder\.downsamples\.")

LARGE = 1024
"""Elements of a constant; below, storing it otherwise saves nothing."""

_FEWEST_CHANNELS = 16  # INT8 tensor cores work on 16 or 32 at once; the image's 3 channels and single scores stay out
_FEWEST_ROWS = 16


@dataclass(frozen=True)
class Plan:
    """What each node computes in; a node in neither set computes in FP16, one in both in INT8 with an FP32 result.

    Attributes:
        fp32: names of nodes whose floating-point part is FP32.
        int8: names of Conv and MatMul nodes whose both operands are quantised.
        raised: layer groups that the accuracy gate had moved up, for reports.
    """

    fp32: frozenset[str]
    int8: frozenset[str]
    raised: tuple[str, ...] = ()

    @property
    def precision(self) -> Precision:
        """The lowest that it uses."""
        return "int8" if self.int8 else "fp16"

    def has_fp16(self, network: Network) -> bool:
        """Whether anything computes in FP16."""
        return any(node.name not in self.fp32 for node in network.nodes)

    def lowered_groups(self, network: Network) -> list[str]:
        """The layer groups that ``raise_groups`` could move up: INT8 ones in an INT8 plan, else FP16 ones."""
        lowered = self.int8 or {node.name for node in network.nodes if node.name not in self.fp32}
        return [group for group, nodes in network.groups().items() if any(node.name in lowered for node in nodes)]

    def raise_groups(self, network: Network, groups: Iterable[str]) -> Plan:
        """The plan with these groups one step up: an INT8 plan's to floating point, else FP16 to FP32."""
        chosen = set(groups)
        names = {node.name for node in network.nodes if group_of(node.name) in chosen}
        kept = tuple(group for group in network.groups() if group in chosen)
        if self.int8:
            return replace(self, int8=self.int8 - names, raised=kept)
        return replace(self, fp32=self.fp32 | names, raised=kept)


def lowest_plan(network: Network, ranges: Ranges, precision: Precision, target: Target = "gpu") -> Plan:
    """Everything in the lowest precision that kind, measured range and target allow."""
    if target == "cpu":
        everything = frozenset(node.name for node in network.nodes)
        return Plan(everything, frozenset(node.name for node in quantisable_nodes(network)))
    fp32 = frozenset(node.name for node in network.nodes if why_fp32(network, ranges, node))
    if precision == "fp16":
        return Plan(fp32, frozenset())
    int8 = frozenset(
        node.name
        for node in quantisable_nodes(network)
        if node.name not in fp32 and _fp16_holds_scales(network, ranges, node)
    )
    return Plan(fp32, int8)


def _fp16_holds_scales(network: Network, ranges: Ranges, node: NodeProto) -> bool:
    """Whether the scales of a node's input and of half of its weights' channels keep their digits in FP16."""
    weight = numpy_helper.to_array(network.constants[node.input[1]])
    channels = np.abs(weight).reshape(len(weight), -1).max(axis=1) if node.op_type == "Conv" else np.abs(weight).max(0)
    return min(ranges.magnitude(network, node.input[0]), float(np.median(channels))) / 127 >= _SMALLEST_SCALE


def why_fp32(network: Network, ranges: Ranges, node: NodeProto) -> str | None:
    """Why a node has to stay in FP32, in a few words; None if FP16 can hold all it reads and makes."""
    if node.op_type in ALWAYS_FP32:
        return "its sums pass FP16"
    for name in (*node.input, *node.output):
        if not network.is_float(name):
            continue
        constant = network.constants.get(name)
        if constant is not None:
            if not fp16_holds(numpy_helper.to_array(constant)):
                return "weights that FP16 cannot hold"
            continue
        magnitude = ranges.magnitude(network, name)
        if magnitude > FP16_MAX / HEADROOM:
            return f"values over {FP16_MAX / HEADROOM:.0f}"
        if 0 < magnitude < SMALLEST:
            return f"values under {SMALLEST:.1g} only"
    return None


def fp16_holds(values: np.ndarray) -> bool:
    """Whether float32 values survive FP16: none overflows, and rounding costs no more than rounding should."""
    if values.dtype != np.float32 or not values.size:
        return True
    if np.abs(values).max() > FP16_MAX:
        return False
    wide = values.astype(np.float64)
    power = math.sqrt(float(np.mean(wide**2)))
    error = math.sqrt(float(np.mean((wide - values.astype(np.float16).astype(np.float64)) ** 2)))
    return power == 0 or error / power <= _WEIGHT_ERROR


def stored_in_fp16(values: np.ndarray) -> bool:
    """Whether a constant of a node in FP32 is stored in FP16: it is large, and that keeps its digits."""
    return values.dtype == np.float32 and values.size >= LARGE and fp16_holds(values)


def quantisable_nodes(network: Network) -> list[NodeProto]:
    """Dense products of an activation with constant weights, large enough for INT8 to pay.

    Left out: products of two activations (attention), depthwise convolutions (bound by memory, and they lie on the
    residual stream), the first convolution, single-channel scores, the downsamplings and the decoder's tokens.
    """
    return [node for node in network.nodes if _is_quantisable(network, node)]


def _is_quantisable(network: Network, node: NodeProto) -> bool:
    if node.op_type not in ("Conv", "MatMul") or _NEVER_INT8.match(node.name):
        return False
    left, right = node.input[0], node.input[1]
    weight = network.constants.get(right)
    if weight is None or left in network.constants or weight.data_type != TensorProto.FLOAT:
        return False
    if node.op_type == "Conv":
        outputs, inputs = weight.dims[0], weight.dims[1]  # a depthwise convolution has 1 input a group
        rows = math.prod(network.shape(node.output[0])[2:])
    else:
        if len(weight.dims) != 2:
            return False
        inputs, outputs = weight.dims
        rows = math.prod(network.shape(node.output[0])[1:-1])
    return min(inputs, outputs) >= _FEWEST_CHANNELS and rows >= _FEWEST_ROWS


def quantised_tensors(network: Network) -> list[str]:
    """The activations that quantisable nodes read, each once, in the order of the graph."""
    return list(dict.fromkeys(node.input[0] for node in quantisable_nodes(network)))
