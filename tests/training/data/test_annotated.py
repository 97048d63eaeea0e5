"""Annotations of other tools become a dataset folder; what is damaged in them is a line each."""

from __future__ import annotations

import base64
import gc
import json
import resource
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from espmedsam_edge.annotations import reading
from espmedsam_edge.annotations.coco_reading import read_coco
from espmedsam_edge.annotations.formats import FileEach, OneDocument, Picture, writer
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.objects.separation import separated
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.training.data.annotated import READERS, find_annotated
from espmedsam_edge.training.data.prepare import Prepared, prepare

pytest.importorskip("pycocotools", reason="needs pycocotools (extra annotations)")
pytest.importorskip("PIL", reason="needs Pillow (extra annotations)")
Bits = NDArray[np.bool_]
SIZE = (60, 80)


def scene(seed: int) -> Bits:
    rng = np.random.default_rng(seed)
    blobs = cv2.GaussianBlur(rng.random(SIZE).astype(np.float32), (0, 0), 3)
    return np.asarray(blobs > np.quantile(blobs, 0.65)) ^ (rng.random(SIZE) > 0.985)


def save(folder: Path, form: str, masks: dict[str, Bits]) -> None:
    """As ``infer --export`` does."""
    made = writer(form)
    text = made.head() if isinstance(made, OneDocument) else ""
    for name, mask in masks.items():
        labels = separated(mask.astype(np.uint8) * 255, split=False)
        entry = made.entry(Picture(f"{name}.png", mask.shape[1], mask.shape[0], "lesion", (0, 0, 0), labels))
        text += entry
        (folder / made.images).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / made.images / f"{name}.png"), phantom("ultrasound", len(name), mask.shape)[0])
        if isinstance(made, FileEach):
            (folder / made.place(name)).parent.mkdir(exist_ok=True)
            (folder / made.place(name)).write_text(entry)
    if isinstance(made, OneDocument):
        (folder / made.document).write_text(text + made.tail())
    for name, content in made.others().items():
        (folder / name).write_text(content)


def converted(tmp_path: Path, form: str, **options: Any) -> tuple[Prepared, DatasetFolder]:
    done = prepare(find_annotated(form, tmp_path / "source", **options), tmp_path / "made")
    return done, DatasetFolder.open(tmp_path / "made")


@pytest.mark.parametrize("form", READERS)
def test_what_was_written_comes_back_pixel_by_pixel_as_far_as_the_format_can(form: str, tmp_path: Path) -> None:
    masks = {f"case.{seed} a": scene(seed) for seed in range(4)}
    save(tmp_path / "source", form, masks)
    done, folder = converted(tmp_path, form)
    assert done.failures == []
    assert folder.ids() == sorted(masks)
    ndimage = pytest.importorskip("scipy.ndimage")
    for name, mask in masks.items():
        expected = ndimage.binary_fill_holes(mask) if form == "yolo" else mask
        assert np.array_equal(folder.load(name).mask > 0, expected)
        assert (expected != mask).any() == (form == "yolo")


def coco(folder: Path, annotations: list[Any], images: list[Any] | None = None, **more: Any) -> None:
    """A file and a picture ``a.png`` with the id 1."""
    (folder / "source").mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "source" / "a.png"), phantom("ultrasound", 1, SIZE)[0])
    entry = {"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}
    value = {
        "images": [entry, *(images or [])],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "lesion"}, {"id": 2, "name": "marker"}],
    } | more
    (folder / "source" / "x.json").write_text(json.dumps(value))


