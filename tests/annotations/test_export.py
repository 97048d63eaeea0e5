"""What is written for annotation tools is what their own readers make of it: the mask, pixel by pixel."""

from __future__ import annotations

import base64
import json
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from sink_material import result_of

from espmedsam_edge import Outputs, ReadingOptions, UserError, infer
from espmedsam_edge.annotations.formats import FORMATS, OneDocument, Picture, writer
from espmedsam_edge.annotations.outlines import centre_outlines, edge_outlines, hole_pixels
from espmedsam_edge.annotations.rle import draw_rle, encode_rle
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.objects.instance import Instances
from espmedsam_edge.objects.separation import separated
from espmedsam_edge.runtime.sinks.annotations import AnnotationFolder
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

mask_tools = pytest.importorskip("pycocotools.mask", reason="needs pycocotools (extra dev)")
Bits = NDArray[np.bool_]


def scene(seed: int, size: tuple[int, int] = (44, 60)) -> Bits:
    """Blobs, specks, lines of one pixel, holes and parts that touch at corners."""
    rng = np.random.default_rng(seed)
    blobs = cv2.GaussianBlur(rng.random(size).astype(np.float32), (0, 0), 2.5)
    mask = blobs > np.quantile(blobs, 0.6)
    mask[3, 5:30] = mask[10:30, -4] = True
    mask ^= rng.random(size) > 0.98
    return mask


def filled(mask: Bits) -> Bits:
    """With its holes filled: what a format without holes can hold."""
    ndimage = pytest.importorskip("scipy.ndimage")
    return np.asarray(ndimage.binary_fill_holes(mask, structure=[[0, 1, 0], [1, 1, 1], [0, 1, 0]]))


def picture(mask: Bits, name: str = "a.b c.png") -> Picture:
    labels = separated(mask.astype(np.uint8) * 255, split=False)
    return Picture(name, mask.shape[1], mask.shape[0], "cell nuclei", (0, 200, 255), labels)


def document(form: str, pictures: list[Picture]) -> str:
    made = writer(form)
    return made.head() + "".join(made.entry(one) for one in pictures) + made.tail()


def test_a_format_that_lacks_a_part_cannot_be_made() -> None:
    class Half(OneDocument):
        document = "half.txt"

        def head(self) -> str:
            return ""

        def entry(self, picture: Picture) -> str:
            return picture.name

    with pytest.raises(TypeError, match="tail"):
        Half()


@pytest.mark.parametrize("seed", range(8))
def test_outlines_filled_either_way_give_the_mask_back(seed: int) -> None:
    mask = scene(seed)
    found, size = np.zeros(mask.shape, bool), mask.shape
    for part in edge_outlines(mask.astype(np.uint8)):
        for ring in (part.outer, *part.holes):
            corners = [ring.ravel().astype(float).tolist()]
            found ^= mask_tools.decode(mask_tools.frPyObjects(corners, *size))[..., 0].astype(bool)
    assert np.array_equal(found, mask)
    drawn = np.zeros(size, np.uint8)
    for part in centre_outlines(mask.astype(np.uint8)):
        cv2.fillPoly(drawn, [part.outer.astype(np.int32)], 1)
    assert np.array_equal(drawn > 0, filled(mask))
    assert hole_pixels(mask.astype(np.uint8)) == filled(mask).sum() - mask.sum()


@pytest.mark.parametrize("seed", range(8))
def test_run_lengths_are_read_back(seed: int) -> None:
    mask = scene(seed, (31, 17 + seed))
    packed = encode_rle(mask.astype(np.uint8))
    before = np.zeros(mask.shape, np.uint8)
    before[::3, ::2] = 255
    canvas = before.copy()
    draw_rle(packed["counts"], canvas)
    assert np.array_equal(canvas, before | 255 * mask.astype(np.uint8))
    runs = [(value, len(list(run))) for value, run in groupby(mask.T.ravel().tolist())]
    counts = [0] * runs[0][0] + [length for _, length in runs]
    canvas[:] = 0
    draw_rle(counts, canvas)
    assert np.array_equal(canvas > 0, mask)


@pytest.mark.parametrize("seed", range(8))
def test_run_lengths_of_a_part_are_those_of_the_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    part = scene(seed, (9, 8)).astype(np.uint8)
    whole = np.zeros((9 + seed % 3, 8 + seed % 4), np.uint8)
    y, x = int(rng.integers(0, 1 + seed % 3)), int(rng.integers(0, 1 + seed % 4))
    whole[y : y + 9, x : x + 8] = part
    assert encode_rle(part, (x, y), whole.shape) == encode_rle(whole)
    packed = mask_tools.encode(np.asfortranarray(whole))
    assert encode_rle(whole)["counts"] == packed["counts"].decode()


