"""Packed checkpoints: small, readable without torch, true to their tensors, and refused when damaged."""

from __future__ import annotations

import json
import lzma
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espmedsam_edge.errors import UserError
from espmedsam_edge.shipped.packed import read_packed, write_packed


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "linear": rng.standard_normal((96, 64)).astype(np.float32)
        * np.geomspace(1e-4, 10, 96, dtype=np.float32)[:, None],
        "conv": rng.standard_normal((32, 8, 3, 3)).astype(np.float32),
        "with a row of zeros": np.vstack([np.zeros((1, 4096)), np.ones((1, 4096))]).astype(np.float32),
        "norm": rng.standard_normal(64).astype(np.float32),
        "table": rng.integers(0, 1000, (50, 50)),
    }


def test_tensors_come_back_within_half_a_step_of_their_row(tmp_path: Path) -> None:
    arrays = _arrays()
    size = write_packed(tmp_path / "w.safetensors.xz", arrays, {"about": "é"})
    back, metadata = read_packed(tmp_path / "w.safetensors.xz")
    assert metadata == {"about": "é"}
    assert set(back) == set(arrays)
    for name in ("norm", "table"):
        assert np.array_equal(back[name], arrays[name])
        assert back[name].dtype == arrays[name].dtype
    for name in ("linear", "conv", "with a row of zeros"):
        rows = arrays[name].reshape(len(arrays[name]), -1)
        step = np.abs(rows).max(axis=1, keepdims=True) / 127
        error = np.abs(back[name].reshape(rows.shape) - rows)
        assert (error <= 0.5 * step * (1 + 1e-5)).all()  # rounding of the scale itself
        assert back[name].dtype == np.float32
    assert size < 0.5 * sum(value.nbytes for value in arrays.values())


def test_fewer_levels_take_less_room_and_coarser_steps(tmp_path: Path) -> None:
    arrays = _arrays()
    sizes = [
        write_packed(tmp_path / f"{levels}.safetensors.xz", arrays, {}, lambda name, n=levels: n)
        for levels in (127, 31)
    ]
    assert sizes[1] < 0.85 * sizes[0]
    rows = arrays["linear"]
    back = read_packed(tmp_path / "31.safetensors.xz")[0]["linear"]
    step = np.abs(rows).max(axis=1, keepdims=True) / 31
    assert (np.abs(back - rows) <= 0.5 * step * (1 + 1e-5)).all()


def test_unpacked_by_xz_it_is_a_safetensors_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors (extra train)")
    arrays = _arrays()
    write_packed(tmp_path / "w.safetensors.xz", arrays, {"a": "b"})
    stored = safetensors.load(lzma.decompress((tmp_path / "w.safetensors.xz").read_bytes()))
    assert stored["linear"].dtype == np.int8
    assert stored["linear@scale"].shape == (96,)
    assert np.array_equal(stored["table"], arrays["table"])


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=60, deadline=None)
def test_damage_is_one_line(position: float, flip: int, cut: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("packed")
    path = folder / "w.safetensors.xz"
    write_packed(path, {"w": np.arange(4096, dtype=np.float32).reshape(64, 64)}, {})
    content = bytearray(path.read_bytes())
    place = int(position * len(content))
    if cut:
        del content[place:]
    else:
        content[place] ^= flip
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors\.xz") as caught:
        read_packed(path)
    assert "\n" not in str(caught.value)


def test_a_valid_xz_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b'{"a": {}}'):
        path = tmp_path / "x.safetensors.xz"
        path.write_bytes(lzma.compress(content))
        with pytest.raises(UserError, match="not a readable packed checkpoint"):
            read_packed(path)


def bomb(header: dict[str, object], body: int) -> bytes:
    """A packed file of zeros behind a header."""
    text = json.dumps(header).encode()
    return lzma.compress(len(text).to_bytes(8, "little") + text + bytes(body), preset=1)


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        ({}, 200 << 20, "holds more than its header says"),
        ({"a": {"dtype": "F32", "shape": [1 << 29], "data_offsets": [0, 1 << 31]}}, 200 << 20, "holds 2048 MiB"),
        ({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 5]}}, 5, "another size than its shape says"),
        ({"a": {"dtype": "I8", "shape": [-4], "data_offsets": [0, -4]}}, 5, "has no size"),
        ({"a": {"dtype": "I8", "shape": [True], "data_offsets": [0, 1]}}, 5, "has no size"),
        ({"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 4]}}, 4, "its header is none"),
        ({"a": 7}, 4, "its header is none"),
        ({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}, 3, "it ends early"),
    ],
)
def test_no_more_is_unpacked_than_the_header_says(
    tmp_path: Path, header: dict[str, object], body: int, words: str
) -> None:
    path = tmp_path / "w.safetensors.xz"
    path.write_bytes(bomb(header, body))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=words) as caught:
        read_packed(path)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # KiB


def entry(kind: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


SAME_PLACE = {f"a{i}": entry("I8", [4096, 256], 0, 1 << 20) for i in range(200)}
SAME_PLACE |= {f"a{i}@scale": entry("F32", [4096], 1 << 20, (1 << 20) + (4096 << 2)) for i in range(200)}
SQUARE = {"a": entry("I8", [256, 1], 0, 256), "a@scale": entry("F32", [256, 1024], 256, 256 + (1 << 20))}


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        (SAME_PLACE, (1 << 20) + (4096 << 2), "does not begin where the tensor before it ends"),
        ({"a": entry("I8", [4], 4, 8)}, 8, "does not begin"),
        (SQUARE, 256 + (1 << 20), "belongs to nothing"),
        ({"a": entry("I8", [4], 0, 4), "a@scale": entry("F32", [], 4, 8)}, 8, "belongs to nothing"),
        ({"a": entry("I8", [], 0, 1), "a@scale": entry("F32", [], 1, 5)}, 5, "belongs to nothing"),
        ({"a": entry("I8", [2**62] * 200_000, 0, 4)}, 4, "has no size"),  # their product has millions of digits
    ],
)
def test_tensors_lie_one_behind_the_other_and_scales_fit(
    tmp_path: Path, header: dict[str, object], body: int, words: str
) -> None:
    path = tmp_path / "w.safetensors.xz"
    path.write_bytes(bomb(header, body))
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=words) as caught:
        read_packed(path)
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # KiB


def test_a_large_file_does_not_unpack_to_gigabytes(tmp_path: Path) -> None:
    size = 200 << 20
    text = json.dumps({"a": entry("I8", [size], 0, size)}).encode()
    noise = np.random.default_rng(0).bytes(2 << 20)
    content = lzma.compress(len(text).to_bytes(8, "little") + text + noise + bytes(size - len(noise)), preset=0)
    assert size < 200 * len(content)
    (tmp_path / "w.safetensors.xz").write_bytes(content)
    with pytest.raises(UserError, match="it says that it holds 200 MiB"):
        read_packed(tmp_path / "w.safetensors.xz")


def test_a_header_nested_without_end_is_one_line(tmp_path: Path) -> None:
    text = b"[" * 1_000_000
    (tmp_path / "w.safetensors.xz").write_bytes(lzma.compress(len(text).to_bytes(8, "little") + text))
    with pytest.raises(UserError, match="nested too deeply"):
        read_packed(tmp_path / "w.safetensors.xz")
    long = (1 << 40).to_bytes(8, "little") + bytes(1 << 20)
    (tmp_path / "w.safetensors.xz").write_bytes(lzma.compress(long))
    with pytest.raises(UserError, match="its header is too long"):
        read_packed(tmp_path / "w.safetensors.xz")
