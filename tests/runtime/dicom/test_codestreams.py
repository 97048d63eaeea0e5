"""The size that a compressed frame has by its own header: of real encoders, of what is cut, and of bombs."""

from __future__ import annotations

import contextlib
import struct

import cv2
import numpy as np
import pytest
from dicom_files import jpeg2000
from hypothesis import given
from hypothesis import strategies as st

from espmedsam_edge.runtime.dicom.codestreams import FrameSize, bare_codestream, check_rle, size_of

COLOUR = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
GREY = np.ascontiguousarray(COLOUR[..., 0])


def encoded(suffix: str, image: np.ndarray, *parameters: int) -> bytes:
    done, data = cv2.imencode(suffix, image, parameters)
    assert done
    return data.tobytes()


@pytest.mark.parametrize(("image", "samples"), [(GREY, 1), (COLOUR, 3)])
@pytest.mark.parametrize("parameters", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)])
def test_jpeg(image: np.ndarray, samples: int, parameters: tuple[int, ...]) -> None:
    assert size_of(encoded(".jpg", image, *parameters)) == FrameSize(60, 40, samples)


@pytest.mark.parametrize(("image", "samples"), [(GREY, 1), (COLOUR, 3)])
def test_jpeg_ls(image: np.ndarray, samples: int) -> None:
    jpeg_ls = pytest.importorskip("jpeg_ls", reason="needs pyjpegls (extra dicom)")
    codestream = bytes(jpeg_ls.encode_array(image, interleave_mode=2 if samples == 3 else 0))
    assert size_of(codestream) == FrameSize(60, 40, samples)


@pytest.mark.parametrize(("image", "samples"), [(GREY, 1), (COLOUR, 3)])
def test_jpeg_2000_with_and_without_its_boxes(image: np.ndarray, samples: int) -> None:
    boxed = encoded(".jp2", image)
    bare = bare_codestream(boxed)
    assert boxed.startswith(b"\0\0\0\x0cjP  ")
    assert size_of(bare) == FrameSize(60, 40, samples)
    assert bare_codestream(bare) == bare


def test_a_jpeg_with_long_segments_and_fill_bytes_before_its_size() -> None:
    whole = encoded(".jpg", GREY)
    comment = b"\xff\xfe" + struct.pack(">H", 65535) + b"\xff\xc0" * 32766 + b"\xff"  # frames in a comment are none
    assert size_of(whole[:2] + comment + b"\xff\xff\xff" + whole[2:]) == FrameSize(60, 40, 1)


@pytest.mark.parametrize("marker", [b"\xff\x01", b"\xff\xd0", b"\xff\xd7"])
def test_a_marker_without_a_length_hides_no_size_behind_it(marker: bytes) -> None:
    """Taken for one with a length, it would lead past the size that the decoder sees."""
    hidden, shown = bytes.fromhex("ffc0 000b08 1388 1388 01 011100"), bytes.fromhex("ffc0 000b08 0028 003c 01 011100")
    assert size_of(b"\xff\xd8" + marker + hidden + bytes(0xFFC0 - len(hidden)) + shown) == FrameSize(5000, 5000, 1)


def test_lossless_jpeg() -> None:
    assert size_of(bytes.fromhex("ffd8 ffc3000b10 0028 003c 01 011100")) == FrameSize(60, 40, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8" + bytes(100_000),
        b"BM",
        b"\xff\x4f\xff\x51",
        b"\xff" * 9,
    ],
)
def test_what_has_no_size_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"codestream|without a size"):
        size_of(data)


@pytest.mark.parametrize("whole", [encoded(".jpg", COLOUR), bare_codestream(encoded(".jp2", COLOUR))])
@given(data=st.data())
def test_cut_and_changed_codestreams_have_a_size_or_are_refused(whole: bytes, data: st.DataObject) -> None:
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, max(0, min(200, len(changed)) - 1)), max_size=8)) if changed else ():
        changed[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        size_of(bytes(changed))


@given(
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "]),
    rest=st.binary(max_size=200),
)
def test_random_bytes_have_a_size_or_are_refused(start: bytes, rest: bytes) -> None:
    with contextlib.suppress(ValueError):
        size_of(bare_codestream(start + rest))
    with contextlib.suppress(ValueError):
        check_rle(start + rest, 100)


def test_boxes_that_lead_nowhere_end() -> None:
    """A box of no length made pydicom look at it for ever."""
    with pytest.raises(ValueError, match="boxes"):
        bare_codestream(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64))


@pytest.mark.parametrize(
    "usual",
    [
        {"levels": 5},
        {"levels": 5, "layers": 50, "samples": 3},
        {"levels": 5, "layers": 20, "samples": 3, "precincts": 7, "tile": (512, 512)},
        {"levels": 6, "precincts": 6},
    ],
)
def test_usual_ways_to_write_jpeg_2000_pass(usual: dict[str, int]) -> None:
    assert size_of(jpeg2000(3000, 2000, **usual)) == FrameSize(3000, 2000, usual.get("samples", 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "costly"),
    [
        ((96, 64), {"layers": 65535, "levels": 5, "precincts": 1}),  # ten seconds and 1.3 GB, of 900 bytes
        ((2000, 2000), {"levels": 5, "precincts": 1}),  # 2.3 GB
        ((255, 256), {"tile": (1, 1)}),  # 0.7 GB
        ((96, 64), {"layers": 65535, "levels": 5, "precincts": 1, "in_tile": True}),
    ],
)
def test_jpeg_2000_of_far_too_many_parts_is_refused(size: tuple[int, int], costly: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="too many"):
        size_of(jpeg2000(*size, **costly))  # type: ignore[arg-type]


def rle(*segments: bytes) -> bytes:
    places = [64]
    for segment in segments[:-1]:
        places.append(places[-1] + len(segment))
    return struct.pack("<16I", len(segments), *places, *[0] * (15 - len(segments))) + b"".join(segments)


def test_rle_segments_must_fit_the_frame() -> None:
    check_rle(rle(b"\0\1" * 100, b"\0\2" * 100), 100)  # the worst of packers: two bytes for one
    with pytest.raises(ValueError, match="do not fit"):
        check_rle(rle(b"\x81\0" * 1000), 100)  # unpacks to 128 kB
    with pytest.raises(ValueError, match="do not fit"):
        check_rle(struct.pack("<16I", 3, 264, 64, 64, *[0] * 12) + bytes(300), 100)  # backwards
    with pytest.raises(ValueError, match="cut off"):
        check_rle(b"\1\0\0\0", 100)
