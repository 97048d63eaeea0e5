"""Checkpoints on disk: exact round trips, smaller storage, damage, partial contents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import scrambled_model
from safetensors.torch import save_file

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.modalities import register
from espmedsam_edge.model.checkpoint import CheckpointInfo, load_checkpoint, read_checkpoint, save_checkpoint


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
    save_checkpoint(tmp_path / "half.safetensors", model, info, torch.float16)
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
