"""The environment is read as the machine shows it, and no machine makes it fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from espmedsam_edge.machine import environment


def put(root: Path, path: str, content: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise empty PATH (the shell apart) to put fake programs in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, output: str, code: int = 0) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\nwhile read line; do echo \"$line\"; done <<'END'\n{output}\nEND\nexit {code}\n")
    file.chmod(0o755)


@pytest.fixture
def orin(tmp_path: Path, tools: Path) -> Path:
    """The files and programs of a Jetson Orin Nano under a root of their own."""
    root = tmp_path / "orin"
    put(root, "etc/nv_tegra_release", "# R36 (release), REVISION: 3.0, GCID: 36191598, BOARD: generic, EABI: aarch64\n")
    put(root, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\x00")
    put(root, "etc/os-release", 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.4 LTS"\n')
    put(root, "proc/meminfo", "MemTotal:        7802112 kB\nMemFree: 1 kB\nMemAvailable:    5242880 kB\n")
    put(
        root,
        "proc/cpuinfo",
        "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nFeatures\t: fp asimd asimddp i8mm\n\nprocessor:1\n",
    )
    put(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "schedutil\n")
    put(root, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "1510400\n")
    program(tools, "nvidia-smi", "Orin (nvgpu), 540.3.0, [N/A], 8.7, [N/A], [N/A], [N/A], [N/A]")
    put(root, "sys/class/devfreq/bwmgr/cur_freq", "204000000\n")
    put(root, "sys/class/devfreq/17000000.gpu/cur_freq", "306000000\n")
    put(root, "sys/class/devfreq/17000000.gpu/max_freq", "1020000000\n")
    program(tools, "nvpmodel", "NV Power Mode: 15W\n0")
    return root


def test_a_jetson_is_recognised_with_release_and_power_mode(orin: Path) -> None:
    board = environment.jetson(orin)
    assert board == environment.Jetson("NVIDIA Jetson Orin Nano Developer Kit", "36.3.0", "15W", 306.0, 1020.0)
    assert environment.gpus(orin) == [environment.Gpu("Orin (nvgpu)", "540.3.0", None, "8.7", None)]
    cpu = environment.cpu(orin)
    assert (cpu.model, cpu.simd) == ("ARMv8 Processor rev 1 (v8l)", ("asimd", "asimddp", "i8mm"))
    assert (cpu.governor, cpu.max_frequency_mhz) == ("schedutil", 1510.4)
    assert environment.memory(orin) == environment.Memory(7802112 * 1024, 5242880 * 1024)
    assert environment.system_name(orin) == "Ubuntu 22.04.4 LTS"


def test_a_machine_that_shows_nothing_gives_none_not_an_error(tmp_path: Path, tools: Path) -> None:
    found = environment.collect_environment(tmp_path / "nowhere")
    assert found["gpus"] == []
    assert found["jetson"] is None
    assert found["memory"] == {"total": None, "available": None}
    assert found["cpu"]["usable"] >= 1
    assert json.loads(json.dumps(found)) == found


def test_gpus_are_listed_with_what_the_driver_reports(tmp_path: Path, tools: Path) -> None:
    lines = "NVIDIA RTX A2000, 570.124.06, 6138, 8.6, 70.00, 210, 2100, 405\n"
    lines += "NVIDIA T4, 570.124.06, 15360, 7.5, [Not Supported]"
    program(tools, "nvidia-smi", lines)
    assert environment.gpus(tmp_path) == [
        environment.Gpu("NVIDIA RTX A2000", "570.124.06", 6138, "8.6", 70.0, 210.0, 2100.0, 405.0),
        environment.Gpu("NVIDIA T4", "570.124.06", 15360, "7.5", None),
    ]


def test_a_failing_nvidia_smi_leaves_the_drivers_own_listing(tmp_path: Path, tools: Path) -> None:
    program(tools, "nvidia-smi", "Failed to initialize NVML: Driver/library version mismatch", code=18)
    put(tmp_path, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\n")
    put(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA RTX A4000\nIRQ: 152\n")
    assert environment.gpus(tmp_path) == [environment.Gpu("NVIDIA RTX A4000", "550.54.15")]


def test_memory_is_cut_to_the_containers_limit(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    put(tmp_path, "sys/fs/cgroup/memory.max", str(4 << 30))
    put(tmp_path, "sys/fs/cgroup/memory.current", str(1 << 30))
    assert environment.memory(tmp_path) == environment.Memory(4 << 30, 3 << 30)
    put(tmp_path, "sys/fs/cgroup/memory.max", "max")
    assert environment.memory(tmp_path) == environment.Memory(16 << 30, 8 << 30)


def test_a_tool_that_is_absent_fails_or_hangs_prints_nothing(tools: Path) -> None:
    program(tools, "fails", "half an answer", code=3)
    (tools / "hangs").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    (tools / "hangs").chmod(0o755)
    assert environment.run_tool(["absent"]) is None
    assert environment.run_tool(["fails"]) is None
    assert environment.run_tool(["hangs"], timeout_s=0.2) is None
