"""What commands besides ``infer`` write and clean: over nothing of the user's."""

from __future__ import annotations

import os
import time
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.destinations import Claims, Destination, check_destinations, claimed
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.marks import FRAMES
from espmedsam_edge.runtime.bundle_choice import choose_bundle
from espmedsam_edge.runtime.engines.inventory import clean


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """A command's exit code and what it said on standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "histopathology" / "drive"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
        cv2.imwrite(str(folder / name / "a.png"), np.random.default_rng(2).integers(0, 2, (32, 32), np.uint8) * 255)
    return folder


@pytest.mark.parametrize("option", ["--json", "--csv", "--worst"])
def test_evaluate(toy_bundle: Bundle, dataset: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    command = ("evaluate", toy_bundle.path, dataset, "--split", "all", "--size", 64, option)
    place = dataset.parent / "o"
    file = place / "histopathology-drive.png" if option == "--worst" else place
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    assert run(capsys, *command, place)[0] == 2
    assert file.read_text() == "mine"
    image = dataset / "images" / "a.png"
    before = image.read_bytes()
    if option != "--worst":
        code, error = run(capsys, *command, image, "--overwrite")
        assert (code, "would replace an input" in error) == (2, True)
    code, error = run(capsys, *command, toy_bundle.path, "--overwrite")
    assert code == 2
    assert image.read_bytes() == before
    assert run(capsys, *command, place, "--overwrite")[0] == 0
    assert run(capsys, *command, place)[0] == 0
    assert file.read_bytes() != b"mine"


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_bench(toy_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    place = tmp_path / "o"
    place.write_text("mine")
    code, error = run(capsys, "bench", toy_bundle.path, "--duration", 0.01, option, place)
    assert (code, "exists and is no" in error) == (2, True)
    assert place.read_text() == "mine"
    code, error = run(capsys, "bench", toy_bundle.path, option, toy_bundle.path / "new", "--overwrite")
    assert (code, "results do not go into it" in error) == (2, True)


@pytest.mark.parametrize("command", [("import", "sam"), ("import", "mobilesam"), ("export",), ("weights",)])
def test_checkpoints_and_bundles(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    """Refused before anything is read; a checkpoint that exists may be weeks of training, so it takes --overwrite."""
    place = tmp_path / "o.safetensors"
    if command[0] == "export":
        place.mkdir()
        (place / "manifest.json").write_text('{"name": "app"}')
    else:
        place.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    options = (tmp_path / "in.pth", "--out", place) if command != ("weights",) else ("--checkpoint", place)
    code, error = run(capsys, *command, *options)
    assert (code, error.count("\n"), f"{place} exists" in error) == (2, 1, True)
    with Claims() as other:
        fresh = tmp_path / "new.safetensors"
        with other.planning():
            other.add([fresh])
        options = (*options[:-1], fresh)
        assert "another run is writing to" in run(capsys, *command, *options)[1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["bundle", "cache"])
@pytest.mark.parametrize("command", ["segment", "prepare", "triton"])
def test_nothing_is_made_in_a_bundle_or_the_cache(
    toy_bundle: Bundle,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    place: str,
) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    there = toy_bundle.path / "new" if place == "bundle" else tmp_path / "cache" / "engines" / "new"
    options: dict[str, tuple[object, ...]] = {
        "segment": ("train", "segment", "smoke", "--set", "run.accelerator=cpu", "--out", there),
        "prepare": ("data", "prepare", "udiat", dataset, there),
        "triton": ("deploy", "triton", toy_bundle.path, "--engine", "python", "--out", there),
    }
    before = sorted(tmp_path.rglob("*"))
    code, error = run(capsys, *options[command])
    assert code == 2
    assert "results do not go into it" in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["segment", "all", "prepare", "calibrate"])
def test_what_another_run_writes_is_left_to_it(
    toy_bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    options: dict[str, tuple[object, ...]] = {
        "segment": ("train", "segment", "smoke", "--set", "run.accelerator=cpu", "--out", tmp_path / "new"),
        "all": ("train", "all", "smoke", "--set", "run.accelerator=cpu", "--out", tmp_path / "new"),
        "prepare": ("data", "prepare", "udiat", tmp_path, tmp_path / "new"),
        "calibrate": ("calibrate", toy_bundle.path, dataset, "--precision", "fp16", "--images", 1, "--held-out", 1),
    }
    place = {"prepare": tmp_path / "new", "calibrate": toy_bundle.path / "fp16.onnx"}
    before = sorted(tmp_path.rglob("*"))
    with Claims() as other:
        with other.planning():
            other.add([place.get(command, tmp_path / "new" / "weights.safetensors")])
        code, error = run(capsys, *options[command])
        assert (code, "another run is writing to" in error) == (1, True), error
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluate_and_bench_replace_nothing_that_they_read(
    toy_bundle: Bundle, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset / "split.json").write_text('{"test": ["a"]}')
    before = {file: file.read_bytes() for file in dataset.rglob("*") if file.is_file()}
    for file in before:
        for option in ("--json", "--csv"):
            command = ("evaluate", toy_bundle.path, dataset, "--size", 64, option, file, "--overwrite")
            code, error = run(capsys, *command)
            assert (code, "would replace an input" in error) == (2, True)
    image = dataset / "images" / "a.png"
    for source in (image.parent, dataset, image.with_name("*.png"), image):
        for option in ("--json", "--markdown", "--plot"):
            command = (
                "bench",
                toy_bundle.path,
                source,
                "--duration",
                0.01,
                "--no-roofline",
                option,
                image,
                "--overwrite",
            )
            code, error = run(capsys, *command)
            assert (code, "would replace an input" in error) == (2, True)
    assert {file: file.read_bytes() for file in dataset.rglob("*") if file.is_file()} == before


def test_a_table_that_came_meanwhile_stays(
    toy_bundle: Bundle, dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = dataset.parent / "o.csv"
    monkeypatch.setattr("espmedsam_edge.cli.evaluate._show", lambda *arguments: place.write_text("mine"))
    code, error = run(capsys, "evaluate", toy_bundle.path, dataset, "--split", "all", "--size", 64, "--csv", place)
    assert (code, f"{place} was put there meanwhile" in error) == (1, True)
    assert place.read_text() == "mine"


def test_the_demo(tmp_path: Path, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pictures/histopathology-1.png", "clip.mp4", "results.jsonl", "contact-sheet.png"):
        file = tmp_path / "demo" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        code, error = run(capsys, "demo", "--bundle", toy_bundle.path, "--out", tmp_path / "demo")
        assert (code, f"{file} exists and is no" in error) == (2, True)
        assert file.read_text() == "mine"
        file.unlink()


def test_cleaning_the_engines_leaves_what_is_not_the_caches(tmp_path: Path) -> None:
    names = ["package.json", ".bashrc", "tsconfig.json", "app.log", "notes.plan", "build.cache", ".env", "yarn.lock"]
    names += ["resnet50-fp16.plan", "yolo-int8.json", "yolo-int8.log", "timing-notes.cache", ".unet-fp32.txt.swp"]
    names += ["unet-fp16-512x1-tensorrt.plan", "timing.plan"]
    for name in names:
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (0, time.time() - 1e6))
    ours = [
        "fundus-fp16-1024x1-tensorrt-sm87-0123456789ab.json",
        ".fundus-fp16-1024x1-tensorrt-sm87-01234567.0123456789ab.plan",
    ]
    ours += ["timing-10.3.0-sm87-8.cache"]
    for name in ours:
        (tmp_path / name).write_text("{}")
    removed = clean(tmp_path, everything=True)
    assert len(removed) == len(ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("listed", ["NFC", "NFD"])
@pytest.mark.parametrize("image", ["NFC", "NFD"])
@pytest.mark.parametrize("mask", ["NFC", "NFD"])
def test_pairing_ignores_the_normal_form(tmp_path: Path, image: str, mask: str, listed: str) -> None:
    name = "Mu\u0308ller \u00e9"
    pixels = np.eye(8, dtype=np.uint8) * 255
    for folder, form in (("images", image), ("masks", mask)):
        (tmp_path / folder).mkdir()
        data = cv2.imencode(".png", pixels)[1].tobytes()
        (tmp_path / folder / f"{unicodedata.normalize(form, name)}.png").write_bytes(data)  # type: ignore[arg-type]
    text = unicodedata.normalize(listed, name)  # type: ignore[arg-type]
    (tmp_path / "split.json").write_text(f'{{"test": ["{text}"], "patient": {{"{text}": "p"}}}}', encoding="utf-8")
    dataset = DatasetFolder.open(tmp_path)
    (only,) = dataset.ids("test")
    np.testing.assert_array_equal(dataset.load(only).mask, pixels)
    assert dataset.split is not None
    assert dataset.split.patient == {only: "p"}


def test_another_precision_without_a_bundle_says_how_to_make_one() -> None:
    with pytest.raises(UserError, match=r"weights --modality fundus --out fundus\.bundle; then .* --precision int8"):
        choose_bundle(None, "fundus", precision="int8")


@pytest.mark.parametrize("mounted", [False, True])
def test_a_folder_that_is_not_replaced_as_a_whole(
    toy_bundle: Bundle,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mounted: bool,
) -> None:
    """One that the command runs in would be gone below the user's shell; one that is mounted cannot be renamed."""
    place = toy_bundle.path.resolve()
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: os.path.realpath(path) == str(place))
    else:
        monkeypatch.chdir(place)
    images = dataset / "images"
    said = "is mounted" if mounted else "is the current folder"
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    named = place if mounted else Path()
    for command in (
        ("calibrate", named, images, "--precision", "fp16"),
        ("calibrate", named, images, "--check", "onnxruntime-cpu"),
        ("weights", "--modality", "fundus", "--out", named),
        ("deploy", "triton", place, "--out", named),
        ("data", "prepare", "pairs", images, dataset / "masks", named),
    ):
        code, error = run(capsys, *command)
        assert code == 2
        assert said in error or "exists" in error or "is a bundle" in error, error
        assert command[0] not in ("calibrate", "weights") or said in error
    empty = dataset.parent / "empty"
    empty.mkdir()
    place = empty
    if not mounted:
        monkeypatch.chdir(empty)
    for command in (
        ("deploy", "triton", toy_bundle.path, "--out", empty),
        ("data", "prepare", "pairs", images, dataset / "masks", empty),
    ):
        code, error = run(capsys, *command)
        assert (code, said in error) == (2, True), error
    assert list(empty.iterdir()) == []
    assert {file.name: file.read_bytes() for file in toy_bundle.path.iterdir()} == before


