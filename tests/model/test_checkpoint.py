"""Checkpoints on disk: exact round trips, smaller storage, damage, partial contents."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import scrambled_model
from safetensors.torch import save_file
from swapping import swap_when_opened

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.modalities import register
from espmedsam_edge.model import checkpoint
from espmedsam_edge.model.checkpoint import (
    CheckpointInfo,
    load_checkpoint,
    load_hashed_checkpoint,
    read_checkpoint,
    read_foreign,
    read_hashed_foreign,
    save_checkpoint,
)
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.model.teacher_checkpoint import load_teacher
from espmedsam_edge.training.state import read_state


@pytest.mark.parametrize("published", [False, True])
def test_round_trip_is_exact(tmp_path: Path, published: bool) -> None:
    model = scrambled_model(published=published)
    info = CheckpointInfo(
        config=model.config,
        origin="trained",
        normalization=Normalization(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)),
        provenance={"recipe": "r.toml"},
    )
    save_checkpoint(tmp_path / "w.safetensors", model, info)
    loaded, read = load_checkpoint(tmp_path / "w.safetensors")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, model(image, "xray"), loaded(image, "xray")))
    assert read.modalities == ["fundus", "xray"]
    assert read.targets["fundus"] == "retinal vessels"
    assert (read.config, read.normalization, read.provenance) == (info.config, info.normalization, info.provenance)


def test_a_users_own_modality_travels_with_its_target(tmp_path: Path) -> None:
    register("endomicroscopy", "crypts")
    model = scrambled_model(modalities=["endomicroscopy"])
    save_checkpoint(tmp_path / "w.safetensors", model, CheckpointInfo(config=model.config, origin="trained"))
    assert load_checkpoint(tmp_path / "w.safetensors")[1].targets == {"endomicroscopy": "crypts"}


def test_half_storage_halves_the_file_and_loads_as_float32(tmp_path: Path) -> None:
    model = scrambled_model()
    info = CheckpointInfo(config=model.config, origin="trained")
    save_checkpoint(tmp_path / "full.safetensors", model, info)
    half = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "half.safetensors", half, info)
    sizes = [(tmp_path / name).stat().st_size for name in ("half.safetensors", "full.safetensors")]
    assert sizes[0] < 0.6 * sizes[1]
    state, _ = read_checkpoint(tmp_path / "half.safetensors")
    assert state["encoder.neck.0.weight"].dtype == torch.float32
    torch.testing.assert_close(state["encoder.neck.0.weight"], model.encoder.neck[0].weight, rtol=1e-3, atol=1e-4)


def _write(path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"encoder.x": torch.zeros(3)}, path, metadata=metadata)


def _info(**changes: object) -> dict[str, str]:
    config = scrambled_model().config
    info = CheckpointInfo(config=config, origin="random", targets={"fundus": "vessels"}).model_dump(mode="json")
    return {"espmedsam": json.dumps({**info, **changes})}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (None, "not a checkpoint of this project"),
        ({"espmedsam": "{"}, "metadata is not valid"),
        ({"espmedsam": "{}"}, "metadata is not valid"),
        (_info(format_version=2), "newer version"),
        (_info(targets={"../x": "y"}), "metadata is not valid"),
        (_info(), "does not fit its configuration"),
        (_info(parts=["encoder"]), "Train from it first"),
    ],
)
def test_unfit_metadata_is_named(tmp_path: Path, metadata: dict[str, str] | None, says: str) -> None:
    _write(tmp_path / "w.safetensors", metadata)
    with pytest.raises(UserError, match=says):
        load_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_checkpoint_is_refused(tmp_path: Path, keep: int) -> None:
    model = scrambled_model()
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, model, CheckpointInfo(config=model.config, origin="random"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_checkpoint(path)


def test_a_foreign_file_is_sent_to_import(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="espmedsam-edge import"):
        load_checkpoint(tmp_path / "w.pth")


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_checkpoints_have_one_ending(tmp_path: Path) -> None:
    model = scrambled_model()
    with pytest.raises(UserError, match=r"end in \.safetensors"):
        save_checkpoint(tmp_path / "w.bin", model, CheckpointInfo(config=model.config, origin="random"))
    assert list(tmp_path.iterdir()) == []


def hostile(path: Path, change: dict[str, object], targets: dict[str, str] | None = None) -> None:
    """A small, whole checkpoint whose header says something else of its sizes."""
    model = scrambled_model(modalities=["fundus"])
    info = CheckpointInfo(config=model.config, targets={"fundus": "retinal vessels"}, origin="trained")
    values = info.model_dump(mode="json")
    for key, value in change.items():
        place = values["config"]["encoder"] if key in values["config"]["encoder"] else values["config"]
        place[key] = value
    values["targets"] = targets or values["targets"]
    save_file(dict(model.state_dict()), path, metadata={"espmedsam": json.dumps(values)})


@pytest.mark.parametrize(
    "change",
    [
        {"decoder_mlp": 10**9},
        {"decoder_mlp": 60_000},
        {"bag_tokens": 10**8},
        {"bag_tokens": 1000},
        {"windows": [7, 7, 100_000, 7]},
        {"windows": [7, 7, 24, 7]},
        {"depths": [1, 1, 10**6, 1]},
        {"depths": [16, 16, 16, 16]},
        {"decoder_depth": 10**6},
        {"dims": [8192, 8192, 8192, 8192], "heads": [1, 1, 1, 1]},
        {"embed_dim": 8192},
        {"mlp_ratio": 1e9},
        {"mlp_ratio": 16},
        {"bag_mlp_ratio": float("inf")},
        {"patch_width": 8000},
        {"decoder_heads": 0},
    ],
)
def test_sizes_that_are_not_those_of_the_file_s_tensors_take_no_memory(
    tmp_path: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(tmp_path / "w.safetensors", change)
    made: list[object] = []
    monkeypatch.setattr(EspMedSam, "eval", lambda self: made.append(self))
    begin = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"metadata is not valid \(config|does not fit its configuration") as caught:
        load_checkpoint(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)
    assert time.process_time() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB
    assert not made


def test_modalities_without_tensors_are_refused_at_once(tmp_path: Path) -> None:
    hostile(tmp_path / "many.safetensors", {}, {f"m{number}": "x" for number in range(100_000)})
    with pytest.raises(UserError, match=r"metadata is not valid \(targets"):
        load_checkpoint(tmp_path / "many.safetensors")
    hostile(tmp_path / "two.safetensors", {}, {"fundus": "vessels", "xray": "lungs"})
    with pytest.raises(UserError, match="it holds nothing of xray"):
        load_checkpoint(tmp_path / "two.safetensors")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "nonsense", "[]"])
def test_metadata_nested_without_end_is_one_line(tmp_path: Path, text: str) -> None:
    save_file({"encoder.x": torch.zeros(3)}, tmp_path / "w.safetensors", metadata={"espmedsam": text})
    with pytest.raises(UserError, match="metadata is not valid") as caught:
        read_checkpoint(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


def test_tensors_are_of_the_bytes_that_were_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened once; what takes its place afterwards is not read."""
    first, second = (scrambled_model(modalities=["fundus"], seed=seed) for seed in (1, 2))
    for name, model in (("first", first), ("second", second)):
        save_checkpoint(tmp_path / f"{name}.safetensors", model, CheckpointInfo(config=model.config, origin="trained"))
    path = tmp_path / "w.safetensors"
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("first", "second")]
    opened = swap_when_opened(monkeypatch, path, contents)
    loaded, _, sha256 = load_hashed_checkpoint(path)
    assert len(opened) == 1
    assert sha256 == hashlib.sha256(contents[0]).hexdigest()
    assert all(map(torch.equal, loaded.state_dict().values(), first.state_dict().values()))


