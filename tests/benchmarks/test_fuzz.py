"""Mutated files, slides and folders end in results or one line; the long versions are benchmarks/fuzz*.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from video_files import save_clip

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.reading import open_video


@pytest.fixture
def fuzzing(monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType]) -> ModuleType:
    module = load_script("benchmarks/fuzzing.py")
    monkeypatch.setattr(module, "SECONDS", 60.0)  # a machine under tests is slow; what hangs, hangs longer
    return module


@pytest.fixture
def fuzz(fuzzing: ModuleType, load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/fuzz.py")


def test_a_mutation_is_made_again_by_its_seed(fuzzing: ModuleType) -> None:
    content = bytes(range(256)) * 10
    made = [fuzzing.mutated(content, seed) for seed in range(100)]
    assert made == [fuzzing.mutated(content, seed) for seed in range(100)]
    assert sum(one != content for one in made) >= 95


@pytest.mark.parametrize(
    ("what", "outcome"),
    [
        ("fine", "read"),
        ("refuse", "refused"),
        ("quote", "quotes the header"),
        ("lines", "several lines"),
        ("long", "a long line"),
        ("fail", "KeyError: 'a b' (odd.py, read)"),
        ("die", "dies with code -11"),
        ("hang", "hangs over 2 s"),
    ],
)
def test_what_goes_wrong_is_a_finding(
    fuzzing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, outcome: str
) -> None:
    (tmp_path / "odd.py").write_text(_ODD)
    (tmp_path / "fuzzing.py").symlink_to(Path(fuzzing.__file__).resolve())
    monkeypatch.setattr(fuzzing, "__file__", str(tmp_path / "fuzzing.py"))
    monkeypatch.setattr(fuzzing, "SECONDS", 2.0 if what == "hang" else 60.0)
    tally = fuzzing.count(fuzzing.Reader("odd"), {"odd": lambda chance: what}, 1, 0, lambda line: None)
    assert [finding.what for finding in tally.findings] == [outcome] * (outcome not in fuzzing.FINE)
    assert tally.of(outcome if outcome in fuzzing.FINE else "finding") == 1


def test_what_was_too_slow_once_is_no_finding(
    fuzzing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text(_ODD)
    (tmp_path / "fuzzing.py").symlink_to(Path(fuzzing.__file__).resolve())
    monkeypatch.setattr(fuzzing, "__file__", str(tmp_path / "fuzzing.py"))
    monkeypatch.setattr(fuzzing, "SECONDS", 2.0)
    tally = fuzzing.count(fuzzing.Reader("odd"), {"odd": lambda chance: f"once {tmp_path / 'there'}"}, 2, 5, print)
    assert not tally.findings
    assert [(slow.seed, slow.what) for slow in tally.slow] == [(5, "hangs over 2 s")]
    assert tally.of("refused") == 2


_ODD = """
import os, signal, time
from pathlib import Path
import fuzzing
from espmedsam_edge.errors import UserError
def read(what):
    print("not an answer")
    if what == "fail":
        raise KeyError("a b")
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang" or what.startswith("once") and not Path(what[5:]).exists():
        what.startswith("once") and Path(what[5:]).touch()
        time.sleep(60)
    if what in ("lines", "long"):
        return fuzzing.told(["fine.", {"lines": "a\\nb", "long": "a" * 6000}[what]])
    if what != "fine":
        raise UserError({"refuse": "no.", "quote": "of JANE."}.get(what, "no."))
    return fuzzing.told([])
"""


def test_whole_files_of_every_kind_are_read(fuzz: ModuleType, tmp_path: Path) -> None:
    reader = fuzz.Reader("fuzz")
    outcomes = {}
    for kind, content in fuzz.seeds().items():
        path = tmp_path / kind
        path.write_bytes(content)
        outcomes[kind] = reader.read(str(path))[0]
    reader.close()
    assert outcomes == dict.fromkeys(outcomes, "read")


def test_mutated_files_are_read_or_refused(fuzz: ModuleType, fuzzing: ModuleType) -> None:
    tally = fuzz.fuzz(300, 7_000_000)
    assert tally.findings == []
    assert tally.of("refused") >= 100
    assert tally.of("read") + tally.of("partly") >= 30
    assert tally.most_memory < fuzzing.MEMORY


def test_mutated_slides_are_read_or_refused(
    fuzzing: ModuleType, load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tifffile", "imagecodecs", "pydicom", "onnx"):
        pytest.importorskip(name, reason=f"needs {name} (extras slide, dicom and export)")
    tally = load_script("benchmarks/fuzz_slides.py").fuzz(52, 7_000_000)
    assert tally.findings == []
    assert min(tally.of("refused"), tally.of("read") + tally.of("partly")) >= 10


def test_changed_annotations_journals_and_results_are_read_or_refused(
    fuzzing: ModuleType, load_script: Callable[[str], ModuleType]
) -> None:
    for name in ("pycocotools", "PIL", "onnx", "matplotlib"):
        pytest.importorskip(name, reason=f"needs {name} (extras annotations, plot and export)")
    tally = load_script("benchmarks/fuzz_folders.py").fuzz(48, 7_000_000)
    assert tally.findings == []
    assert min(tally.of("refused"), tally.of("read") + tally.of("partly")) >= 10


# What fuzzing found, once and for all.


def test_a_codec_that_nobody_knows_is_one_line(tmp_path: Path) -> None:
    content = save_clip(tmp_path / "a.avi").read_bytes()
    (tmp_path / "b.avi").write_bytes(content.replace(b"MJPG", b"QQQQ"))
    with pytest.raises(UserError, match="not a video that can be decoded here"):
        open_video(tmp_path / "b.avi")


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV (extra video)")
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_title_in_another_encoding_is_no_reason_to_refuse(tmp_path: Path, suffix: str) -> None:
    import av

    with av.open(str(tmp_path / f"a{suffix}"), "w", options={}) as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))
    content = (tmp_path / f"a{suffix}").read_bytes()
    assert content.count(b"TITLE") == 1
    (tmp_path / f"b{suffix}").write_bytes(content.replace(b"TITLE", b"T\xcfT\xcbE"))
    assert len(list(open_video(tmp_path / f"b{suffix}"))) == 3
