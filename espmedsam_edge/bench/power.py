"""Watts while something runs: the GPU's by nvidia-smi (NVML), a Jetson module's by tegrastats (INA3221)."""

from __future__ import annotations

import contextlib
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from espmedsam_edge.files import temporary_file
from espmedsam_edge.machine.environment import jetson
from espmedsam_edge.runtime.cuda.gpu import find_gpu

_INTERVAL_MS = 100
# What measures the whole module. AGX Orin has no such rail: there the others are added up.
_INPUT_RAILS = ("VDD_IN", "POM_5V_IN")
_RAIL = re.compile(r"\b(V[A-Z0-9_]+|POM_[A-Z0-9_]+) (\d+)(?:mW)?/(\d+)(?:mW)?")


def watts_of_nvidia_smi(text: str) -> list[float]:
    """Readings from ``nvidia-smi --query-gpu=power.draw --format=csv,noheader,nounits``, a line each.

    Lines such as ``[N/A]`` and ``[Not Supported]`` are left out.
    """
    found = []
    for line in text.splitlines():
        try:
            found.append(float(line.strip().removesuffix(" W")))
        except ValueError:
            continue
    return [watts for watts in found if watts > 0]


def watts_of_tegrastats(text: str) -> list[float]:
    """Readings from tegrastats, a line each: the module's input rail, or the sum of the rails where it has none.

    A rail looks like ``VDD_IN 5234mW/5100mW`` (now, average), before JetPack 4.6 like ``POM_5V_IN 5234/5100``.
    """
    found = []
    for line in text.splitlines():
        rails = {name: int(now) for name, now, _ in _RAIL.findall(line)}
        if not rails:
            continue
        own = next((rails[name] for name in _INPUT_RAILS if name in rails), None)
        found.append((sum(rails.values()) if own is None else own) / 1000)
    return found


@dataclass(frozen=True)
class Sensor:
    """A program that prints power readings until it is ended, what reads its text, and what it measures."""

    command: tuple[str, ...]
    read: Callable[[str], list[float]]
    what: str


def find_sensor() -> Sensor | None:
    """The sensor of the GPU that CUDA numbers 0 here (CUDA_VISIBLE_DEVICES counts), or of a Jetson; or None."""
    if jetson() is not None and shutil.which("tegrastats"):
        return Sensor(("tegrastats", "--interval", str(_INTERVAL_MS)), watts_of_tegrastats, "the whole module")
    if shutil.which("nvidia-smi"):
        gpu = find_gpu()
        which = gpu.pci if gpu is not None and gpu.pci else "0"
        query = ("--query-gpu=power.draw", "--format=csv,noheader,nounits", f"--loop-ms={_INTERVAL_MS}")
        return Sensor(("nvidia-smi", *query, f"--id={which}"), watts_of_nvidia_smi, "the GPU alone")
    return None


class PowerMeter:
    """Reads a sensor while its block runs; ``watts`` afterwards is the median, None without readings."""

    def __init__(self, sensor: Sensor) -> None:
        self.sensor = sensor
        self.watts: float | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PowerMeter:
        self._text = temporary_file()
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(self.sensor.command, stdout=self._text, **quiet)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with self._text:
            self._text.seek(0)
            readings = self.sensor.read(self._text.read().decode("utf-8", "replace"))
        self.watts = statistics.median(readings) if readings else None