@pytest.mark.parametrize("counts", ["", "é", "0" * 9, "o" * 20, [5, -1, 3], [1, 2], [[1]], "P0"])
def test_damaged_run_lengths_are_refused(counts: str | list[int]) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        draw_rle(counts, np.zeros((3, 4), np.uint8))


def test_coco_is_read_by_pycocotools_and_supervision(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    masks = {f"{seed}.png": scene(seed) for seed in range(3)} | {"empty.png": np.zeros((20, 30), bool)}
    file = tmp_path / "annotations.json"
    file.write_text(document("coco", [picture(mask, name) for name, mask in masks.items()]))
    read = coco.COCO(str(file))
    for entry in read.loadImgs(read.getImgIds()):
        truth = masks[entry["file_name"]]
        found = np.zeros(truth.shape, bool)
        objects = read.loadAnns(read.getAnnIds(entry["id"]))
        assert len(objects) == separated(truth.astype(np.uint8), split=False).max()
        for one in objects:
            alone = read.annToMask(one).astype(bool)
            rows, columns = np.nonzero(alone)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert (one["area"], one["bbox"]) == (alone.sum(), box)
            assert not (found & alone).any()
            found |= alone
        assert np.array_equal(found, truth)
    supervision = pytest.importorskip("supervision", reason="needs supervision (extra dev)")
    for name, mask in masks.items():
        cv2.imwrite(str(tmp_path / name), mask.astype(np.uint8))
    seen = supervision.DetectionDataset.from_coco(str(tmp_path), str(file), force_masks=True)
    for path, _, detections in seen:
        truth = masks[Path(path).name]
        assert len(detections) == separated(truth.astype(np.uint8), split=False).max()


def test_yolo_is_read_by_supervision_and_by_who_cuts_off(tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision", reason="needs supervision (extra dev)")
    made, masks = writer("yolo"), {f"{seed}": scene(seed, (44 + seed, 61)) for seed in range(3)}
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name, mask in masks.items():
        cv2.imwrite(str(tmp_path / "images" / f"{name}.png"), mask.astype(np.uint8))
        (tmp_path / made.place(name)).write_text(made.entry(picture(mask, f"{name}.png")))
    for name, text in made.others().items():
        (tmp_path / name).write_text(text)
    read = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "data.yaml"), force_masks=True
    )
    assert read.classes == ["cell nuclei"]
    for path, _, detections in read:
        truth = filled(masks[Path(path).stem])
        assert np.array_equal(np.any(detections.mask, axis=0), truth)
        height, width = truth.shape
        drawn = np.zeros(truth.shape, np.uint8)
        for line in (tmp_path / "labels" / f"{Path(path).stem}.txt").read_text().splitlines():
            points = np.array(line.split()[1:], np.float32).reshape(-1, 2) * (width, height)
            cv2.fillPoly(drawn, [points.astype(np.int32)], 1)
        assert np.array_equal(drawn > 0, truth)
    holes = sum(int(filled(mask).sum() - mask.sum()) for mask in masks.values())
    assert made.lost == f"YOLO has no holes: {holes} pixels of holes in 3 pictures are filled."


@pytest.mark.parametrize("seed", range(3))
def test_labelme_is_exact_as_labelme_draws_it(seed: int) -> None:
    """As its ``shapes_to_label`` does: Pillow's polygon with its outline, and masks between two corners, both in."""
    image, draw = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageDraw")
    truth = scene(seed)
    value = json.loads(writer("labelme").entry(picture(truth)))
    assert (value["imagePath"], value["imageHeight"], value["imageWidth"]) == ("a.b c.png", *truth.shape)
    found, kinds = np.zeros(truth.shape, bool), set()
    for shape in value["shapes"]:
        kinds.add(shape["shape_type"])
        if shape["shape_type"] == "mask":
            (left, top), (right, bottom) = shape["points"]
            part = cv2.imdecode(np.frombuffer(base64.b64decode(shape["mask"]), np.uint8), cv2.IMREAD_UNCHANGED)
            found[top : bottom + 1, left : right + 1] |= part.astype(bool)
        else:
            canvas = image.fromarray(np.zeros(truth.shape, np.uint8))
            draw.Draw(canvas).polygon([tuple(point) for point in shape["points"]], outline=1, fill=1)
            found |= np.array(canvas, bool)
    assert np.array_equal(found, truth)
    assert kinds == {"mask", "polygon"}


