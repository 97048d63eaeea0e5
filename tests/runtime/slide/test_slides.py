"""Whole slides against the toy graph's formula, which knows no tiles, no regions and no tissue."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_slides import SIZE, save_dicom_level, save_ndpi, save_slide, tissue_picture

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.imaging.geometry import mask_from_logits
from espmedsam_edge.marks import OBJECTS, SLIDE_MASK
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.slide.apart import open_slide
from espmedsam_edge.runtime.slide.mask_file import write_mask
from espmedsam_edge.runtime.slide.objects import write_objects
from espmedsam_edge.runtime.slide.pyramid import Slide
from espmedsam_edge.runtime.slide.regions import Regions
from espmedsam_edge.runtime.slide.segmenting import SlideOptions, SlideReport, SlideResults, segment_slide
from espmedsam_edge.runtime.slide.tissue import Tissue, tissue_mask

tifffile = pytest.importorskip("tifffile", reason="needs tifffile (extra slide)")

OPTIONS = SlideOptions(tile=64, region=256, everything=True)


def expected_mask(bundle: Bundle, rgb: np.ndarray) -> np.ndarray:
    normalization = bundle.manifest.input.normalization
    values = ((rgb / 255 - normalization.mean) / normalization.std) @ np.array([1.0, -0.5, 0.25])
    logits = values.reshape(rgb.shape[0] // 4, 4, rgb.shape[1] // 4, 4).mean(axis=(1, 3))
    return mask_from_logits(logits.astype(np.float32), rgb.shape[:2], 0.5)


def run(
    bundle: Bundle, slide: Path, out: Path, options: SlideOptions = OPTIONS
) -> tuple[SlideResults, SlideReport, np.ndarray]:
    results = SlideResults.of(slide, out)
    with Segmenter.load(bundle, tile="off", threads=1) as segmenter:
        report = segment_slide(slide, segmenter, results, options)
    return results, report, tifffile.imread(results.mask, level=0)


def test_the_mask_is_the_networks_however_the_slide_is_cut(toy_bundle: Bundle, tmp_path: Path) -> None:
    picture = tissue_picture()
    slide = save_slide(tmp_path / "a.tif", picture, resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    results, report, mask = run(toy_bundle, slide, tmp_path)
    expected = expected_mask(toy_bundle, picture)
    assert 0.05 < expected.mean() / 255 < 0.95
    assert (mask == expected).mean() > 0.9995
    assert report.failure is None
    with tifffile.TiffFile(results.mask) as file:
        assert file.is_ome
        assert 'PhysicalSizeX="0.5"' in file.ome_metadata
        levels = file.series[0].levels
        assert [level.shape for level in levels] == [SIZE]
        assert levels[0].keyframe.is_tiled
    assert cv2.imread(str(results.overview)).shape == (*SIZE, 3)
    assert not results.unfinished.exists()


def filled(ring: np.ndarray, *, outline: bool = True) -> np.ndarray:
    """The pixels whose centres are inside a ring, or on it."""
    large = np.zeros((2 * SIZE[0] + 1, 2 * SIZE[1] + 1), np.uint8)
    corners = [np.round(2 * ring[:-1]).astype(np.int32)]
    cv2.fillPoly(large, corners, 255)
    if not outline:
        cv2.polylines(large, corners, True, 0)
    return large[1::2, 1::2].copy()


def test_outlines_are_the_masks_objects_each_whole(toy_bundle: Bundle, tmp_path: Path) -> None:
    slide = save_slide(tmp_path / "a.tif", tissue_picture(seed=1), resolution=(20_000, 20_000), resolutionunit=3)
    results, report, mask = run(toy_bundle, slide, tmp_path)
    features = json.loads(results.objects.read_text())["features"]
    parts = cv2.connectedComponents(mask, connectivity=8)[0] - 1
    assert len(features) == report.objects == parts > 5
    drawn = np.zeros(SIZE, np.uint8)
    for feature in features:
        rings = [np.array(ring) for ring in feature["geometry"]["coordinates"]]
        assert all(np.array_equal(ring[0], ring[-1]) for ring in rings)
        one = filled(rings[0])
        for ring in rings[1:]:
            one[filled(ring, outline=False) > 0] = 0
        area = feature["properties"]["measurements"]["Area µm^2"]
        assert area == pytest.approx(cv2.countNonZero(one) * 0.25, abs=0.3)
        drawn |= one
    assert (drawn == mask).mean() > 0.9999
    assert features[0]["properties"]["classification"]["name"] == "fundus"


def test_a_large_mask_has_levels_of_half_the_size_each(toy_bundle: Bundle, tmp_path: Path) -> None:
    picture = np.kron(tissue_picture((100, 400), 2), np.ones((12, 24, 1), np.uint8))  # 1200 x 9600
    slide = save_slide(tmp_path / "a.tif", picture, levels=5)
    results, _, mask = run(toy_bundle, slide, tmp_path, SlideOptions(tile=64, level=1, region=1024, everything=True))
    with tifffile.TiffFile(results.mask) as file:
        levels = [level.asarray() for level in file.series[0].levels]
    assert [level.shape for level in levels] == [(600, 4800), (300, 2400), (150, 1200), (75, 600)]
    assert all(np.array_equal(level, mask[:: 2**n, :: 2**n]) for n, level in enumerate(levels))
    assert OBJECTS.wrote(results.objects)
    features = json.loads(results.objects.read_text())["features"]
    corners = [corner for f in features for ring in f["geometry"]["coordinates"] for corner in ring]
    assert np.max(corners) > 9000  # in the largest level's pixels


def test_a_mask_of_any_size_is_known_as_ours(tmp_path: Path) -> None:
    regions = Regions(tmp_path, (1000, 1000), 1024)
    regions.write(0, 0, np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (1000, 1000)))
    write_mask(tmp_path / "a.ome.tif", regions, None)
    assert (tmp_path / "a.ome.tif").stat().st_size > 1 << 16
    assert SLIDE_MASK.wrote(tmp_path / "a.ome.tif")


_KILLED = """
import sys, time
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.slide.segmenting import *
with Segmenter.load(sys.argv[1], tile="off", threads=1) as segmenter:
    slide = Path(sys.argv[2])
    segment_slide(slide, segmenter, SlideResults.of(slide, Path(sys.argv[3])),
                  SlideOptions(tile=64, region=256, everything=True), lambda done, of: time.sleep(0.005))
