"""Evaluation against hand-computed scores, with models whose predictions are known."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rich.console import Console
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle, Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.evaluation.candidates import BundleCandidate, Predict, open_candidate
from espmedsam_edge.evaluation.evaluate import Evaluation, evaluate, plan_tasks
from espmedsam_edge.evaluation.paper import TEACHER, paper_score, paper_tables
from espmedsam_edge.evaluation.report import build_published_tables, summary, write_csv, write_json, write_sheets
from espmedsam_edge.imaging.geometry import mask_from_logits
from espmedsam_edge.imaging.masks import resize_mask
from espmedsam_edge.imaging.views import VIEWS
from espmedsam_edge.metrics import scores
from espmedsam_edge.modalities import PAPER_MODALITIES, views_of
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.segmenter import Segmenter


class Oracle:
    """Predicts the red channel of the image; the datasets here hold their mask in it, shifted by a given amount."""

    name = "oracle"
    method = "ESP-MedSAM-S"
    untrained = False
    threshold = 0.5

    def __init__(self, modalities: tuple[str, ...] = ("fundus", "xray")) -> None:
        self.modalities = list(modalities)

    def check(self, modality: str) -> None:
        """Everything is there."""

    @contextmanager
    def predictor(self, modality: str) -> Iterator[Predict]:
        yield self.predict

    def predict(self, frame: np.ndarray) -> np.ndarray:
        small = cv2.resize(frame[..., 2], (64, 64), interpolation=cv2.INTER_AREA)
        return (small.astype(np.float32) - 127.5) / 32


def _square(left: int, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[32:96, left : left + 64] = 255
    return mask


def write_dataset(folder: Path, shifts: dict[str, int]) -> Path:
    """Squares of 64 pixels in images of 128; the image shows the square ``shift`` pixels right of its mask."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for id_, shift in shifts.items():
        image = np.zeros((128, 128, 3), np.uint8)
        image[..., 2] = _square(16 + shift)
        cv2.imwrite(str(folder / "images" / f"{id_}.png"), image)
        cv2.imwrite(str(folder / "masks" / f"{id_}.png"), _square(16))
    (folder / "split.json").write_text(json.dumps({"origin": "derived", "test": list(shifts), "train": []}))
    return folder


def _run(paths: list[Path], **options: Any) -> Evaluation:
    oracle = Oracle()
    return evaluate(oracle, plan_tasks(oracle, paths), **options)


def test_scores_are_those_computed_by_hand(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "fundus" / "squares", {"exact": 0, "quarter": 16, "half": 32})
    evaluation = _run([data], size=128, native=True)
    found = {result.id: result.scores for result in evaluation.results}
    # Shifts are multiples of the oracle's 2-pixel cells, so the prediction is exact: overlap (64 - shift) / 64.
    assert found["exact"].to_dict() == {"dice": 1, "iou": 1, "hd": 0, "hd95": 0}
    assert found["quarter"].to_dict() == {"dice": 0.75, "iou": 0.6, "hd": 16, "hd95": 16}
    assert found["half"].to_dict() == {"dice": 0.5, "iou": pytest.approx(1 / 3), "hd": 32, "hd95": 32}
    assert summary(evaluation) == {
        "fundus": {
            "squares": {
                "dice": 75.0,
                "hd": 16.0,
                "hd95": 16.0,
                "iou": pytest.approx(100 * (1 + 0.6 + 1 / 3) / 3, abs=1e-3),
                "images": 3,
                "native": {"dice": 75.0, "hd": 16.0, "hd95": 16.0, "iou": pytest.approx(64.4444, abs=1e-3)},
            }
        }
    }


def test_distances_are_in_pixels_of_the_common_size(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "fundus" / "squares", {"quarter": 16})
    evaluation = _run([data], native=True)
    result = evaluation.results[0]
    assert evaluation.size == 1024
    # 8 times as large; linear interpolation of the logits moves an edge by less than a cell of 16 pixels.
    assert result.scores.hd == pytest.approx(128, abs=16)
    assert result.scores.dice == pytest.approx(0.75, abs=0.02)
    assert result.native is not None
    assert result.native.hd == 16


