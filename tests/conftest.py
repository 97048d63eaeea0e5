"""Fixtures that several test folders share. Other toy bundles: ``toy_bundles.save_toy_bundle``."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from listening import listening
from once import share_in
from toy_bundles import save_toy_bundle, save_toy_graph

from espmedsam_edge import modalities
from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.runtime.backends import onnxruntime_backend
from espmedsam_edge.runtime.backends.backend import Backend
from espmedsam_edge.shipped import bundles, packed

__all__ = ["data_root", "save_toy_bundle", "save_toy_graph", "toy_bundle", "toy_bundle_of_two"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in a shell's background: Ctrl-C is ignored there, by this process and all it starts; its tests need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test is a timed assertion; on a busy machine an example may take as long as it takes.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

pytest_plugins = ("trt_fixtures",)  # the double of TensorRT, a described GPU, the real TensorRT-RTX


@pytest.fixture(scope="session", autouse=True)
def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The workers' own folders lie in the run's."""
    own = tmp_path_factory.getbasetemp()
    share_in((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "once")


@pytest.fixture(scope="session", autouse=True)
def _unpacked_once() -> Iterator[None]:
    """The weights that came along are unpacked once a process, which takes more than a second each time."""
    with pytest.MonkeyPatch.context() as patch:
        remembered = functools.lru_cache(maxsize=2)(packed.unpack)
        for module in (packed, bundles):
            patch.setattr(module, "unpack", remembered)
        yield


@pytest.fixture(autouse=True)
def _known_modalities(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, or a checkpoint that it reads, is forgotten after it."""
    monkeypatch.setattr(modalities, "_REGISTRY", dict(modalities._REGISTRY))


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Load a script that is no part of the package, such as ``benchmarks/fuzz.py``, as a module for one test."""

    def load(path: str) -> ModuleType:
        file = Path(__file__).parents[1] / path
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def toy_bundle(tmp_path: Path) -> Bundle:
    """A bundle of one modality, fundus, with a 64x64 graph of batch 1: reddish pixels are foreground."""
    return save_toy_bundle(tmp_path / "toy.bundle")


@pytest.fixture
def toy_bundle_of_two(tmp_path: Path) -> Bundle:
    """A bundle of two modalities, fundus and colonoscopy, whose logits are each other's negatives."""
    return save_toy_bundle(tmp_path / "two.bundle", ("fundus", "colonoscopy"))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that the package tells (``logging``, from INFO on), as they come."""
    lines: list[str] = []
    with listening(lines.append):
        yield lines


@pytest.fixture
def announced_load(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ONNX Runtime, the backend where there is no GPU, says when it loads, as if it had to build an engine."""
    line, load = "Building an engine, once; this takes minutes.", onnxruntime_backend.load

    def announced(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> Backend:
        logging.getLogger("espmedsam_edge.runtime").info("%s", line)
        return load(name, bundle, graph, threads)

    monkeypatch.setattr(onnxruntime_backend, "load", announced)
    return line


@pytest.fixture
def data_root() -> Path:
    """The folder of development images; tests that ask for it are skipped where it is missing."""
    root = Path(os.environ.get("ESPMEDSAM_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip("needs the development images: set ESPMEDSAM_DATA, or put them in ../shared/data")
    return root