@pytest.mark.parametrize("command", [("demo",), ("weights", "--out", "x"), ("infer", "{bundle}", "{image}")])
def test_a_current_folder_that_is_gone_is_one_line(
    toy_bundle: Bundle,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    words = {"{bundle}": toy_bundle.path, "{image}": dataset / "images" / "a.png"}
    gone = dataset.parent / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code, error = run(capsys, *(words.get(word, word) for word in command))
    assert code == 2
    assert error.splitlines()[-1].startswith("error: the current folder is gone")


@pytest.mark.parametrize("place", ["closed", "file/x", "x" * 300])
@pytest.mark.parametrize("command", ["export", "segment", "prepare", "calibrate", "triton", "weights", "demo", "bench"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    toy_bundle: Bundle,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    place: str,
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir(mode=0o500)
    access = os.access  # the superuser may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))
    there = tmp_path / place / "new"
    options: dict[str, tuple[object, ...]] = {
        "export": ("export", "none.safetensors", "--out", there),
        "segment": ("train", "segment", "smoke", "--set", "run.accelerator=cpu", "--out", there),
        "prepare": ("data", "prepare", "udiat", dataset, there),
        "calibrate": ("calibrate", there, dataset, "--precision", "fp16", "--images", 1, "--held-out", 1),
        "triton": ("deploy", "triton", toy_bundle.path, "--engine", "python", "--out", there),
        "weights": ("weights", "--checkpoint", there.with_suffix(".safetensors")),
        "demo": ("demo", "--out", there),
        "bench": ("bench", toy_bundle.path, "--duration", 0.01, "--json", there),
    }
    if command == "calibrate":
        if place != "closed":
            pytest.skip("no bundle can be there")
        toy_bundle.path.rename(there)
    before = sorted(tmp_path.rglob("*"))
    code, error = run(capsys, *options[command])
    assert (code, error.count("\n")) == (2, 1), error
    assert any(why in error for why in ("may not write", "Not a directory", "File name too long")), error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_queue_may_lie_in_a_folder_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a service's own folder does."""
    (tmp_path / "closed" / "queue").mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))
    with claimed([tmp_path / "closed" / "queue"]):
        pass
    check_destinations([Destination(tmp_path / "closed" / "queue", FRAMES)])
    with pytest.raises(UserError, match="may not write"), claimed([tmp_path / "closed" / "new"]):
        pass


def test_a_name_that_no_checkpoint_can_have_costs_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--out", tmp_path / "new.bundle", "--checkpoint", tmp_path / "weights.txt")
    assert "must end in .safetensors" in run(capsys, "weights", *options)[1]
    assert list(tmp_path.iterdir()) == []
