"""The U-Net baseline: trained in the package's own loop, kept, resumed, and asked for one modality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch", reason="training needs torch (extra train)")
pytest.importorskip("monai", reason="the U-Net is MONAI's (extra train)")

ROOT = Path(__file__).parents[2]
TINY = (
    "model.preset=espmedsam-tiny", "model.image_size=64", "model.image_sizes={}", "data.windows={}", "data.phantoms=2",
    'data.only=["fundus", "xray"]', "run.batch_size=2", "run.steps_per_epoch=2", "run.epochs=2", "run.sheet_images=0",
    "run.precision=32-true",
)  # fmt: skip


@pytest.fixture
def unet(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script("benchmarks/unet.py")


def test_each_modality_has_its_channel(unet: ModuleType) -> None:
    torch.manual_seed(0)
    network = unet.UNet(["fundus", "xray"]).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole = network.net(images)
        for place, modality in enumerate(("fundus", "xray")):
            assert torch.equal(network(images, modality).low_res_logits, whole[:, place : place + 1])
        assert not torch.equal(whole[:, :1], whole[:, 1:])


def test_it_learns_by_the_recipe_is_kept_and_goes_on(unet: ModuleType, tmp_path: Path) -> None:
    recipe = unet.load_recipe(unet.RECIPE, TINY).for_stage("segment")
    file, progress = unet.train_unet(recipe, tmp_path / "run", resume=False)
    assert (progress.step, progress.finished) == (4, True)
    assert progress.best is not None
    kept = unet.load(unet.UNET, file, recipe)
    torch.manual_seed(recipe.run.seed)
    start = unet.UNet(["fundus", "xray"])
    changed = [not torch.equal(one, two) for one, two in zip(kept.parameters(), start.parameters(), strict=True)]
    assert all(changed[: len(changed) // 2])
    again, same = unet.train_unet(recipe, tmp_path / "run", resume=True)
    assert (again, same.step, same.best) == (file, 4, progress.best)


def test_it_is_exported_timed_and_counted(unet: ModuleType) -> None:  # ours is exported in tests/export
    recipe = unet.load_recipe(unet.RECIPE, TINY).for_stage("segment")
    networks = {"U-Net": unet.UNet(["fundus", "xray"])}
    found = unet.time_in_turn(networks, recipe, rounds=1)
    assert list(found) == ["64"]
    assert set(found["64"]["ms"]) == {"U-Net, PyTorch", "U-Net, ONNX Runtime"}
    convolutions = [m for m in networks["U-Net"].modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
    weights = sum(convolution.weight.numel() for convolution in convolutions)
    assert weights * 4 * 4 < found["64"]["mac"]["U-Net"] < weights * 64 * 64  # each at 4 x 4 pixels or more


@pytest.mark.parametrize(("minutes", "says"), [("0", "no time to train"), ("1", "no dataset folder")])
def test_wrong_use_is_told_before_any_training(
    unet: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    minutes: str,
    says: str,
) -> None:
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["unet.py", "--name", "unet-x", "--minutes", minutes, *places])
    with pytest.raises(SystemExit) as left:
        unet.main()
    assert left.value.code == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
