"""On a disk that is full each command says a line and leaves whole files; with room the same command ends as alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from forked_runs import ForkedRuns
from seg_sources import save_dicom
from toy_bundles import save_toy_bundle
from video_files import save_clip

INFER = ("infer", "toy.bundle", "in", "--threads", "1", "--backend", "onnxruntime-cpu")
TABLES = ("--jsonl", "out/lines.jsonl", "--csv", "out/areas.csv", "--objects", "out/objects.csv")
COMMANDS = {
    "resume": (*INFER, "--resume", "--masks", "out/masks", "--labels", "out/labels", *TABLES),
    "shard": (*INFER, "--resume", "--shard", "1/2", "--masks", "out/masks", *TABLES),
    "labels": (*INFER, "--labels", "out/labels"),
    "objects": (*INFER, "--objects", "out/objects.csv"),
    "export": (*INFER, "--export", "coco", "--export-to", "out/coco", "--overwrite"),
    "dicom-sr": ("infer", "toy.bundle", "in/d.dcm", "--dicom-sr", "out/d.dcm", "--threads", "1"),
    "dicom-seg": ("infer", "toy.bundle", "in/d.dcm", "--dicom-seg", "out/d.dcm", "--threads", "1"),
    "slide": ("slide", "toy.bundle", "a.tif", "--out", "out", "--everything", "--threads", "1"),
}
ROOM = (0, 12_000)  # bytes that are left


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ForkedRuns, Path, Path]]:
    """Runs that see a small disk, its place, and the folder of the inputs."""
    whole, disk = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("disk")
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=8m none {disk} && exec "$@"', "-"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system (user namespaces)")
    save_toy_bundle(whole / "toy.bundle", ("histopathology",))
    (whole / "in").mkdir()
    generator = np.random.default_rng(2)
    for number in range(6):
        noise = generator.integers(0, 256, (48, 64, 3), np.uint8)
        assert cv2.imwrite(str(whole / "in" / f"p{number}.png"), noise)
    save_clip(whole / "in" / "c.avi", 20)
    save_dicom(whole / "in" / "d.dcm", PixelSpacing=[0.5, 0.5])
    with ForkedRuns(mount) as forked:
        yield forked, disk, whole


def tree(folder: Path) -> dict[str, bytes]:
    """Files that are the same for each run, and the names of the others."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: b"" if path.suffix in (".jsonl", ".dcm") or ".ome" in name else path.read_bytes()
        for name, path in found.items()
    }


def check_whole(folder: Path) -> None:
    """All that stands under its own name, and not under a partial one, can be read to its end."""
    for path in folder.rglob("*"):
        if path.suffix in (".png", ".jpg") and ".unfinished" not in str(path):
            assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is not None, path
        elif path.suffix in (".json", ".geojson") and ".partial" not in path.name:
            json.loads(path.read_bytes())
        elif path.suffix == ".dcm":
            from pydicom import dcmread

            assert {"ContentSequence", "PixelData"} & set(dcmread(path).dir())


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_with_room_it_ends_as_alone(
    runs: tuple[ForkedRuns, Path, Path], command: str, room: int
) -> None:
    forked, disk, whole = runs
    if command == "slide":
        made_slides = pytest.importorskip("made_slides")
        made_slides.save_slide(whole / "a.tif", made_slides.tissue_picture())
    if command.startswith("dicom"):
        pytest.importorskip("highdicom", reason="needs highdicom (extra dicom)")
    inside = forked.root / disk.relative_to("/")
    shutil.rmtree(inside / "alone", ignore_errors=True)
    shutil.rmtree(inside / "full", ignore_errors=True)
    (inside / "ballast").unlink(missing_ok=True)
    alone, full = (inside / name for name in ("alone", "full"))
    for folder in (alone, full):
        folder.mkdir()
        for name in ("toy.bundle", "in", *(["a.tif"] if command == "slide" else [])):
            (folder / name).symlink_to(whole / name)
    ended = forked.run(disk / "alone", COMMANDS[command])
    assert ended.code == 0, ended.err
    ballast = inside / "ballast"
    _fill(ballast, room)
    ended = forked.run(disk / "full", COMMANDS[command])
    assert "Traceback" not in ended.err
    if ended.code:
        lines = [line for line in ended.err.splitlines() if line.startswith(("failed: ", "error: "))]
        assert ended.code == 1
        assert any("no space left to write" in line for line in lines), ended.err
        assert len(lines) <= 8  # there are so many inputs
    check_whole(full / "out")
    ballast.unlink()
    ended = forked.run(disk / "full", COMMANDS[command])
    assert ended.code == 0, ended.err
    found = tree(full / "out")
    if "--resume" not in COMMANDS[command]:  # what could be saved of the first run stays
        found = {name: content for name, content in found.items() if ".partial" not in name}
    assert found == tree(alone / "out")


def _fill(ballast: Path, room: int) -> None:
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            stream.truncate(stream.tell() - room // 4096 * 4096)
