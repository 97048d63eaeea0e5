"""The peers' benchmark: rounds, a run that died and goes on, what each network computes, and the page from a result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from espmedsam_edge.errors import UserError

torch = pytest.importorskip("torch", reason="networks need torch (extra train)")

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "peers-epyc-2core.json"


@pytest.fixture
def peers(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script("benchmarks/peers.py")


def _facts(**settings: Any) -> dict[str, Any]:
    environment = {"time": "2026-01-01T00:00:00+00:00", "cpu": {"model": "C", "usable": 2, "frequency_mhz": 1.0}}
    environment |= {"gpus": [], "packages": {"torch": "9"}, "system": "S", "python": "3", "load_average_1min": 0.0}
    standard = {"device": "cpu", "threads": 2, "points_per_side": 32, "rounds": 3, "automatic_rounds": 1}
    return {"kind": "peers", "settings": {**standard, "picture": [1024, 1024], **settings}, "environment": environment}


def _nothing() -> None:
    """Waits for no GPU."""


def test_each_has_its_turn_in_every_round_and_a_run_that_died_goes_on(peers: ModuleType, tmp_path: Path) -> None:
    order: list[str] = []

    def turn(name: str, dies_at: int = -1) -> Any:
        def run() -> None:
            order.append(name)
            if order.count(name) == dies_at:
                raise KeyboardInterrupt

        return peers.Turn(name, run, warm=_nothing)

    path = tmp_path / "r.json"
    record = peers.Record(path, _facts(), resume=False)
    with pytest.raises(KeyboardInterrupt):
        record.take("one box", [turn("a"), turn("b", dies_at=2), turn("a"), turn("c")], 3, _nothing)
    assert order == ["a", "b", "a", "c", "a", "b"]
    left = json.loads(path.read_text())["seconds"]["one box"]
    assert {name: len(found) for name, found in left.items()} == {"a": 3, "b": 1, "c": 1}

    order.clear()
    again = peers.Record(path, _facts(), resume=True)
    again.take("one box", [turn("a"), turn("b"), turn("a"), turn("c")], 3, _nothing)
    assert order == ["b", "a", "c", "a", "b", "a", "c"]
    whole = json.loads(path.read_text())
    assert {name: len(found) for name, found in whole["seconds"]["one box"].items()} == {"a": 6, "b": 3, "c": 3}
    assert whole["seconds"]["one box"]["a"][:3] == left["a"]
    assert len(whole["resumed"]) == 1


def test_one_that_fails_is_named_and_the_others_are_measured(peers: ModuleType, tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("no such operator\nat line 3")

    record = peers.Record(tmp_path / "r.json", _facts(), resume=False)
    record.take("encoder", [peers.Turn("bad", broken), peers.Turn("good", _nothing)], 2, _nothing)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["failed"] == {"encoder": {"bad": "RuntimeError: no such operator"}}
    assert [len(times) for times in found["seconds"]["encoder"].values()] == [2]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda f: f["settings"].update(rounds=4), "settings"),
        (lambda f: f["environment"]["cpu"].update(model="D"), "cpu"),
        (lambda f: f["environment"]["packages"].update(torch="10"), "packages"),
        (lambda f: f["environment"].update(gpus=[{"name": "G"}]), "gpus"),
    ],
)
def test_times_of_other_machines_packages_and_settings_are_not_mixed(
    peers: ModuleType, tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    peers.Record(tmp_path / "r.json", _facts(), resume=False)
    same = _facts()
    same["environment"]["cpu"]["frequency_mhz"] = 2.0  # changes by the second
    peers.Record(tmp_path / "r.json", same, resume=True)
    change(other := _facts())
    with pytest.raises(UserError, match=f"of other {what}"):
        peers.Record(tmp_path / "r.json", other, resume=True)
    (tmp_path / "r.json").write_text("[1")
    with pytest.raises(UserError, match="no result of this script"):
        peers.Record(tmp_path / "r.json", _facts(), resume=True)


def test_the_one_pass_is_what_the_bundle_computes(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.ON, "cpu", ("encoder onnxruntime",))
    ours = peers.Ours("cpu", 2)
    frame = peers.phantom(peers.MODALITY, 1, (300, 400))[0]
    mask = ours.one_pass(frame)
    assert mask.shape == (300, 400)
    assert 0 < (mask > 0).mean() < 1
    with ours.segmenters["encoder onnxruntime"] as segmenter:
        assert (mask == segmenter.segment(frame).mask).mean() > 0.9999


def test_a_peer_gives_a_mask_of_a_box_and_is_asked_for_every_point(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mobile_sam", reason="a peer (extra peers)")
    monkeypatch.setattr("peers_networks.POINTS_PER_BATCH", 3)
    row = next(row for row in peers.ROWS if row.name == "MobileSAM")
    one, same, other = (peers.Peer(row, seed, "cpu") for seed in (0, 0, 1))
    weights = [next(peer.encoder.parameters()) for peer in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    encoded: list[tuple[int, ...]] = []
    one.sam.image_encoder.register_forward_hook(lambda _, given, __: encoded.append(tuple(given[0].shape)))
    asked: list[int] = []
    one.sam.mask_decoder.register_forward_pre_hook(
        lambda _, __, given: asked.append(len(given["sparse_prompt_embeddings"])), with_kwargs=True
    )
    picture = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    assert one.one_box(picture).shape == (200, 300)
    one.everything(picture, 2)
    assert encoded == [(1, 3, 1024, 1024)] * 2
    assert asked == [1, 3, 1]  # the box; 2 x 2 points in batches of three


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["measure", "--name", "x", "--figures", "encoder onnxruntime cuda"], "is not of cpu"),
        (["measure", "--name", "x", "--rounds", "0"], "must be 1 or more"),
        (["page", "nothing"], "Run measure first"),
    ],
)
def test_wrong_use_is_told_before_anything_runs(
    peers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    folders = ["--out", str(tmp_path), "--docs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["peers.py", *options, *folders])
    with pytest.raises(SystemExit) as left:
        peers.main()
    assert left.value.code == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _measured(**seconds: dict[str, list[float]]) -> dict[str, Any]:
    counts = {"parameters": 10_000_000, "encoder_mac": 20 * 10**9, "prompt_mac": 10**9}
    data = {**_facts(), "counts": {"EdgeSAM": counts, "ESP-MedSAM-S": counts}, "kept": {}, "failed": {}, "others": {}}
    return {**data, "seconds": {name.replace("_", " "): found for name, found in seconds.items()}}


def test_the_page_says_what_was_measured_and_no_more(peers: ModuleType, tmp_path: Path) -> None:
    result = _measured(
        encoder={"EdgeSAM": [0.5, 0.7, 0.6], "ESP-MedSAM-S": [1.0]},
        one_box={"EdgeSAM": [0.9], "MobileSAM": [1.8], "ESP-MedSAM-S": [1.2]},
        automatic={"EdgeSAM": [90.0], "MobileSAM": [99.0], "ESP-MedSAM-S": [1.0, 1.5, 1.4]},
    )
    result["failed"] = {"encoder openvino": {"RepViT-SAM": "RuntimeError: no such operator"}}
    (tmp_path / "one.json").write_text(json.dumps(result))
    peers.write_page([tmp_path / "one.json"], tmp_path / "docs")
    page = (tmp_path / "docs" / "peers.md").read_text()
    assert "| EdgeSAM | 10.00 | 9.60 | 20.0 | 21.0 | 22.10 | 1,044 |" in page  # 20 + 1024 x 1 GMAC
    assert "| **ESP-MedSAM-S** | 10.00 | 28.46 | 20.0 | 21.0 | 55.86 | 21 |" in page
    assert "| EdgeSAM | 600 | 900 | 90.00 | 64 | 0.80 | 10.3 |" in page
    assert "| SAM-Lightening |  |  |  |  | 0.98 | 12.6 |" in page
    assert "the fastest of them, EdgeSAM, takes 64 times as long as ESP-MedSAM-S." in page
    assert "EdgeSAM takes 0.75 times as long as our one pass, MobileSAM 1.50 times" in page
    assert "Not measured: encoder openvino of RepViT-SAM: RuntimeError: no such operator." in page
    assert "python benchmarks/peers.py measure --name one" in page
    assert "not for publishing" not in page
    plot = cv2.imread(str(tmp_path / "docs" / "images" / "peers.png"))
    assert plot is not None
    assert plot.shape[1] > 800

    result["others"] = {"encoder": 1.5}
    (tmp_path / "one.json").write_text(json.dumps(result))
    peers.write_page([tmp_path / "one.json"], tmp_path / "docs")
    assert "**Other work kept 1.5 cores busy meanwhile" in (tmp_path / "docs" / "peers.md").read_text()
    with pytest.raises(UserError, match="Run measure first"):
        peers.write_page([tmp_path / "none.json"], tmp_path / "docs")
    (tmp_path / "other.json").write_text('{"kind": "peers"}')
    with pytest.raises(UserError, match=r"other\.json is no result"):
        peers.write_page([tmp_path / "other.json"], tmp_path / "docs")


def test_the_plot_has_the_papers_mean_dice(peers: ModuleType, load_script: Callable[[str], ModuleType]) -> None:
    drawing = load_script("benchmarks/peers_page.py")
    result = _measured(automatic={"EdgeSAM": [90.0], "ESP-MedSAM-S": [1.0]}, one_box={"EdgeSAM": [0.9]})
    edge = np.mean([85.86, 94.52, 25.62, 76.41, 60.24, 59.68]), np.mean([88.10, 96.18, 68.04, 81.76, 67.64, 87.35])
    assert drawing.points(result) == [
        ("automatic mode", "EdgeSAM", 90.0, pytest.approx(edge[0])),
        ("one prompt by hand", "EdgeSAM", 0.9, pytest.approx(edge[1])),
        ("without prompts", "ESP-MedSAM-S", 1.0, pytest.approx(86.4, abs=0.005)),
    ]


def test_the_page_says_who_wins_of_unet_and_ours(peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "peers-x.json").write_text(json.dumps(_measured()))

    def scores(*dice: float) -> dict[str, Any]:
        sets = {"fundus": "drive", "xray": "lungs"}
        entries = ({"dice": one, "hd95": 9.0, "images": 7} for one in dice)
        return {modality: {name: entry} for (modality, name), entry in zip(sets.items(), entries, strict=True)}

    names = ("U-Net", "ESP-MedSAM-S")
    ms = {f"{name}, {runtime}": {"p50": 250.0} for name in names for runtime in ("PyTorch", "ONNX Runtime")}
    unet = {
        "kind": "unet",
        "recipe": "segment-s-cpu",
        "minutes": 30,
        "environment": _facts()["environment"],
        "times": {"448": {"ms": ms, "mac": dict.fromkeys(names, 15_300_000_000)}},
        "networks": {
            "U-Net": {"steps": 9, "parameters": 1_980_000, "scores": scores(70, 90)},
            "ESP-MedSAM-S": {"steps": 8, "parameters": 28_890_000, "scores": scores(60, 92)},
        },
    }
    (tmp_path / "unet-x.json").write_text(json.dumps(unet))
    peers.write_page([tmp_path / "peers-x.json"], tmp_path)
    page = (tmp_path / "peers.md").read_text()
    assert "**By the mean Dice of these sets the U-Net wins, 80.00 to 76.00**; the U-Net is ahead in 1 of 2." in page
    assert "| fundus | drive | 7 | 70.00 | 9.0 | 60.00 | 9.0 |" in page
    assert "| U-Net | 1.98 | 15.3 | 250 | 250 |" in page
    assert "unet.py --data ../shared/data --minutes 30 --name unet-x" in page
    unet["networks"]["U-Net"]["scores"] = scores(50, 93)
    (tmp_path / "unet-x.json").write_text(json.dumps(unet))
    peers.write_page([tmp_path / "peers-x.json"], tmp_path)
    assert "ESP-MedSAM-S wins, 76.00 to 71.50**; the U-Net is ahead in 1 of 2." in (tmp_path / "peers.md").read_text()
    del unet["times"]  # its run has not ended
    (tmp_path / "unet-x.json").write_text(json.dumps(unet))
    peers.write_page([tmp_path / "peers-x.json"], tmp_path)
    assert "U-Net" not in (tmp_path / "peers.md").read_text()


def test_published_figures_are_table_iiis(peers: ModuleType) -> None:
    published = {row.name: row.published for row in peers.ROWS if row.published[2]}
    assert published == {
        "MobileSAM": (9.79, 39.71, 1.05),
        "RepViT-SAM": (9.57, 23.64, 1.12),
        "EfficientViT-SAM-L0": (34.80, 89.10, 0.91),
        "EfficientSAM-S": (25.38, 32.51, 0.98),
        "EdgeSAM": (9.60, 22.10, 1.25),
        "SAM-Lightening": (19.26, 52.46, 1.02),
    }


def test_the_documented_page_is_drawn_from_its_result(
    peers: ModuleType, load_script: Callable[[str], ModuleType]
) -> None:
    drawing = load_script("benchmarks/peers_page.py")
    results = drawing.read_results([RESULT])
    assert (ROOT / "docs" / "peers.md").read_text() == drawing.page(results)
    counts = results[0]["counts"]
    assert set(counts) == {row.name for row in peers.ROWS if row.build} | {peers.OURS}
    # What the notes say of sizes is what was counted.
    for name, million, encoder in (("MobileSAM", 10.13, 38.8), ("RepViT-SAM", 27.2, 113), ("EdgeSAM", 9.6, 20.0)):
        assert counts[name]["parameters"] / 1e6 == pytest.approx(million, abs=0.06)
        assert counts[name]["encoder_mac"] / 1e9 == pytest.approx(encoder, abs=0.5)
    assert {round(found["prompt_mac"] / 1e9, 1) for name, found in counts.items() if name != peers.OURS} == {1.8}
    # What their authors published: parameters, and GMAC of encoder and prompt.
    for name, million, gmac in (("EdgeSAM", 9.6, 22.1), ("EfficientViT-SAM-L0", 34.8, 35)):
        assert counts[name]["parameters"] / 1e6 == pytest.approx(million, abs=0.05)
        assert (counts[name]["encoder_mac"] + counts[name]["prompt_mac"]) / 1e9 == pytest.approx(gmac, rel=0.05)