def test_a_bundle_scores_as_its_segmenter_predicts(tmp_path: Path, toy_bundle: Bundle) -> None:
    data = write_dataset(tmp_path / "fundus" / "squares", {"one": 8, "two": 24})
    candidate = BundleCandidate(toy_bundle)
    evaluation = evaluate(candidate, plan_tasks(candidate, [data]), size=256, native=True)
    with Segmenter.load(toy_bundle) as segmenter:
        for result in evaluation.results:
            frame = cv2.imread(str(data / "images" / f"{result.id}.png"))
            truth = cv2.imread(str(data / "masks" / f"{result.id}.png"), cv2.IMREAD_GRAYSCALE)
            segmentation = segmenter.segment(frame)
            assert result.native == scores(segmentation.mask, truth)
            expected = mask_from_logits(segmentation.logits, (256, 256), toy_bundle.manifest.threshold)
            assert result.scores == scores(expected, resize_mask(truth, (256, 256)))


def test_a_bad_image_is_kept_for_the_end_and_the_rest_is_done(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "fundus" / "squares", {"a": 0, "b": 0, "c": 0})
    (data / "images" / "b.png").write_bytes(b"not an image")
    cv2.imwrite(str(data / "masks" / "c.png"), np.zeros((5, 5), np.uint8))
    evaluation = _run([data], size=64)
    assert [result.id for result in evaluation.results] == ["a"]
    assert [failure.message.count("b.png") for failure in evaluation.failures] == [1, 0]
    assert "c.png" in evaluation.failures[1].message
    assert summary(evaluation)["fundus"]["squares"]["failed"] == 2


def test_modality_comes_from_the_place_or_the_option(tmp_path: Path) -> None:
    oracle = Oracle()
    data = write_dataset(tmp_path / "fundus" / "squares", {"a": 0})
    assert [task.modality for task in plan_tasks(oracle, [data])] == ["fundus"]
    assert [task.modality for task in plan_tasks(oracle, [data], "xray")] == ["xray"]
    with pytest.raises(UserError, match=r"no modality 'fundos'.*Did you mean 'fundus'"):
        plan_tasks(oracle, [data], "fundos")
    other = write_dataset(tmp_path / "teeth" / "squares", {"a": 0})
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    cv2.imwrite(str(other / "images" / "a.png"), noise)
    with pytest.raises(UserError, match=r"cannot tell the modality of .* by its images"):
        plan_tasks(oracle, [other])
    with pytest.raises(UserError, match="cannot tell the modality"):
        plan_tasks(Oracle(("fundus", "teeth")), [write_dataset(tmp_path / "others" / "squares", {"a": 0})])
    assert plan_tasks(Oracle(("xray",)), [other])[0].modality == "xray"


def test_images_of_a_folder_that_says_nothing_are_told_apart_by_their_looks(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "mine" / "all", dict.fromkeys(("a", "b", "c", "noise", "broken"), 0))
    for id_, modality in {"a": "xray", "b": "fundus", "c": "xray"}.items():
        cv2.imwrite(str(data / "images" / f"{id_}.png"), phantom(modality, 2, (128, 128))[0])
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    cv2.imwrite(str(data / "images" / "noise.png"), noise)
    (data / "images" / "broken.png").write_bytes(b"not an image")
    evaluation = _run([data], size=64)
    assert [(result.modality, result.id) for result in evaluation.results] == [
        ("xray", "a"),
        ("xray", "c"),
        ("fundus", "b"),
    ]
    refused, broken = evaluation.failures
    assert "noise.png looks like none of the modalities" in refused.message
    assert "broken.png" in broken.message


