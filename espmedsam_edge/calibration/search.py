"""Over the budget: which layer groups hurt, and the cheapest set to keep in higher precision, by measuring."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from onnx import ModelProto

from espmedsam_edge.calibration.gate import Gate
from espmedsam_edge.calibration.network import Network, group_of
from espmedsam_edge.calibration.plan import Plan

log = logging.getLogger(__name__)

SENSITIVITY_IMAGES = 3
"""Held-out images that each group is measured on; sets are measured on all."""

_GIVEN_BACK = 4  # groups of a passing set that are tried without

Simulate = Callable[[Plan], ModelProto]


@dataclass(frozen=True)
class Sensitivity:
    """What lowering one group alone costs.

    Attributes:
        group: the layer group.
        loss: Dice points.
        logit_error: root mean square change of the logits over their standard deviation.
        finite: whether every logit is a number.
        share: of the graph's multiply-accumulates, 0..1; what it costs to keep the group higher.
    """

    group: str
    loss: float
    logit_error: float
    finite: bool
    share: float

    @property
    def harm(self) -> tuple[bool, float]:
        """For ordering, most harmful first when reversed: broken, then damage a share of the work."""
        return not self.finite, (self.logit_error + max(self.loss, 0.0) / 10) / (self.share + 0.002)


def sensitivities(
    network: Network, plan: Plan, simulate: Simulate, gate: Gate, on_group: Callable[[str, int, int], None]
) -> list[Sensitivity]:
    """Lower each group of a plan alone, all others one step higher, and measure; in the order of the graph."""
    groups = plan.lowered_groups(network)
    macs = {group: sum(network.macs(node) for node in nodes) for group, nodes in network.groups().items()}
    total = sum(macs.values()) or 1
    found = []
    for index, group in enumerate(groups):
        on_group(group, index, len(groups))
        alone = _only(plan, network, group)
        result = gate.judge_emulated(simulate(alone), SENSITIVITY_IMAGES)
        found.append(Sensitivity(group, result.loss, result.logit_error, result.not_finite == 0, macs[group] / total))
    return found


def _only(plan: Plan, network: Network, group: str) -> Plan:
    """The plan with one group lowered and every other one step higher."""
    names = {node.name for node in network.nodes if group_of(node.name) == group}
    if plan.int8:
        return replace(plan, int8=plan.int8 & names)
    return replace(plan, fp32=plan.fp32 | {node.name for node in network.nodes if node.name not in names})


def passing_plans(
    network: Network, plan: Plan, simulate: Simulate, gate: Gate, ranking: list[Sensitivity]
) -> list[Plan]:
    """Plans with groups kept one step higher that meet the budget, the cheapest first; empty where none does.

    The most harmful for their cost are raised first: the smallest number that passes is found by halving, then the most
    expensive members are given back one by one where it still passes. Every step is a measurement.
    """
    order = [s.group for s in sorted(ranking, key=lambda s: s.harm, reverse=True)]
    share = {s.group: s.share for s in ranking}
    passing: list[Plan] = []

    def passes(groups: list[str]) -> bool:
        candidate = plan.raise_groups(network, groups)
        result = gate.judge_emulated(simulate(candidate), hasty=True)
        if result.passed:
            passing.append(candidate)
        log.info("%d of %d groups kept higher: %s", len(groups), len(order), result)
        return result.passed

    if not passes(order[:-1]):  # one group at least stays low, else nothing is gained
        return []
    low, high = 0, len(order) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if passes(order[:middle]):
            high = middle
        else:
            low = middle
    kept = order[:high]
    for group in sorted(kept, key=lambda name: share[name], reverse=True)[:_GIVEN_BACK]:
        fewer = [name for name in kept if name != group]
        if fewer and passes(fewer):
            kept = fewer
    return sorted(passing, key=lambda found: sum(share[group] for group in found.raised))
