"""What Inductor's engine asks of torch around each run on a GPU, seen without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch (extra inductor)")

import torch

from espmedsam_edge.runtime.inductor.device_engine import InductorEngine


class OurStream:
    """A stream of our driver's, by its address."""

    def __int__(self) -> int:
        return 4711


def test_torch_works_on_our_stream_and_its_own_pool_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: within a capture of ours, torch lends its pool to none of its own graphs."""
    told: list[Any] = []

    def noted(name: str) -> Any:
        @contextmanager
        def enter(what: Any, device: Any = None) -> Iterator[None]:
            told.append((name, what, device))
            yield
            told.append(f"end of {name}")

        return enter

    for name in ("device", "use_mem_pool", "stream"):
        monkeypatch.setattr(torch.cuda, name, noted(name))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: (address, device))
    engine = InductorEngine.__new__(InductorEngine)
    engine._torch_device, engine._pool = "cuda:0", "pool"
    before = torch.backends.cudnn.allow_tf32
    stream: Any = OurStream()
    with engine._on(stream):
        assert not torch.backends.cudnn.allow_tf32
        told.append("run")
    assert torch.backends.cudnn.allow_tf32 == before
    assert told == [
        ("device", "cuda:0", None),
        ("use_mem_pool", "pool", "cuda:0"),
        ("stream", (4711, "cuda:0"), None),
        "run",
        "end of stream",
        "end of use_mem_pool",
        "end of device",
    ]
