"""The machine a measurement was made on: processor, memory, GPU, Jetson, versions. Reads much, fails on nothing.

``root`` stands for the file system's root everywhere, so that tests can show these functions another machine.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.installation import checkout

ROOT = Path("/")
PACKAGES = (
    "espmedsam-edge", "numpy", "scipy", "opencv-python-headless", "opencv-python", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt", "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings",
    "cuda-python", "torch", "timm", "onnx", "onnxscript", "onnxsim",
    "nvidia-modelopt", "av", "pydicom", "highdicom", "matplotlib", "psutil",
    "openvino",
)  # fmt: skip
_SIMD = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve",
)  # fmt: skip
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "ORT_NUM_THREADS")


@dataclass(frozen=True)
class Cpu:
    """``usable``: physical cores within this process's affinity and its container's quota. Frequencies in MHz."""

    model: str
    logical: int
    physical: int | None
    usable: int
    simd: tuple[str, ...] = ()
    governor: str | None = None
    frequency_mhz: float | None = None
    max_frequency_mhz: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the system does not say."""

    total: int | None
    available: int | None


@dataclass(frozen=True)
class Gpu:
    """What the driver says of one GPU; fields it does not report are None.

    ``clock_mhz`` is of the moment (low while idle), ``max_clock_mhz`` what it may reach, ``memory_clock_mhz`` its
    memory's.
    """

    name: str
    driver: str | None = None
    memory_mib: int | None = None
    compute_capability: str | None = None
    power_limit_w: float | None = None
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None


@dataclass(frozen=True)
class Jetson:
    """A Jetson board: its device-tree model, the L4T release ("36.3.0"), the power mode in force, the GPU's clocks."""

    model: str
    l4t: str | None = None
    power_mode: str | None = None
    gpu_clock_mhz: float | None = None
    max_gpu_clock_mhz: float | None = None


def read_text(path: Path) -> str | None:
    """A small file's text without surrounding blanks and NULs, or None when it cannot be read."""
    try:
        return path.read_bytes()[: 1 << 20].decode("utf-8", "replace").strip("\x00 \n\t") or None
    except OSError:
        return None


def run_tool(command: Sequence[str], timeout_s: float = 10) -> str | None:
    """Standard output of a program, or None when it is absent, fails, hangs or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            list(command), capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_s, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip() or None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def cpu(root: Path = ROOT) -> Cpu:
    """The processor, from /proc/cpuinfo, /sys and the device tree."""
    info = read_text(root / "proc/cpuinfo") or ""
    fields: dict[str, str] = {}
    cores: set[tuple[str, str]] = set()
    for block in info.split("\n\n"):
        entry = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in block.splitlines())}
        fields = {**entry, **fields}
        if "core id" in entry:
            cores.add((entry.get("physical id", "0"), entry["core id"]))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    maximum = _number(read_text(frequency / "cpuinfo_max_freq"))
    return Cpu(
        model=fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine(),
        logical=os.cpu_count() or 1,
        physical=len(cores) or None,
        usable=usable_cores(root),
        simd=tuple(name for name in _SIMD if name in flags),
        governor=read_text(frequency / "scaling_governor"),
        frequency_mhz=_number(fields.get("cpu MHz")),
        max_frequency_mhz=maximum / 1000 if maximum else None,
    )


def memory(root: Path = ROOT) -> Memory:
    """Memory of the machine in bytes, from /proc/meminfo, cut to a container's limit."""
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", read_text(root / "proc/meminfo") or "", re.M))
    total, available = (int(found[key]) * 1024 if key in found else None for key in ("MemTotal", "MemAvailable"))
    limit = _number(read_text(root / "sys/fs/cgroup/memory.max"))  # "max" where there is none
    if limit and total and limit < total:
        used = _number(read_text(root / "sys/fs/cgroup/memory.current")) or 0
        total, available = int(limit), int(min(available or limit, max(limit - used, 0)))
    return Memory(total, available)


