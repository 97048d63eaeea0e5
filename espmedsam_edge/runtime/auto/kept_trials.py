"""What trials of backends found on this machine, kept in the cache: a file for each graph, machine and set of runtimes.

A file is used only if it is the user's alone, whole, and of the graph, the versions, the processor and the number of
threads at hand; anything else is as if there had been no trial, with one line where the file is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from espmedsam_edge.bundle import FormatVersion, Graph, Precision, Sha256
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.cache import PRIVATE_FILE, cache_place, make_private, read_kept
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.environment import cpu
from espmedsam_edge.runtime.cuda.gpu import find_gpu
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)

FASTER = 0.95
"""The part of the reference's time from which on a candidate is taken in its place: less is within the noise."""

ALIKE = 0.9
"""The least Dice between a candidate's mask of a generated picture and ONNX Runtime's of the same graph: far below lies
a runtime that is broken here. What small differences mean on real pictures is for the gate to say."""

_FOLDER = "trials"
_RUNTIMES = ("onnxruntime", "openvino", "torch")
_ON_GPU = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-libs")


class Tried(BaseModel, extra="forbid", frozen=True):
    """One candidate of a trial.

    Attributes:
        precision, graph_sha256, backend: what was tried.
        ratio: its time over the reference's, medians of runs in turn; None where it failed.
        dice: of its mask of a generated picture with ONNX Runtime's of the same graph, 0 to 1.
        failed: why it does not run here, one line; empty where it does.
    """

    precision: Precision
    graph_sha256: Sha256
    backend: str
    ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    dice: Annotated[float, Field(ge=0, le=1)] | None = None
    failed: str = ""

    @property
    def usable(self) -> bool:
        """Whether it ran, and gave what its graph says."""
        return self.ratio is not None and self.dice is not None and self.dice >= ALIKE


class Trial(BaseModel, extra="forbid", frozen=True):
    """What a trial found.

    Attributes:
        made_of: everything that it depends on.
        date: when, as YYYY-MM-DD.
        milliseconds: the reference's median.
        tried: each candidate beside the reference.
    """

    schema_version: FormatVersion = 1
    made_of: dict[str, str]
    date: str
    milliseconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tried: list[Tried]

    @property
    def faster(self) -> list[tuple[float, Tried]]:
        """The candidates that are faster than the reference and right, with their part of its time, fastest first."""
        found = [(one.ratio, one) for one in self.tried if one.usable and one.ratio is not None and one.ratio <= FASTER]
        return sorted(found, key=lambda pair: pair[0])


def depends_on(graph: Graph, threads: int | None) -> dict[str, str]:
    """What a trial of a modality depends on, whose reference is this graph."""
    processor, gpu = cpu(), find_gpu()
    with_gpu = {} if gpu is None else {"gpu": f"{gpu}, CUDA {gpu.cuda}", **{name: _version(name) for name in _ON_GPU}}
    return {
        "graph": graph.sha256,
        "processor": f"{processor.model}: {' '.join(processor.simd)}",
        "threads": str(threads or usable_cores()),
        "espmedsam-edge": __version__,
        **{name: _version(name) for name in _RUNTIMES},
        **with_gpu,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def find_trial(graph: Graph, threads: int | None) -> Trial | None:
    """The trial in the cache that fits; None where there is none."""
    try:
        if not (cache_place() / _FOLDER).exists():  # looking is quicker than finding out what it depends on
            return None
        made_of = depends_on(graph, threads)
        file, root = _place(made_of)
        trial = Trial.model_validate_json(read_kept(file, root))
    except (FileNotFoundError, UserError):
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else "it is damaged"
        log.info(
            "The trial of backends in the cache is not used, %s; try them again: espmedsam-edge bench BUNDLE --choose",
            reason,
        )
        return None
    return trial if trial.made_of == made_of else None


def keep_trial(trial: Trial) -> Path | None:
    """Keep a trial in place of the one before it; where that cannot be, one line says so, and it is None."""
    try:
        file, root = _place(trial.made_of)
        make_private(file.parent, root)
        atomic_write(file, trial.model_dump_json(indent=1) + "\n", PRIVATE_FILE)
    except (OSError, UserError) as error:
        log.warning("The trial of backends is not kept: %s", error)
        return None
    return file


def _place(made_of: dict[str, str]) -> tuple[Path, Path]:
    root = cache_place()
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return root / _FOLDER / f"{digest[:32]}.json", root
