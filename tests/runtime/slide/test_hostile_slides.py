"""Slides made to cost time and memory, or to read what is not theirs."""

from __future__ import annotations

import json
import os
import signal
import struct
import threading
import time
import traceback
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_slides import save_dicom_level, save_slide, tissue_picture

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.slide import apart, objects
from espmedsam_edge.runtime.slide.pyramid import Slide
from espmedsam_edge.runtime.slide.regions import Regions

tifffile = pytest.importorskip("tifffile", reason="needs tifffile (extra slide)")


def repeated_tile(
    path: Path, side: int, tile: int, data: bytes, compression: int, *, listed: int | None = None
) -> Path:
    """A grey TIFF of so many pixels a side, each tile of which is the same bytes."""
    count = (-(-side // tile)) ** 2 if listed is None else listed
    tags = {256: side, 257: side, 258: 8, 259: compression, 262: 1, 277: 1, 322: tile, 323: tile}
    entries = 8 + len(data)
    lists = entries + 2 + 12 * 10 + 4
    file = b"II*\0" + struct.pack("<I", entries) + data + struct.pack("<H", 10)
    for tag, value in tags.items():
        file += struct.pack("<HHII", tag, 4, 1, value)
    file += struct.pack("<HHII", 324, 4, count, lists) + struct.pack("<HHII", 325, 4, count, lists + 4 * count)
    path.write_bytes(
        file + bytes(4) + struct.pack(f"<{count}I", *[8] * count) + struct.pack(f"<{count}I", *[len(data)] * count)
    )
    return path


def large_tile(kind: str) -> tuple[int, bytes]:
    """TIFF's number of a compression, and a tile of 6000x6000 pixels in it."""
    pixels = np.zeros((6000, 6000), np.uint8)
    if kind in ("jpeg", "png"):
        return {"jpeg": 7, "png": 34933}[kind], cv2.imencode(f".{kind}", pixels)[1].tobytes()
    if kind == "deflate":
        return 8, zlib.compress(pixels.tobytes(), 9)
    codecs = pytest.importorskip("imagecodecs", reason="needs imagecodecs (extra slide)")
    if kind == "webp":
        return 50001, codecs.webp_encode(np.zeros((6000, 6000, 3), np.uint8))
    return 33005, codecs.jpeg2k_encode(pixels)


@pytest.mark.parametrize("kind", ["jpeg", "png", "deflate", "webp", "jpeg2000"])
def test_a_tile_that_unpacks_to_more_than_its_size_is_damaged(tmp_path: Path, kind: str) -> None:
    compression, data = large_tile(kind)
    with Slide(repeated_tile(tmp_path / "a.tif", 512, 256, data, compression)) as slide:
        begin = time.process_time()
        assert (slide.overview(512) == 255).all()
        assert len(slide.damaged) == 4
        assert time.process_time() - begin < 2


@pytest.mark.parametrize("side", [8192 * 40, 1 << 20])
def test_a_few_bytes_hold_no_slide_of_many_pixels(tmp_path: Path, side: int) -> None:
    file = repeated_tile(tmp_path / "a.tif", side, 8192, zlib.compress(bytes(8192 * 8192)), 8)
    with pytest.raises(UserError, match="so few bytes"):
        Slide(file)


def test_tiles_that_are_not_listed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer tiles than it has"):
        Slide(repeated_tile(tmp_path / "a.tif", 4096, 16, zlib.compress(bytes(256)), 8, listed=8))


def test_one_tile_for_all_of_a_slide_is_read(tmp_path: Path) -> None:
    pixels = tissue_picture((256, 256))[..., 0]
    with Slide(repeated_tile(tmp_path / "a.tif", 1024, 256, zlib.compress(pixels.tobytes()), 8)) as slide:
        assert np.array_equal(slide.read(0, 512, 256, 256, 256)[..., 0], pixels)


def test_tiles_that_take_too_long_end_the_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_TILE_SECONDS", 0.001)
    monkeypatch.setattr(apart, "_A_MEGAPIXEL", 0.0)
    monkeypatch.setattr(apart, "_PATIENCE", 0.005)
    noise = np.random.default_rng(0).bytes(1 << 20)
    with (
        Slide(repeated_tile(tmp_path / "a.tif", 8192, 1024, zlib.compress(noise), 8)) as slide,
        pytest.raises(UserError, match="far longer than their size accounts for"),
    ):
        slide.overview()


def test_time_that_tiles_took_is_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_FAIR_SECONDS", -1.0)  # as if each took a second more
    with (
        Slide(save_slide(tmp_path / "a.tif", tissue_picture())) as slide,
        pytest.raises(UserError, match="far longer than their size accounts for"),
    ):
        slide.read(0, 0, 0, 904, 600)
    assert not slide.damaged


@pytest.mark.parametrize("answer", [{"fault": "OSError"}, {"error": "cannot read a.tif: it takes too much memory."}])
def test_whatever_keeps_the_child_from_opening_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: dict[str, str]
) -> None:
    monkeypatch.setattr(apart.Child, "ask", lambda *arguments: (answer, b""))
    with pytest.raises(UserError, match=r"cannot read .*a\.tif") as refused:
        Slide(save_slide(tmp_path / "a.tif", tissue_picture()))
    assert "copy it again." in str(refused.value)


def test_a_decoder_that_died_costs_a_tile(tmp_path: Path) -> None:
    picture = tissue_picture()
    with Slide(save_slide(tmp_path / "a.tif", picture)) as slide:
        assert np.array_equal(slide.read(0, 0, 0, 128, 128)[..., ::-1], picture[:128, :128])
        storage = slide._storage
        assert isinstance(storage, apart.SlideProcess)
        assert storage._child._process is not None
        os.kill(storage._child._process.pid, signal.SIGKILL)
        storage._child._process.wait()
        slide.read(0, 128, 0, 128, 128)
        assert len(slide.damaged) == 1
        assert np.array_equal(slide.read(0, 256, 128, 128, 128)[..., ::-1], picture[128:256, 256:384])
        assert len(slide.damaged) == 1


def test_other_files_that_a_slide_names_are_not_read(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "secret.tif", np.full((256, 256), 77, np.uint8), tile=(128, 128), metadata=None)
    named = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="256" SizeY="256" '
        'SizeC="1" SizeZ="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
        '<TiffData IFD="0" PlaneCount="1"><UUID FileName="secret.tif">urn:uuid:2</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    own = np.full((256, 256), 200, np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", own, tile=(128, 128), description=named, metadata=None)
    with Slide(tmp_path / "a.ome.tif") as slide:
        assert (slide.overview(256) == 200).all()


@pytest.mark.parametrize("change", ["frames", "table", "larger"])
def test_a_dicom_slide_that_cannot_be_is_refused_or_damaged(tmp_path: Path, change: str) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
    path = tmp_path / "a.dcm"
    save_dicom_level(path, tissue_picture((256, 256)))
    dataset = pydicom.dcmread(path)
    if change == "frames":
        dataset.NumberOfFrames = 3
    elif change == "table":  # the second frame's place before the first's
        dataset.PixelData = dataset.PixelData[:12] + struct.pack("<I", 1 << 30) + dataset.PixelData[16:]
    else:
        data = cv2.imencode(".jpg", np.zeros((4000, 4000, 3), np.uint8))[1].tobytes()
        dataset.PixelData = pydicom.encaps.encapsulate([data + b"\0" * (len(data) % 2)] * 4)
    dataset.save_as(path)
    if change == "larger":
        with Slide(path) as slide:
            assert (slide.overview(256) == 255).all()
            assert len(slide.damaged) == 4
        return
    with pytest.raises(UserError, match={"frames": "NumberOfFrames does not fit", "table": "no table tells"}[change]):
        Slide(path)


@pytest.mark.parametrize("noise", ["specks", "holes", "both"])
def test_of_noise_the_smallest_outlines_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], noise: str
) -> None:
    monkeypatch.setattr(objects, "_MOST_PARTS", 6)
    monkeypatch.setattr(objects, "_MOST_HOLES", 6)
    clean = np.zeros((256, 256), np.uint8)
    clean[20:110, 30:200] = 255  # across regions
    clean[40:60, 50:90] = 0
    clean[150:180, 150:180] = 255
    noisy = clean.copy()
    if noise != "holes":
        noisy[1::6, 1::6] = 255
    if noise != "specks":
        noisy[3::6, 3::6] = 0
    found = {}
    for name, mask in (("clean", clean), ("noisy", noisy)):
        regions = Regions(tmp_path / name, mask.shape, 128)
        (tmp_path / name).mkdir()
        for row in range(2):
            for column in range(2):
                regions.write(row, column, regions.place(row, column).of(mask))
        options = {"name": "x", "colour": (1, 2, 3), "scale": 1.0, "mpp": None}
        count = objects.write_objects(tmp_path / f"{name}.geojson", regions, **options)
        features = json.loads((tmp_path / f"{name}.geojson").read_text())["features"]
        assert count == len(features)
        found[name] = features
        assert any("looks like noise" in line for line in said) == (name == "noisy")
    shapes = [[len(feature["geometry"]["coordinates"]) for feature in found[name]] for name in ("clean", "noisy")]
    assert sorted(shapes[0]) == sorted(shapes[1]) == [1, 2]  # rings: an outline, and the large hole
    boxes = [
        sorted(np.array(feature["geometry"]["coordinates"][0]).min(axis=0).tolist() for feature in found[name])
        for name in ("clean", "noisy")
    ]
    assert np.abs(np.array(boxes[0]) - boxes[1]).max() <= 1  # a speck may touch it