def gpus(root: Path = ROOT) -> list[Gpu]:
    """NVIDIA GPUs by nvidia-smi, else by the driver's /proc entries; an empty list where there is none."""
    query = "name,driver_version,memory.total,compute_cap,power.limit,clocks.sm,clocks.max.sm,clocks.mem"
    listing = run_tool(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
    if listing and "," in listing:
        return [_gpu_of(line) for line in listing.splitlines() if line.strip()]
    loaded = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", read_text(root / "proc/driver/nvidia/version") or "")
    found = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        name = re.search(r"^Model:\s*(.+)$", read_text(file) or "", re.M)
        found.append(Gpu(name[1].strip() if name else "NVIDIA GPU", loaded[1] if loaded else None))
    return found


def _gpu_of(line: str) -> Gpu:
    # "[N/A]" and "[Not Supported]" stand for what a board (a Jetson, for one) does not report.
    cells = [None if cell.strip().startswith("[") else cell.strip() for cell in line.split(",")]
    name, driver, memory_mib, capability, *numbers = (*cells, *[None] * 8)[:8]
    size = _number(memory_mib)
    return Gpu(name or "NVIDIA GPU", driver, int(size) if size else None, capability, *map(_number, numbers))


def jetson(root: Path = ROOT) -> Jetson | None:
    """The Jetson board this is, by /etc/nv_tegra_release and the device tree, or None."""
    release = read_text(root / "etc/nv_tegra_release")
    model = read_text(root / "proc/device-tree/model")
    if release is None and not (model and re.search(r"jetson|tegra", model, re.I)):
        return None
    number = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", release or "")
    mode = re.search(r"Power Mode:\s*(\S+)", run_tool(["nvpmodel", "-q"]) or "")
    return Jetson(
        model or "Jetson (model unknown)",
        f"{number[1]}.{number[2]}" if number else None,
        mode[1] if mode else None,
        *(_jetson_clock(root, name) for name in ("cur_freq", "max_freq")),
    )


def _jetson_clock(root: Path, name: str) -> float | None:
    """A frequency of a Jetson's GPU in MHz: its devfreq device is called 17000000.gpu or 17000000.ga10b on Orin."""
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        if folder.name.rpartition(".")[2] in ("gpu", "ga10b", "gv11b", "gb10b"):
            hertz = _number(read_text(folder / name))
            return hertz / 1e6 if hertz else None
    return None


def packages() -> dict[str, str]:
    """Versions of the installed packages that bear on a measurement."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source_revision() -> str | None:
    """The commit of the checkout the package runs from, "+changes" when files differ from it; None outside one."""
    folder = checkout()
    if folder is None:
        return None
    commit = run_tool(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return None
    changed = run_tool(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+changes" if changed else commit


def system_name(root: Path = ROOT) -> str:
    """The operating system as it calls itself ("Ubuntu 22.04.4 LTS")."""
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', read_text(root / "etc/os-release") or "", re.M)
    return name[1] if name else platform.platform(terse=True)


def load_average() -> float | None:
    """The one-minute load average, or None where the system keeps none."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def collect_environment(root: Path = ROOT) -> dict[str, Any]:
    """Everything above as plain values for JSON; call it before measuring, so that the load is the others' load."""
    board, processor = jetson(root), cpu(root)
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average_1min": load_average(),
        "system": system_name(root),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "source_revision": source_revision(),
        "cpu": {**asdict(processor), "simd": list(processor.simd)},
        "memory": asdict(memory(root)),
        "gpus": [asdict(gpu) for gpu in gpus(root)],
        "jetson": asdict(board) if board else None,
        "thread_variables": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        "packages": packages(),
    }


def process_memory() -> tuple[int | None, int | None]:
    """Bytes this process holds in memory now and the most it ever held; None where /proc does not say."""
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", read_text(Path("/proc/self/status")) or "", re.M))
    now, most = (int(found[key]) * 1024 if key in found else None for key in ("VmRSS", "VmHWM"))
    return now, most


def machine_cpu_seconds() -> tuple[float, float] | None:
    """CPU seconds all programs together used since boot, and those a hypervisor kept (steal); None where unknown."""
    fields = (read_text(Path("/proc/stat")) or "").partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (
        int(value) / os.sysconf("SC_CLK_TCK") for value in fields[1:9]
    )
    return user + nice + system + irq + softirq, steal
