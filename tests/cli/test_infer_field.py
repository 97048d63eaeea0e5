"""One folder with what people bring: what can be read is done, and each of the others is named with its reason."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from dicom_files import ramp, save_compressed, save_dicom
from heic_files import phone_heic
from video_files import save_clip

Image = pytest.importorskip("PIL.Image")
tifffile = pytest.importorskip("tifffile")
pydicom = pytest.importorskip("pydicom")

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def field(folder: Path) -> dict[str, str]:
    """Fill a folder; the files that nobody can read, each with what its line must say."""
    folder.mkdir()
    picture, buffer = Image.fromarray(PICTURE), io.BytesIO()
    picture.save(folder / "photo.jpg", exif=_turned(6))
    picture.save(folder / "stack.tif", save_all=True, append_images=[picture.rotate(180)])
    picture.save(folder / "loop.gif", save_all=True, append_images=[picture.rotate(180)], duration=40)
    tifffile.imwrite(folder / "tiles.tif", PICTURE, tile=(32, 32), photometric="rgb")
    cv2.imwrite(str(folder / "deep.png"), PICTURE.astype(np.uint16) * 16)
    (folder / "scan [1] (copy).png").write_bytes(cv2.imencode(".png", PICTURE)[1].tobytes())
    save_clip(folder / "clip.mp4")
    trailing = save_clip(folder / "trailing.mp4")
    trailing.write_bytes(trailing.read_bytes() + bytes(512))
    save_dicom(folder / "slice.dcm", ramp())
    report = pydicom.dcmread(save_dicom(folder / "report.dcm", ramp()))
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = pydicom.uid.ComprehensiveSRStorage
    report.save_as(folder / "report.dcm")

    tifffile.imwrite(folder / "float.tif", PICTURE[..., 0].astype(np.float32))
    picture.save(buffer, "JPEG")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[:600])
    (folder / "text.png").write_text("not a picture")
    (folder / "short.dcm").write_bytes((folder / "slice.dcm").read_bytes()[:-500])
    (folder / "empty.mp4").write_bytes(b"")
    return {
        "float.tif": "32 bits", "cut.jpg": "cut off", "text.png": "it is not a JPEG", "short.dcm": "cut off or damaged",
        "empty.mp4": "",
    }  # fmt: skip


def _turned(orientation: int) -> object:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def test_a_folder_of_everything_is_done_as_far_as_it_goes(infer: Callable[..., Any], tmp_path: Path) -> None:
    reasons = field(tmp_path / "in")
    out = tmp_path / "out"
    code, _, error = infer(
        tmp_path / "in", "--out", out / "overlays", "--masks", out / "masks",
        "--jsonl", out / "frames.jsonl", "--csv", out / "areas.csv",
    )  # fmt: skip
    assert code == 1
    failed = [line for line in error.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(reasons), failed
    for name, reason in reasons.items():
        (line,) = (line for line in failed if name in line)
        assert reason in line
    assert "no pictures are passed over: 1 Comprehensive SR." in error
    lines = [json.loads(line) for line in (out / "frames.jsonl").read_text().splitlines()]
    per_file = dict.fromkeys((path.name for path in (tmp_path / "in").iterdir()), 0)
    for line in lines:
        per_file[Path(line["source"]).name] += 1
    expected = dict.fromkeys(per_file, 1) | dict.fromkeys([*reasons, "report.dcm"], 0)
    assert per_file == expected | {"clip.mp4": 12, "trailing.mp4": 12, "loop.gif": 2, "stack.tif": 2}
    assert len(list(csv.reader((out / "areas.csv").open()))) == 1 + len(lines)
    photo = next(line for line in lines if line["source"].endswith("photo.jpg"))
    assert (photo["height"], photo["width"]) == (56, 40)
    assert {"photo.png", "tiles.png", "slice.png"} <= {path.name for path in (out / "masks").iterdir()}


def test_under_anonymous_names_no_line_has_a_files_name(infer: Callable[..., Any], tmp_path: Path) -> None:
    """Whatever it tells: of pages, scales, masks left out, frames that no header names, failures."""
    field(tmp_path / "DOE^JANE")
    folder = tmp_path / "DOE^JANE"
    for number in (1, 2):
        cv2.imwrite(str(folder / f"DOE {number}.png"), PICTURE.astype(np.uint16) * 100)
    cv2.imwrite(str(folder / "photo_mask.png"), PICTURE)
    cv2.imwritemulti(str(folder / "DOE stack.tif"), [PICTURE, PICTURE[:24, :24]])
    frames = pydicom.dcmread(save_dicom(folder / "doe.dcm", np.stack([ramp(), ramp()])))
    frames.NumberOfFrames = 1
    frames.save_as(folder / "doe.dcm")
    code, _, error = infer(folder, "--anonymous-names", "--jsonl", tmp_path / "l.jsonl")
    assert code == 1
    names = [path.name for path in folder.iterdir()]
    for line in error.splitlines():
        assert not [name for name in (*names, "DOE") if name in line], line
    for told in (
        r"source-1-00\d\d, page 2, is 24x24 pixels, the first \d+x\d+: it is left out\.",
        r"in source-1 are shown on one scale",
        r"masks beside their pictures: 1\.",
        r"source-1-00\d\d holds 2 frames, its header names 1; the others are left out\.",
    ):
        assert re.search(told, error), error


def more(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Add what recorders, phones, scanners and archives leave.

    Returns:
        The frames of each file that is read, and of the others what their line must say.
    """
    av, codecs = pytest.importorskip("av", reason="needs PyAV"), pytest.importorskip("imagecodecs")
    pytest.importorskip("pillow_heif")
    picture = Image.fromarray(PICTURE)
    square = np.repeat(np.repeat(np.random.default_rng(1).integers(0, 256, (4, 4, 3), np.uint8), 32, 0), 32, 1)
    (folder / "IMG_0001.HEIC").write_bytes(phone_heic(square, [("irot", 1)]))
    (folder / "ten.avif").write_bytes(codecs.avif_encode(PICTURE.astype(np.uint16) * 4, level=100, bitspersample=10))
    picture.save(folder / "moving.webp", save_all=True, append_images=[picture.rotate(180)], lossless=True)
    picture.save(folder / "moving.png", save_all=True, append_images=[picture.rotate(180)])
    picture.convert("CMYK").save(folder / "print.jpg")
    os.rename(_png(folder / "latin.png"), os.fsencode(folder) + b"/Aufnahme_M\xfcller.png")
    for name in ("two\nlines.png", "-dash.png", "100%d.png", "e\u0301-nfd.png", "a?b*c.png", "x" * 240 + ".png"):
        _png(folder / name)
    counts = dict.fromkeys((*(os.fsdecode(name) for name in os.listdir(os.fsencode(folder))),), 1)
    counts |= {"moving.webp": 2, "moving.png": 2}
    noise = np.random.default_rng(2).integers(0, 256, (5, 48, 64, 3), np.uint8)
    for name, codec, form, first in (
        ("late.ts", "mpeg2video", "mpegts", 15_000), ("00001.MTS", "mpeg2video", "mpegts", 0),
        ("VTS_01_1.VOB", "mpeg2video", "vob", 0), ("clip.mxf", "mpeg2video", None, 0), ("clip.asf", "mpeg4", None, 0),
        ("clip.y4m", "wrapped_avframe", "yuv4mpegpipe", 0), ("clip.mjpeg", "mjpeg", None, 0),
        ("b.avi", "mpeg4", None, 0),
    ):  # fmt: skip
        with av.open(str(folder / name), "w", format=form) as container:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width = 48, 64
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for number in range(5):
                frame = av.VideoFrame.from_ndarray(noise[number], format="bgr24").reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = first + number, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        counts[name] = 5
    wide = ramp(high=4000, dtype=np.uint16)
    save_dicom(folder / "padded.dcm", np.pad(wide, 9, constant_values=65535), PixelPaddingValue=65535)
    save_dicom(folder / "cine.dcm", np.stack([ramp(), ramp() // 2, ramp()]))
    signed = ramp(low=-900, high=900, dtype=np.int16)
    lossless = bytes(codecs.jpegls_encode(signed.view(np.uint16)))
    save_compressed(folder / "signed.dcm", [lossless], pydicom.uid.JPEGLSLossless, signed)
    counts |= {"padded.dcm": 1, "cine.dcm": 3, "signed.dcm": 1}

    (folder / "old.jp2").write_bytes(codecs.jpeg2k_encode(PICTURE))
    picture.save(folder / "plain.ppm")
    tifffile.imwrite(folder / "lab.tif", PICTURE, photometric="cielab")
    deflated = pydicom.dcmread(folder / "padded.dcm")
    deflated.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    deflated.save_as(folder / "deflated.dcm")
    cut = (folder / "clip.mxf").read_bytes()
    (folder / "cut.mxf").write_bytes(cut[: len(cut) * 2 // 3])
    (folder / "tail.heic").write_bytes((folder / "IMG_0001.HEIC").read_bytes()[:-99])
    return counts, {
        "lab.tif": "CIELAB", "deflated.dcm": "the whole file is compressed", "tail.heic": "cut off",
        "cut.mxf": "it is cut off", "old.jp2": "it is JPEG 2000, which is not read",
        "plain.ppm": "it is PNM, which is not read",
    }  # fmt: skip


def _png(path: Path) -> Path:
    path.write_bytes(cv2.imencode(".png", PICTURE)[1].tobytes())
    return path


def test_all_kinds_in_one_folder_each_done_or_named_with_its_reason(infer: Callable[..., Any], tmp_path: Path) -> None:
    """As before, of every container and syntax that can be made here, and of kinds that are not read."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    counts, reasons = more(folder)
    code, _, error = infer(
        folder, "--masks", out / "masks", "--jsonl", out / "frames.jsonl", "--csv", out / "areas.csv",
    )  # fmt: skip
    assert code == 1
    failed = [line for line in error.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(reasons), failed
    for name, reason in reasons.items():
        (line,) = (line for line in failed if name in line)
        assert reason in line
    done: dict[str, int] = {}
    for line in (out / "frames.jsonl").read_text().splitlines():
        name = json.loads(line)["source"].rpartition("/")[2]
        done[name] = done.get(name, 0) + 1
    assert 0 < done.pop("cut.mxf") < 5  # what there is of it
    assert sorted(done.values()) == sorted(counts.values())
    assert {name: done[name] for name in counts if name.isprintable()} == {
        name: count for name, count in counts.items() if name.isprintable()
    }
    rows = len(list(csv.reader((out / "areas.csv").open(errors="surrogateescape", newline=""))))
    masks = list((out / "masks").rglob("*.png"))
    assert rows - 1 == len(masks) == len((out / "frames.jsonl").read_text().splitlines())


@pytest.mark.parametrize("options", [[], ["--crop", "auto"], ["--fps", "2"]])
@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_a_start_behind_the_end_is_no_damage(
    infer: Callable[..., Any], tmp_path: Path, suffix: str, options: list[str]
) -> None:
    save_clip(tmp_path / f"c{suffix}", 10)
    code, _, error = infer(tmp_path / f"c{suffix}", "--start", "100", "--masks", tmp_path / "masks", *options)
    assert code == 1
    assert f"c{suffix} ends before second 100: nothing of it is taken. Give an earlier --start." in error
    assert "Copy it again" not in error
