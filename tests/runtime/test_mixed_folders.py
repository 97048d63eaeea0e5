"""A folder of several modalities: each picture with its own network, in order; what is not clear is refused by name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from dicom_files import ramp, save_dicom
from toy_bundles import save_toy_bundle

from espmedsam_edge import ModelOptions, Outputs, Segmenter, UserError, infer, infer_frames
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.imaging.recognition import recognise
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime import bundle_choice
from espmedsam_edge.runtime.auto.kept_trials import Trial, depends_on, keep_trial
from espmedsam_edge.runtime.request import ReadingOptions
from espmedsam_edge.shipped.bundles import Score

SIZE = (120, 160)
MIXED = ("fundus", "colonoscopy", "fundus", "noise", "colonoscopy", "colonoscopy")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modalities whose networks were loaded."""
    loaded: list[str] = []
    load = Segmenter.load

    def counted(bundle: Bundle, modality: str | None = None, *arguments: object, **options: object) -> Segmenter:
        segmenter = load(bundle, modality, *arguments, **options)  # type: ignore[arg-type]
        loaded.append(segmenter.modality)
        return segmenter

    monkeypatch.setattr(Segmenter, "load", counted)
    return loaded


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modalities that bundles of shipped weights were asked for; each such bundle is a toy."""
    asked: list[str] = []

    def toy(modality: str) -> Bundle:
        asked.append(modality)
        return save_toy_bundle(tmp_path / f"{modality}.bundle", (modality,))

    scores = dict.fromkeys(PAPER_MODALITIES, Score(dice=70, images=14, dataset="set", required=65))
    monkeypatch.setattr(bundle_choice, "shipped_scores", lambda: scores)
    monkeypatch.setattr(bundle_choice, "shipped_bundle", toy)
    return asked


def run(*arguments: str) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code


def picture_of(modality: str, seed: int = 3) -> np.ndarray:
    """Noise, or the first phantom from ``seed`` on that is clearly what it shows."""
    if modality == "noise":
        return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    pictures = (phantom(modality, number, SIZE)[0] for number in range(seed, seed + 20))
    return next(picture for picture in pictures if is_clearly(modality, picture))


def is_clearly(modality: str, picture: np.ndarray) -> bool:
    guess = recognise(picture, PAPER_MODALITIES)
    return guess is not None and guess.sure and guess.modality == modality


def save_mixed(folder: Path, modalities: tuple[str, ...] = MIXED) -> dict[str, tuple[str, np.ndarray]]:
    """Pictures ``1.png``, ``2.png``, ... of the modalities; gives each with what it shows, by name."""
    folder.mkdir()
    saved = {}
    for number, modality in enumerate(modalities, 1):
        saved[f"{number}.png"] = (modality, picture_of(modality, number))
        cv2.imwrite(str(folder / f"{number}.png"), saved[f"{number}.png"][1])
    return saved


def save_video(path: Path, modality: str, frames: int = 3) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (SIZE[1], SIZE[0]))
    assert writer.isOpened()
    for _ in range(frames):
        writer.write(picture_of(modality))
    writer.release()


@pytest.mark.parametrize("batch", [1, 3])
def test_each_picture_is_segmented_as_what_it_looks_like(tmp_path: Path, batch: int, loads: list[str]) -> None:
    bundle = save_toy_bundle(tmp_path / "two.bundle", ("fundus", "colonoscopy"), batch=batch)
    saved = save_mixed(Path("in"))
    report = infer("in", bundle, Outputs(out="overlays", masks="masks", jsonl="r.jsonl", csv="r.csv"))

    clear = {name: modality for name, (modality, _) in saved.items() if modality != "noise"}
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(Path("r.csv").read_text().splitlines()))
    for found in (lines, rows):
        assert [(Path(line["source"]).name, line["modality"]) for line in found] == list(clear.items())
    assert "modality" in rows[0]
    assert sorted(loads) == ["colonoscopy", "fundus"]

    for modality in ("fundus", "colonoscopy"):
        with Segmenter.load(bundle, modality) as segmenter:
            for name in (name for name, found in clear.items() if found == modality):
                image = saved[name][1]
                expected = segmenter.segment(image)
                assert 0 < expected.area < expected.mask.size
                np.testing.assert_array_equal(cv2.imread(f"masks/{name}", cv2.IMREAD_UNCHANGED), expected.mask)
                drawn = draw_overlay(image, expected.mask, OverlayStyle(color_of(modality)))
                np.testing.assert_array_equal(cv2.imread(f"overlays/{name}"), drawn)

    (failure,) = report.failures
    assert failure.name == "in/4.png"
    assert "in/4.png looks like none of the modalities with certainty" in failure.message
    assert "--modality fundus|colonoscopy" in failure.message
    assert not Path("masks/4.png").exists()
    assert (report.frames, report.modality) == (5, "fundus, colonoscopy")
    assert [(network.modality, network.frames) for network in report.networks] == [("fundus", 2), ("colonoscopy", 3)]


def test_each_network_says_why_it_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino", reason="a choice between backends needs another one (extra openvino)")
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    bundle = save_toy_bundle(tmp_path / "two.bundle", ("fundus", "colonoscopy"))
    for modality, date in (("fundus", "2026-11-27"), ("colonoscopy", "2026-11-28")):
        made_of = depends_on(bundle.graph(modality), 1)
        keep_trial(Trial(made_of=made_of, date=date, milliseconds=400, tried=[]))
    save_mixed(Path("in"), ("colonoscopy", "fundus", "colonoscopy"))
    assert run("infer", str(bundle.path), "in", "--threads", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    for what in ("colonoscopy", "fundus"):
        (line,) = (line for line in lines if f": {what}, fp32, onnxruntime (CPU, 1 thread), " in line)
        count, date = ("2 frames", "2026-11-28") if what == "colonoscopy" else ("1 frame", "2026-11-27")
        assert line.endswith(f", {count}: nothing was faster when tried on {date}")


def test_frames_come_in_order_with_their_modality(toy_bundle_of_two: Bundle) -> None:
    save_mixed(Path("in"), ("colonoscopy", "fundus", "colonoscopy"))
    got = [(frame.path.name, result.modality) for frame, result in infer_frames("in", toy_bundle_of_two)]
    assert got == [("1.png", "colonoscopy"), ("2.png", "fundus"), ("3.png", "colonoscopy")]


def test_a_video_is_of_one_modality_by_its_first_frame(toy_bundle_of_two: Bundle) -> None:
    for name in ("fundus", "noise", "colonoscopy"):
        save_video(Path(f"{name}.avi"), name)
    report = infer(
        ["fundus.avi", "noise.avi", "colonoscopy.avi"], toy_bundle_of_two, Outputs(out="out", jsonl="r.jsonl")
    )
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [line["modality"] for line in lines] == ["fundus"] * 3 + ["colonoscopy"] * 3
    assert [failure.name for failure in report.failures] == ["noise.avi"]
    assert sorted(path.stem for path in Path("out").iterdir()) == ["colonoscopy", "fundus"]


def test_without_a_bundle_each_network_is_made_and_loaded_once_when_it_is_needed(
    shipped: list[str], loads: list[str], said: list[str]
) -> None:
    save_mixed(Path("in"), ("xray", "fundus") * 6)
    assert run("infer", "in", "--masks", "masks") == 0
    assert shipped == loads == ["xray", "fundus"]
    looks = [line for line in said if "looks like" in line]
    assert [line.split(" (")[0] for line in looks] == ["in/1.png looks like xray", "in/2.png looks like fundus"]


def test_the_first_pictures_may_be_unclear(shipped: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    save_mixed(Path("in"), ("noise", "noise", "xray"))
    assert run("infer", "in", "--masks", "masks") == 1
    assert [path.name for path in Path("masks").iterdir()] == ["3.png"]
    printed = capsys.readouterr().err
    assert printed.count("failed: ") == 2
    assert shipped == ["xray"]


def test_where_nothing_is_clear_nothing_runs(shipped: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    save_mixed(Path("in"), ("noise", "noise"))
    (Path("in") / "3.png").write_bytes(b"no picture")
    assert run("infer", "in", "--masks", "masks") == 1
    printed = capsys.readouterr().err
    assert [printed.count(f"failed: in/{number}.png") for number in (1, 2)] == [1, 1]
    assert "in/3.png" in printed
    assert shipped == []
    assert not Path("masks").exists()


def test_an_unclear_picture_is_told_with_what_it_is_likeliest_of(toy_bundle_of_two: Bundle) -> None:
    rng = np.random.default_rng(1)
    for _ in range(400):  # between two pictures lies one that is neither for sure
        share, seed = rng.uniform(0.2, 0.8), int(rng.integers(0, 1000))
        pair = [picture_of(name, seed) for name in ("fundus", "colonoscopy")]
        image = cv2.addWeighted(pair[0], share, pair[1], 1 - share, 0)
        guess = recognise(image, ("fundus", "colonoscopy"))
        if guess is not None and 0.2 < guess.probability < 0.85:
            break
    else:
        raise AssertionError("no such picture")
    cv2.imwrite("a.png", image)
    report = infer("a.png", toy_bundle_of_two)
    assert f"the likeliest is {guess.modality} ({guess.per_cent})" in report.failures[0].message


def test_a_live_source_must_be_named(toy_bundle_of_two: Bundle) -> None:
    save_mixed(Path("in"), ("fundus",))
    with pytest.raises(UserError, match=r"the modality of test://fundus.* cannot be told.*fundus\|colonoscopy"):
        infer(["in", "test://fundus?frames=3"], toy_bundle_of_two)
    named = ModelOptions(toy_bundle_of_two, "fundus")
    assert infer("test://fundus?size=64x48&frames=3&live=no", named, None).failures == []


def test_names_are_numbers_where_they_are_hidden(shipped: list[str], said: list[str]) -> None:
    save_mixed(Path("DOE^JANE"), ("xray", "noise"))
    assert run("infer", "DOE^JANE", "--anonymous-names", "--masks", "masks") == 1
    assert any(line.startswith("source-1-0001 looks like xray") for line in said)
    assert "DOE" not in "".join(said)


Make = Callable[[Bundle], ModelOptions]


@pytest.mark.parametrize(
    "make", [lambda bundle: ModelOptions(bundle), lambda bundle: ModelOptions(bundle, "fundus")], ids=["only", "named"]
)
def test_a_picture_that_is_plainly_another_is_segmented_and_told_once(
    toy_bundle: Bundle, make: Make, said: list[str]
) -> None:
    save_mixed(Path("in"), ("fundus", "xray", "noise", "colonoscopy"))
    report = infer("in", make(toy_bundle), Outputs(masks="masks"))
    assert (report.frames, report.failures, report.modality) == (4, [], "fundus")
    (line,) = [line for line in said if "looks like" in line]
    assert line.startswith("in/2.png looks like xray (")
    assert "is segmented as fundus" in line


def test_a_photograph_is_told_too_and_what_fits_or_is_unknown_is_not(tmp_path: Path, said: list[str]) -> None:
    cv2.imwrite("page.png", page := np.full((*SIZE, 3), 255, np.uint8))
    for row in range(20, 110, 12):
        cv2.putText(page, "Lorem ipsum dolor", (8, row), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0))
    cv2.imwrite("page.png", page)
    save_mixed(Path("in"), ("fundus", "fundus"))
    infer("in", save_toy_bundle(tmp_path / "a.bundle"), None)
    infer("page.png", save_toy_bundle(tmp_path / "b.bundle", ("teeth",)), None)
    with Segmenter.load(tmp_path / "a.bundle") as segmenter:
        infer("page.png", segmenter, None)
    assert [line for line in said if "looks like" in line] == []
    infer("page.png", save_toy_bundle(tmp_path / "c.bundle"), None)
    (line,) = said
    assert line.startswith("page.png looks like a kind of picture that no network here is for (")


def test_files_that_are_read_twice_are_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = save_toy_bundle(tmp_path / "two.bundle", ("fundus", "colonoscopy"))
    save_mixed(Path("in"))
    for name in ("0a.png", "0b.png"):  # before those that are clear
        cv2.imwrite(f"in/{name}", picture_of("noise").astype(np.uint16) * 16)
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
    save_dicom(Path("in/report.dcm"), ramp())
    report = pydicom.dcmread("in/report.dcm")
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = pydicom.uid.ComprehensiveSRStorage
    report.save_as("in/report.dcm")
    assert run("infer", str(bundle.path), "in", "--out", "overlays") == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum("on one scale" in line for line in lines) == 1
    assert sum("passed over" in line for line in lines) == 1


def test_what_is_recognised_is_the_crop(tmp_path: Path) -> None:
    """A capture card's frame, whose panel would be something else."""
    bundle = save_toy_bundle(tmp_path / "two.bundle", ("fundus", "colonoscopy"))
    frame = np.random.default_rng(1).integers(0, 256, (360, 640, 3), np.uint8)
    frame[100 : 100 + SIZE[0], 200 : 200 + SIZE[1]] = picture_of("fundus")
    cv2.imwrite("frame.png", frame)
    assert infer("frame.png", bundle, Outputs(jsonl="r.jsonl")).failures
    reading = ReadingOptions(crop=f"200,100,{SIZE[1]},{SIZE[0]}")
    report = infer("frame.png", bundle, Outputs(jsonl="r.jsonl"), reading)
    assert not report.failures
    assert json.loads(Path("r.jsonl").read_text())["modality"] == "fundus"
