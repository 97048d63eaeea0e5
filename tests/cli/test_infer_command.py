"""``espmedsam-edge infer`` through its command line: what it writes, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from dicom_files import BIRTH_DATE, PATIENT, PATIENT_ID, save_dicom
from toy_bundles import save_toy_bundle
from video_files import FRAMES, cut, number_of, save_clip

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.files import VIDEO_SUFFIXES
from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.reading import open_video

Outcome = tuple[int, str, str]


def save_photo(path: Path, seed: int = 0, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    photo = np.asarray(cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), photo)
    return photo


def tree(folder: Path = Path()) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_one_image_goes_beside_where_you_are(infer: Callable[..., Outcome], toy_bundle: Bundle) -> None:
    photo = save_photo(Path("in/a.png"))
    code, out, err = infer("in/a.png")
    assert (code, err) == (0, "")
    assert tree() == ["a-overlay.png", "in/a.png"]
    with Segmenter.load(toy_bundle) as segmenter:
        expected = draw_overlay(photo, segmenter.segment(photo).mask, OverlayStyle(color_of("histopathology")))
    np.testing.assert_array_equal(cv2.imread("a-overlay.png"), expected)
    assert "histopathology, fp32, onnxruntime (CPU" in out
    assert "1 frame in " in out
    assert "overlays: a-overlay.png" in out
    assert "never trained" not in out


def test_tta_averages_over_views(infer: Callable[..., Outcome], tmp_path: Path) -> None:
    photo = save_photo(Path("a.png"))
    bundle = save_toy_bundle(
        tmp_path / "t.bundle", ("tiles",), patch=np.arange(16, dtype=np.float32).reshape(4, 4) / 99
    )
    masks = {}
    for options in ((), ("--tta",)):
        code, out, err = infer("a.png", "--masks", "m", "--overwrite", *options, bundle=bundle.path)
        assert (code, err) == (0, "")
        assert ("mean of 8 views" in out) == bool(options)
        masks[options] = cv2.imread("m/a.png", cv2.IMREAD_UNCHANGED)
        with Segmenter.load(bundle, tta=bool(options)) as segmenter:
            np.testing.assert_array_equal(masks[options], segmenter.segment(photo).mask)
    assert not np.array_equal(masks[()], masks[("--tta",)])


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_gpu_asked_for_without_a_driver_is_one_line(infer: Callable[..., Outcome], backend: str) -> None:
    save_photo(Path("a.png"))
    code, out, err = infer("a.png", "--backend", backend)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: backend {backend} cannot run here: there is no NVIDIA driver here.")
    assert tree() == ["a.png"]


def test_a_video_becomes_a_video(infer: Callable[..., Outcome]) -> None:
    save_clip(Path("c.avi"))
    code, out, err = infer("c.avi", "--out", "new/o.mp4")
    assert (code, err) == (0, "")
    reader = open_video(Path("new/o.mp4"))
    assert reader.fps == 10
    assert [number_of(frame) for frame, _ in reader] == list(range(FRAMES))
    assert tree(Path("new")) == ["o.mp4"]
    assert f"{FRAMES} frames in " in out


def test_a_folder_gives_overlays_masks_and_lines(infer: Callable[..., Outcome], toy_bundle: Bundle) -> None:
    photos = {name: save_photo(Path("in") / name, seed) for seed, name in enumerate(("a.png", "b.jpg", "c.bmp"))}
    save_clip(Path("in/clip.mp4"), 3)
    code, out, err = infer("in", "--out", "o", "--masks", "m", "--jsonl", "r.jsonl")
    assert (code, err) == (0, "")
    assert tree(Path("o")) == ["a.png", "b.png", "c.png", "clip.mp4"]
    assert tree(Path("m")) == ["a.png", "b.png", "c.png", *(f"clip/00000{number}.png" for number in range(3))]
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [(line["source"], line["frame"]) for line in lines] == [
        ("in/a.png", 0), ("in/b.jpg", 0), ("in/c.bmp", 0), ("in/clip.mp4", 0), ("in/clip.mp4", 1), ("in/clip.mp4", 2)
    ]  # fmt: skip
    mask = cv2.imread("m/a.png", cv2.IMREAD_UNCHANGED)
    with Segmenter.load(toy_bundle) as segmenter:
        result = segmenter.segment(photos["a.png"])
    np.testing.assert_array_equal(mask, result.mask)
    assert lines[0]["area"] == result.area == int((mask > 0).sum())
    assert lines[0]["weights"] == "trained"
    for place in ("overlays: o", "masks: m", "measurements: r.jsonl"):
        assert place in out


def test_every_kind_of_result_of_a_video(infer: Callable[..., Outcome]) -> None:
    save_clip(Path("c.avi"))
    places = ["--mask-video", "m.mkv", "--csv", "a.csv", "--jsonl", "r.jsonl", "--contours", "both", "--plot", "a.png"]
    code, out, err = infer("c.avi", "--out", "o.mkv", *places)
    assert (code, err) == (0, "")
    assert tree() == ["a.csv", "a.png", "c.avi", "m.mkv", "o.mkv", "r.jsonl"]
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    rows = Path("a.csv").read_text().splitlines()
    assert len(lines) == len(rows) - 1 == FRAMES
    assert [f",{line['area']}," in row for line, row in zip(lines, rows[1:], strict=True)] == [True] * FRAMES
    if has_pyav():
        shown = [int((frame[..., 0] >= 128).sum()) for frame, _ in open_video(Path("m.mkv"))]
        assert shown == [line["area"] for line in lines]
    for place in ("overlays: o.mkv", "mask videos: m.mkv", "areas: a.csv", "plot: a.png", "measurements: r.jsonl"):
        assert place in out


def test_dicom_in_and_dicom_seg_out(infer: Callable[..., Outcome]) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
    pytest.importorskip("highdicom", reason="needs highdicom (extra dicom)")
    frames = np.stack([save_photo(Path("p.png"), seed) for seed in range(3)])
    save_dicom(Path("cine.dcm"), frames, "RGB", FrameTime=40, PixelSpacing=[0.5, 0.25])
    options = ["--dicom-seg", "seg.dcm", "--masks", "m", "--jsonl", "r.jsonl", "--csv", "a.csv", "--uids", "plain"]
    code, out, err = infer("cine.dcm", *options)
    assert (code, err) == (0, "")
    masks = np.stack([cv2.imread(f"m/cine/00000{number}.png", cv2.IMREAD_UNCHANGED) for number in range(3)])
    found, source = pydicom.dcmread("seg.dcm"), pydicom.dcmread("cine.dcm")
    np.testing.assert_array_equal(found.pixel_array, masks // 255)
    assert found.StudyInstanceUID == source.StudyInstanceUID
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [line["instance_uid"] for line in lines] == [source.SOPInstanceUID] * 3
    assert [line["area_mm2"] for line in lines] == [line["area"] * 0.125 for line in lines]
    assert [line["time"] for line in lines] == pytest.approx([0, 0.04, 0.08])
    said = out + err + Path("r.jsonl").read_text() + Path("a.csv").read_text()
    for secret in (PATIENT, PATIENT_ID, BIRTH_DATE):
        assert secret not in said


def test_what_a_source_cannot_have_is_one_line(infer: Callable[..., Outcome]) -> None:
    save_photo(Path("a.png"))
    for options, words in (
        (("--stream", "udp://127.0.0.1:5000"), "--stream sends one video"),
        (("--dicom-seg", "s"), "a.png is not DICOM"),
        (("--jsonl", "-", "--contours", "polygon"), "polygon"),
    ):
        code, _, err = infer("a.png", *options)
        assert (code, words in err) == (2, True)
    assert tree() == ["a.png"]


def test_several_sources_and_the_default_folder(infer: Callable[..., Outcome]) -> None:
    save_photo(Path("x/a.png"))
    save_photo(Path("y/a.png"), 1)
    save_clip(Path("c.mp4"), 2)
    code, out, _ = infer("x/a.png", "y/*.png", "c.mp4")
    assert code == 0
    assert tree(Path("overlays")) == ["c.mp4", "x-a-png.png", "y-a-png.png"]
    assert "overlays: overlays" in out


def test_lines_to_standard_output_are_all_there_is(infer: Callable[..., Outcome]) -> None:
    save_photo(Path("a.png"))
    code, out, err = infer("a.png", "--jsonl", "-")
    assert code == 0
    assert [json.loads(line)["source"] for line in out.splitlines()] == ["a.png"]
    assert "1 frame in" in err
    assert tree() == ["a.png"]


def test_untrained_weights_are_named_everywhere(infer: Callable[..., Outcome], tmp_path: Path) -> None:
    random = save_toy_bundle(tmp_path / "random.bundle", ("histopathology",), origin="random")
    save_photo(Path("a.png"), size=(200, 300))
    code, out, _ = infer("a.png", "--out", "trained.png")
    code, out, _ = infer("a.png", "--out", "random.png", "--jsonl", "r.jsonl", bundle=random.path)
    assert code == 0
    assert "These weights were never trained: the masks mean nothing." in out
    assert json.loads(Path("r.jsonl").read_text())["weights"] == "random"
    changed = (cv2.imread("trained.png") != cv2.imread("random.png")).any(axis=2)
    assert changed[:40].any()
    assert not changed[40:].any()


def test_threshold_and_opacity(infer: Callable[..., Outcome]) -> None:
    photo = save_photo(Path("a.png"))
    assert infer("a.png", "--out", "o.png", "--opacity", "0", "--threshold", "0.999999")[0] == 0
    np.testing.assert_array_equal(cv2.imread("o.png"), photo)  # nothing reaches that probability
    code, _, err = infer("a.png", "--threshold", "1.5")
    assert code == 2
    assert "threshold 1.5 is not between 0 and 1" in err


def test_a_modality_is_asked_for_and_suggested(infer: Callable[..., Outcome], toy_bundle_of_two: Bundle) -> None:
    save_photo(Path("a.png"))
    code, out, _ = infer("a.png", "--modality", "colonoscopy", bundle=toy_bundle_of_two.path)
    assert code == 0
    assert "colonoscopy, fp32" in out
    code, _, err = infer("a.png", "--modality", "colonscopy", bundle=toy_bundle_of_two.path)
    assert (code, "Did you mean 'colonoscopy'?" in err) == (2, True)
    code, _, err = infer("a.png", bundle=toy_bundle_of_two.path)
    assert (code, "--modality fundus|colonoscopy" in err) == (1, True)  # it looks like neither
    code, _, err = infer("a.png", bundle=save_toy_bundle(Path("b.bundle"), ("fundus", "teeth")).path)
    assert (code, "holds 2 modalities" in err) == (2, True)


# Bad input: one line each, the right exit code, the rest done, no partial file.


def bad_files(folder: Path) -> dict[str, str]:
    """Files that cannot be segmented, and a word of the line that each deserves."""
    folder.mkdir()
    save_photo(folder / "whole.jpg", size=(200, 300))
    save_photo(folder / "whole.png")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:3000])
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:300])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("this is a text")
    assert cv2.imwrite(str(folder / "pixel.png"), np.zeros((1, 1, 3), np.uint8))
    assert cv2.imwrite(str(folder / "huge.png"), np.zeros((20_000, 20_000), np.uint8))
    (folder / "no.mp4").write_bytes(b"no video at all" * 99)
    (folder / "empty.mp4").touch()
    return {
        "cut.jpg": "cut off",
        "cut.png": "cut off",
        "empty.jpg": "empty",
        "text.png": "not a JPEG",
        "pixel.png": "too small",
        "huge.png": "20000x20000 pixels, over the limit",
        "no.mp4": "not a video",
        "empty.mp4": "empty",
    }


def test_bad_files_are_a_line_each_and_the_rest_is_done(infer: Callable[..., Outcome]) -> None:
    lines = bad_files(Path("in"))
    code, _, err = infer("in", "in/missing.png", "--out", "o", "--masks", "m")
    assert code == 1
    written = err.splitlines()
    assert len(written) == len(lines) + 1
    for name, words in {**lines, "missing.png": "no file"}.items():
        (line,) = [line for line in written if f"in/{name}" in line]
        assert line.startswith("failed: ")
        assert words in line
        assert line.endswith(".")
    assert tree(Path("o")) == ["whole-jpg.png", "whole-png.png"]
    assert tree(Path("m")) == ["whole-jpg.png", "whole-png.png"]


def test_odd_but_good_files_are_done(infer: Callable[..., Outcome]) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow writes the odd files")
    photo = save_photo(Path("in/plain.png"), size=(60, 90))
    picture = image_module.fromarray(photo[..., ::-1])
    exif = image_module.Exif()
    exif[274] = 6
    picture.save("in/turned.jpg", exif=exif)
    picture.convert("CMYK").save("in/cmyk.jpg")
    picture.convert("L").save("in/gray.webp")
    picture.convert("RGBA").save("in/rgba.png")
    cv2.imwrite("in/deep.tiff", photo.astype(np.uint16) * 257)
    code, _, err = infer("in", "--masks", "m")
    assert (code, err) == (0, "")
    shapes = {file.stem: cv2.imread(str(file), cv2.IMREAD_UNCHANGED).shape for file in Path("m").iterdir()}
    assert shapes == dict.fromkeys(("plain", "cmyk", "gray", "rgba", "deep"), (60, 90)) | {"turned": (90, 60)}
    masks = {name: cv2.imread(f"m/{name}.png", 0) for name in ("plain", "rgba", "deep")}
    np.testing.assert_array_equal(masks["rgba"], masks["plain"])
    np.testing.assert_array_equal(masks["deep"], masks["plain"])


def test_a_video_that_ends_mid_frame_gives_what_there_is(infer: Callable[..., Outcome]) -> None:
    cut(save_clip(Path("c.avi"), 30), 0.6)
    save_photo(Path("a.png"))
    code, _, err = infer("c.avi", "a.png", "--out", "o")
    assert code == 1
    assert tree(Path("o")) == ["a.png", "c.mp4"]
    frames = len(list(open_video(Path("o/c.mp4"))))
    assert 5 < frames < 20
    assert err == f"failed: cannot read all of c.avi: it is cut off after {frames} frames. " + (
        "Copy it again, or convert it.\n"
    )


def test_nothing_to_do_is_a_failure(infer: Callable[..., Outcome]) -> None:
    Path("empty").mkdir()
    code, out, err = infer("empty", "*.tiff")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("damage", "words", "code"),
    [
        (lambda path: (path / "fp32.onnx").write_bytes(b"x"), "SHA-256 differs", 1),
        (lambda path: (path / "fp32.onnx").unlink(), "is missing", 1),
        (lambda path: (path / "manifest.json").write_text("{"), "is not JSON", 2),
        (lambda path: edit_manifest(path, schema_version=7), "schema version 7", 2),
        (lambda path: edit_manifest(path, graph={"file": "../fp32.onnx"}), "graphs.0.file", 2),
        (lambda path: shutil.rmtree(path), "no bundle at", 2),
    ],
)
def test_a_damaged_bundle_is_one_line(
    infer: Callable[..., Outcome], toy_bundle: Bundle, damage: Callable[[Path], object], words: str, code: int
) -> None:
    save_photo(Path("a.png"))
    damage(toy_bundle.path)
    found, out, err = infer("a.png")
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert tree() == ["a.png"]


def edit_manifest(path: Path, graph: dict[str, Any] | None = None, **changes: Any) -> None:
    file = path / "manifest.json"
    manifest = {**json.loads(file.read_text()), **changes}
    manifest["graphs"][0].update(graph or {})
    file.write_text(json.dumps(manifest))


def test_an_input_is_never_overwritten(infer: Callable[..., Outcome]) -> None:
    save_photo(Path("a.png"))
    before = Path("a.png").read_bytes()
    for arguments in (("--out", "a.png"), ("--out", "."), ("--masks", ".")):
        code, _, err = infer("a.png", *arguments)
        assert (code, "would replace an input" in err) == (2, True)
    assert Path("a.png").read_bytes() == before


def test_results_can_be_kept(infer: Callable[..., Outcome]) -> None:
    save_photo(Path("a.png"))
    assert infer("a.png")[0] == 0
    code, _, err = infer("a.png", "--no-overwrite")
    assert (code, "a-overlay.png exists" in err) == (2, True)


def command(bundle: Bundle, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "espmedsam_edge", "infer", str(bundle.path), *(str(item) for item in arguments)]


def test_a_disk_that_fills_up_is_one_line(toy_bundle: Bundle, tmp_path: Path) -> None:
    """A limit on file sizes is the full disk that any machine can set up."""
    save_noise(tmp_path / "c.avi", 40)
    save_photo(tmp_path / "a.png")
    done = subprocess.run(
        command(toy_bundle, tmp_path / "c.avi", tmp_path / "a.png", "--out", tmp_path / "o"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "c.mp4" in done.stderr
    if has_pyav():
        assert tree(tmp_path / "o") == ["a.png", "c.partial.mp4"]
        assert len(list(open_video(tmp_path / "o" / "c.partial.mp4"))) >= 3


FULL = {"--out": "o.mp4", "--mask-video": "m.mkv", "--masks": "m", "--jsonl": "r.jsonl", "--csv": "r.csv"}


@pytest.mark.parametrize("output", FULL)
def test_a_full_disk_is_one_line_and_earlier_frames_can_be_read(
    toy_bundle: Bundle, tmp_path: Path, output: str
) -> None:
    """On a file system of a few kB, where this user may make one."""
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    save_noise(tmp_path / "c.avi", 200)
    size = "8k" if output in ("--jsonl", "--csv") else "200k"
    mount = f"mount -t tmpfs -o size={size} none {disk} || exit 77; "
    call = " ".join(command(toy_bundle, tmp_path / "c.avi", output, disk / FULL[output]))
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} {call}; code=$?; cp -r {disk} {saved}; exit $code"],
        capture_output=True,
        text=True,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("needs the right to mount a small file system (user namespaces)")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no space left to write" in done.stderr
    found = tree(saved)
    if output == "--masks":
        masks = [cv2.imread(str(saved / file)) for file in found]
        assert len(masks) >= 10
        assert all(mask is not None for mask in masks)
    elif output == "--jsonl":
        assert found == ["r.partial.jsonl"]
        lines = (saved / found[0]).read_text().split("\n")[:-1]  # what follows the last line's end did not fit
        assert [json.loads(line)["frame"] for line in lines] == list(range(len(lines)))
        assert len(lines) >= 10
    elif output == "--csv":
        assert found == ["r.partial.csv"]
        assert len((saved / found[0]).read_text().splitlines()) >= 50
    elif has_pyav():
        assert found == [{"--out": "o.partial.mp4", "--mask-video": "m.partial.mkv"}[output]]
        frames = len(list(open_video(saved / found[0])))
        assert frames >= 3


def save_noise(path: Path, frames: int) -> None:
    random = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (160, 120))
    for _ in range(frames):
        writer.write(random.integers(0, 256, (120, 160, 3), np.uint8))
    writer.release()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_writing_leaves_whole_files_only(
    toy_bundle: Bundle, tmp_path: Path, number: signal.Signals
) -> None:
    save_photo(tmp_path / "a.png")
    save_clip(tmp_path / "c.avi", 5_000)
    results = tmp_path / "o"
    arguments = [tmp_path / "a.png", tmp_path / "c.avi", "--out", results, "--jsonl", tmp_path / "o" / "r.jsonl"]
    process = subprocess.Popen(
        command(toy_bundle, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not list(results.glob("c.partial.*")) and time.monotonic() < deadline:  # until the video is being written
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err == "interrupted: finished files were kept, unfinished ones removed.\n"
    assert os.listdir(results) == ["a.png"]


def test_native_libraries_keep_quiet(toy_bundle: Bundle, tmp_path: Path) -> None:
    bad_files(tmp_path / "in")
    cut(save_clip(tmp_path / "in" / "c.avi", 30), 0.5)
    cut(save_clip(tmp_path / "in" / "d.mp4", 30), 0.5)
    for without_pyav in (False, True):
        script = (
            "import sys\n"
            f"if {without_pyav}:\n"
            "    from espmedsam_edge.runtime.video import reading, writing\n"
            "    reading.has_pyav = writing.has_pyav = lambda: False\n"
            "from espmedsam_edge.cli import main\n"
            "main(sys.argv[1:])\n"
        )
        arguments = command(toy_bundle, tmp_path / "in", "--out", tmp_path / f"o{without_pyav}")[3:]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 1
        assert [line for line in done.stderr.splitlines() if not line.startswith("failed: ")] == []
        assert "c.mp4" in tree(tmp_path / f"o{without_pyav}")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read memory")
def test_memory_stays_flat_over_a_long_video(toy_bundle: Bundle, tmp_path: Path) -> None:
    """± 5 % after the first 100 frames, here over 900 small ones."""
    save_clip(tmp_path / "c.avi", 1000, size=(240, 320))
    script = f"""
