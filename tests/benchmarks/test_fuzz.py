"""Mutated images, videos and DICOM files end in frames or one line; the long version is benchmarks/fuzz.py."""

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
def fuzz(monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType]) -> ModuleType:
    module = load_script("benchmarks/fuzz.py")
    monkeypatch.setattr(module, "SECONDS", 60.0)  # a machine under tests is slow; what hangs, hangs longer
    return module


def test_a_mutation_is_made_again_by_its_seed(fuzz: ModuleType) -> None:
    content = bytes(range(256)) * 10
    made = [fuzz.mutated(content, seed) for seed in range(100)]
    assert made == [fuzz.mutated(content, seed) for seed in range(100)]
    assert sum(one != content for one in made) >= 95


def test_whole_files_of_every_kind_are_read(fuzz: ModuleType, tmp_path: Path) -> None:
    reader = fuzz.Reader()
    outcomes = {}
    for kind, content in fuzz.seeds().items():
        path = tmp_path / kind
        path.write_bytes(content)
        outcomes[kind] = reader.read(path)[0]
    reader.close()
    assert outcomes == dict.fromkeys(outcomes, "read")


def test_mutated_files_are_read_or_refused(fuzz: ModuleType) -> None:
    outcomes, findings, most = fuzz.fuzz(300, 7_000_000)
    assert findings == []
    assert outcomes["refused"] >= 100
    assert outcomes["read"] + outcomes["partly"] >= 30
    assert most < fuzz.MEMORY


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
