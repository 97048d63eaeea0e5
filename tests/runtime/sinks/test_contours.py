"""Masks as text come back: run lengths through pycocotools and a decoder of our own, polygons through OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sink_material import blob, result_of

from espmedsam_edge.annotations.rle import encode_rle
from espmedsam_edge.runtime.sinks.measurements import contour_fields

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def decoded(rle: dict[str, object]) -> np.ndarray:
    """COCO's ``rleFrString`` and ``rleDecode``, written from their description."""
    text, lengths, place = str(rle["counts"]), [], 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            letter = ord(text[place]) - 48
            value |= (letter & 31) << shift
            more = bool(letter & 32)
            shift += 5
            place += 1
            if not more and letter & 16:
                value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
    height, width = rle["size"]  # type: ignore[misc]
    flat = np.repeat(np.arange(len(lengths)) % 2, lengths).astype(bool)
    return flat.reshape(width, height).T


@given(MASKS)
def test_run_lengths_come_back(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(decoded(encode_rle(mask.astype(np.uint8) * 255)), mask)


@given(MASKS)
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="the reference is pycocotools")
    ours = encode_rle(mask.astype(np.uint8) * 255)
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert ours == {"size": theirs["size"], "counts": theirs["counts"].decode()}
    np.testing.assert_array_equal(coco.decode(ours).astype(bool), mask)
    assert coco.area(ours) == mask.sum()


def test_run_lengths_of_large_masks() -> None:
    size = (1080, 1920)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for mask in (np.ones(size, bool), np.zeros(size, bool), np.sin(rows / 40) + np.cos(columns / 300) > 0.5):
        np.testing.assert_array_equal(decoded(encode_rle(mask.astype(np.uint8) * 255)), mask)


@given(MASKS)
def test_filled_polygons_are_the_parts_without_their_holes(mask: np.ndarray) -> None:
    grey = mask.astype(np.uint8) * 255
    polygons = contour_fields(result_of(grey), "polygons")["polygons"]
    filled = np.zeros_like(grey)
    for polygon in polygons:
        assert len(polygon) % 2 == 0
        cv2.fillPoly(filled, [np.array(polygon, np.int32).reshape(-1, 2)], 255)
    around = np.pad(grey, 1)
    cv2.floodFill(around, None, (0, 0), 255, flags=4)  # 4: background is what 8-connected parts leave open
    expected = grey | ~np.where(np.pad(grey, 1) > 0, 0, around)[1:-1, 1:-1]
    np.testing.assert_array_equal(filled, expected)


@given(MASKS)
def test_every_polygon_is_one_to_coco(mask: np.ndarray) -> None:
    """Of six numbers or more: pycocotools refuses two, and takes four for a box. What it decodes each to is the part,
    but for its border: COCO's vertices are corners of pixels, ours their centres.
    """
    coco = pytest.importorskip("pycocotools.mask", reason="the reference is pycocotools")
    polygons = contour_fields(result_of(mask.astype(np.uint8) * 255), "polygons")["polygons"]
    assert all(len(polygon) >= 6 for polygon in polygons)
    assert bool(polygons) == bool(mask.any())
    around = np.ones((3, 3), np.uint8)
    for polygon, encoded in zip(polygons, coco.frPyObjects(polygons, *mask.shape) if polygons else [], strict=True):
        drawn = coco.decode(encoded)
        assert drawn.shape == mask.shape
        part = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [np.array(polygon, np.int32).reshape(-1, 2)], 1)
        assert not (drawn & ~cv2.dilate(part, around) & 1).any()
        inside = cv2.erode(part, around, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        assert not (inside & ~drawn & 1).any()


def test_forms() -> None:
    result = result_of(blob((48, 64)))
    assert contour_fields(result, "none") == {}
    assert set(contour_fields(result, "both")) == {"polygons", "rle"}
    assert contour_fields(result_of(np.zeros((9, 9), np.uint8)), "polygons") == {"polygons": []}