def kept(folder: Path) -> tuple[Regions, dict[str, object]]:
    plan: dict[str, object] = {"slide": ["a.tif", 1, 1], "graph": "0"}
    regions = Regions(folder, (256, 256), 128)
    regions.open(plan, anew=False)
    regions.write(0, 0, np.full((128, 128), 255, np.uint8))
    return Regions(folder, (256, 256), 128), plan


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs the superuser, to give files away")
@pytest.mark.parametrize("whose", ["folder", "plan", "region"])
def test_what_another_user_kept_is_not_gone_on_with(tmp_path: Path, whose: str) -> None:
    folder = tmp_path / "a.unfinished"
    regions, plan = kept(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    names = {"folder": ".", "plan": "plan.json", "region": "00000-00000.png"}
    os.chown(folder / names[whose], 12345, 12345)

    def go_on() -> None:
        regions.open(plan, anew=False)
        regions.read(0, 0)

    with pytest.raises(UserError, match="another user"):
        go_on()
    assert (folder / "00000-00000.png").exists()


@pytest.mark.parametrize("there", ["pipe", "device", "folder", "large"])
def test_what_is_no_plan_is_refused_without_waiting(tmp_path: Path, there: str) -> None:
    folder = tmp_path / "a.unfinished"
    regions, plan = kept(folder)
    file = folder / "plan.json"
    file.unlink()
    if there == "pipe":
        os.mkfifo(file)
    elif there == "folder":
        file.mkdir()
    elif there == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
    said: list[UserError] = []

    def go_on() -> None:
        with pytest.raises(UserError, match="another slide") as told:
            regions.open(plan, anew=False)
        said.append(told.value)

    going_on = threading.Thread(target=go_on, daemon=True)
    going_on.start()
    going_on.join(10)
    assert said
    assert (folder / "00000-00000.png").exists()


def test_what_a_kill_left_is_gone_on_with_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "a.unfinished"
    folder.mkdir()
    (folder / ".plan.0123456789ab.json").write_text('{"slide": ')
    regions = Regions(folder, (256, 256), 128)
    regions.open({"slide": ["a.tif", 1, 1], "graph": "0"}, anew=False)
    regions.write(0, 0, np.full((128, 128), 255, np.uint8))
    (folder / ".00000-00001.0123456789ab.png").write_bytes(b"half")
    regions.remove()
    assert not folder.exists()
    folder.mkdir()
    (folder / ".plan.mine.json").write_text("a word of mine")
    with pytest.raises(UserError, match="another slide"):
        regions.open({"slide": ["a.tif", 1, 1], "graph": "0"}, anew=True)
    assert (folder / ".plan.mine.json").exists()


@pytest.mark.parametrize("change", ["size", "format", "depth", "cut", "link"])
def test_a_kept_region_that_is_another_picture_is_one_line(tmp_path: Path, change: str) -> None:
    regions, plan = kept(tmp_path / "a.unfinished")
    file = tmp_path / "a.unfinished" / "00000-00000.png"
    pixels = np.full((128, 128), 255, np.uint8)
    data = cv2.imencode(".jpg" if change == "format" else ".png", pixels)[1].tobytes()
    if change == "size":
        data = cv2.imencode(".png", np.zeros((8000, 8000), np.uint8))[1].tobytes()
    elif change == "depth":
        data = cv2.imencode(".png", pixels.astype(np.uint16))[1].tobytes()
    if change == "link":
        file.unlink()
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(data[: len(data) // 2] if change == "cut" else data)
    regions.open(plan, anew=False)
    if change == "link":
        assert regions.read(0, 0) is None  # no file, so not finished
        assert not regions.is_finished(0, 0)
        return
    with pytest.raises(UserError, match="is damaged"):
        regions.read(0, 0)


@pytest.mark.parametrize("change", ["sparse", "many", "full"])
def test_tiles_that_take_no_bytes_take_no_time(tmp_path: Path, change: str) -> None:
    """A few kilobytes of DICOM, with tiles of one pixel, kept the reader busy for minutes."""
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
    path = tmp_path / "a.dcm"
    save_dicom_level(path, tissue_picture((256, 256)), sparse=change != "full", jpeg=False)
    dataset = pydicom.dcmread(path)
    dataset.Rows = dataset.Columns = 1
    side = {"sparse": 3000, "many": 16_000, "full": 3000}[change]
    dataset.TotalPixelMatrixRows = dataset.TotalPixelMatrixColumns = side
    if change == "full":
        dataset.NumberOfFrames = side * side
    dataset.save_as(path)
    begin = time.process_time()
    if change == "sparse":
        with Slide(path) as slide:
            assert slide.overview(512).shape[1] >= 500
            assert (slide.read(0, 1000, 1000, 512, 512) == 255).all()
    else:
        with pytest.raises(UserError, match={"many": "too small, and too many", "full": "is cut off"}[change]):
            Slide(path)
    assert time.process_time() - begin < 5


_MODULES = ("whole-slide-microscopy-image", "whole-slide-microscopy-series", "specimen", "image-pixel", "optical-path",
            "multi-frame-functional-groups", "multi-frame-dimension", "acquisition-context", "slide-label")  # fmt: skip


def test_no_value_in_the_header_of_a_slide_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("highdicom", reason="has the standard's modules (extra dicom)")
    planted = pytest.importorskip("planted_dicom")
    caplog.set_level(0)
    save_dicom_level(tmp_path / "whole.dcm", tissue_picture((128, 128)), jpeg=False)
    whole, path, faults = (tmp_path / "whole.dcm").read_bytes(), tmp_path / "slide" / "a.dcm", ""
    path.parent.mkdir()
    keywords = {*planted.attributes((*_MODULES, *planted.COPIED, *planted.OTHERS)), "SharedFunctionalGroupsSequence"}
    assert len(keywords) > 150
    for number, keyword in enumerate(sorted(keywords - {"PixelData", "SOPClassUID"})):
        path.write_bytes(whole)
        planted.plant(path, [keyword], planted.FORMS[number % 4])
        try:
            opened = apart.open_slide(path)
            opened.levels[0].part(0)
        except Exception as error:  # noqa: BLE001 (of a tile the child tells the kind of error alone)
            faults += "".join(traceback.format_exception(error)) if isinstance(error, UserError) else ""
    told = faults + caplog.text + "".join(capfd.readouterr())
    assert not any(mark in told for mark in planted.MARKS)
    assert "malformed" in faults or "no DICOM whole-slide" in faults
    path.write_bytes(whole)
    planted.plant(
        path, sorted(keywords & {"PatientName", "PatientBirthDate", "StudyDate", "SpecimenIdentifier"}), "own"
    )
    with Slide(path) as slide:  # nothing of them is looked at
        slide.overview(128)
        assert not slide.damaged
