"""One folder with what people bring: what can be read is done, and each of the others is named with its reason."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from dicom_files import ramp, save_dicom
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
    assert len(failed) == len(reasons)
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
