"""Files of several pictures as frames, against what other programs wrote into them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge import ModelOptions, Outputs, infer, infer_frames
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.runtime.sources import paged
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.source import SourceFrame

tifffile = pytest.importorskip("tifffile", reason="needs tifffile (extra slide)")


def pages(count: int, size: tuple[int, ...] = (20, 30), dtype: type = np.uint8, top: int = 255) -> np.ndarray:
    return np.random.default_rng(count).integers(0, top + 1, (count, *size)).astype(dtype)


def read(path: Path) -> tuple[list[SourceFrame], list[str]]:
    (source,), failures = open_sources([str(path)])
    assert not failures
    with source:
        frames = list(source)
    return frames, [failure.message for failure in source.failures]


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_every_page_of_a_tiff_is_a_frame(tmp_path: Path, compression: str | None, bigtiff: bool) -> None:
    stack = pages(5, (20, 30, 3))
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="rgb", compression=compression, bigtiff=bigtiff)
    frames, failures = read(tmp_path / "a.tif")
    assert not failures
    assert [(frame.index, frame.time, frame.z) for frame in frames] == [(n, None, None) for n in range(5)]
    assert all(np.array_equal(frame.image[..., ::-1], page) for frame, page in zip(frames, stack, strict=True))


def test_an_imagej_hyperstack_has_times_and_depths(tmp_path: Path) -> None:
    stack = pages(6).reshape(3, 2, 20, 30)
    metadata = {"axes": "TZYX", "finterval": 0.5, "spacing": 1.5, "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata=metadata)
    frames, _ = read(tmp_path / "a.tif")
    assert [(frame.time, frame.z) for frame in frames] == [(t / 2, z * 1.5) for t in range(3) for z in range(2)]
    assert all(np.array_equal(f.image[..., 0], page) for f, page in zip(frames, stack.reshape(6, 20, 30), strict=True))


@pytest.mark.parametrize("truncate", [False, True])
def test_imagej_writes_one_directory_before_a_large_stack(tmp_path: Path, truncate: bool) -> None:
    stack = pages(4, dtype=np.uint16, top=4000)
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, truncate=truncate)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(list(file.pages)) == (1 if truncate else 4)
    frames, _ = read(tmp_path / "a.tif")
    expected = [cv2.convertScaleAbs(page, alpha=255 / 4095) for page in stack]  # one scale for all
    assert len(frames) == 4
    assert all(np.array_equal(frame.image[..., 0], page) for frame, page in zip(frames, expected, strict=True))


def test_an_ome_stack_has_depths_in_micrometres(tmp_path: Path) -> None:
    stack = pages(4)
    metadata = {"axes": "ZYX", "PhysicalSizeZ": 500, "PhysicalSizeZUnit": "nm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, metadata=metadata)
    frames, _ = read(tmp_path / "a.ome.tif")
    assert [frame.z for frame in frames] == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize("spacing", [0, float("nan"), float("inf"), -1.0])
def test_a_spacing_that_is_none_is_not_told(tmp_path: Path, spacing: float) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pages(3), imagej=True, metadata={"axes": "ZYX", "spacing": spacing})
    assert [frame.z for frame in read(tmp_path / "a.tif")[0]] == [None] * 3


def test_pages_that_do_not_fit_are_left_out_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    fitting = pages(3)
    with tifffile.TiffWriter(path) as file:
        file.write(fitting[0], contiguous=False)
        file.write(pages(1, (24, 30))[0], contiguous=False)
        file.write(fitting[1], contiguous=False)
        file.write(fitting[2].astype(np.float32), contiguous=False)
        file.write(fitting[2], contiguous=False)
    frames, failures = read(path)
    assert [frame.index for frame in frames] == [0, 2, 4]
    assert len(failures) == 2
    assert "page 2, is 30x24 pixels, the first 30x20: it is left out." in failures[0]
    assert "page 4" in failures[1]
    assert "32 bits" in failures[1]


def test_a_stack_cut_off_gives_the_pages_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for page in pages(4, (64, 64)):
            file.write(page, contiguous=False)
    with tifffile.TiffFile(path) as file:
        third = file.pages[2].dataoffsets[0]
    path.write_bytes(path.read_bytes()[: third + 100])
    frames, _ = read(path)
    assert 1 <= len(frames) <= 2


def test_levels_of_a_pyramid_are_no_pages(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pages(1, (64, 64))[0], subfiletype=0)
        file.write(pages(1, (32, 32))[0], subfiletype=1)
    (source,), _ = open_sources([str(tmp_path / "a.tif")])
    assert source.kind == "images"


def test_pages_of_a_scanners_slide_are_no_frames(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        for size in (64, 16, 32):
            file.write(pages(1, (size, size))[0], description="Aperio Image Library v12", metadata=None)
    (source,), _ = open_sources([str(tmp_path / "a.svs")])
    assert source.kind == "images"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tif")
    (source,), _ = open_sources([str(tmp_path / "a.tif")])
    assert source.kind == "images"


@pytest.mark.skipif(not hasattr(cv2, "imwriteanimation"), reason="this OpenCV writes no animations")
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_animations_are_frames_with_their_times(tmp_path: Path, suffix: str) -> None:
    animation = cv2.Animation()
    shown = [np.full((20, 30, 3), value, np.uint8) for value in (10, 90, 200)]
    animation.frames, animation.durations = shown, np.array([100, 200, 50])
    cv2.imwriteanimation(str(tmp_path / f"a{suffix}"), animation)
    frames, _ = read(tmp_path / f"a{suffix}")
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.3])
    assert all(
        np.abs(frame.image - picture.astype(int)).max() <= 2 for frame, picture in zip(frames, shown, strict=True)
    )


def test_an_animated_avif_is_a_video_with_its_times(tmp_path: Path, said: list[str]) -> None:
    pytest.importorskip("av", reason="needs PyAV (extra video)")
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    if not pytest.importorskip("PIL.features").check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    shown = [np.full((64, 96, 3), value, np.uint8) for value in (10, 90, 200)]
    first, *others = (image.fromarray(picture) for picture in shown)
    first.save(tmp_path / "a.avif", save_all=True, append_images=others, duration=[100, 200, 50], quality=95)
    first.save(tmp_path / "still.avif")
    (source,), failures = open_sources([str(tmp_path / "a.avif")])
    assert not failures
    with source:
        frames = list(source)
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.3])
    for frame, picture in zip(frames, shown, strict=True):
        assert np.abs(frame.image - picture.astype(int)).max() <= 3
    assert said == []
    (still,), _ = open_sources([str(tmp_path / "still.avif")])
    assert still.kind == "images"


def test_a_run_over_a_stack(toy_bundle: Bundle, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pages(3), imagej=True, metadata={"axes": "ZYX", "spacing": 2.0})
    report = infer(
        tmp_path / "a.tif", ModelOptions(toy_bundle), Outputs(jsonl=tmp_path / "a.jsonl", masks=tmp_path / "m")
    )
    assert (report.frames, report.failures) == (3, [])
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(line["frame"], line["z_um"]) for line in lines] == [(0, 0.0), (1, 2.0), (2, 4.0)]
    assert len(list((tmp_path / "m").rglob("*.png"))) == 3
    assert [frame.z for frame, _ in infer_frames(tmp_path / "a.tif", ModelOptions(toy_bundle))] == [0, 2, 4]


def test_of_a_large_stack_some_pages_are_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(paged, "_LOOKED_AT", 3 * 20 * 30)
    stack = pages(9, dtype=np.uint16, top=1000)
    stack[4, 0, 0] = 4000  # the one in the middle is looked at
    stack[5, 0, 0] = 60000
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    frames, _ = read(tmp_path / "a.tif")
    scales = [4095] * 5 + [65535] + [4095] * 3
    expected = [cv2.convertScaleAbs(page, alpha=255 / scale) for page, scale in zip(stack, scales, strict=True)]
    assert all(np.array_equal(frame.image[..., 0], page) for frame, page in zip(frames, expected, strict=True))
    assert said == [f"{tmp_path / 'a.tif'}: 3 of 9 pages are looked at for their brightness."]


def test_pages_that_are_left_out_do_not_count_for_brightness(tmp_path: Path) -> None:
    stack = pages(3, dtype=np.uint16, top=1000)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in (*stack, pages(1, (40, 60), np.uint16, 60000)[0]):
            file.write(page, photometric="minisblack", metadata=None)
    frames, failures = read(tmp_path / "a.tif")
    assert len(failures) == 1
    expected = [cv2.convertScaleAbs(page, alpha=255 / 1023) for page in stack]
    assert all(np.array_equal(frame.image[..., 0], page) for frame, page in zip(frames, expected, strict=True))


def test_of_many_pages_that_cannot_be_read_a_few_are_named(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for number in range(9):
            page = np.full((40, 50), number, np.uint8 if number in (0, 4) else np.float32)
            file.write(page, contiguous=False)
    frames, failures = read(tmp_path / "a.tif")
    assert [frame.index for frame in frames] == [0, 4]
    assert [("page" in line, "more" in line) for line in failures] == [(True, False)] * 3 + [(True, True)]
    assert failures[-1].endswith("4 more of its 9 pages are left out.")


def test_a_page_of_another_depth_is_told_once(tmp_path: Path, said: list[str]) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for number in range(5):
            page = (
                np.full((40, 50), 100 * (number + 1), np.uint16)
                if number in (2, 4)
                else np.full((40, 50), 90, np.uint8)
            )
            file.write(page, contiguous=False)
    frames, failures = read(tmp_path / "a.tif")
    assert [line.split(", ", 1)[1] for line in said if "bits" in line] == [
        "page 3, has 16 bits a sample, the first 8: such pages have a brightness of their own."
    ]
    assert len(frames) + len(failures) == 5