def thing(number: Any = 1, segmentation: Any = None, image: Any = 1, category: int = 1) -> dict[str, Any]:
    square = [[10, 10, 10, 30, 30, 30, 30, 10]]
    return {
        "id": number, "image_id": image, "category_id": category, "segmentation": segmentation or square,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("annotations", "images", "said"),
    [
        ([thing(2, [[1, 2, 3, 4]])], [], "object 2: it has 2 points, fewer than 3"),
        ([thing(2, [[900, 900, 910, 900, 905, 990]])], [], "object 2: it lies outside the picture"),
        ([thing(2, [[1, 1, 5, 5, 1e300, 3]])], [], "object 2: it reaches far outside the picture"),
        ([thing(2, [[1, 1, 5, 5, float("nan"), 3]])], [], "object 2: its coordinates are not finite"),
        ([thing(2, [["x", 1, 5, 5, 3, 3]])], [], "object 2: its points are not pairs of numbers"),
        ([thing(2, [[1, 1, 5, 5, 3]])], [], "object 2: its points are not pairs of numbers"),
        ([thing(2, {"size": [60, 80], "counts": [5, 5]})], [], "object 2: its run lengths are not those of 80x60"),
        ([thing(2, {"size": [6, 8], "counts": [48]})], [], "object 2: its run lengths are not of the picture's size"),
        ([thing(2, {"size": [60, 80], "counts": [1e400, 2]})], [], "object 2: its run lengths are no whole numbers"),
        ([thing(2, "outline")], [], "object 2: it has no outline"),
        ([thing(1)], [], "two objects have the id 1"),
        ([thing(2, image=9), thing(3, image=9)], [], "2 objects are of a picture 9 that is not listed"),
        ([thing(2, image=5)], [{"id": 5, "file_name": "absent.png"}], "there is no picture 'absent.png'"),
        ([], [{"id": 5, "file_name": "../../../etc/passwd"}], "there is no picture '../../../etc/passwd'"),
        ([], [{"id": 1, "file_name": "b.png"}], "two pictures have the id 1"),
        ([], [{"id": 2, "file_name": "a.png"}], "a.png is there twice"),
        (["no object", 7, None], [], None),
    ],
)
def test_what_is_damaged_in_coco_is_a_line_and_the_rest_is_done(
    annotations: list[Any], images: list[Any], said: str | None, tmp_path: Path
) -> None:
    coco(tmp_path, [thing(), *annotations], images)
    done, folder = converted(tmp_path, "coco")
    expected = np.zeros(SIZE, np.uint8)
    expected[10:30, 10:30] = 255
    assert np.array_equal(folder.load("a").mask, expected)
    assert len(done.failures) == (said is not None)
    assert said is None or said in done.failures[0]


def test_of_many_damaged_objects_a_few_lines_are_told(tmp_path: Path) -> None:
    coco(tmp_path, [thing(), *(thing(number, [[1, 2]]) for number in range(2, 5000))])
    done, _ = converted(tmp_path, "coco")
    assert len(done.failures) == 4
    assert "4995 more objects" in done.failures[3]