def _archive(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in (("data.pkl", b"\x80\x02" + pickled + b"."), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"a/{name}", part)


def _compressed(path: Path) -> None:
    torch.save({"a": torch.zeros(20_000_000, dtype=torch.uint8)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_compressed, "its parts are compressed"),
        (lambda path: torch.save({"a": torch.zeros(4).as_strided((1 << 20, 1 << 20), (0, 0))}, path), "larger than"),
        (
            lambda path: torch.save({"a": torch.zeros(1 << 40, device="meta")}, path),
            "larger than the file|not a readable",
        ),
        (lambda path: _archive(path, b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R"), "other things than tensors"),
        (lambda path: _archive(path, b"t"), "not a readable checkpoint"),  # no such mark
        (lambda path: _archive(path, b"]" * 100_000), "holds no state dict"),
    ],
)
def test_a_small_foreign_file_takes_little(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path / "w.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=words):
        read_foreign(tmp_path / "w.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_foreign_tensors_are_of_the_bytes_that_were_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    contents = []
    for value in (1.0, 2.0):
        state = {"image_encoder.pos_embed": torch.full((3,), value)}
        path = tmp_path / f"sam{suffix}"
        torch.save(state, path) if suffix == ".pth" else save_file(state, path)
        contents.append(path.read_bytes())
    opened = swap_when_opened(monkeypatch, path, contents)
    state, sha256 = read_hashed_foreign(path)
    assert len(opened) == 1
    assert sha256 == hashlib.sha256(contents[0]).hexdigest()
    assert state["image_encoder.pos_embed"].tolist() == [1, 1, 1]


def _sparse(path: Path, size: int) -> None:
    """A safetensors file of one tensor of zeros, which nobody wrote."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)


@pytest.mark.parametrize(
    "read", [read_checkpoint, read_foreign, read_state, load_teacher], ids=["checkpoint", "foreign", "state", "teacher"]
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_that_nobody_wrote_takes_no_memory(read: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    _sparse(tmp_path / name, 600 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize(
    "read", [read_checkpoint, read_foreign, read_state, load_teacher], ids=["checkpoint", "foreign", "state", "teacher"]
)
@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"a": {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}}, "F4"),
        ({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}, "over 20000"),
    ],
    ids=["type", "count"],
)
def test_types_and_numbers_of_tensors_that_no_network_has_are_one_line(
    read: Callable[[Path], object], table: dict[str, object], words: str, tmp_path: Path
) -> None:
    header = json.dumps(table).encode()
    body = bytes(16 if words == "F4" else 0)
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        read(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)
    assert read is read_state or words in str(caught.value)
    assert time.process_time() - began < 5


def test_a_checkpoint_s_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scrambled_model(modalities=["fundus"])
    save_checkpoint(tmp_path / "w.safetensors", model, CheckpointInfo(config=model.config, origin="trained"))
    size = (tmp_path / "w.safetensors").stat().st_size
    monkeypatch.setattr(checkpoint, "_MOST_BYTES", size)
    load_checkpoint(tmp_path / "w.safetensors")
    monkeypatch.setattr(checkpoint, "_MOST_BYTES", size - 1)
    with pytest.raises(UserError, match=f"over {size - 1} bytes"):
        load_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["sam.pth", "sam.safetensors"])
def test_a_foreign_checkpoint_s_size_is_bounded(tmp_path: Path, name: str) -> None:
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"is not a readable checkpoint \(over \d+ bytes\)"):
        read_foreign(tmp_path / name)
