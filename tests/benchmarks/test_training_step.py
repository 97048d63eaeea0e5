"""benchmarks/training_step.py counts what torch runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize(("groups", "kind"), [(1, "dense"), (8, "depthwise")])
def test_convolutions_are_counted_by_hand(load_script: Callable[[str], Any], groups: int, kind: str) -> None:
    script = load_script("benchmarks/training_step.py")
    image = torch.randn(2, 8, 10, 10, requires_grad=True)
    weight = torch.randn(8, 8 // groups, 3, 3, requires_grad=True)
    ledger = script.Ledger()
    with ledger:
        F.conv2d(image, weight, padding=1, groups=groups).backward(torch.ones(2, 8, 10, 10))
    once = 2 * (2 * 8 * 10 * 10) * (8 // groups) * 9  # two operations a product and sum, of every output's window
    forward, backward = (ledger.sums[f"{kind} convolutions, {way}"] for way in ("forward", "backward"))
    assert (forward["flop"], backward["flop"]) == (once, 2 * once)
    assert forward["bytes"] == 4 * (2 * image.numel() + weight.numel())
    assert forward["calls"] == 1


def test_each_operation_has_its_row(load_script: Callable[[str], Any]) -> None:
    script = load_script("benchmarks/training_step.py")
    rows = torch.randn(4, 6, 8, requires_grad=True)
    ledger = script.Ledger()
    with ledger:
        normed = F.gelu(F.layer_norm(F.linear(rows, torch.ones(8, 8)), (8,)))
        (torch.softmax(normed @ normed.transpose(1, 2), -1) @ normed).sum().backward()
    kinds = {kind for kind, entry in ledger.sums.items() if entry["calls"]}
    assert {"linear layers", "GELU", "layer and batch normalisation", "attention: products and softmax"} <= kinds
    table = script.shares(ledger.sums, {"flop_per_s": 1e9, "bytes_per_s": 1e9})
    for key in ("measured_percent", "predicted_percent"):
        assert sum(row[key] for row in table) == pytest.approx(100, abs=1)
