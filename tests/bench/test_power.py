"""Power readings in the forms that nvidia-smi and tegrastats print."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from espmedsam_edge.bench import power
from espmedsam_edge.bench.power import PowerMeter, Sensor, find_sensor, watts_of_nvidia_smi, watts_of_tegrastats

ORIN_NANO = """\
03-14-2024 10:22:31 RAM 3141/7620MB (lfb 22x4MB) SWAP 0/3810MB (cached 0MB) CPU [12%@1510,4%@1510,3%@1510,2%@1510,\
1%@1510,0%@1510] GR3D_FREQ 98% cpu@52.718C soc2@51.187C soc0@51.25C gpu@53.031C tj@53.031C soc1@51.531C \
VDD_IN 11234mW/9876mW VDD_CPU_GPU_CV 5210mW/4400mW VDD_SOC 2411mW/2200mW
03-14-2024 10:22:32 RAM 3141/7620MB (lfb 22x4MB) SWAP 0/3810MB (cached 0MB) CPU [11%@1510,4%@1510,3%@1510,2%@1510,\
1%@1510,0%@1510] GR3D_FREQ 99% cpu@52.9C tj@53.1C VDD_IN 11500mW/9990mW \
VDD_CPU_GPU_CV 5300mW/4450mW VDD_SOC 2420mW/2210mW
"""
AGX_ORIN = """\
RAM 4722/30536MB (lfb 5912x4MB) SWAP 0/15268MB (cached 0MB) CPU [0%@729,0%@729,off,off] EMC_FREQ 0% GR3D_FREQ 61% \
CPU@47.4C tboard@37C Tdiode@39.25C VDD_GPU_SOC 12800mW/7990mW VDD_CPU_CV 1600mW/1600mW VIN_SYS_5V0 5038mW/4900mW
"""
NANO = "RAM 1903/3964MB GR3D_FREQ 0% PLL@27C CPU@29.5C POM_5V_IN 2532/2500 POM_5V_GPU 40/40 POM_5V_CPU 485/480\n"


def test_a_module_with_an_input_rail() -> None:
    assert watts_of_tegrastats(ORIN_NANO) == [11.234, 11.5]
    assert watts_of_tegrastats(NANO) == [2.532]


def test_a_module_without_one_adds_up_its_rails() -> None:
    assert watts_of_tegrastats(AGX_ORIN) == [pytest.approx(12.8 + 1.6 + 5.038)]


def test_nvidia_smi() -> None:
    assert watts_of_nvidia_smi("312.54\n309.10\n") == [312.54, 309.10]
    assert watts_of_nvidia_smi("[N/A]\n[Not Supported]\nN/A\n\n0.00\n") == []


# nvidia-smi of a server with two GPUs, by the argument after --id: the first works, the second idles.
NVIDIA_SMI = """\
#!/bin/sh
for word; do
    case $word in
    --id=0 | --id=0000:18:00.0) printf '691.12\\n688.40\\n695.31\\n' ;;
    --id=0000:C1:00.0) printf '75.80\\n75.91\\n76.02\\n' ;;
    --id=*) echo "No devices were found" ;;
    esac
done
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(power, "jetson", lambda: None)


def measured(sensor: Sensor | None) -> float | None:
    assert sensor is not None
    meter = PowerMeter(sensor)
    with meter:
        assert meter._process is not None
        meter._process.wait(20)
    return meter.watts


@pytest.mark.usefixtures("nvidia_smi")
def test_the_gpu_that_cuda_sees_is_measured_and_not_the_machines_first(gpu: Callable[[str], None]) -> None:
    gpu("NVIDIA H200|9|0|132|150000000000|140000000000|0|1|0000:C1:00.0")
    assert measured(find_sensor()) == 75.91
    gpu("NVIDIA H200|9|0|132|150000000000|140000000000|0|1|0000:18:00.0")
    assert measured(find_sensor()) == 691.12


@pytest.mark.usefixtures("nvidia_smi", "no_gpu")
def test_without_cuda_the_machines_first_is_measured() -> None:
    assert measured(find_sensor()) == 691.12


@pytest.mark.parametrize("read", [watts_of_nvidia_smi, watts_of_tegrastats])
def test_text_that_is_none_of_theirs(read: object) -> None:
    for text in ("", "nothing", "RAM 1/2MB\nFailed to initialize NVML: Driver/library version mismatch\n"):
        assert read(text) == []  # type: ignore[operator]


def test_the_median_while_the_block_runs() -> None:
    lines = r"import time; print('1\n2\n300', flush=True); time.sleep(60)"
    with PowerMeter(Sensor((sys.executable, "-c", lines), watts_of_nvidia_smi, "a test")) as meter:
        deadline = time.monotonic() + 20
        while meter._text.seek(0, 2) < 7 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert meter.watts == 2.0


@pytest.mark.parametrize("command", [("no-such-program-here",), (sys.executable, "-c", "print('[N/A]')")])
def test_a_sensor_that_is_silent_gives_nothing(command: tuple[str, ...]) -> None:
    with PowerMeter(Sensor(command, watts_of_nvidia_smi, "a test")) as meter:
        pass
    assert meter.watts is None
