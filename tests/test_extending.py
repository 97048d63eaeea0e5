"""A new backend, source or sink is one new file and one line of its registry: no other place has to know it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.runtime.backends.backend import BACKENDS
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.publishing import PUBLISHERS
from espmedsam_edge.runtime.sources.uris import SCHEMES, Scheme

BACKEND = '''
"""The left half of every picture is foreground."""
import numpy as np

def unavailable(name):
    return None

def load(name, bundle, graph, threads):
    return Halves(name, graph)

class Halves:
    device = "nothing"

    def __init__(self, name, graph):
        self.name, self.graph = name, graph

    def run(self, image):
        batch, _, height, width = image.shape
        logits = np.full((batch, 1, height // 4, width // 4), -9, np.float32)
        logits[..., : width // 8] = 9
        return logits

    def close(self):
        pass
'''

SOURCE = '''
"""So many grey frames, each brighter than the one before: grey://COUNT"""
from fractions import Fraction
from pathlib import Path

import numpy as np
from espmedsam_edge.runtime.sources.source import SourceFrame

def open_grey(uri, live):
    uri.allow()
    return Grey(uri)

class Grey:
    kind, live, fps = "video", False, Fraction(5)

    def __init__(self, uri):
        self.name, self.files, self.length, self.failures = uri.address, [Path(uri.label)], int(uri.place), []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        for index in range(self.length):
            image = np.full((40, 60, 3), 10 * index, np.uint8)
            yield SourceFrame(image, self.files[0], index, index / 5, address=self.name)
'''


SINK = '''
"""Lines into a list of this process: list://NAME"""
import sys

def open_list(publication):
    return Lines(publication)

class Lines:
    received = []

    def __init__(self, publication):
        self.name, self.form = publication.address, publication.form

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.received.append("end")

    def write(self, frame, result):
        self.received.append(self.form.line(frame, result))
'''


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code in (0, None)


def test_a_backend_is_a_file_and_a_line(toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halves_backend.py").write_text(BACKEND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BACKENDS, "halves", "halves_backend")

    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    segmenter = Segmenter.load(toy_bundle, backend="halves")
    mask = segmenter.segment(frame).mask
    assert np.array_equal(mask, np.repeat([[255] * 30 + [0] * 30], 40, axis=0))
    segmenter.close()

    cv2.imwrite(str(tmp_path / "a.png"), frame)
    run("infer", toy_bundle.path, tmp_path / "a.png", "--backend", "halves", "--masks", tmp_path / "masks")
    assert np.array_equal(cv2.imread(str(tmp_path / "masks" / "a.png"), cv2.IMREAD_UNCHANGED), mask)


def test_a_source_is_a_file_and_a_line(toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grey_source.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SCHEMES, "grey", Scheme("grey_source:open_grey", "grey://3"))

    run("infer", toy_bundle.path, "grey://3", "--masks", tmp_path / "masks")
    written = sorted((tmp_path / "masks").rglob("*.png"))
    assert len(written) == 3
    with Segmenter.load(toy_bundle) as segmenter:
        for index, file in enumerate(written):
            expected = segmenter.segment(np.full((40, 60, 3), 10 * index, np.uint8)).mask
            assert np.array_equal(cv2.imread(str(file), cv2.IMREAD_UNCHANGED), expected)


def test_a_sink_is_a_file_and_a_line(toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list_sink.py").write_text(SINK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PUBLISHERS, "list", Scheme("list_sink:open_list", "list://NAME"))
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), frame)

    run("infer", toy_bundle.path, "a.png", "b.png", "--publish", "list://x", "--jsonl", "lines.jsonl")
    received = import_module("list_sink").Lines.received
    without_times = [{**json.loads(line), "milliseconds": None} for line in received[:-1]]
    written = [json.loads(line) for line in Path("lines.jsonl").read_text().splitlines()]
    assert without_times == [{**line, "milliseconds": None} for line in written]
    assert [line["source"] for line in written] == ["a.png", "b.png"]
    assert received[-1] == "end"
    assert not (tmp_path / "overlays").exists()  # a result was asked for, so there are no others


@pytest.mark.parametrize(
    ("kinds", "scheme"),
    [(SCHEMES, name) for name in SCHEMES if name != "file"] + [(PUBLISHERS, name) for name in PUBLISHERS],
)
def test_every_scheme_names_what_opens_it(kinds: dict[str, Scheme], scheme: str) -> None:
    module, _, function = kinds[scheme].opener.partition(":")
    assert callable(getattr(import_module(module), function))