@pytest.mark.parametrize("seed", range(3))
def test_cvat_is_exact_by_its_rules(seed: int) -> None:
    """Its polygons go through pycocotools; its masks are runs along the rows of a box."""
    truth = scene(seed)
    root = ElementTree.fromstring(document("cvat", [picture(truth, 'x & "y".png'), picture(truth[:20])]))
    assert [image.get("name") for image in root.iter("image")] == ['x & "y".png', "a.b c.png"]
    image, found = next(root.iter("image")), np.zeros(truth.shape, bool)
    for shape in image:
        assert shape.get("label") == "cell nuclei"
        if shape.tag == "mask":
            left, top, width, height = (int(shape.get(name) or 0) for name in ("left", "top", "width", "height"))
            runs = [int(word) for word in (shape.get("rle") or "").split(",")]
            values = np.repeat(np.arange(len(runs)) % 2 > 0, runs).reshape(height, width)
            found[top : top + height, left : left + width] |= values
        else:
            points = [[float(value) for pair in (shape.get("points") or "").split(";") for value in pair.split(",")]]
            found |= mask_tools.decode(mask_tools.frPyObjects(points, *truth.shape))[..., 0].astype(bool)
    assert np.array_equal(found, truth)
    assert {shape.tag for shape in image} == {"mask", "polygon"}


@pytest.mark.parametrize("seed", range(8))
def test_geojson_holds_holes_and_counts_areas_in_valid_polygons(seed: int) -> None:
    shapely = pytest.importorskip("shapely", reason="needs shapely (extra dev)")
    truth = scene(seed)
    if seed > 5:  # noise, and a chain of holes that meet at corners around a part
        truth = np.random.default_rng(seed).random((40, 50)) < 0.3 + 0.05 * seed
    truth[:9, :9] = np.abs(np.add.outer(np.abs(np.arange(-4, 5)), np.abs(np.arange(-4, 5))) - 3) > 0
    value = json.loads(writer("geojson").entry(picture(truth)))
    found = np.zeros(truth.shape, bool)
    kinds = set()
    for one in value["features"]:
        geometry = one["geometry"]
        kinds.add(geometry["type"])
        assert shapely.is_valid_reason(shapely.geometry.shape(geometry)) == "Valid Geometry"
        assert shapely.geometry.shape(geometry).area == one["properties"]["measurements"]["Area px"]
        alone = np.zeros(truth.shape, bool)
        polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
        for ring in (ring for polygon in polygons for ring in polygon):
            assert ring[0] == ring[-1]
            flat = [np.array(ring[:-1], float).ravel().tolist()]
            alone ^= mask_tools.decode(mask_tools.frPyObjects(flat, *truth.shape))[..., 0].astype(bool)
        assert one["properties"]["measurements"]["Area px"] == alone.sum()
        found |= alone
    assert "MultiPolygon" in kinds
    assert np.array_equal(found, truth)


# In a run.


@pytest.fixture
def _pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    rng = np.random.default_rng(6)
    for number in range(3):
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
        cv2.imwrite(f"in/{number}.jpg", cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC))


@pytest.mark.usefixtures("_pictures")
@pytest.mark.parametrize("form", FORMATS)
def test_a_run_writes_pictures_and_objects_of_every_format(form: str, toy_bundle: Bundle) -> None:
    report = infer("in", toy_bundle, Outputs(masks="masks", export=form, export_to="made"))
    assert report.failures == []
    assert report.results["annotations"] == Path("made")
    pictures = Path("made") if form == "labelme" else Path("made/images")
    for number in range(3):
        assert np.array_equal(cv2.imread(str(pictures / f"{number}.png")), cv2.imread(f"in/{number}.jpg"))
    assert not list(Path("made").rglob("*partial*"))
    if form == "coco":
        read = pytest.importorskip("pycocotools.coco").COCO("made/annotations.json")
        assert read.cats[1]["name"] == "retinal vessels"
        for entry in read.loadImgs(read.getImgIds()):
            whole = np.zeros((120, 160), bool)
            for one in read.loadAnns(read.getAnnIds(entry["id"])):
                whole |= read.annToMask(one).astype(bool)
                assert 0.5 <= one["score"] <= 1
            assert np.array_equal(whole, cv2.imread(f"masks/{entry['file_name']}", 0) > 0)


