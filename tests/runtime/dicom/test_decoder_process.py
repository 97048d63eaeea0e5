"""Decoders in a child process: the same pixels as in this one; after one that dies or hangs the next frame works."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import numpy as np
import pytest

from espmedsam_edge.runtime.dicom import decoder_process
from espmedsam_edge.runtime.dicom.decoder_process import DecoderProcess, decode

pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
jpeg_ls = pytest.importorskip("jpeg_ls", reason="needs pyjpegls (extra dicom)")

JPEG_LS, JPEG_LOSSLESS = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.70"
PICTURE = np.random.default_rng(0).integers(0, 4096, (40, 60), np.uint16)
OPTIONS = {
    "rows": 40,
    "columns": 60,
    "number_of_frames": 1,
    "samples_per_pixel": 1,
    "photometric_interpretation": "MONOCHROME2",
    "bits_allocated": 16,
    "bits_stored": 12,
    "pixel_representation": 0,
}


@pytest.fixture
def child() -> Iterator[DecoderProcess]:
    process = DecoderProcess()
    yield process
    process.close()


def pid_of(child: DecoderProcess) -> int:
    assert child._child._process is not None
    return child._child._process.pid


def test_the_child_decodes_what_this_process_does(child: DecoderProcess) -> None:
    codestream = bytes(jpeg_ls.encode_array(PICTURE))
    for plugin in ("pyjpegls", "gdcm"):
        found = child.decode(codestream, JPEG_LS, plugin, OPTIONS)
        np.testing.assert_array_equal(found, PICTURE)
        assert found.dtype == decode(codestream, JPEG_LS, plugin, OPTIONS).dtype == np.uint16


def test_what_a_decoder_refuses_leaves_the_child_as_it_is(child: DecoderProcess) -> None:
    whole = bytes(jpeg_ls.encode_array(PICTURE))
    child.decode(whole, JPEG_LS, "pyjpegls", OPTIONS)
    before = pid_of(child)
    with pytest.raises(ValueError, match="plugins"):
        child.decode(b"\xff\xd8 no picture", JPEG_LS, "pyjpegls", OPTIONS)
    np.testing.assert_array_equal(child.decode(whole, JPEG_LS, "pyjpegls", OPTIONS), PICTURE)
    assert pid_of(child) == before


@pytest.mark.parametrize(
    ("syntax", "codestream"),
    [
        (JPEG_LS, "ffd8 fff7000bff 0040 0060 01 011100 ffda0008010100000000 00 ffd9"),  # 255 bits a sample
        (JPEG_LOSSLESS, "ffd8 ffc3000b08 0040 0060 01 011100 ff0000 ffda0008010100010000 f2f52c8661c7fa1d0e8f45"),
    ],
)
def test_data_that_end_gdcm_do_not_end_this_process(child: DecoderProcess, syntax: str, codestream: str) -> None:
    pytest.importorskip("gdcm", reason="needs GDCM (extra dicom)")
    options = OPTIONS | {"rows": 64, "columns": 96, "bits_allocated": 8, "bits_stored": 8}
    with pytest.raises((EOFError, OSError, ValueError)):  # 3.2.6 dies, another release may say no
        child.decode(bytes.fromhex(codestream), syntax, "gdcm", options)
    np.testing.assert_array_equal(child.decode(bytes(jpeg_ls.encode_array(PICTURE)), JPEG_LS, "gdcm", OPTIONS), PICTURE)


def test_a_frame_that_takes_too_long_is_given_up(child: DecoderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bytes(jpeg_ls.encode_array(PICTURE))
    child.decode(whole, JPEG_LS, "gdcm", OPTIONS)
    monkeypatch.setattr(decoder_process, "_SECONDS", 0.2)
    os.kill(pid_of(child), signal.SIGSTOP)  # from here on it does nothing
    began = time.monotonic()
    with pytest.raises(EOFError, match="ended"):
        child.decode(whole, JPEG_LS, "gdcm", OPTIONS)
    assert time.monotonic() - began < 60
    monkeypatch.undo()
    np.testing.assert_array_equal(child.decode(whole, JPEG_LS, "gdcm", OPTIONS), PICTURE)


def test_the_child_ends_with_its_parent(child: DecoderProcess) -> None:
    child.decode(bytes(jpeg_ls.encode_array(PICTURE)), JPEG_LS, "gdcm", OPTIONS)
    process = child._child._process
    assert isinstance(process, subprocess.Popen)
    assert process.stdin is not None
    process.stdin.close()  # as the kernel does when the parent dies
    assert process.wait(60) == 0
