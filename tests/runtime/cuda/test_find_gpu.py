"""What the GPU driver says, with a compiled stand-in for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda.gpu import find_gpu, free_bytes

GpuFixture = Callable[[str], None]


def test_describes_the_gpu(gpu: GpuFixture) -> None:
    gpu("NVIDIA GeForce RTX 4090|8|9|128|25300000000|24000000000|0|1")
    found = find_gpu()
    assert found is not None
    assert str(found) == "NVIDIA GeForce RTX 4090 (SM 8.9, 128 SMs)"
    assert (found.sm, found.total_bytes, found.integrated, found.cuda) == ("sm89", 25_300_000_000, False, "13.0")
    assert free_bytes(found) == 24_000_000_000
    assert found.pci == ""


def test_knows_its_place_on_the_bus(gpu: GpuFixture) -> None:
    gpu("NVIDIA H200|9|0|132|150000000000|140000000000|0|1|0000:C1:00.0")
    found = find_gpu()
    assert found is not None
    assert found.pci == "0000:C1:00.0"


def test_two_digit_generations(gpu: GpuFixture) -> None:
    gpu("NVIDIA GeForce RTX 5090|12|0|170|34000000000|1|0|1")
    found = find_gpu()
    assert found is not None
    assert found.sm == "sm120"
    assert "SM 12.0" in str(found)


@pytest.mark.usefixtures("no_gpu")
def test_none_without_a_driver() -> None:
    assert find_gpu() is None


def test_none_without_a_gpu(gpu: GpuFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("x|8|6|1|1|1|0|1")
    monkeypatch.setenv("CUDA_MACHINE_GPU", "none")  # the driver is there and finds nothing
    assert find_gpu() is None
    gpu("x|8|6|1|1|1|0|1")
    assert find_gpu(ordinal=1) is None


def test_a_full_gpu_is_one_line(gpu: GpuFixture) -> None:
    gpu("Orin|8|7|8|7990000000|0|0|1")
    found = find_gpu()
    assert found is not None
    with pytest.raises(
        UserError, match=r"^cuDevicePrimaryCtxRetain on Orin failed: out of memory\. Other programs hold"
    ):
        free_bytes(found)


def test_a_driver_that_goes_away(gpu: GpuFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("Orin|8|7|8|7990000000|9|0|1")
    found = find_gpu()
    assert found is not None
    monkeypatch.setenv("CUDA_MACHINE_GPU", "none")
    with pytest.raises(UserError, match="Orin does not answer any more"):
        free_bytes(found)