@pytest.mark.usefixtures("_pictures")
def test_corrections_are_never_replaced_unasked_nor_inputs(toy_bundle: Bundle) -> None:
    infer("in", toy_bundle, Outputs(export="labelme", export_to="made"))
    Path("made/0.json").write_text("corrected")
    for outputs in (Outputs(export="labelme", export_to="made"), Outputs(export="coco", export_to="made")):
        with pytest.raises(UserError, match="may be corrections"):
            infer("in", toy_bundle, outputs)
    with pytest.raises(UserError, match="holds the input"):
        infer("in", toy_bundle, Outputs(export="labelme", export_to="in", overwrite=True))
    assert Path("made/0.json").read_text() == "corrected"
    infer("in", toy_bundle, Outputs(export="labelme", export_to="made", overwrite=True))
    assert json.loads(Path("made/0.json").read_text())["imagePath"] == "0.png"


def files_of(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.usefixtures("_pictures")
@pytest.mark.parametrize("form", FORMATS)
def test_a_run_that_was_cut_off_is_gone_on_with(form: str, toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as one left alone, done pictures are not done again, and what was corrected since stays."""
    clip = cv2.VideoWriter("in/clip.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 120))
    for number in (0, 1, 2):
        clip.write(cv2.imread(f"in/{number}.jpg"))
    clip.release()
    infer("in", toy_bundle, Outputs(export=form, export_to="alone"))
    outputs = Outputs(export=form, export_to="made", resume=True)
    for broken in (AnnotationFolder.entry, AnnotationFolder.take):
        count = [0]

        def fails(self: Any, *taken: Any, own: Any = broken, count: list[int] = count) -> Any:
            count[0] += 1
            if count[0] == 2:
                raise KeyboardInterrupt
            return own(self, *taken)

        with monkeypatch.context() as patch:
            patch.setattr(AnnotationFolder, broken.__name__, fails)
            with pytest.raises(KeyboardInterrupt):
                infer("in", toy_bundle, outputs)
    report = infer("in", toy_bundle, outputs)
    assert (report.frames, report.done, report.failures) == (0, 4, [])
    assert files_of("made") == files_of("alone")

    corrected = next(path for path in Path("made").rglob("*") if path.suffix in (".json", ".xml", ".txt", ".geojson"))
    corrected.write_text("corrected")
    assert infer("in", toy_bundle, outputs).frames == 0
    assert corrected.read_text() == "corrected"
    before = files_of("made")
    cv2.imwrite("in/new.jpg", cv2.imread("in/0.jpg"))
    if not isinstance(writer(form), OneDocument):
        assert infer("in", toy_bundle, outputs).frames == 1
        assert {name: data for name, data in files_of("made").items() if "new" not in name} == before
        assert len(files_of("made")) == len(before) + 2
    else:
        with pytest.raises(UserError, match="may hold corrections, and is without 1 of the files"):
            infer("in", toy_bundle, outputs)
        assert files_of("made") == before


@pytest.mark.usefixtures("_pictures")
def test_going_on_replaces_nothing_that_was_there_before_or_was_corrected(toy_bundle: Bundle, said: list[str]) -> None:
    Path("mine").mkdir()
    Path("mine/0.json").write_text("mine")
    with pytest.raises(UserError, match="may be corrections"):
        infer("in", toy_bundle, Outputs(export="labelme", export_to="mine", masks="masks", resume=True))
    outputs = Outputs(export="labelme", export_to="made", masks="masks", resume=True)
    infer("in", toy_bundle, outputs)
    Path("made/0.json").write_text("corrected")
    picture = Path("made/0.png").read_bytes()
    cv2.imwrite("in/0.jpg", np.zeros((120, 160, 3), np.uint8))
    Path("made/1.png").unlink()
    assert infer("in", toy_bundle, outputs).frames == 2
    assert (Path("made/0.json").read_text(), Path("made/0.png").read_bytes()) == ("corrected", picture)
    assert any("made/0.json stays as it is" in line for line in said)
    infer("in", toy_bundle, Outputs(export="labelme", export_to="made", masks="masks", resume=True, overwrite=True))
    assert json.loads(Path("made/0.json").read_text())["shapes"] == []


@pytest.mark.usefixtures("_pictures")
def test_frames_of_a_video_are_numbered_pictures(toy_bundle: Bundle) -> None:
    clip = cv2.VideoWriter("clip.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 120))
    for number in (0, 1, 2):
        clip.write(cv2.imread(f"in/{number}.jpg"))
    clip.release()
    infer("clip.avi", toy_bundle, Outputs(export="yolo"), ReadingOptions(every=2))
    assert sorted(path.name for path in Path("annotations/images").iterdir()) == ["clip-000000.png", "clip-000002.png"]
    assert Path("annotations/labels/clip-000002.txt").read_text()


def test_objects_that_are_followed_may_have_any_numbers(tmp_path: Path) -> None:
    """A video's thousandth minute has a millionth object; it is one of two here."""
    mask = np.zeros((40, 50), np.uint8)
    mask[5:10, 5:10] = mask[20:30, 20:40] = 255
    result = result_of(mask)
    numbered = np.where(mask > 0, 7, 0).astype(np.int32)
    numbered[20:30, 20:40] = 1_000_000
    found = replace(result, find=lambda _: Instances(numbered, 2))
    failures, path = list[Failure](), Path("p.png")
    folder = AnnotationFolder(tmp_path / "out", "geojson", {path: "p"}, (), failures, resumed=True)
    with folder:
        folder.take(json.loads(json.dumps(folder.entry(SourceFrame(np.zeros((40, 50, 3), np.uint8), path), found))))
    assert failures == []
    features = json.loads((tmp_path / "out" / "objects" / "p.geojson").read_text())["features"]
    assert [feature["properties"]["measurements"]["Area px"] for feature in features] == [25, 200]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../../mine.png"},
        {"name": "/tmp/mine.png"},
        {"name": 3},
        {"labels": ""},
        {"labels": "bm8="},
        {"labels": None},
        {"height": 7},
        {"more": 1},
        {"failed": 1},
        {"probabilities": ["a"]},
    ],
)
def test_what_a_damaged_journal_says_of_a_picture_is_written_nowhere(tmp_path: Path, wrong: dict[str, object]) -> None:
    mask = np.zeros((40, 50), np.uint8)
    mask[5:10, 5:10] = 255
    path = Path("p.png")
    folder = AnnotationFolder(tmp_path / "a" / "out", "geojson", {path: "p"}, (), [], resumed=True)
    with folder:
        entry = folder.entry(SourceFrame(np.zeros((40, 50, 3), np.uint8), path), result_of(mask))
        with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):  # which are one line: see resumed.py
            folder.take(json.loads(json.dumps(entry)) | wrong)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["p.png"]


