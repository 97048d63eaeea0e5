"""tools/join_bags.py: bags that were trained apart, in one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import scrambled_model

from espmedsam_edge.errors import UserError
from espmedsam_edge.model.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.training.trainable import modality_names


def a_run(folder: Path, model: EspMedSam, *, changed: set[str]) -> Path:
    """A run's folder whose weights differ from the model's in the parameters named alone."""
    folder.mkdir()
    state = {name: value + 1 if name in changed else value for name, value in model.state_dict().items()}
    facts = {"steps": "60", "best_score": "0.9500", "recipe_sha256": "0123456789abcdef"}
    save_checkpoint(
        folder / "weights.safetensors", state,
        CheckpointInfo(config=model.config, origin="trained", targets={"fundus": "f", "xray": "x"}, provenance=facts),
    )  # fmt: skip
    (folder / "valid.csv").write_text("step,epoch,modality,score\n0,0,x,0.9\n60,1,x,0.95\n")
    return folder


def test_each_bag_comes_from_its_run_and_the_rest_stays(tmp_path: Path, load_script: Callable[[str], Any]) -> None:
    tool, model = load_script("tools/join_bags.py"), scrambled_model()
    facts = {"init": "scratch", "then_xray": "once before"}
    save_checkpoint(
        tmp_path / "base.safetensors", model, CheckpointInfo(config=model.config, origin="trained", provenance=facts)
    )
    own = {name: modality_names(model, name) for name in ("fundus", "xray")}
    runs = {name: a_run(tmp_path / name, model, changed=own[name]) for name in own}
    tool.join(tmp_path / "base.safetensors", {"xray": runs["xray"]}, tmp_path / "one.safetensors")
    tool.join(tmp_path / "base.safetensors", runs, tmp_path / "both.safetensors")
    image = torch.randn(1, 3, 64, 64)
    before, of_run = model(image, "xray"), load_checkpoint(runs["xray"] / "weights.safetensors")[0](image, "xray")
    assert not torch.equal(before[0], of_run[0])
    one, info = load_checkpoint(tmp_path / "one.safetensors")
    assert all(map(torch.equal, one(image, "xray"), of_run))
    assert all(map(torch.equal, one(image, "fundus"), model(image, "fundus")))
    assert info.provenance["init"] == "scratch"
    assert info.provenance["then_xray"].startswith("once before; ")
    assert "60 steps, validation 0.9000 to 0.9500" in info.provenance["then_xray"]
    both, _ = load_checkpoint(tmp_path / "both.safetensors")
    assert all(map(torch.equal, both(image, "xray"), of_run))
    assert not torch.equal(both(image, "fundus")[0], model(image, "fundus")[0])


def test_a_run_that_changed_what_all_share_is_refused(tmp_path: Path, load_script: Callable[[str], Any]) -> None:
    tool, model = load_script("tools/join_bags.py"), scrambled_model()
    save_checkpoint(tmp_path / "base.safetensors", model, CheckpointInfo(config=model.config, origin="trained"))
    shared = next(name for name, _ in model.named_parameters() if name.startswith("encoder."))
    run = a_run(tmp_path / "run", model, changed={*modality_names(model, "xray"), shared})
    with pytest.raises(UserError, match=r"changed encoder\..*all modalities share"):
        tool.join(tmp_path / "base.safetensors", {"xray": run}, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
