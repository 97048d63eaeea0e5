"""Image decoding, against Pillow as the independent reader, and on damaged files."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from heic_files import phone_heic
from hypothesis import given, settings
from hypothesis import strategies as st

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import decode_image, largest_sample, read_image, read_samples
from espmedsam_edge.imaging.decoder_process import PictureDecoder
from espmedsam_edge.imaging.header_errors import HeaderError
from espmedsam_edge.imaging.headers import read_header

Image = pytest.importorskip("PIL.Image", reason="Pillow is the independent reader")

FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "TIFF": {},
    "BMP": {},
    "WEBP": {"lossless": True},
}


def smooth_picture(width: int = 60, height: int = 44, seed: int = 0) -> np.ndarray:
    """An RGB picture with structure, that JPEG keeps well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(picture: Any, name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image = picture if hasattr(picture, "save") else Image.fromarray(picture)
    image.save(stream, name, **{**FORMATS.get(name, {}), **options})
    return stream.getvalue()


def rgb(data: bytes) -> np.ndarray:
    """What Pillow reads, as BGR."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[..., ::-1]


def largest_difference(first: np.ndarray, second: np.ndarray) -> int:
    assert first.shape == second.shape
    return int(np.abs(first.astype(int) - second.astype(int)).max())


@pytest.mark.parametrize("name", FORMATS)
def test_colour_images_match_pillow(name: str) -> None:
    data = encoded(smooth_picture(), name)
    # Two JPEG decoders may round differently in the inverse DCT and the colour conversion.
    assert largest_difference(decode_image(data), rgb(data)) <= (2 if name == "JPEG" else 0)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_png_colour_models_become_bgr(mode: str) -> None:
    data = encoded(Image.fromarray(smooth_picture()).convert(mode), "PNG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., 2::-1]  # alpha dropped, not blended
    assert largest_difference(decode_image(data), expected) == 0


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_cmyk_matches_pillow(name: str) -> None:
    data = encoded(Image.fromarray(smooth_picture()).convert("CMYK"), name)
    # Integer conversions with different rounding.
    assert largest_difference(decode_image(data), rgb(data)) <= 3


def test_gray_jpeg_has_three_equal_channels() -> None:
    frame = decode_image(encoded(Image.fromarray(smooth_picture()).convert("L"), "JPEG"))
    assert frame.shape == (44, 60, 3)
    assert np.array_equal(frame[..., 0], frame[..., 1])
    assert np.array_equal(frame[..., 0], frame[..., 2])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(name: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(smooth_picture(), name, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))[..., ::-1]
    assert largest_difference(decode_image(data), expected) <= (2 if name == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("layout", [{}, {"tile": (32, 32)}, {"rowsperstrip": 7}, {"bigtiff": True}, {"byteorder": ">"}])
def test_a_tiff_is_turned_as_a_whole(orientation: int, layout: dict[str, Any]) -> None:
    tifffile = pytest.importorskip("tifffile", reason="writes tiled TIFFs")
    picture, stream = smooth_picture(), io.BytesIO()
    tifffile.imwrite(stream, picture, photometric="rgb", extratags=[(274, "H", 1, orientation, True)], **layout)
    expected = {
        1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1],
        5: picture.transpose(1, 0, 2), 6: np.rot90(picture, -1), 7: picture.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(picture),
    }  # fmt: skip
    assert np.array_equal(decode_image(stream.getvalue()), expected[orientation][..., ::-1])


def pages(*pictures: tuple[np.ndarray, dict[str, Any]]) -> bytes:
    """A TIFF of tifffile's."""
    tifffile, stream = pytest.importorskip("tifffile", reason="writes such TIFFs"), io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for picture, options in pictures:
            writer.write(picture, **options)
    return stream.getvalue()


@pytest.mark.parametrize("layout", ["before", "within", "mask", "after"])
def test_a_tiff_s_preview_is_not_its_picture(layout: str) -> None:
    picture = smooth_picture()
    preview = (picture[::4, ::4].copy(), {"photometric": "rgb", "subfiletype": 1})
    main = (picture, {"photometric": "rgb", "subfiletype": 0})
    data = {
        "before": lambda: pages(preview, main), "after": lambda: pages(main, preview),
        "within": lambda: pages((preview[0], {**preview[1], "subifds": 1}), main),
        "mask": lambda: pages((picture[..., 0] > 99, {"subfiletype": 4}), main),
    }[layout]()  # fmt: skip
    assert np.array_equal(decode_image(data), picture[..., ::-1])
    header = read_header(data)
    assert (header.width, header.height, header.pictures) == (60, 44, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_s_transparency_leaves_its_colours(dtype: type) -> None:
    full = np.iinfo(dtype).max
    picture = smooth_picture().astype(dtype) * dtype(full // 255)
    picture[0, 0] = full  # the 16 bits' scale
    alpha = np.full((44, 60, 1), full // 3, dtype)
    data = pages((np.dstack([picture, alpha]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}))
    assert np.array_equal(decode_image(data), (picture // (full // 255)).astype(np.uint8)[..., ::-1])


def test_a_tiff_that_would_be_shown_wrongly_is_refused() -> None:
    wide = smooth_picture().astype(np.uint16) * 16
    lab = encoded(Image.fromarray(smooth_picture()).convert("LAB"), "TIFF")
    planes = pages((np.ascontiguousarray(wide.transpose(2, 0, 1)), {"photometric": "rgb", "planarconfig": "separate"}))
    grey = np.dstack([wide[..., 0], np.full((44, 60), 65535, np.uint16)])
    both = pages((grey, {"photometric": "minisblack", "extrasamples": ["unassalpha"], "planarconfig": "contig"}))
    for data, reason in ((lab, "CIELAB"), (planes, "separate planes"), (both, "grey with transparency")):
        with pytest.raises(UserError, match=reason):
            decode_image(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned(orientation: int) -> None:
    features, ImageOps = pytest.importorskip("PIL.features"), pytest.importorskip("PIL.ImageOps")
    if not features.check("avif") or "AVIF:                        avif" not in cv2.getBuildInformation():
        pytest.skip("Pillow or OpenCV is built without AVIF")
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(Image.fromarray(smooth_picture()), "AVIF", exif=exif, quality=100, subsampling="4:4:4")
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))[..., ::-1]
    assert largest_difference(decode_image(data), expected) <= 2  # YCbCr rounds
    with pytest.raises(UserError, match="cut off"):
        decode_image(data[: len(data) * 2 // 3])


def test_an_animated_avif_gives_its_first_picture_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not pytest.importorskip("PIL.features").check("avif"):
        pytest.skip("Pillow is built without AVIF")
    if "AVIF:                        avif" not in cv2.getBuildInformation():
        pytest.skip("OpenCV is built without AVIF")
    first, path = smooth_picture(), tmp_path / "a.avif"
    others = [Image.fromarray(smooth_picture(seed=seed)) for seed in (1, 2)]
    path.write_bytes(encoded(first, "AVIF", quality=95, subsampling="4:4:4", save_all=True, append_images=others))
    assert np.abs(read_image(path).astype(int) - first[..., ::-1]).mean() < 3  # lossy
    assert [record.getMessage() for record in caplog.records] == [f"{path} holds 3 pictures; the first is read."]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("size", [(60, 44), (512, 300), (1, 1), (9, 8)])
def test_an_avif_s_own_size_is_what_the_file_says(
    mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pytest.importorskip("PIL.features").check("avif"):
        pytest.skip("Pillow is built without AVIF")
    data = bytearray(encoded(Image.fromarray(smooth_picture(*size)).convert(mode), "AVIF"))
    assert (read_header(bytes(data)).width, read_header(bytes(data)).height) == size
    if min(size) < 256:
        return
    for found in re.finditer(b"ispe", bytes(data)):
        data[found.end() + 4 : found.end() + 12] = struct.pack(">II", 64, 64)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded a picture larger than it says"))
    with pytest.raises(UserError, match="it says 64x64 pixels, and its data 512x300"):
        decode_image(bytes(data))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_heic_is_read_whole(mode: str, orientation: int) -> None:
    heif, ImageOps = (
        pytest.importorskip("pillow_heif", reason="the optional reader"),
        pytest.importorskip("PIL.ImageOps"),
    )
    picture, exif = Image.fromarray(smooth_picture(192, 128)).convert(mode), Image.Exif()
    exif[274] = orientation
    stored, stream = heif.from_pillow(picture), io.BytesIO()
    stored.info["exif"] = exif.tobytes()  # becomes irot
    stored.save(stream, quality=95)
    data = stream.getvalue()
    assert (b"irot" in data) == (orientation != 1)
    picture.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[..., ::-1]
    got = decode_image(data + b"notes that a camera appends")
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).mean() < 2  # lossy
    with pytest.raises(UserError, match="cut off"):
        decode_image(data[: len(data) * 2 // 3])


TURNS = [
    *[(("irot", turns),) for turns in range(4)],
    *[(("irot", turns), ("imir", axis)) for turns in range(4) for axis in range(2)],
    *[(("imir", axis), ("irot", turns)) for turns in range(4) for axis in range(2)],
]


@pytest.mark.parametrize("turns", TURNS)
def test_a_phones_heic_is_turned_and_mirrored_once_in_the_order_that_it_states(
    turns: tuple[tuple[str, int], ...],
) -> None:
    """A grid of tiles; the Exif data that go with it name the turn a second time, as phones do."""
    pytest.importorskip("pillow_heif", reason="the optional reader")
    exif = Image.Exif()
    exif[274] = 6
    seen = smooth_picture(192, 128)
    data = phone_heic(seen, turns, exif.tobytes().removeprefix(b"Exif\0\0"))
    stored = seen
    for kind, value in turns:
        seen = np.rot90(seen, value) if kind == "irot" else seen[::-1] if value == 0 else seen[:, ::-1]
    got = decode_image(data)
    assert got.shape == seen.shape
    assert np.abs(got.astype(int) - seen).mean() < 4  # lossy
    header = read_header(data)  # by which an AVIF is turned
    exif[274] = header.orientation
    picture = Image.fromarray(stored)
    picture.getexif()[274] = header.orientation
    assert np.array_equal(np.asarray(pytest.importorskip("PIL.ImageOps").exif_transpose(picture)), seen)


def test_without_its_reader_a_heic_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    box = struct.pack(">I4s", 20, b"ftyp") + b"heic\0\0\0\0mif1"
    ispe = struct.pack(">I4sIII", 20, b"ispe", 0, 64, 48)
    ipco, ipma = struct.pack(">I4s", 28, b"ipco") + ispe, struct.pack(">I4sIIHBB", 20, b"ipma", 0, 1, 7, 1, 1)
    inner = struct.pack(">I4sIH", 14, b"pitm", 0, 7) + struct.pack(">I4s", 8 + 48, b"iprp") + ipco + ipma
    data = box + struct.pack(">I4sI", 12 + len(inner), b"meta", 0) + inner
    header = read_header(data)
    assert (header.format, header.width, header.height) == ("HEIC", 64, 48)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"HEIC needs the package pillow-heif\. Install it"):
        decode_image(data, "IMG_0001.HEIC")


def several(name: str, count: int) -> bytes:
    pages = [Image.fromarray(smooth_picture(seed=seed)) for seed in range(count)]
    return encoded(pages[0], name, save_all=True, append_images=pages[1:])


@pytest.mark.parametrize("name", ["TIFF", "PNG", "WEBP", "GIF"])
def test_of_several_pictures_the_first_is_read_and_that_is_said(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "GIF" and "GIF:                         YES" not in cv2.getBuildInformation():
        pytest.skip("OpenCV is built without GIF")
    file = tmp_path / "stack"
    file.write_bytes(several(name, 5))
    expected = np.asarray(Image.open(file).convert("RGB"))[..., ::-1]
    assert largest_difference(read_image(file), expected) == 0
    assert [record.getMessage() for record in caplog.records] == [f"{file} holds 5 pictures; the first is read."]
    caplog.clear()
    file.write_bytes(several(name, 1))
    read_image(file)
    assert not caplog.records


def test_thumbnails_and_pyramid_levels_are_no_pictures_but_an_imagej_stack_has_many() -> None:
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(smooth_picture(64, 48), photometric="rgb", tile=(32, 32))
        writer.write(smooth_picture(32, 24), photometric="rgb", subfiletype=1)
    assert read_header(stream.getvalue()).pictures == 1
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((7, 20, 30), np.uint16), imagej=True, metadata={"axes": "TYX"})
    assert read_header(stream.getvalue()).pictures == 7


def test_a_tiff_of_a_compression_that_is_not_read_is_refused_by_its_name() -> None:
    data = bytearray(encoded(smooth_picture(), "TIFF"))
    plain, zstandard = struct.pack("<HHIH", 259, 3, 1, 1), struct.pack("<HHIH", 259, 3, 1, 50000)
    assert plain in data
    with pytest.raises(UserError, match="compression by Zstandard is not read"):
        decode_image(bytes(data.replace(plain, zstandard)))


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_samples_are_scaled_by_the_range_they_use(name: str, bits: int) -> None:
    top = (1 << bits) - 1
    samples = np.random.default_rng(bits).integers(0, top + 1, (20, 30)).astype(np.uint16)
    samples[0, 0] = top
    frame = decode_image(encoded(samples, name))
    expected = np.rint(samples * (255 / top))
    assert np.abs(frame[..., 1] - expected).max() <= 1  # halves may round either way
    assert frame[0, 0, 0] == 255


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_keeps_its_channels(suffix: str, channels: int) -> None:
    samples = np.random.default_rng(3).integers(0, 65536, (20, 30, channels)).astype(np.uint16)
    samples[0, 0] = 65535
    done, data = cv2.imencode(suffix, samples)
    assert done
    frame = decode_image(data.tobytes())
    assert np.abs(frame - samples[..., :3] / 257).max() <= 0.51  # rounded to the nearest


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_tiff_that_counts_from_white_is_inverted(depth: type[np.uint8] | type[np.uint16]) -> None:
    top = np.iinfo(depth).max
    samples = np.random.default_rng(4).integers(0, top + 1, (20, 30)).astype(depth)
    samples[0, 0] = top
    data = bytearray(encoded(samples, "TIFF"))
    photometric_interpretation, short = struct.pack("<HHIH", 262, 3, 1, 1), struct.pack("<HHIH", 262, 3, 1, 0)
    data[:] = data.replace(photometric_interpretation, short)  # 1, black is zero, becomes 0, white is zero
    assert read_header(bytes(data)).white_is_zero
    assert np.abs(decode_image(bytes(data))[..., 0] - (255 - samples * (255 / top))).max() <= 0.51


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.98])
def test_a_cut_off_file_is_an_error_not_half_a_picture(tmp_path: Path, name: str, kept: float) -> None:
    data = encoded(smooth_picture(300, 200), name)
    file = tmp_path / f"cut.{name.lower()}"
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=r"cannot read .*cut") as caught:
        read_image(file)
    assert caught.value.exit_code == 1


def test_a_progressive_jpeg_cut_between_its_scans_is_an_error() -> None:
    data = encoded(smooth_picture(300, 200), "JPEG", progressive=True)
    last_scan = data.rindex(b"\xff\xda")
    assert decode_image(data).shape == (200, 300, 3)
    with pytest.raises(UserError, match="cut off"):
        decode_image(data[:last_scan])


def test_a_jpeg_whose_tail_was_never_written_is_an_error() -> None:
    data = encoded(smooth_picture(300, 200), "JPEG")
    with pytest.raises(UserError, match="cut off"):
        decode_image(data[: len(data) // 2] + bytes(len(data) // 2))


def test_a_changed_byte_in_a_png_is_an_error() -> None:
    data = bytearray(encoded(smooth_picture(), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(UserError, match="checksum"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"hello, this is text", "not a JPEG"), (b"GIF89a" + bytes(40), "damaged"), (b"\xff", "not a")],
)
def test_other_content_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        decode_image(content, "scan.jpg")


def test_missing_folder_and_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match="not a file"):
        read_image(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        read_image(tmp_path / ("x" * 300 + ".png"))


def test_one_pixel_is_too_small() -> None:
    with pytest.raises(UserError, match="1x1 pixels, too small"):
        decode_image(encoded(np.zeros((1, 1, 3), np.uint8), "PNG"))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_size_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded an image over the limit"))
    with pytest.raises(UserError, match=r"20000x20000 pixels, over the limit of 100000000"):
        decode_image(png_header(20_000, 20_000))


def test_the_limit_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(smooth_picture(60, 44), "PNG")
    monkeypatch.setenv("ESPMEDSAM_MAX_PIXELS", str(60 * 44))
    assert decode_image(data).shape == (44, 60, 3)
    monkeypatch.setenv("ESPMEDSAM_MAX_PIXELS", str(60 * 44 - 1))
    with pytest.raises(UserError, match="over the limit"):
        decode_image(data)
    monkeypatch.setenv("ESPMEDSAM_MAX_PIXELS", "many")
    with pytest.raises(UserError, match="ESPMEDSAM_MAX_PIXELS=many"):
        decode_image(data)


def test_float_samples_are_refused() -> None:
    with pytest.raises(UserError, match="its samples have 32 bits, not 8 or 16"):
        decode_image(encoded(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF"))


def test_opencv_writes_nothing_of_its_own_to_stderr(tmp_path: Path) -> None:
    data = encoded(smooth_picture(), "TIFF", compression="tiff_lzw")
    damaged = bytearray(data)
    middle = len(data) // 2
    damaged[middle : middle + 20] = bytes(byte ^ 0x55 for byte in damaged[middle : middle + 20])
    (tmp_path / "a.tiff").write_bytes(bytes(damaged))
    (tmp_path / "b.tiff").write_bytes(encoded(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF"))
    script = (
        "from espmedsam_edge.imaging.decode import read_image\n"
        "from espmedsam_edge import UserError\n"
        "for name in 'ab':\n"
        "    try: read_image(f'{name}.tiff')\n"
        "    except UserError: pass\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ESPMEDSAM_DEBUG"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


ENCODED = [encoded(smooth_picture(24, 16), name) for name in (*FORMATS, "GIF")]


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from(ENCODED),
    edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 400),
)
def test_damaged_files_give_a_frame_or_one_clear_error(data: bytes, edits: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(data)
    for position, value in edits:
        # Half of the edits hit the headers, where sizes, offsets and counts are.
        damaged[position % len(damaged) if position % 2 else position % min(len(damaged), 120)] = value
    del damaged[len(damaged) - cut % len(damaged) :]
    try:
        frame = decode_image(bytes(damaged))
    except UserError:
        return
    assert frame.dtype == np.uint8
    assert frame.ndim == 3
    assert frame.shape[2] == 3


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [
            *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0+", b"BM", b"RIFF\0\0\0\0WEBP", b"GIF89a"),
            b"\0\0\0\x14ftypheic\0\0\0\0mif1\0\0\0\x40meta\0\0\0\0",
        ]
    ),
    st.binary(),
)
def test_headers_of_noise_never_raise_anything_else(start: bytes, rest: bytes) -> None:
    try:
        header = read_header(start + rest)
    except HeaderError:
        return
    assert header.width >= 0
    assert header.height >= 0


@pytest.mark.parametrize("part", [1.0, 0.2])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_tiffs_are_scaled_by_the_bits_they_state(bits: int, part: float) -> None:
    """However dark they are; their samples are given as stored."""
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs", reason="packs the samples")
    top = (1 << bits) - 1
    samples = (np.random.default_rng(bits).random((20, 30)) * part * top).astype(np.uint16)
    stream = io.BytesIO()
    tifffile.imwrite(stream, samples, bitspersample=bits, photometric="minisblack")
    assert np.abs(decode_image(stream.getvalue())[..., 1] - samples * (255 / top)).max() <= 1


def test_samples_of_packed_tiffs_are_as_stored_and_no_part_of_a_folders_scale(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs", reason="packs the samples")
    labels = np.random.default_rng(1).integers(0, 900, (20, 30)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", labels, bitspersample=12, photometric="minisblack")
    assert np.array_equal(read_samples(tmp_path / "a.tif"), labels)
    assert largest_sample(tmp_path / "a.tif") is None


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.2])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_avifs_of_more_bits_are_scaled_by_the_bits_they_state(bits: int, part: float, grey: bool) -> None:
    codecs = pytest.importorskip("imagecodecs", reason="writes AVIF of more than 8 bits")
    if "AVIF:                        avif" not in cv2.getBuildInformation():
        pytest.skip("OpenCV is built without AVIF")
    top = (1 << bits) - 1
    picture = smooth_picture()[..., 0] if grey else smooth_picture()
    samples = np.rint(picture * (part * top / 255)).astype(np.uint16 if bits > 8 else np.uint8)
    data = bytes(codecs.avif_encode(samples, level=100, bitspersample=bits))
    got = decode_image(data)[..., ::-1]
    expected = np.stack([samples] * 3, axis=-1) if grey else samples
    assert np.abs(got - expected * (255 / top)).max() <= 1.5


@pytest.mark.parametrize(
    ("start", "remedy"), [(b"\xff\x4f\xff\x51", "Convert it to PNG."), (b"GIF89a", "Copy it again")]
)
def test_a_whole_file_of_another_kind_is_not_to_be_copied_again(start: bytes, remedy: str) -> None:
    with pytest.raises(UserError) as raised:
        decode_image(start + bytes(100))
    assert raised.value.hint.startswith(remedy)


def test_of_samples_in_several_pages_the_first_is_read_and_that_is_said(tmp_path: Path, said: list[str]) -> None:
    pages = [np.full((16, 16), value, np.uint8) for value in (255, 0)]
    cv2.imwritemulti(str(tmp_path / "a.tif"), pages)
    assert np.array_equal(read_samples(tmp_path / "a.tif"), pages[0])
    assert said == [f"{tmp_path / 'a.tif'} holds 2 pictures; the first is read."]


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("name", ["file", "service"])
def test_a_jpeg_that_lacks_only_its_end_mark_is_read(name: str, grey: bool, capfd: pytest.CaptureFixture[str]) -> None:
    picture = smooth_picture()[..., 0] if grey else smooth_picture()
    whole = cv2.imencode(".jpg", picture)[1].tobytes()
    decoder = PictureDecoder()
    read = decode_image if name == "file" else decoder.decode
    expected = decode_image(whole)
    assert np.array_equal(read(whole[:-2]), expected)
    for missing in (*range(4, 12), 40, 200):
        with pytest.raises(UserError, match="cut off"):
            read(whole[:-missing])
    decoder.close()
    assert "".join(capfd.readouterr()) == ""  # nothing of libjpeg's


@pytest.mark.parametrize("option", [cv2.IMWRITE_JPEG_PROGRESSIVE, cv2.IMWRITE_JPEG_RST_INTERVAL])
def test_a_jpeg_of_several_parts_needs_its_end_mark(option: int) -> None:
    """Whether a part is missing cannot be told."""
    whole = cv2.imencode(".jpg", smooth_picture(), [option, 1])[1].tobytes()
    decode_image(whole)
    with pytest.raises(UserError, match="cut off"):
        decode_image(whole[:-2])