@pytest.mark.parametrize("form", ["coco", "labelme"])
def test_thousands_of_small_objects_in_a_large_picture_take_what_they_cover(form: str, tmp_path: Path) -> None:
    """Not the picture for each of them: that was minutes."""
    side, count = 5000, 2000
    size = {"height": side, "width": side}
    corners = [(20 + 100 * (number // 45), 20 + 100 * (number % 45)) for number in range(count)]
    expected = np.zeros((side, side), np.uint8)
    for x, y in corners:
        expected[y : y + 3, x : x + 3] = 255
    if form == "coco":
        things = []
        for number, (x, y) in enumerate(corners):
            before = x * side + y
            counts = [before, 3, side - 3, 3, side - 3, 3, side * side - before - 2 * side - 3]
            things.append(thing(number, {"size": [side, side], "counts": counts}))
        coco(tmp_path, things, [])
        file = tmp_path / "source" / "x.json"
        value = json.loads(file.read_text())
        value["images"][0] |= size
        file.write_text(json.dumps(value))
    else:
        labelme(
            tmp_path,
            [shape("rectangle", [[x, y], [x + 2, y + 2]]) for x, y in corners],
            imageHeight=side,
            imageWidth=side,
        )
    cv2.imwrite(str(tmp_path / "source" / "a.png"), np.zeros((side, side, 3), np.uint8))
    (one,) = find_annotated(form, tmp_path / "source").items
    found = find_annotated(form, tmp_path / "source")
    began = time.process_time()
    assert found.mask_of is not None
    mask = found.mask_of(one, (side, side))
    assert time.process_time() - began < 5
    assert np.array_equal(mask, expected)


def test_a_picture_with_more_than_can_be_drawn_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than made with a part of its objects."""
    monkeypatch.setattr(reading, "_MOST_WORK", 20 << 14)
    coco(tmp_path, [thing(number) for number in range(50)], [{"id": 2, "file_name": "b.png"}])
    cv2.imwrite(str(tmp_path / "source" / "b.png"), np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png has 50 objects, which are more or larger than can be drawn"):
        converted(tmp_path, "coco")


def test_of_a_million_strange_entries_some_lines_and_a_count_are_told(tmp_path: Path) -> None:
    coco(
        tmp_path,
        [thing(), *(thing(1) for _ in range(3000))],
        [{"id": f"n{n}", "file_name": f"{n}"} for n in range(500)],
    )
    done, _ = converted(tmp_path, "coco")
    assert len(done.failures) == 101
    assert done.failures[-1].startswith("3400 more of the annotations' entries")


def test_a_picture_s_name_of_megabytes_is_a_line(tmp_path: Path) -> None:
    began = time.process_time()
    coco(tmp_path, [thing()], [{"id": 2, "file_name": "a/" * 500_000 + "a.png"}])
    done, _ = converted(tmp_path, "coco")
    (line,) = done.failures
    assert "a name of 1000005 characters is no picture's" in line
    coco(tmp_path, [thing()], categories=[{"id": n, "name": f"{n:0200}"} for n in range(20_000)])
    with pytest.raises(UserError, match="no object is labelled 'lesions'"):
        converted(tmp_path, "coco", labels=["lesions"])
    assert time.process_time() - began < 5


def test_only_the_labels_that_are_asked_for_count(tmp_path: Path) -> None:
    coco(tmp_path, [thing(1, [[0, 0, 0, 5, 5, 5, 5, 0]], category=2), thing(2)])
    _, folder = converted(tmp_path, "coco", labels=["marker"])
    assert np.count_nonzero(folder.load("a").mask) == 25
    with pytest.raises(UserError, match="Did you mean 'lesion'"):
        find_annotated("coco", tmp_path / "source", labels=["lesio"])


def test_lists_are_those_of_files_and_folders(tmp_path: Path) -> None:
    """Of one name in several folders, the folders become part of the id."""
    names = {"train": ["a", "b", "c"], "valid": ["a"], "test": ["d"]}
    for part, members in names.items():
        save(tmp_path / "source" / part, "coco", {name: scene(len(name)) for name in members})
    done, folder = converted(tmp_path, "coco", modality="ultrasound")
    split = done.split
    assert (split.train, split.valid, split.test) == (["train-images-a", "b", "c"], ["valid-images-a"], ["d"])
    assert (split.origin, split.modality) == ("official", "ultrasound")
    assert len(folder.ids()) == 5


@pytest.mark.parametrize("form", ["labelme", "yolo"])
def test_a_picture_called_test_is_in_no_list_for_that(form: str, tmp_path: Path) -> None:
    save(tmp_path / "source", form, {f"{name}_{seed}": scene(seed) for name in ("test", "p1") for seed in range(3)})
    done, _ = converted(tmp_path, form, patient="{patient}_*")
    assert done.split.origin == "derived"
    assert sorted(done.split.patient.values()) == ["p1"] * 3 + ["test"] * 3
    assert len(done.split.train) + len(done.split.valid) + len(done.split.test) == 6


def test_a_file_alone_with_its_pictures_elsewhere(tmp_path: Path) -> None:
    coco(tmp_path, [thing()])
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    (tmp_path / "source" / "a.png").rename(tmp_path / "pictures" / "deep" / "a.png")
    found = find_annotated("coco", tmp_path / "source" / "x.json", images=tmp_path / "pictures")
    prepare(found, tmp_path / "made")
    assert DatasetFolder.open(tmp_path / "made").load("a").mask[10:30, 10:30].all()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"images": 1}', "[" * 100_000, '{"images": [], "annotations": []}', "1" * 5000]
)
@pytest.mark.parametrize("form", ["coco", "labelme"])
def test_files_that_are_none_of_the_tools_are_told_and_nothing_is_made(form: str, content: str, tmp_path: Path) -> None:
    coco(tmp_path, [])
    (tmp_path / "source" / "x.json").write_text(content)
    with pytest.raises(UserError) as error:
        converted(tmp_path, form)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_a_file_that_is_too_large_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco(tmp_path, [thing()])
    (tmp_path / "source" / "y.json").write_text(" " * 2000 + "{}")
    monkeypatch.setattr("espmedsam_edge.annotations.reading.MOST_BYTES", 1500)
    done, _ = converted(tmp_path, "coco")
    assert [("y.json" in line, "over 1500 bytes" in line) for line in done.failures] == [(True, True)]


COSTLY = [
    lambda n: b'{"images":[' + b"{}," * n + b'{}],"annotations":[]}',
    lambda n: b'{"images":[' + b"[]," * n + b'{}],"annotations":[]}',
    lambda n: b'{"images":[' + b"1.5," * n + b'{}],"annotations":[]}',
    lambda n: b'{"images":[' + b"1000," * n + b'{}],"annotations":[]}',
    lambda n: b'{"images":[' + b'"ab",' * n + b'{}],"annotations":[]}',
    lambda n: b'{"images":[' + b'"' + b"a" * 5 * n + b'\\ud83d\\ude00",{}],"annotations":[]}',
    lambda n: b'{"images":[{"id":1,"file_name":"a.png"}],"annotations":[' + b'{"image_id":1},' * n + b"{}]}",
    lambda n: (
        b'{"images":[{"id":1,"file_name":"a.png"}],"annotations":['
        + b",".join(b'{"id":%d,"image_id":1,"segmentation":[[%d.5]]}' % (i, i) for i in range(n))
        + b"]}"
    ),
]


@pytest.mark.parametrize("make", COSTLY)
def test_what_annotations_take_is_known_before(make: Callable[[int], bytes], tmp_path: Path) -> None:
    coco(tmp_path, [])
    file = tmp_path / "source" / "x.json"
    file.write_bytes(make(20_000))
    gc.collect()
    tracemalloc.start()
    found = read_coco(file, tmp_path / "source", ())
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    needed = reading._MOST_MEMORY - found._left
    assert kept < needed + 200_000
    assert peak < needed + 9 * file.stat().st_size + 200_000


@pytest.mark.parametrize("form", ["coco", "labelme", "yolo"])
def test_annotations_that_take_too_much_together_are_told(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "source", form, {name: scene(3) for name in ("a", "b", "c")})
    found = READERS[form][1](tmp_path / "source", tmp_path / "source", ())
    assert len(found.pictures) == 3
    needed = reading._MOST_MEMORY - found._left
    most = needed + 3 * max(file.stat().st_size for file in (tmp_path / "source").rglob("*") if file.suffix != ".png")
    for memory, fit in ((most, True), (needed - 1, False)):
        monkeypatch.setattr(reading, "_MOST_MEMORY", memory)
        found = READERS[form][1](tmp_path / "source", tmp_path / "source", ())
        assert any("of memory: split it" in line for line in found.problems) != fit
        assert all(one.objects for one in found.pictures) == (fit or form != "yolo")


def test_small_annotations_of_gigabytes_are_refused(tmp_path: Path) -> None:
    coco(tmp_path, [thing()])
    (tmp_path / "source" / "y.json").write_bytes(COSTLY[0](10_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done, _ = converted(tmp_path, "coco")
    assert [("y.json" in line, "over 1.5 GB of memory" in line) for line in done.failures] == [(True, True)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def labelme(folder: Path, shapes: list[Any], **more: Any) -> None:
    coco(folder, [])
    (folder / "source" / "x.json").unlink()
    value = {"shapes": shapes, "imagePath": "..\\pictures\\a.png", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    (folder / "source" / "a.json").write_text(json.dumps(value | more))


def shape(kind: str, points: Any, **more: Any) -> dict[str, Any]:
    return {"label": "lesion", "shape_type": kind, "points": points} | more


def test_labelmes_other_shapes_are_drawn_or_told(tmp_path: Path) -> None:
    damaged = [
        shape("point", [[3, 3]]),
        shape("mask", [[1, 1], [4, 4]], mask="bm8="),
        shape("mask", [[1, 1], [4, 4]], mask=None),
        shape("polygon", [[1, 1], [4, 4]]),
        "none",
    ]
    for wrong in damaged:
        labelme(tmp_path, [shape("rectangle", [[30, 20], [10, 10]]), shape("circle", [[60, 30], [60, 40]]), wrong])
        done, folder = converted(tmp_path, "labelme")
        mask = folder.load("a").mask > 0
        rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
        assert mask[10:21, 10:31].all()
        disc = np.hypot(rows - 30, columns - 60)
        assert mask[disc <= 9].all()
        mask[10:21, 10:31] = False
        assert not mask[disc > 11].any()
        assert len(done.failures) == 1
        assert "shape 3" in done.failures[0]
        for file in (tmp_path / "made").rglob("*"):
            if file.is_file():
                file.unlink()
        for place in ("images", "masks", "."):
            (tmp_path / "made" / place).rmdir()


def test_a_picture_of_another_size_is_left_out(tmp_path: Path) -> None:
    labelme(tmp_path, [shape("rectangle", [[1, 1], [9, 9]])], imageHeight=61)
    with pytest.raises(UserError, match="its annotations are of 80x61"):
        converted(tmp_path, "labelme")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0 0.5 0.5 0.2 0.2", "line 2: it is a box, not an outline"),
        ("0 0.5", "line 2: it has too few values"),
        ("0 0.1 0.1 0.2 0.2 nan 0.3", "line 2: its coordinates are not finite"),
        ("0 0.1 0.1 0.2 0.2 x 0.3", "line 2: its values are no numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "line 2: it has an odd number of coordinates"),
        ("0 2.1 2.1 2.2 2.2 2.3 2.3", "line 2: it lies outside the picture"),
    ],
)
def test_what_is_damaged_in_yolo_is_a_line(line: str, said: str, tmp_path: Path) -> None:
    save(tmp_path / "source", "yolo", {"a": scene(1)})
    label = tmp_path / "source" / "labels" / "a.txt"
    whole = label.read_text().splitlines()[0]
    label.write_text(f"{whole}\n{line}\n")
    (tmp_path / "source" / "labels" / "stranger.txt").write_text(whole)
    done, folder = converted(tmp_path, "yolo")
    assert folder.load("a").mask.any()
    assert len(done.failures) == 2
    assert "there is no picture 'stranger'" in done.failures[0]
    assert said in done.failures[1]


@pytest.mark.parametrize(
    "names", ["names: [other, lesion]", "names:\n  0: other\n  1: 'lesion'", "nc: 2\nnames:\n- other\n- lesion\n"]
)
def test_yolos_classes_go_by_name_or_number(names: str, tmp_path: Path) -> None:
    save(tmp_path / "source", "yolo", {"a": scene(1)})
    (tmp_path / "source" / "data.yaml").write_text(names)
    square = "1 0.1 0.1 0.1 0.2 0.2 0.2 0.2 0.1"
    label = tmp_path / "source" / "labels" / "a.txt"
    label.write_text(f"0 0.5 0.5 0.6 0.6 0.5 0.7\n{square}\n")
    masks = []
    for number, wanted in enumerate((["lesion"], ["1"])):
        found = find_annotated("yolo", tmp_path / "source", labels=wanted)
        prepare(found, tmp_path / f"made{number}")
        masks.append(DatasetFolder.open(tmp_path / f"made{number}").load("a").mask)
    expected = np.zeros(SIZE, bool)
    expected[6:13, 8:17] = True
    assert np.array_equal(masks[0] > 0, expected)
    assert np.array_equal(masks[0], masks[1])


@pytest.mark.parametrize(
    "names",
    ["\n" * 1_000_000, "names: [a" * 100_000, "names:\n" + " " * 1_000_000 + "x", f"names:\n  {'9' * 5000}: a\n- a\n"],
    ids=["line ends", "lists without end", "spaces", "digits"],
)
def test_yolos_classes_are_read_in_time(names: str, tmp_path: Path) -> None:
    save(tmp_path / "source", "yolo", {"a": scene(1)})
    (tmp_path / "source" / "data.yaml").write_text(names)
    began = time.process_time()
    assert find_annotated("yolo", tmp_path / "source").items
    assert time.process_time() - began < 5  # it was hours, or a traceback


@pytest.mark.parametrize("sizes", [{}, {"height": 10**400}])
@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": list(SIZE), "counts": [2**62] * 4 + [SIZE[0] * SIZE[1]]},  # whose sum is right in 64 bits
        {"size": list(SIZE), "counts": [10**30]},
        [[10**400, 1, 2, 3, 4, 5]],
    ],
    ids=["wraps", "large", "point"],
)
def test_numbers_of_any_size_are_a_line(segmentation: Any, sizes: dict[str, int], tmp_path: Path) -> None:
    coco(tmp_path, [thing(1), thing(2, segmentation)])
    file = tmp_path / "source" / "x.json"
    value = json.loads(file.read_text())
    value["images"][0].update(sizes)
    file.write_text(json.dumps(value))
    done, folder = converted(tmp_path, "coco")
    assert folder.load("a").mask.any()
    (line,) = done.failures
    assert "object 2" in line


def test_a_labelme_masks_texts_are_not_unpacked(tmp_path: Path) -> None:
    whole = cv2.imencode(".png", np.full((3, 3), 255, np.uint8))[1].tobytes()
    text = b"zTXt" + b"a\0\0" + zlib.compress(bytes(7_900_000))
    chunk = (len(text) - 4).to_bytes(4) + text + zlib.crc32(text).to_bytes(4)
    costly = whole[:33] + chunk * 300 + whole[33:]
    corners = [[4, 5], [6, 7]]
    shapes = [shape("mask", corners, mask=base64.b64encode(costly).decode())]
    bmp = cv2.imencode(".bmp", np.full((3, 3), 255, np.uint8))[1].tobytes()
    shapes.append(shape("mask", corners, mask=base64.b64encode(bmp).decode()))
    labelme(tmp_path, shapes)
    began = time.process_time()
    done, folder = converted(tmp_path, "labelme")
    assert time.process_time() - began < 2
    assert np.argwhere(folder.load("a").mask).tolist() == [[y, x] for y in (5, 6, 7) for x in (4, 5, 6)]
    (line,) = done.failures
    assert "shape 2: its mask is no PNG" in line


@given(value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["a.png", 1]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(
        ["images", "annotations", "categories", "id", "file_name", "image_id", "segmentation", "counts", "size",
         "shapes", "points", "shape_type", "mask", "label", "imagePath", "width", "height"]
    ), inner, max_size=6),
    max_leaves=25,
))  # fmt: skip
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("form", ["coco", "labelme"])
def test_no_json_is_more_than_a_line(form: str, value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any")
    if form == "labelme":
        value = {"shapes": [value, {"shape_type": "polygon"} | (value if isinstance(value, dict) else {})]} | {
            "imagePath": "a.png"
        }
    else:
        entry = value if isinstance(value, dict) else {}
        value = {"images": [{"id": 1, "file_name": "a.png"}, value], "annotations": [{"image_id": 1} | entry, value]}
    coco(folder, [])
    (folder / "source" / "x.json").write_text(json.dumps(value))
    with suppress(UserError):  # any other error fails
        converted(folder, form)
