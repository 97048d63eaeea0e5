"""What runs is what was checked: another process swaps files all the time, and nothing but the checked bytes is run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_bundles import TOY_PATCH, TOY_SECOND_CHANNEL_WEIGHTS, save_toy_bundle, toy_graph
from trt_fixtures import ORIN

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines.cache import find_or_build
from espmedsam_edge.runtime.segmenter import Segmenter

SWAP = """
import os, sys
file, other, stay = sys.argv[1:]
print("swapping", flush=True)
while True:
    os.link(file, stay)  # the good one, kept under another name
    os.link(other, file + ".new")
    os.replace(file + ".new", file)
    os.replace(stay, file)
"""


@contextmanager
def swapping(file: Path, other: bytes) -> Iterator[None]:
    """Another process that puts ``other`` in a file's place and the file back, as fast as it can."""
    place = file.with_name("other.bin")
    place.write_bytes(other)
    arguments = [str(path) for path in (file, place, file.with_name("stay.bin"))]
    process = subprocess.Popen([sys.executable, "-c", SWAP, *arguments], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"swapping\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_a_graph_swapped_by_another_process_never_runs(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "b")
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with Segmenter.load(bundle, backend="onnxruntime-cpu", threads=1) as segmenter:
        expected = segmenter.segment(frame).logits
    loaded = refused = 0
    with swapping(bundle.graph_path(bundle.graph()), toy_graph(weights=TOY_SECOND_CHANNEL_WEIGHTS)):
        for _ in range(150):
            try:
                with Segmenter.load(bundle, backend="onnxruntime-cpu", threads=1) as segmenter:
                    found = segmenter.segment(frame).logits
            except UserError as error:
                assert "SHA-256 differs" in str(error) or "missing" in str(error)  # noqa: PT017 (both are right)
                refused += 1
                continue
            assert np.array_equal(found, expected)
            loaded += 1
    assert loaded
    assert refused  # else nothing was swapped in time


def test_a_compiled_network_swapped_by_another_process_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """OpenVINO's, and the files in which those of Inductor are kept alike."""
    pytest.importorskip("openvino", reason="needs OpenVINO (extra openvino)")
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def logits(name: str) -> np.ndarray:
        with Segmenter.load(Bundle.open(tmp_path / name), backend="openvino", threads=1) as segmenter:
            return segmenter.segment(frame).logits

    save_toy_bundle(tmp_path / "b")
    save_toy_bundle(tmp_path / "c", patch=2 * TOY_PATCH)
    expected, others = logits("b"), logits("c")
    assert not np.array_equal(expected, others)
    files = {str(json.loads(f.read_text())["graph"]): f.stem for f in (tmp_path / "cache" / "openvino").glob("*.json")}
    blob, other = (
        next((tmp_path / "cache" / "openvino").glob(f"{files[Bundle.open(tmp_path / name).graph().sha256]}-*.blob"))
        for name in ("b", "c")
    )
    said.clear()
    with swapping(blob, other.read_bytes()):
        for _ in range(30):
            assert np.array_equal(logits("b"), expected)
    assert 0 < sum("is damaged; compiling anew" in line for line in said) < 30  # else nothing was swapped in time


@pytest.fixture
def orin(gpu: Callable[[str], None]) -> None:
    gpu(ORIN)


@pytest.mark.usefixtures("orin")
def test_a_plan_swapped_after_it_was_found_is_not_read(tmp_path: Path, double: Callable[..., Any]) -> None:
    double()
    bundle = save_toy_bundle(tmp_path / "b")
    plan = find_or_build(bundle, bundle.graph(), cache=tmp_path / "cache")
    content = plan.read()
    assert hashlib.sha256(content).hexdigest() == plan.sidecar.plan_sha256
    found = find_or_build(bundle, bundle.graph(), cache=tmp_path / "cache")
    assert not found.built_now
    found.path.write_bytes(content[::-1])
    with pytest.raises(UserError, match=r"\.plan was changed meanwhile \(SHA-256 differs\)"):
        found.read()


@pytest.mark.usefixtures("orin")
def test_a_plan_swapped_by_another_process_never_runs(tmp_path: Path, double: Callable[..., Any]) -> None:
    double()
    bundle = save_toy_bundle(tmp_path / "b")
    plan = find_or_build(bundle, bundle.graph(), cache=tmp_path / "cache")
    good, found, refused = plan.read(), 0, 0
    with swapping(plan.path, good[::-1]):
        for _ in range(30_000):
            if found > 300 and refused > 10:
                break
            try:
                content = replace(plan).read()
            except UserError as error:
                assert "SHA-256 differs" in str(error)  # noqa: PT017 (of the two ends one)
                refused += 1
                continue
            assert content == good
            found += 1
    assert found
    assert refused  # else nothing was swapped in time


@pytest.mark.usefixtures("orin")
def test_a_graph_swapped_between_the_check_and_the_build_is_not_built(
    tmp_path: Path, double: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build's process reads the graph again: it checks what it reads."""
    double()
    bundle = save_toy_bundle(tmp_path / "b")
    file, read = bundle.graph_path(bundle.graph()), type(bundle).read_graph

    def then_swap(self: Any, graph: Any) -> bytes:
        content = read(self, graph)
        file.write_bytes(toy_graph(weights=TOY_SECOND_CHANNEL_WEIGHTS))
        return content

    monkeypatch.setattr(type(bundle), "read_graph", then_swap)
    with pytest.raises(UserError, match=r"fp32\.onnx was changed meanwhile"):
        find_or_build(bundle, bundle.graph(), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.plan"))


def test_a_graph_is_in_memory_once_while_it_runs(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "b")
    with Segmenter.load(bundle, backend="onnxruntime-cpu", threads=1) as segmenter:
        session = segmenter.choice.backend._session  # type: ignore[attr-defined]
        held = [value for value in vars(session).values() if isinstance(value, bytes) and len(value) > 100]
    assert not held