import sys
from pathlib import Path
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.runtime.run.jobs import Job
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.recording import overlay_video
from espmedsam_edge.runtime.sources.files import VideoFile
memory = []
def measure(progress):
    if progress.done % 100 == 0:
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
source = VideoFile(Path({str(tmp_path / "c.avi")!r}))
overlay = overlay_video(Path({str(tmp_path / "o.mp4")!r}), source, OverlayStyle((0, 255, 255)))
with Segmenter.load({str(toy_bundle.path)!r}, threads=1) as segmenter:
    report = run_pipeline(segmenter, [Job(source, [overlay])], on_progress=measure)
print(*memory)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    memory = [int(text) for text in done.stdout.split()]
    assert len(memory) == 10
    assert max(memory) <= 1.05 * memory[0]


def test_anonymous_names_are_all_that_is_written_and_said(infer: Callable[..., Outcome]) -> None:
    pytest.importorskip("highdicom", reason="needs highdicom (extra dicom)")
    folder = Path("DOE^JANE_1970")
    folder.mkdir()
    grey = np.zeros((40, 60), np.uint8)
    save_dicom(folder / "DOE^JANE 2.dcm", grey, NumberOfFrames=1)
    save_dicom(folder / "DOE^JANE 1.dcm", np.stack([grey] * 3), FrameTime=40)
    save_dicom(Path("DOE^ROE.dcm"), grey)
    (folder / "DOE^JANE 3.dcm").write_bytes(b"no DICOM")
    save_clip(Path("DOE.avi"))
    inputs = tree()
    (Path("DOE^EMPTY")).mkdir()
    options = [
        "--out",
        "o",
        "--masks",
        "m",
        "--mask-video",
        "v",
        "--jsonl",
        "r.jsonl",
        "--csv",
        "a.csv",
        "--plot",
        "p.png",
    ]
    sources = [folder, "DOE.avi", "DOE^EMPTY", "missing-DOE.png", "DOE^ROE.dcm"]
    code, out, err = infer(*sources, "--anonymous-names", *options)
    assert code == 1
    written = [file for file in tree() if file not in inputs]
    texts = Path("r.jsonl").read_text() + Path("a.csv").read_text()
    for text in (out, err, texts, *written):
        assert "DOE" not in text
    assert err.splitlines() == [
        "failed: no images, videos or DICOM files in source-3, and no DICOM files in its subfolders. "
        "Name a glob for more: 'source-3/**/*.png'",
        "failed: cannot read source-1-0003: it is not DICOM. Name an image file.",
        "failed: no file source-4. Check the name.",
    ]
    called = [json.loads(line)["source"] for line in Path("r.jsonl").read_text().splitlines()]
    assert called == ["source-1-0002", *["source-1-0001"] * 3, *["source-2"] * FRAMES, "source-5"]
    assert tree(Path("o")) == ["source-1-0001.mp4", "source-1-0002.png", "source-2.mp4", "source-5.png"]
    assert tree(Path("v")) == ["source-1-0001.mp4", "source-2.mp4"]

    code, out, err = infer(folder, "--anonymous-names", "--dicom-seg", "s", "--frames", 2)
    assert tree(Path("s")) == ["source-1-0002-seg.dcm"]
    assert "no DICOM-SEG of source-1-0001: not all of it" in err
    code, out, err = infer("DOE.avi", "--anonymous-names", "--dicom-seg", "s")
    assert (code, err) == (
        2,
        "error: source-1 is not DICOM; --dicom-seg is for DICOM inputs. Leave it out, or use --masks.\n",
    )


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["infer", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    options = (
        "modality precision backend out masks mask-video jsonl contours uids csv plot dicom-seg anonymous-names stream "
        "threshold opacity frames duration max-latency give-up decoder threads overwrite no-overwrite serve token "
        "allow-host"
    )
    named = set(re.findall(r"--[a-z-]+", text))
    assert {f"--{name}" for name in options.split()} <= named


def test_development_clips_and_images(infer: Callable[..., Outcome], data_root: Path) -> None:
    """Every clip and a picture of every modality, as they come from cameras and scanners."""
    clips = sorted(path for path in (data_root / "video").iterdir() if path.suffix in VIDEO_SUFFIXES)
    assert len(clips) == 7
    pictures = [sorted(folder.iterdir())[0] for folder in sorted(data_root.glob("*/*/images"))]
    code, _, err = infer(*clips, *pictures, "--out", "o")
    assert (code, err) == (0, "")
    assert len(tree(Path("o"))) == len(clips) + len(pictures)
    if has_pyav():
        assert [len(list(open_video(path))) for path in sorted(Path("o").glob("lung*.mp4"))] != []