def test_everything_is_checked_before_anything_runs(tmp_path: Path) -> None:
    oracle = Oracle()
    data = write_dataset(tmp_path / "fundus" / "squares", {"a": 0})
    with pytest.raises(UserError, match="no dataset folder"):
        plan_tasks(oracle, [data, tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"train list in .* is empty"):
        plan_tasks(oracle, [data], split="train")
    with pytest.raises(UserError, match="two fundus folders are called 'squares'"):
        plan_tasks(oracle, [data, write_dataset(tmp_path / "more" / "fundus" / "squares", {"a": 0})])
    (tmp_path / "bare" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="has no masks"):
        plan_tasks(oracle, [tmp_path / "bare"])


def test_files_hold_what_was_measured(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "fundus" / "squares", {"a b (1).x": 0, "worse": 16, "worst": 48})
    evaluation = _run([data], size=128, native=True, worst=2)
    write_json(tmp_path / "out" / "e.json", evaluation)
    evaluation.results[1] = replace(evaluation.results[1], note='=HYPERLINK("http://x")\n.png: 3 grey pixels')
    write_csv(tmp_path / "out" / "e.csv", evaluation)
    assert json.loads((tmp_path / "out" / "e.json").read_text()) == summary(evaluation)
    rows = list(csv.DictReader((tmp_path / "out" / "e.csv").open()))
    assert [(row["id"], float(row["dice_percent"]), float(row["hd_px"])) for row in rows] == [
        ("a b (1).x", 100, 0),
        ("worse", 75, 16),
        ("worst", 25, 48),
    ]
    assert all(row["native_dice_percent"] == row["dice_percent"] for row in rows)
    assert [row["note"] for row in rows] == ["", '\'=HYPERLINK("http://x")\\n.png: 3 grey pixels', ""]
    (sheet,) = write_sheets(tmp_path / "out", evaluation)
    assert sheet.name == "fundus-squares.png"
    assert [case.result.id for case in evaluation.worst["fundus", "squares"]] == ["worst", "worse"]
    picture = cv2.imread(str(sheet))
    assert picture.shape == (2 * (320 + 26), 3 * 320, 3)
    image, truth, prediction = (picture[26 : 26 + 320, 320 * part : 320 * (part + 1)] for part in range(3))
    assert not np.array_equal(image, truth)
    assert not np.array_equal(truth, prediction)


def test_a_checkpoint_scores_as_the_network_predicts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="checkpoints need torch (extra train)")
    from espmedsam_edge.imaging.geometry import preprocess
    from espmedsam_edge.model.checkpoint import CheckpointInfo, save_checkpoint
    from espmedsam_edge.model.config import model_config
    from espmedsam_edge.model.esp_medsam import EspMedSam

    torch.manual_seed(0)
    model = EspMedSam(model_config("espmedsam-tiny"), ["fundus", "xray"]).eval()
    save_checkpoint(tmp_path / "w.safetensors", model, CheckpointInfo(config=model.config, origin="random"))
    data = write_dataset(tmp_path / "fundus" / "squares", {"a": 0})
    candidate = open_candidate(tmp_path / "w.safetensors", device="cpu")
    assert candidate.untrained
    assert candidate.modalities == ["fundus", "xray"]
    result = evaluate(candidate, plan_tasks(candidate, [data]), size=128).results[0]
    frame = cv2.imread(str(data / "images" / "a.png"))
    with torch.inference_mode():
        image = torch.from_numpy(preprocess(frame, model.config.image_size, Normalization()))
        logits = model(image, "fundus").low_res_logits[0, 0].numpy()
    assert result.scores == scores(mask_from_logits(logits, (128, 128)), _square(16))

    views = views_of("fundus")
    assert views != "none"
    averaged = open_candidate(tmp_path / "w.safetensors", device="cpu", tta=True)
    with averaged.predictor("fundus") as predict, torch.inference_mode():
        turned = torch.stack([torch.from_numpy(view.of(image[0].numpy()).copy()) for view in VIEWS[views]])
        answers = model(turned, "fundus").low_res_logits[:, 0].numpy()
        expected = np.mean([view.undone(one) for view, one in zip(VIEWS[views], answers, strict=True)], axis=0)
        np.testing.assert_allclose(predict(frame), expected, atol=1e-5)


@pytest.mark.parametrize(
    "header", ['{"__metadata__":5}', '{"__metadata__":null}', '{"__metadata__":"espmedsam-teacher"}']
)
def test_a_header_of_another_form_is_one_line(header: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="checkpoints need torch")
    file = tmp_path / "c.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(UserError, match=r"c\.safetensors is not a"):
        open_candidate(file, device="cpu")


def test_a_teacher_is_recognised_and_compared_with_the_teachers_row(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="teachers need torch (extra train)")
    from espmedsam_edge.model.config import model_config
    from espmedsam_edge.model.teacher import EspMedSamTeacher, teacher_config
    from espmedsam_edge.model.teacher_checkpoint import save_teacher

    torch.manual_seed(0)
    teacher = EspMedSamTeacher(teacher_config("vit_tiny"), model_config("espmedsam-tiny"), ["fundus"])
    save_teacher(tmp_path / "t.safetensors", teacher, store_vit=True)
    candidate = open_candidate(tmp_path / "t.safetensors", device="cpu")
    assert candidate.method == TEACHER
    data = write_dataset(tmp_path / "fundus" / "squares", {"a": 0})
    assert len(evaluate(candidate, plan_tasks(candidate, [data]), size=64).results) == 1


