"""How many cores a process may use, on made-up machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from espmedsam_edge.machine.cores import usable_cores


def machine(root: Path, siblings: list[str], files: dict[str, str] | None = None) -> Path:
    for cpu, listing in enumerate(siblings):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(listing + "\n")
    for name, content in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


PAIRS = ["0,4", "1,5", "2,6", "3,7"] * 2
SINGLE = [str(cpu) for cpu in range(8)]


def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    assert usable_cores(machine(tmp_path, PAIRS)) == 4


def test_affinity_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 1}, raising=False)
    assert usable_cores(machine(tmp_path, PAIRS)) == 2


def test_without_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/job", {"sys/fs/cgroup/job/cpu.max": "300000 100000"}, 3),
        ("0::/outer/inner", {"sys/fs/cgroup/outer/cpu.max": "250000 100000"}, 2),
        ("0::/job", {"sys/fs/cgroup/job/cpu.max": "max 100000"}, 8),
        ("0::/job", {"sys/fs/cgroup/job/cpu.max": "50000 100000"}, 1),
        ("0::/job", {"sys/fs/cgroup/job/cpu.max": "nonsense"}, 8),
        (
            "5:cpu,cpuacct:/job",
            {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("5:cpu:/job", {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1"}, 8),
        ("4:memory:/job", {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "100000"}, 8),
    ],
)
def test_the_control_groups_quota_limits(tmp_path: Path, group: str, files: dict[str, str], cores: int) -> None:
    assert usable_cores(machine(tmp_path, SINGLE, {"proc/self/cgroup": group, **files})) == cores


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= 8
