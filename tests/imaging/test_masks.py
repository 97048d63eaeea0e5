"""Mask files of every kind become the same mask, and keep in register with their image at another size."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.masks import binary, read_mask, resize_mask
from espmedsam_edge.phantoms import phantom


def _mask() -> np.ndarray:
    return phantom("dermoscopy", 1, (60, 80))[1]


@pytest.mark.parametrize("value", [1, 255])
def test_a_grey_png_of_ones_or_255s_is_the_mask(tmp_path: Path, value: int) -> None:
    mask = _mask()
    cv2.imwrite(str(tmp_path / "m.png"), np.where(mask > 0, value, 0).astype(np.uint8))
    found = read_mask(tmp_path / "m.png")
    assert np.array_equal(found.mask, mask)
    assert found.grey == 0


@pytest.mark.parametrize("name", ["m.png", "m.tif"])
def test_sixteen_bits_and_colour_are_the_mask_too(tmp_path: Path, name: str) -> None:
    mask = _mask()
    cv2.imwrite(str(tmp_path / name), mask.astype(np.uint16) * 257)
    assert np.array_equal(read_mask(tmp_path / name).mask, mask)
    red = np.zeros((*mask.shape, 3), np.uint8)
    red[..., 2] = mask
    cv2.imwrite(str(tmp_path / name), red)
    assert np.array_equal(read_mask(tmp_path / name).mask, mask)


def test_a_jpeg_mask_is_cut_at_half_and_says_so(tmp_path: Path) -> None:
    mask = _mask()
    cv2.imwrite(str(tmp_path / "m.jpg"), mask, [cv2.IMWRITE_JPEG_QUALITY, 90])
    found = read_mask(tmp_path / "m.jpg")
    assert found.grey > 0
    assert np.array_equal(found.mask, mask)  # quality 90 strays far less than half


def written(path: Path, kind: str, disc: np.ndarray) -> Path:
    """The same disc as labelling tools write it."""
    Image, tifffile = pytest.importorskip("PIL.Image"), pytest.importorskip("tifffile")
    white, nothing = disc * np.uint8(255), disc * np.uint8(0)
    arrays_ = {
        "0-127.png": disc * np.uint8(127), "0-1-16bit.png": disc.astype(np.uint16), "0-960.png": disc * np.uint16(960),
        "3-200.png": np.where(disc, 200, 3).astype(np.uint8),
        "alpha.png": np.dstack([nothing + np.uint8(255)] * 3 + [white]),
        "black-with-alpha.png": np.dstack([nothing] * 3 + [white]),
    }  # fmt: skip
    if kind in arrays_:
        cv2.imwrite(str(path / kind), arrays_[kind])
    elif kind == "palette.png":
        image = Image.fromarray(disc.astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 64, 127] + [0] * 762)  # a dark colour
        image.save(path / kind)
    elif kind == "bool.tif":
        tifffile.imwrite(path / kind, disc)
    elif kind == "white-is-zero.tif":
        tifffile.imwrite(path / kind, white, photometric="miniswhite")
    elif kind == "imagej.tif":  # shows 255 in black, and calls it foreground
        says = {"software": "", "description": "ImageJ=1.54p\n", "metadata": None}
        tifffile.imwrite(path / kind, white, photometric="miniswhite", **says)
    elif kind == "white-on-black.tif":  # as Pillow and other programs show it
        tifffile.imwrite(path / kind, 255 - white, photometric="miniswhite", software="another", metadata=None)
        assert np.array_equal(np.array(Image.open(path / kind)), white)
    else:
        Image.fromarray(white).save(path / kind)
    return path / kind


@pytest.mark.parametrize(
    "kind",
    ["0-127.png", "0-1-16bit.png", "0-960.png", "3-200.png", "alpha.png", "black-with-alpha.png", "palette.png",
     "bool.tif", "white-is-zero.tif", "imagej.tif", "white-on-black.tif", "m.gif", "m.bmp", "m.png"],
)  # fmt: skip
def test_two_values_are_a_mask_whichever_they_are(tmp_path: Path, kind: str) -> None:
    mask = _mask()
    found = read_mask(written(tmp_path, kind, mask > 0))
    assert np.array_equal(found.mask, mask)
    assert found.grey == 0


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "int64", "float32", "float64"])
@pytest.mark.parametrize("high", [1, 100])
def test_masks_that_programs_compute_are_read(tmp_path: Path, dtype: str, high: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "m.tif", ((_mask() > 0) * high).astype(dtype))
    assert np.array_equal(read_mask(tmp_path / "m.tif").mask, _mask())


def test_parts_of_one_are_cut_at_half_and_other_numbers_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    soft = cv2.GaussianBlur((_mask() > 0).astype(np.float32), (0, 0), 2)
    tifffile.imwrite(tmp_path / "m.tif", soft)
    found = read_mask(tmp_path / "m.tif")
    assert np.array_equal(found.mask > 0, soft >= 127.5 / 255)
    assert found.grey > 0
    for values in (soft * 5, soft - 0.5, np.where(soft > 0.5, np.nan, soft)):
        tifffile.imwrite(tmp_path / "m.tif", values.astype(np.float32))
        with pytest.raises(UserError, match="as a mask: it holds float32 values from"):
            read_mask(tmp_path / "m.tif")


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255), (0, 255, 0)])
def test_several_bright_colours_are_refused(tmp_path: Path, background: tuple[int, int, int]) -> None:
    picture = np.full((*_mask().shape, 3), background, np.uint8)
    picture[_mask() > 0] = (0, 0, 255)
    cv2.imwrite(str(tmp_path / "m.png"), picture)
    if not any(background):
        assert np.array_equal(read_mask(tmp_path / "m.png").mask, _mask())
        picture[:9, :9] = (0, 255, 0)
        cv2.imwrite(str(tmp_path / "m.png"), picture)
    with pytest.raises(UserError, match="as a mask: it holds several colours"):
        read_mask(tmp_path / "m.png")


def test_labels_beside_what_belongs_to_none_are_refused(tmp_path: Path) -> None:
    labels = (_mask() > 0).astype(np.uint8)
    labels[cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0] = 255  # as Pascal VOC's rims
    cv2.imwrite(str(tmp_path / "m.png"), labels)
    with pytest.raises(UserError, match="it holds the values 0, 1, 255"):
        read_mask(tmp_path / "m.png")


@pytest.mark.parametrize("kind", ["labels", "colours", "ids", "ones-through-jpeg"])
def test_labels_and_numbers_are_refused_never_silently_empty(tmp_path: Path, kind: str) -> None:
    mask, file = _mask() > 0, tmp_path / "m.png"
    labels = mask.astype(np.uint8)
    labels[:9, :9] = 2
    if kind == "colours":
        labels = np.array([[0, 0, 0], [0, 64, 127], [64, 0, 0]], np.uint8)[labels]
    elif kind == "ids":
        labels = np.where(mask, np.arange(mask.shape[1]) // 8 * 60 + 60, 0).astype(np.uint16)
    elif kind == "ones-through-jpeg":
        file, labels = tmp_path / "m.jpg", (mask * 3).astype(np.uint8)
    cv2.imwrite(str(file), labels)
    with pytest.raises(UserError, match=r"as a mask: it holds the values 0, .* Write the target's pixels as 255"):
        read_mask(file)


def test_empty_and_full_masks_are_what_they_are() -> None:
    assert not binary(np.zeros((4, 5), np.uint16)).mask.any()
    assert binary(np.full((4, 5), 7, np.uint8)).mask.all()


def test_values_are_cut_at_half() -> None:
    found = binary(np.array([[0, 4, 127, 128, 253, 255]], np.uint8))
    assert found.mask.tolist() == [[0, 0, 0, 255, 255, 255]]
    assert found.grey == 4


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_resized_mask_is_binary_and_keeps_what_is_plain(data: st.DataObject) -> None:
    side = st.integers(1, 40)
    mask = data.draw(arrays(np.bool_, st.tuples(side, side))).view(np.uint8) * np.uint8(255)
    size = data.draw(st.tuples(side, side))
    resized = resize_mask(mask, size)
    assert resized.shape == size
    assert set(np.unique(resized)) <= {0, 255}
    assert np.array_equal(resize_mask(mask, mask.shape), mask)
    if mask.all() or not mask.any():
        assert (resized == mask.flat[0]).all()


def test_shrinking_keeps_pixels_at_least_half_covered() -> None:
    mask = np.zeros((4, 6), np.uint8)
    mask[0, 0] = mask[0, 1] = 255  # half of the first block
    mask[2, 4] = 255  # a quarter of the last
    assert resize_mask(mask, (2, 3)).tolist() == [[255, 0, 0], [0, 0, 0]]


def test_a_speck_shrunk_to_nothing_is_gone() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:4, :4] = 255
    assert not resize_mask(mask, (1, 1)).any()  # its average is 1 of 255


@pytest.mark.parametrize("size", [(30, 40), (120, 160), (30, 160), (91, 53)])
def test_a_resized_mask_stays_where_its_image_is(size: tuple[int, int]) -> None:
    mask = _mask()
    y, x = (np.mean(axis) + 0.5 for axis in np.nonzero(mask))
    new_y, new_x = (np.mean(axis) + 0.5 for axis in np.nonzero(resize_mask(mask, size)))
    # Centre of mass in the new pixels; half a pixel would be nearest neighbour's shift.
    assert new_y == pytest.approx(y * size[0] / mask.shape[0], abs=0.2)
    assert new_x == pytest.approx(x * size[1] / mask.shape[1], abs=0.2)
