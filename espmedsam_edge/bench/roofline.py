"""What bounds a graph on a machine: its operations and bytes against the machine's matrix-product and copy rates.

After Williams, Waterman and Patterson, "Roofline" (2009): a kernel takes at least as long as its arithmetic at the best
rate of a matrix product, and at least as long as its bytes at the best rate of a copy, whichever is longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

HALVES = ("bf16", "fp16")
"""Types that a runtime may compute and keep float32 tensors in by itself, of half their size."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a graph.

    Attributes:
        name: of the node that it stands for.
        type: what it multiplies in: "fp32", "fp16", "bf16" or "int8"; "" where it does not.
        flop: operations of its products, two a multiply-accumulate; element-wise work is not counted.
        bytes: read and written, each tensor once.
        weight_bytes: of constants, part of ``bytes``.
    """

    name: str
    type: str
    flop: int
    bytes: int
    weight_bytes: int = 0


@dataclass(frozen=True)
class GraphCost:
    """What one run of a graph, a whole batch, computes and moves.

    Attributes:
        kernels: products, normalisations and softmaxes, with element-wise neighbours fused into them.
        weight_bytes: of the constants, as they are stored; those that several kernels read count once.
    """

    kernels: Sequence[Kernel]
    weight_bytes: int

    @property
    def flop(self) -> dict[str, int]:
        """Operations of products by the type that they are computed in."""
        counts: Counter[str] = Counter()
        for kernel in self.kernels:
            if kernel.flop:
                counts[kernel.type] += kernel.flop
        return dict(counts)

    @property
    def bytes(self) -> int:
        """Bytes read and written by all kernels."""
        return sum(kernel.bytes for kernel in self.kernels)

    def computed_in(self, half: str) -> GraphCost:
        """The same where what the graph has in float32 is computed and kept in one of ``HALVES``."""
        kernels = [
            replace(
                kernel,
                type=half if kernel.type == "fp32" else kernel.type,
                bytes=kernel.bytes // 2,
                weight_bytes=kernel.weight_bytes // 2,
            )
            if kernel.type in ("fp32", "")
            else kernel
            for kernel in self.kernels
        ]
        return replace(self, kernels=kernels)


@dataclass(frozen=True)
class Rates:
    """What a machine can do at its best.

    Attributes:
        products: FLOP/s of matrix products by type; types that are missing count at the slowest of them.
        copy: bytes read and written a second.
    """

    products: Mapping[str, float]
    copy: float

    def of_fp32_in(self, half: str) -> Rates:
        """The same rates, of which FP32's were measured with float32 computed in one of ``HALVES``."""
        return replace(self, products={half if name == "fp32" else name: rate for name, rate in self.products.items()})

    def of(self, type_name: str) -> float:
        """FLOP/s of products in a type."""
        return self.products.get(type_name, min(self.products.values()))


@dataclass(frozen=True)
class Bound:
    """The least seconds a graph can take.

    Attributes:
        products: all products alone.
        copies: all bytes alone.
        kernels: one kernel after the other, each bound by the longer of its two; the bound that counts.
    """

    products: float
    copies: float
    kernels: float


def bound(cost: GraphCost, rates: Rates) -> Bound:
    """What rates allow for a graph."""
    products = copies = kernels = 0.0
    for kernel in cost.kernels:
        computing = kernel.flop / rates.of(kernel.type) if kernel.flop else 0.0
        moving = kernel.bytes / rates.copy
        products, copies, kernels = products + computing, copies + moving, kernels + max(computing, moving)
    return Bound(products, copies, kernels)


@dataclass(frozen=True)
class Roofline:
    """A measured run against its bound.

    Attributes:
        cost: of the graph.
        rates: measured on the same machine.
        seconds: median of one run of the graph alone.
    """

    cost: GraphCost
    rates: Rates
    seconds: float

    @property
    def bound(self) -> Bound:
        """The least seconds by the measured rates."""
        return bound(self.cost, self.rates)

    @property
    def line(self) -> str:
        """For people, one line."""
        limit = self.bound
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in sorted(self.rates.products.items()))
        mostly = "products" if limit.products >= limit.copies else "memory"
        gflop = sum(self.cost.flop.values()) / 1e9
        return (
            f"Roofline: {gflop:.3g} GFLOP and {self.cost.bytes / 1e9:.2g} GB a run; at the measured {rates} and "
            f"{self.rates.copy / 1e9:.1f} GB/s at least {1000 * limit.kernels:.3g} ms, bound by {mostly}; "
            f"the graph takes {self.seconds / limit.kernels:.2f} x that"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values: GFLOP, GB, milliseconds."""
        limit = self.bound
        return {
            "graph_gflop": {name: flop / 1e9 for name, flop in self.cost.flop.items()},
            "graph_gb": self.cost.bytes / 1e9,
            "weights_gb": self.cost.weight_bytes / 1e9,
            "measured_product_gflops": {name: rate / 1e9 for name, rate in self.rates.products.items()},
            "measured_copy_gb_per_s": self.rates.copy / 1e9,
            "products_alone_ms": 1000 * limit.products,
            "bytes_alone_ms": 1000 * limit.copies,
            "bound_ms": 1000 * limit.kernels,
            "run_ms": 1000 * self.seconds,
            "run_to_bound": self.seconds / limit.kernels,
        }
