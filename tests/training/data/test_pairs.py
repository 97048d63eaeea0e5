"""Anybody's own images and masks, named and valued as they are, become a dataset folder."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.training.data.pairs import Positive, find_pairs
from espmedsam_edge.training.data.prepare import Prepared, prepare

SIZE = (40, 56)


def _write(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


def _scenes(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [phantom("ultrasound", seed, SIZE) for seed in range(count)]


def _made(tmp_path: Path, masks: str = "masks", **options: object) -> tuple[Prepared, DatasetFolder]:
    found = find_pairs(tmp_path / "images", tmp_path / masks, **options)  # type: ignore[arg-type]
    done = prepare(found, tmp_path / "made")
    return done, DatasetFolder.open(tmp_path / "made")


@pytest.mark.parametrize(
    ("image", "mask", "options"),
    [
        ("images/{}.png", "masks/{}.png", {}),
        ("images/{}.jpg", "masks/{}_gt.png", {"masks_named": "{id}_gt"}),
        ("images/{}_0000.png", "masks/seg-{}.png", {"images_named": "{id}_0000", "masks_named": "seg-{id}"}),
        ("images/{}.png", "images/{}_mask.png", {"masks_named": "{id}_mask", "masks": "images"}),
        ("images/{}.png", "images/labels/{}.png", {"masks": "images/labels"}),
        ("images/{}/film.png", "masks/{}/lungs.png", {"images_named": "{id}/film", "masks_named": "{id}/lungs"}),
    ],
)
def test_files_belong_together_by_their_names(image: str, mask: str, options: dict[str, str], tmp_path: Path) -> None:
    scenes = {f"case.{number} a": scene for number, scene in enumerate(_scenes(4))}
    for name, (picture, truth) in scenes.items():
        _write(tmp_path / image.format(name), picture)
        _write(tmp_path / mask.format(name), truth)
    done, folder = _made(tmp_path, **options)
    assert (done.failures, done.unmasked, done.unmatched) == ([], [], [])
    assert folder.ids() == sorted(scenes)
    for name, (_, truth) in scenes.items():
        assert np.array_equal(folder.load(name).mask, truth)


def test_several_masks_of_an_image_are_merged(tmp_path: Path) -> None:
    (picture, truth), *_ = _scenes(1)
    _write(tmp_path / "images" / "a_1.png", picture)
    halves = truth.copy(), truth.copy()
    halves[0][:20], halves[1][20:] = 0, 0
    _write(tmp_path / "masks" / "a_1_mask.png", halves[0])
    _write(tmp_path / "masks" / "a_1_mask_2.png", halves[1])
    _, folder = _made(tmp_path, masks_named="{id}_mask*")
    assert np.array_equal(folder.load("a_1").mask, truth)


@pytest.mark.parametrize("kind", ["grey", "16 bits", "palette", "colours", "objects"])
def test_the_values_that_are_meant_are_the_target(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, SIZE).astype(np.uint8)
    _write(tmp_path / "images" / "a.png", _scenes(1)[0][0])
    place, positive, expected = tmp_path / "masks" / "a.png", "1,3", np.isin(labels, (1, 3))
    colours = np.array([[0, 0, 0], [0, 0, 200], [200, 0, 0], [0, 128, 0]], np.uint8)  # BGR
    if kind == "palette":  # OpenCV reads such files as colours
        image = pytest.importorskip("PIL.Image").fromarray(labels)
        image.putpalette(colours[:, ::-1].ravel().tolist())
        place.parent.mkdir()
        image.save(place)
    elif kind == "colours":
        positive = "#c80000, #008000"
        _write(place, colours[labels])
    elif kind == "objects":
        positive, expected = "any", labels > 0
        _write(place, labels.astype(np.uint16) * 300)
    else:
        _write(place, labels if kind == "grey" else labels.astype(np.uint16))
    _, folder = _made(tmp_path, positive=Positive.parse(positive))
    assert np.array_equal(folder.load("a").mask == 255, expected)


def test_a_patients_images_are_in_one_list_and_a_seed_deals_otherwise(tmp_path: Path) -> None:
    for patient in range(12):
        for number, (picture, truth) in enumerate(_scenes(3)):
            for folder, file in (("images", picture), ("masks", truth)):
                _write(tmp_path / folder / f"p{patient:02d}_{number}.png", file)
    dealt = []
    for seed in (0, 0, 1):
        found = find_pairs(
            tmp_path / "images", tmp_path / "masks", patient="{patient}_*", modality="ultrasound", seed=seed
        )
        lists = prepare(found, tmp_path / str(len(dealt))).split
        assert (len(lists.train), len(lists.valid), len(lists.test)) == pytest.approx((25, 4, 7), abs=3)
        assert lists.modality == "ultrasound"
        for name in ("train", "valid", "test"):
            members = getattr(lists, name)
            patients = {id_[:3] for id_ in members}
            assert len(members) == 3 * len(patients)  # all of each patient
            assert {lists.patient[id_] for id_ in members} == patients
        dealt.append(lists.train)
    assert dealt[0] == dealt[1] != dealt[2]


def test_what_does_not_fit_is_told_and_the_rest_done(tmp_path: Path) -> None:
    for number, (picture, truth) in enumerate(_scenes(5)):
        _write(tmp_path / "images" / f"{number}.png", picture)
        _write(tmp_path / "masks" / f"{number}.png", truth)
    (tmp_path / "masks" / "0.png").unlink()
    _write(tmp_path / "masks" / "1.png", np.zeros((9, 9), np.uint8))
    (tmp_path / "masks" / "2.png").write_bytes(b"no picture")
    _write(tmp_path / "masks" / "stranger.png", _scenes(1)[0][1])
    done, folder = _made(tmp_path)
    assert folder.ids() == ["3", "4"]
    assert done.unmasked == ["0"]
    assert [Path(name).name for name in done.unmatched] == ["stranger.png"]
    assert len(done.failures) == 2
    assert any("9x9" in line for line in done.failures)


def test_where_no_mask_has_the_value_the_values_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "images" / "a.png", _scenes(1)[0][0])
    _write(tmp_path / "masks" / "a.png", np.arange(40 * 56, dtype=np.uint8).reshape(SIZE) % 3)
    with pytest.raises(UserError, match=r"a\.png holds 0, 1, 2\."):
        _made(tmp_path, positive=Positive.parse("7"))


def test_links_that_lead_round_are_passed_over(tmp_path: Path) -> None:
    for number, (picture, truth) in enumerate(_scenes(2)):
        _write(tmp_path / "images" / f"{number}.png", picture)
        _write(tmp_path / "images" / "masks" / f"{number}.png", truth)
    for folder in ("images", "images/masks"):
        (tmp_path / folder / "round.png").symlink_to("round.png")
        (tmp_path / folder / "up").symlink_to("..")
    done, folder_made = _made(tmp_path, "images/masks")
    assert (done.failures, done.unmatched, folder_made.ids()) == ([], [], ["0", "1"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"masks_named": "mask"}, "no {id}"),
        ({"images_named": "x{id}"}, "no images named 'x{id}'"),
        ({"patient": "{id}"}, "no {patient}"),
        ({"patient": "z{patient}_*"}, "no image's name fits"),
        ({"masks": "nowhere"}, "no folder at"),
    ],
)
def test_wrong_use_is_one_line(options: dict[str, str], said: str, tmp_path: Path) -> None:
    _write(tmp_path / "images" / "a.png", _scenes(1)[0][0])
    _write(tmp_path / "masks" / "a.png", _scenes(1)[0][1])
    with pytest.raises(UserError) as error:
        _made(tmp_path, **options)
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["", "1,,2", "red", "-1", "#12", "1;2"])
def test_values_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no value of a mask"):
        Positive.parse(text)