def test_options_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    save_toy_bundle(tmp_path / "b.bundle")
    data = write_dataset(tmp_path / "fundus" / "squares", {"a": 0})
    candidate = open_candidate(tmp_path / "b.bundle", precision="int8")
    with pytest.raises(UserError, match="no int8 graph"):
        plan_tasks(candidate, [data])
    with pytest.raises(UserError, match="no bundle at"):
        open_candidate(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no bundle"):
        open_candidate(data)
    with pytest.raises(UserError, match="PyTorch runs it in float32"):
        open_candidate(tmp_path / "w.safetensors", precision="int8")


def test_the_papers_figures_are_those_printed_and_marked_as_published() -> None:
    tables = paper_tables()
    assert "Published figures" in tables.status
    assert [table.number for table in tables.tables] == ["I", "II", "IV", "V"]
    assert [len(table.rows) for table in tables.tables] == [13, 11, 18, 11]
    students = {name: paper_score(name, "any") for name in PAPER_MODALITIES}
    assert [(s.dice, s.hd, s.table) for s in students.values() if s] == [
        (88.89, 98.71, "I"),
        (96.57, 48.50, "I"),
        (72.55, 71.99, "I"),
        (92.84, 49.42, "I"),
        (77.86, 80.25, "I"),
        (89.70, 93.26, "I"),
    ]
    # Table VI's last row averages them: 86.40 is the mean of Table I's Dice; the paper prints 86.70 there.
    assert np.mean([s.dice for s in students.values() if s]) == pytest.approx(86.40, abs=0.005)
    stare, teacher = paper_score("fundus", "stare"), paper_score("fundus", "drive", TEACHER)
    transfer = paper_score("histopathology", "tnbc")
    assert stare is not None
    assert teacher is not None
    assert transfer is not None
    assert (stare.dice, stare.dataset, teacher.dice, transfer.dice) == (71.25, "STARE", 80.93, 83.14)
    assert paper_score("teeth", "any") is None
    best = {row.method: row for row in tables.tables[0].rows if row.prompt == "none"}
    assert all(best["ESP-MedSAM-S"].scores[m].dice >= row.scores[m].dice for row in best.values() for m in row.scores)


def test_every_published_method_stands_beside_ours(tmp_path: Path) -> None:
    oracle = Oracle(("fundus", "histopathology", "teeth"))
    folders = [tmp_path / "fundus" / "drive", tmp_path / "fundus" / "stare", tmp_path / "histopathology" / "tnbc"]
    paths = [write_dataset(folder, {"quarter": 16}) for folder in folders]
    evaluation = evaluate(oracle, plan_tasks(oracle, paths))
    (table,) = build_published_tables(evaluation)
    columns = [list(column.cells) for column in table.columns]
    rows = {(method, prompt): tuple(cells) for method, prompt, *cells in zip(*columns, strict=True)}
    assert [column.header for column in table.columns] == [
        "method",
        "prompt",
        "fundus\ndrive\nDRIVE",
        "fundus\nstare\nSTARE",
        "histopathology\ntnbc\nTNBC",
    ]
    ours = summary(evaluation)["fundus"]["drive"]
    assert set(rows["this model", "none"]) == {f"{ours['dice']:.2f} / {ours['hd']:.2f}"}  # the same image thrice
    # As printed in Tables II (or I), IV and V.
    assert rows["SAM", "point"] == ("78.16 / 72.22", "63.21 / 148.98", "")
    assert rows["LeSAM", "none"] == ("75.12 / 75.77", "70.85 / 99.71", "")
    assert rows["EdgeSAM", "point"] == ("68.04 / 92.40", "69.20 / 98.04", "81.27 / 136.39")
    assert rows["U-Net", "none"] == ("", "", "80.83 / 145.57")
    assert rows["ESP-MedSAM-S", "none"] == ("72.55 / 71.99", "71.25 / 88.00", "83.14 / 111.83")
    asked = "SAM SAMMI MedSAM SAMUS Med-SA SAMed SAM-CL UV-SAM LeSAM H-SAM U-Net nnUNet TransUNet ACC-UNet"
    assert {method for method, _ in rows} >= set(asked.split())
    for width in (60, 80, 100, 140):  # nothing is cut off or broken over lines
        tables = build_published_tables(evaluation, width)
        console = Console(width=width)
        with console.capture() as shown:
            for one in tables:
                console.print(one)
        printed = shown.get()
        assert sum(len(one.columns) - 2 for one in tables) == 3
        assert "EfficientViT-SAM-L0" in printed
        assert printed.count("ESP-MedSAM-S ") == len(tables)
        assert all(figures in printed for row in rows.values() for figures in row if figures)
    prompts = [prompt for _, prompt in rows]
    assert prompts == sorted(prompts)  # "none", then "point"

    smaller = evaluate(oracle, plan_tasks(oracle, paths[:1]), size=512)
    assert build_published_tables(smaller) == [], "the paper's figures are at 1024 x 1024"
    own = evaluate(oracle, plan_tasks(oracle, [write_dataset(tmp_path / "teeth" / "mine", {"a": 0})]))
    assert build_published_tables(own) == [], "the paper has no teeth"
