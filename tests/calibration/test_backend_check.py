"""calibrate --check: what a backend makes of a graph, held to the gate and noted in the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs onnx (extra calibrate)")

from trained_graphs import MODALITY, save_bundle, save_images

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.calibration.check import check_backend
from espmedsam_edge.calibration.images import find_images
from espmedsam_edge.calibration.request import CheckRequest
from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.auto import gates
from espmedsam_edge.runtime.backends.backend import Choice, load_backend


class Log:
    """A listener that listens to nothing."""

    def phase(self, title: str, total: int | None) -> None: ...

    def step(self) -> None: ...


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"), 6)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    save_bundle(tmp_path / "b.bundle")
    return tmp_path / "b.bundle"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


class Noisy:
    """A backend that adds noise to what another one computes, and says that it computes in bf16."""

    name, device, arithmetic = "openvino:bf16", "CPU, 1 thread, bf16 arithmetic", "bf16"

    def __init__(self, backend: Any, noise: float) -> None:
        self._backend, self._noise, self.graph = backend, noise, backend.graph

    def run(self, image: np.ndarray) -> np.ndarray:
        logits = self._backend.run(image)
        return logits + np.float32(self._noise * np.random.default_rng(5).standard_normal(logits.shape))

    def close(self) -> None:
        self._backend.close()


def test_a_backend_is_held_to_the_gate_and_the_bundle_says_how_it_went(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = load_backend
    for noise, passed in ((0.0, True), (3.0, False), (1e-6, True)):

        def noisy(bundle: Bundle, graph: Graph, name: str, threads: int | None, noise: float = noise) -> Choice:
            return Choice(Noisy(load(bundle, graph, "onnxruntime-cpu", threads).backend, noise))

        monkeypatch.setattr("espmedsam_edge.calibration.check.load_backend", noisy)
        command = ["calibrate", str(bundle), str(pictures), "--check", "openvino:bf16", "--held-out", "3", "--threads"]
        with pytest.raises(SystemExit) as ended:
            main([*command, "1"])
        assert (ended.value.code or 0) == (0 if passed else 1)
        out = capsys.readouterr().out
        assert f"gate {'passed' if passed else 'failed'}: " in out
        opened = Bundle.open(bundle)
        graph = opened.graph(MODALITY, "fp32")
        assert gates.passed(opened.manifest, graph, "openvino:bf16") is passed
        assert not gates.passed(opened.manifest, graph, "openvino:fp16")
        assert opened.manifest.modalities == [MODALITY]
        report = (bundle / "report.md").read_text()
        assert report.count(f"## Check: {MODALITY} fp32 on openvino:bf16") == 1
        assert f"Gate: {'passed' if passed else 'failed'}" in report


def test_an_arithmetic_that_is_not_here_cannot_be_checked(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = load_backend

    def without(bundle: Bundle, graph: Graph, name: str, threads: int | None) -> Choice:
        backend = Noisy(load(bundle, graph, "onnxruntime-cpu", threads).backend, 0)
        backend.arithmetic = "fp32"
        return Choice(backend)

    monkeypatch.setattr("espmedsam_edge.calibration.check.load_backend", without)
    before = contents(bundle)
    with pytest.raises(UserError, match="computes in fp32 here, so bf16 cannot be checked"):
        check_backend(bundle, CheckRequest(MODALITY, "openvino:bf16"), find_images([str(pictures)]), Log())
    assert contents(bundle) == before
