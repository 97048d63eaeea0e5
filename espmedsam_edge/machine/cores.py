"""How many CPU cores this process may use, and how many threads it may be asked to start on them."""

from __future__ import annotations

import os
from pathlib import Path

from espmedsam_edge.errors import UserError

_MOST_THREADS = 1024


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores within the process's CPU affinity, at most its cgroup quota (v1 or v2); at least 1.

    Two hardware threads of a core share its arithmetic units, so a second thread on it would not speed up a GEMM.

    Args:
        root: where ``/sys`` and ``/proc`` hang (tests give a copy).
    """
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(root, cpu) for cpu in affinity}
    quota = _cgroup_quota(root)
    return max(1, min(len(cores), int(quota) if quota is not None else len(cores)))


def check_threads(threads: int | None) -> None:
    """Refuse a number of CPU threads that cannot be meant; None stands for ``usable_cores``.

    Raises:
        UserError: fewer than 1 or more than 1024.
    """
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise UserError(f"{threads} threads asked for.", f"Give a number from 1 to {_MOST_THREADS}, or leave it out.")


def _siblings(root: Path, cpu: int) -> str:
    """A name for the physical core of a CPU: the list of the hardware threads on it."""
    listing = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _read(listing) or str(cpu)


def _cgroup_quota(root: Path) -> float | None:
    """CPUs' worth of time that the process's control groups allow, or None where nothing limits it."""
    quotas = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        unified = controllers == ""
        if not unified and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("" if unified else "cpu")
        folder = base / group.strip("/")
        for level in [folder, *folder.parents]:
            if level != base and base not in level.parents:
                break
            quotas.append(_unified_quota(level) if unified else _v1_quota(level))
    return min((quota for quota in quotas if quota is not None), default=None)


def _unified_quota(folder: Path) -> float | None:
    quota, _, period = (_read(folder / "cpu.max") or "max 100000").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _v1_quota(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or ""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