"""


def test_a_killed_run_goes_on_where_it_was(toy_bundle: Bundle, tmp_path: Path) -> None:
    slide = save_slide(tmp_path / "a.tif", tissue_picture(seed=3))
    results = SlideResults.of(slide, tmp_path / "killed")
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(toy_bundle.path), str(slide), str(tmp_path / "killed")]
    )
    limit = time.monotonic() + 60
    while len(finished := list(results.unfinished.glob("*-*.png"))) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= len(finished) < 12
    times = {file: file.stat().st_mtime_ns for file in finished}
    assert not results.mask.exists()

    kept: dict[Path, int] = {}
    with Segmenter.load(toy_bundle, tile="off", threads=1) as segmenter:

        def look(done: int, of: int) -> None:
            kept.update({file: file.stat().st_mtime_ns for file in finished})

        segment_slide(slide, segmenter, results, OPTIONS, look)
    assert kept == times  # not written again
    _, _, whole = run(toy_bundle, slide, tmp_path / "whole")
    assert np.array_equal(tifffile.imread(results.mask, level=0), whole)
    assert results.objects.read_bytes() == (tmp_path / "whole" / "a.geojson").read_bytes()


def test_what_was_begun_otherwise_is_not_mixed_up(toy_bundle: Bundle, tmp_path: Path) -> None:
    slide = save_slide(tmp_path / "a.tif", tissue_picture())
    results = SlideResults.of(slide, tmp_path)

    def stop(done: int, of: int) -> None:
        if done > 60:
            raise KeyboardInterrupt

    with Segmenter.load(toy_bundle, tile="off", threads=1) as segmenter:
        with pytest.raises(KeyboardInterrupt):
            segment_slide(slide, segmenter, results, OPTIONS, stop)
        other = SlideOptions(tile=128, region=256, everything=True)
        with pytest.raises(UserError, match="begun with another slide, network or options"):
            segment_slide(slide, segmenter, results, other)
        anew = SlideOptions(tile=128, region=256, everything=True, overwrite=True)
        segment_slide(slide, segmenter, results, anew)
    assert results.mask.is_file()


def test_a_full_disk_is_one_line_and_what_is_finished_stays(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = save_slide(tmp_path / "a.tif", tissue_picture())
    results, written = SlideResults.of(slide, tmp_path), []

    write_bytes = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with Segmenter.load(toy_bundle, tile="off", threads=1) as segmenter:
        with pytest.raises(UserError, match="no space left") as raised:
            segment_slide(slide, segmenter, results, OPTIONS)
        assert "the same command goes on" in raised.value.hint
        assert len(list(results.unfinished.glob("*-*.png"))) == 3
        monkeypatch.undo()
        segment_slide(slide, segmenter, results, OPTIONS)
    assert results.mask.is_file()


def test_empty_glass_costs_nothing(toy_bundle: Bundle, tmp_path: Path) -> None:
    picture = np.full((*SIZE, 3), 240, np.uint8)  # white is foreground to the toy graph
    picture += np.random.default_rng(0).integers(0, 6, picture.shape, np.uint8)
    picture[300:380, 500:620] = (160, 40, 120)
    slide = save_slide(tmp_path / "a.tif", picture)
    _, report, mask = run(toy_bundle, slide, tmp_path, SlideOptions(tile=64, region=256))
    assert 4 <= report.tiles < report.of / 5
    assert not mask[:, :380].any()
    assert not mask[:200].any()
    expected = expected_mask(toy_bundle, picture)
    assert np.array_equal(mask[300:380, 500:620], expected[300:380, 500:620])
    picture[:] = 240
    _, report, mask = run(toy_bundle, save_slide(tmp_path / "b.tif", picture), tmp_path, SlideOptions(tile=64))
    assert (report.tiles, report.objects, mask.max()) == (0, 0, 0)


@pytest.mark.parametrize("glass", [245, 5])
def test_tissue_is_what_differs_from_glass(glass: int) -> None:
    random = np.random.default_rng(4)
    picture = np.clip(random.normal(glass, 2, (200, 300, 3)), 0, 255).astype(np.uint8)
    picture[50:90, 100:160] = np.clip(random.normal((150, 90, 160), 20, (40, 60, 3)), 0, 255)
    mask = tissue_mask(picture)
    assert mask[50:90, 100:160].mean() > 0.97
    outside = mask.copy()
    outside[44:96, 94:166] = False
    assert outside.mean() < 0.01
    tissue = Tissue(picture, (2000, 3000))
    assert tissue.among(Crop(1000, 500, 100, 100))
    assert not tissue.among(Crop(2000, 1500, 100, 100))


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "lzw"])
def test_any_part_of_any_level_is_read(tmp_path: Path, compression: str) -> None:
    pytest.importorskip("imagecodecs", reason="needs imagecodecs (extra slide)")
    picture = cv2.GaussianBlur(tissue_picture(seed=5), (0, 0), 3)
    with Slide(save_slide(tmp_path / "a.tif", picture, compression=compression)) as slide:
        assert [(level.width, level.height) for level in slide.levels] == [(904, 600), (452, 300), (226, 150)]
        part = slide.read(0, 850, -20, 100, 150)
        assert np.abs(part[20:, :54, ::-1].astype(int) - picture[:130, 850:]).mean() < 4
        assert part[:20].min() == part[:, 54:].min() == 255
        assert np.abs(slide.read(1, 100, 60, 90, 40)[..., ::-1].astype(int) - picture[120:200:2, 200:380:2]).mean() < 4
        assert slide.overview(200).shape == (150, 226, 3)
        whole = slide.read(0, 40, 30, 700, 500)
        for place in (Crop(100, 90, 30, 200), Crop(735, 525, 5, 5), Crop(-9, -9, 60, 60)):
            parts = slide.read(0, 40, 30, 700, 500, [place, place])
            top, left = max(0, place.y - 30), max(0, place.x - 40)
            at = np.s_[top : place.y + place.height - 30, left : place.x + place.width - 40]
            assert (parts[at] == whole[at]).all()
            assert (parts == 255).all(axis=-1).mean() > 0.5
        assert (slide.read(0, 40, 30, 700, 500, []) == 255).all()


def test_an_aperio_slide_says_its_resolution_and_its_levels_are_pages(tmp_path: Path) -> None:
    picture = tissue_picture()
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        common = {"photometric": "rgb", "metadata": None}
        described = "Aperio Image Library v12\r\n904x600 [0,0 904x600] (128x128)|AppMag = 20|MPP = 0.4990"
        file.write(picture, tile=(128, 128), description=described, **common)
        file.write(np.ascontiguousarray(picture[::8, ::8]), description="Aperio thumbnail", **common)
        file.write(np.ascontiguousarray(picture[::4, ::4]), tile=(128, 128), description="Aperio level", **common)
    with Slide(tmp_path / "a.svs") as slide:
        assert slide.mpp == pytest.approx(0.499)
        assert [(level.width, level.downsample) for level in slide.levels] == [(904, 1), (226, 4)]


def test_an_ndpi_slides_restart_intervals_are_its_tiles(toy_bundle: Bundle, tmp_path: Path) -> None:
    levels = save_ndpi(tmp_path / "a.ndpi", tissue_picture((768, 1024)))
    with Slide(tmp_path / "a.ndpi") as slide:
        assert [(level.width, level.height) for level in slide.levels] == [(1024, 768), (512, 384), (256, 192)]
        assert slide.mpp == pytest.approx(0.5)
        for number, expected in enumerate(levels):
            height, width = expected.shape[:2]
            assert np.array_equal(slide.read(number, 0, 0, width, height)[..., ::-1], expected)
            assert np.array_equal(slide.read(number, 33, 17, 90, 70)[..., ::-1], expected[17:87, 33:123])
        assert not slide.damaged
    _, report, mask = run(toy_bundle, tmp_path / "a.ndpi", tmp_path / "out")
    assert report.failure is None
    assert (mask == expected_mask(toy_bundle, levels[0])).mean() > 0.9995


@pytest.mark.parametrize("stated", ["0", "nan", "inf", "-1", "many", "100000"])
def test_a_resolution_that_cannot_be_is_said_and_not_used(tmp_path: Path, stated: str, said: list[str]) -> None:
    slide = save_slide(tmp_path / "a.tif", tissue_picture(), description=f"Aperio |MPP = {stated}", metadata=None)
    with Slide(slide) as opened:
        assert opened.mpp is None
    assert sum("which cannot be" in line for line in said) == 1  # beside it: levels that SVS does not keep so


def test_truncated_tiles_are_counted_and_the_rest_is_done(toy_bundle: Bundle, tmp_path: Path) -> None:
    picture = tissue_picture()
    slide = tmp_path / "a.tif"
    tifffile.imwrite(slide, picture, photometric="rgb", tile=(128, 128))
    whole = slide.read_bytes()
    with tifffile.TiffFile(slide) as file:
        offsets = file.pages[0].dataoffsets
    slide.write_bytes(whole[: offsets[-4] + 10])
    _, report, mask = run(toy_bundle, slide, tmp_path)
    assert report.failure is not None
    assert "4 of its tiles are damaged" in report.failure
    assert (mask[:500] == expected_mask(toy_bundle, picture)[:500]).mean() > 0.999


@pytest.mark.parametrize("kind", ["text", "strip", "planes", "float"])
def test_what_is_no_slide_is_one_line(tmp_path: Path, kind: str) -> None:
    path, picture = tmp_path / "a.tif", tissue_picture()
    if kind == "text":
        path.write_text("no slide")
    elif kind == "strip":
        tifffile.imwrite(path, np.zeros((9500, 9500), np.uint8), rowsperstrip=9500, compression="zlib")
    elif kind == "planes":
        tifffile.imwrite(path, picture.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    else:
        tifffile.imwrite(path, picture.astype(np.float32), photometric="rgb", tile=(128, 128))
    with pytest.raises(UserError, match="cannot read") as raised:
        Slide(path)
    assert "vips tiffsave" in raised.value.hint
    with pytest.raises(UserError, match="no file"):
        Slide(tmp_path / "none.tif")


def test_a_level_that_is_listed_and_not_there_is_told(tmp_path: Path, said: list[str]) -> None:
    path, picture = save_slide(tmp_path / "a.tif", tissue_picture()), tissue_picture()
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].subifds[0]
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    with Slide(path) as slide:
        assert (slide.levels[0].height, slide.levels[0].width) == SIZE
        assert np.array_equal(slide.read(0, 10, 10, 50, 50)[..., ::-1], picture[10:60, 10:60])
    (line,) = said
    assert line == "Of the smaller pictures in a.tif, passed over as missing or no levels: 1."


def test_a_missing_level_is_passed_over(tmp_path: Path, said: list[str]) -> None:
    picture = tissue_picture()
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(picture, photometric="rgb", tile=(128, 128), subifds=2)
        file.write(picture[::4, ::4].astype(np.float32), photometric="rgb", tile=(128, 128), subfiletype=1)
        file.write(np.ascontiguousarray(picture[::8, ::8]), photometric="rgb", tile=(128, 128), subfiletype=1)
    with Slide(path) as slide:
        assert [level.downsample for level in slide.levels] == [1, 8]
        assert slide.overview(300).shape[1] >= 300


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("jpeg", [False, True])
def test_a_dicom_slide_is_an_instance_a_level(tmp_path: Path, sparse: bool, jpeg: bool) -> None:
    picture = cv2.GaussianBlur(tissue_picture(seed=6), (0, 0), 3)
    save_dicom_level(tmp_path / "1.dcm", np.ascontiguousarray(picture[::4, ::4]), jpeg=jpeg)
    save_dicom_level(tmp_path / "2.dcm", picture, sparse=sparse, jpeg=jpeg)
    save_dicom_level(tmp_path / "3.dcm", picture[:100, :100], kind="LABEL", jpeg=jpeg)
    for path in (tmp_path, tmp_path / "2.dcm"):
        with Slide(path) as slide:
            assert [(level.width, level.height) for level in slide.levels] == [(904, 600), (226, 150)]
            assert slide.mpp == pytest.approx(0.25)
            part = slide.read(0, 700, 300, 204, 300)[..., ::-1].astype(int)
            assert np.abs(part - picture[300:, 700:]).mean() < 3
            first = slide.read(0, 0, 0, 128, 128)[..., ::-1].astype(int)
            assert (first == 255).all() == sparse
            assert sparse or np.abs(first - picture[:128, :128]).mean() < 3
            assert not slide.damaged


def test_dicom_that_is_no_slide_is_one_line(tmp_path: Path) -> None:
    save_dicom_level(tmp_path / "a.dcm", tissue_picture((128, 128)), kind="LABEL")
    with pytest.raises(UserError, match="no DICOM whole-slide image"):
        Slide(tmp_path / "a.dcm")


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_slide_is_read_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = tissue_picture((200, 260)).astype(np.uint16) * (257 if seed % 2 else 1)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture if seed % 2 else picture.astype(np.uint8), photometric="rgb", tile=(64, 64),
                     compression="zlib")  # fmt: skip
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    directory = len(whole) - 400
    for _ in range(40):
        changed = whole.copy()
        places = rng.choice([*range(16), *range(directory, len(whole))], 3)
        changed[places] = rng.integers(0, 256, 3)
        path.write_bytes(changed.tobytes())
        with suppress(UserError):  # anything else fails
            opened = open_slide(path)  # as the child process does
            opened.close()
    with suppress(UserError), Slide(path) as slide:
        slide.read(0, 0, 0, 64, 64)


@pytest.mark.parametrize("keyword", ["Rows", "TotalPixelMatrixColumns", "NumberOfFrames", "BitsAllocated"])
def test_no_value_of_a_damaged_dicom_slide_is_told(
    tmp_path: Path, keyword: str, caplog: pytest.LogCaptureFixture
) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
    path = tmp_path / "a.dcm"
    save_dicom_level(path, tissue_picture((256, 256)), jpeg=False)
    dataset = pydicom.dcmread(path)
    del dataset[keyword]
    dataset.add(pydicom.DataElement(keyword, "LO", "DOE JANE"))
    dataset.save_as(path)
    caplog.set_level(0)
    told = ""
    try:
        with Slide(path) as slide:
            slide.read(0, 0, 0, 128, 128)
    except UserError as error:
        told = "".join(traceback.format_exception(error))
    assert "DOE" not in told + caplog.text


@pytest.mark.parametrize("keyword", ["Rows", "TotalPixelMatrixColumns"])
@pytest.mark.parametrize("value", [0, None])
def test_a_dicom_slide_of_no_size_is_one_line(tmp_path: Path, keyword: str, value: int | None) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
    path = tmp_path / "a.dcm"
    save_dicom_level(path, tissue_picture((256, 256)), jpeg=False)
    dataset = pydicom.dcmread(path)
    if value is None:
        del dataset[keyword]
    else:
        setattr(dataset, keyword, value)
    dataset.save_as(path)
    with pytest.raises(UserError, match="as a slide: "):
        Slide(path)


@pytest.mark.parametrize("region", [128, 1024])
def test_objects_that_touch_have_an_outline_each(tmp_path: Path, region: int) -> None:
    """Also those that lie across regions."""
    mask = np.zeros((300, 400), np.uint8)
    for x, y in ((60, 60), (92, 60), (120, 128), (152, 128), (300, 200)):
        cv2.circle(mask, (x, y), 20, 255, -1)  # two, two and one
    regions = Regions(tmp_path, mask.shape, region)
    for row in range(regions.rows):
        for column in range(regions.columns):
            regions.write(row, column, regions.place(row, column).of(mask))
    place = tmp_path / "a.geojson"
    for split, expected in ((False, 3), (True, 5)):
        count = write_objects(place, regions, name="x", colour=(1, 2, 3), scale=1, mpp=None, split=split)
        features = json.loads(place.read_text())["features"]
        assert count == len(features) == expected
        areas = [feature["properties"]["measurements"]["Area px"] for feature in features]
        assert sum(areas) == cv2.countNonZero(mask)
        assert (max(areas) < 1400) == split