def test_a_large_picture_of_noise_is_a_line(tmp_path: Path) -> None:
    """One object of many holes, stripes that each reach over all of it, and specks: minutes, were they outlined."""
    noise = np.random.default_rng(0).random((2000, 2000)) > 0.35
    stripes = np.add.outer(np.arange(3400), np.arange(3400)) % 3 == 0
    specks = np.zeros((2000, 2000), bool)
    specks[::8, ::8] = True
    failures, path = list[Failure](), Path("p.png")
    began = time.process_time()
    with AnnotationFolder(tmp_path / "out", "geojson", {path: "p"}, (), failures) as sink:
        for mask in (noise, stripes, specks):
            sink.write(SourceFrame(np.zeros((*mask.shape, 3), np.uint8), path), result_of(mask))
    assert time.process_time() - began < 20
    assert [failure.message.partition(" has ")[2].partition(":")[0] for failure in failures] == [
        "objects with over 100000 holes",
        "objects that reach too far beside each other",
        "62500 objects, more than 50000",
    ]


@pytest.mark.usefixtures("_pictures")
def test_a_mask_of_too_many_specks_is_one_line_and_the_rest_is_done(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espmedsam_edge.runtime.sinks.annotations.MOST", 0)
    cv2.imwrite("in/1.jpg", np.zeros((120, 160, 3), np.uint8))  # without an object
    report = infer("in", toy_bundle, Outputs(export="coco"))
    assert report.frames == 3
    read = json.loads(Path("annotations/annotations.json").read_text())
    assert [entry["file_name"] for entry in read["images"]] == ["1.png"]
    assert [failure.name for failure in report.failures] == ["in/0.jpg", "in/2.jpg"]
    assert "objects, more than 0: it is left out of annotations." in report.failures[0].message


def test_an_unknown_format_is_one_line() -> None:
    with pytest.raises(UserError, match="Did you mean 'labelme'"):
        Outputs(export="labelm")
    with pytest.raises(UserError, match="no format is named"):
        Outputs(export_to="somewhere")
