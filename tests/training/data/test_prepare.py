"""Every publisher's layout, in miniature, becomes a dataset folder with the right masks and lists."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_layouts import SIZE, WRITERS, scene

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.dataset import DatasetFolder, Split
from espmedsam_edge.training.data.layouts import LAYOUTS, Item, layout
from espmedsam_edge.training.data.prepare import Prepared, of_layout, prepare
from espmedsam_edge.training.data.splitting import make_split

pytest.importorskip("PIL", reason="DRIVE's masks are GIFs (extra train)")


def _prepare(name: str, tmp_path: Path, **options: object) -> tuple[Prepared, DatasetFolder]:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    if not any(source.iterdir()):
        WRITERS[name](source)
    done = prepare(of_layout(layout(name), source), tmp_path / "made", **options)  # type: ignore[arg-type]
    return done, DatasetFolder.open(tmp_path / "made")


def test_every_layout_has_a_copy_to_test() -> None:
    assert set(WRITERS) == set(LAYOUTS)


@pytest.mark.parametrize("name", [name for name, entry in LAYOUTS.items() if entry.modality])
def test_a_layout_becomes_a_folder_with_its_images_masks_and_lists(name: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    seeds = WRITERS[name](tmp_path / "source")
    done, folder = _prepare(name, tmp_path)
    modality = LAYOUTS[name].modality
    assert done.failures == []
    assert folder.ids() == sorted(seeds)
    assert folder.split is not None
    assert folder.split.modality == modality
    listed = [*folder.split.train, *folder.split.valid, *folder.split.test]
    assert sorted(listed) == sorted(seeds)
    assert folder.split.train
    for id_, seed in seeds.items():
        sample = folder.load(id_)
        image, mask = scene(str(modality), seed)
        assert np.array_equal(sample.mask, mask), id_
        assert sample.note == ""
        # JPEG sources differ by their compression, 12-bit films by rounding to 8 bits.
        assert np.abs(sample.image.astype(int) - image).mean() < 12, id_


def test_photographs_have_no_masks_and_are_all_for_training(tmp_path: Path) -> None:
    done, folder = _prepare("photographs", tmp_path)
    assert done.images == 3
    assert folder.mask_files == {}
    assert folder.ids("train") == ["sa_1", "sa_2", "sa_3"]
    source = tmp_path / "source" / "sa_000000" / "sa_1.jpg"
    assert folder.image_files["sa_1"].read_bytes() == source.read_bytes()


def test_photographs_of_one_name_in_two_folders_keep_the_folders_name(tmp_path: Path) -> None:
    for album in ("a", "b"):
        (tmp_path / "source" / album).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "source" / album / "1.jpg"), scene("dental", 1)[0])
    assert _prepare("photographs", tmp_path)[1].ids() == ["a-1", "b-1"]


def test_publishers_lists_are_kept(tmp_path: Path) -> None:
    split = _prepare("isic2018", tmp_path)[0].split
    assert split.origin == "official"
    assert split.valid == ["ISIC_0000012"]
    assert split.test == ["ISIC_0000020", "ISIC_0000021"]


def test_drive_keeps_its_test_list_and_makes_a_valid_list_from_training(tmp_path: Path) -> None:
    split = _prepare("drive", tmp_path)[0].split
    assert split.test == ["01_test", "02_test", "03_test"]
    assert (len(split.train), len(split.valid)) == (4, 1)


def test_drive_without_published_test_masks_leaves_them_out(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    WRITERS["drive"](tmp_path / "source")
    for file in (tmp_path / "source" / "DRIVE" / "test" / "1st_manual").iterdir():
        file.unlink()
    done, _ = _prepare("drive", tmp_path)
    assert done.unmasked == ["01_test", "02_test", "03_test"]
    assert done.split.test == []


@pytest.mark.parametrize(("name", "groups"), [("clinicdb", 4), ("tnbc", 5), ("montgomery", 6)])
def test_a_patient_is_in_one_list_only(name: str, groups: int, tmp_path: Path) -> None:
    split = _prepare(name, tmp_path)[0].split
    assert len(set(split.patient.values())) == groups
    homes = {part: {split.patient[id_] for id_ in getattr(split, part)} for part in ("train", "valid", "test")}
    assert not homes["train"] & homes["test"]
    assert not homes["train"] & homes["valid"]
    assert not homes["valid"] & homes["test"]


def test_normal_cases_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    done, _ = _prepare("busi", tmp_path)
    assert done.unmasked == ["normal (1)"]
    kept = prepare(of_layout(layout("busi"), tmp_path / "source"), tmp_path / "all", keep_empty=True)
    assert kept.images == done.images + 1
    assert not DatasetFolder.open(tmp_path / "all").load("normal (1)").mask.any()


def test_a_film_with_half_its_mask_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    WRITERS["montgomery"](tmp_path / "source")
    next((tmp_path / "source").rglob("leftMask/MCUCXR_0002_0.png")).unlink()
    assert _prepare("montgomery", tmp_path)[0].unmasked == ["MCUCXR_0002_0"]


def test_long_sides_are_shrunk_with_their_masks_and_never_enlarged(tmp_path: Path) -> None:
    _, folder = _prepare("udiat", tmp_path, long_side=32)
    sample = folder.load("000001")
    assert sample.mask.shape == (24, 32)
    whole = scene("ultrasound", 1)[1]
    assert abs(float((sample.mask > 0).mean()) - float((whole > 0).mean())) < 0.02
    prepare(of_layout(layout("udiat"), tmp_path / "source"), tmp_path / "same", long_side=4000)
    assert DatasetFolder.open(tmp_path / "same").load("000001").mask.shape == SIZE


def test_a_given_split_wins_and_is_cut_down_to_the_images(tmp_path: Path) -> None:
    given = Split(origin="official", train=["000002", "000001", "gone"], test=["000007"])
    done, folder = _prepare("udiat", tmp_path, split=given)
    assert done.images == 7
    assert folder.ids("train") == ["000002", "000001"]
    assert folder.ids("test") == ["000007"]
    assert folder.split is not None
    assert folder.split.origin == "official"
    with pytest.raises(UserError, match="none of the given split's ids"):
        prepare(of_layout(layout("udiat"), tmp_path / "source"), tmp_path / "none", split=Split(train=["x"]))
    assert not (tmp_path / "none").exists()


def test_bad_files_are_reported_and_the_rest_is_done(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    WRITERS["udiat"](tmp_path / "source")
    base = tmp_path / "source" / "BUS"
    (base / "original" / "000003.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    cv2.imwrite(str(base / "GT" / "000005.png"), np.full((10, 10), 255, np.uint8))
    done, folder = _prepare("udiat", tmp_path)
    assert folder.ids() == ["000001", "000002", "000004", "000006", "000007"]
    assert sorted(folder.mask_files) == folder.ids()
    assert len(done.failures) == 2
    assert "000003.png" in done.failures[0]
    assert "10x10" in done.failures[1]


def test_damaged_gif_gz_and_ppm_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    WRITERS["stare"](tmp_path / "source")
    images = tmp_path / "source" / "stare-images"
    (images / "im0001.ppm.gz").write_bytes((images / "im0001.ppm.gz").read_bytes()[:40])
    plain = tmp_path / "source" / "labels-ah" / "im0044.ah.ppm"
    plain.write_bytes(plain.read_bytes()[:200])
    done, folder = _prepare("stare", tmp_path)
    assert [("im0001" in text, "im0044" in text) for text in done.failures] == [(True, False), (False, True)]
    assert len(folder.ids()) == 4


def test_a_gif_that_claims_more_than_its_decoder_takes_is_reported(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    WRITERS["udiat"](tmp_path / "source")
    originals = tmp_path / "source" / "BUS" / "original"
    for number, canvas in (("000001", (40_000, 40_000)), ("000002", (10, 10))):
        screen = b"GIF89a" + struct.pack("<HH", *canvas) + b"\x80\0\0" + bytes(3) + b"\xff" * 3
        picture = b"," + struct.pack("<HHHH", 0, 0, 40_000, 40_000) + b"\0\x02\x02\x44\x01\0;"
        (originals / f"{number}.png").write_bytes(screen + picture)
    done, folder = _prepare("udiat", tmp_path)
    assert ["000001" in done.failures[0], "000002" in done.failures[1]] == [True, True]
    assert all("more than" in failure for failure in done.failures)
    assert len(done.failures) == 2
    assert len(folder.ids()) == 5


def test_a_gz_with_damage_in_its_middle_is_reported(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    WRITERS["stare"](tmp_path / "source")
    file = tmp_path / "source" / "stare-images" / "im0001.ppm.gz"
    packed = bytearray(gzip.compress(gzip.decompress(file.read_bytes())))
    packed[10] |= 0b110  # a kind of block that deflate does not have
    file.write_bytes(packed)
    done, _ = _prepare("stare", tmp_path)
    assert ["im0001" in failure for failure in done.failures] == [True]


@pytest.mark.parametrize(
    "table",
    [
        b"frame_id,sequence_id\n1,\xff\n",
        b"frame_id,sequence_id\n1," + b"x" * 200_000,
        None,
    ],
    ids=["not UTF-8", "an endless cell", "a pipe"],
)
def test_a_damaged_table_of_sequences_is_one_line(table: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    WRITERS["clinicdb"](tmp_path / "source")
    file = tmp_path / "source" / "metadata.csv"
    file.unlink()
    if table is None:
        os.mkfifo(file)
    else:
        file.write_bytes(table)
    with pytest.raises(UserError, match=r"cannot read .*metadata\.csv"):
        _prepare("clinicdb", tmp_path)


def test_a_row_of_sequences_that_ends_early_is_read(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    WRITERS["clinicdb"](tmp_path / "source")
    (tmp_path / "source" / "metadata.csv").write_text("frame_id,sequence_id\n1,1\n2\n")
    assert not _prepare("clinicdb", tmp_path)[0].failures


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_another_folder_is_refused_with_what_was_expected(name: str, tmp_path: Path) -> None:
    (tmp_path / "source" / "notes").mkdir(parents=True)
    (tmp_path / "source" / "notes" / "readme.txt").write_text("nothing")
    with pytest.raises(UserError, match="Expected: ") as caught:
        prepare(of_layout(layout(name), tmp_path / "source"), tmp_path / "made")
    assert LAYOUTS[name].form.split()[0] in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_a_taken_target_and_a_missing_source_are_refused(tmp_path: Path) -> None:
    WRITERS["udiat"](tmp_path / "source")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists"):
        prepare(of_layout(layout("udiat"), tmp_path / "source"), tmp_path / "made")
    assert (tmp_path / "made" / "mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match="no folder at"):
        prepare(of_layout(layout("udiat"), tmp_path / "nowhere"), tmp_path / "other")
    with pytest.raises(UserError, match="Did you mean 'busi'"):
        layout("busy")


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    WRITERS["udiat"](tmp_path / "source")

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(of_layout(layout("udiat"), tmp_path / "source"), tmp_path / "made", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    WRITERS["clinicdb"](tmp_path / "source")
    for target in ("one", "two"):
        prepare(of_layout(layout("clinicdb"), tmp_path / "source"), tmp_path / target)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 25
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abc123", min_size=1), st.sampled_from(["p1", "p2", "p3", None]), min_size=1), st.randoms()
)
def test_derived_lists_depend_on_names_only_and_keep_patients_together(patients: dict, random: object) -> None:
    items = [Item(id_, Path(id_), patient=patient) for id_, patient in patients.items()]
    split = make_split(items, "fundus")
    random.shuffle(items)  # type: ignore[attr-defined]
    assert make_split(items, "fundus") == split
    parts = [split.train, split.valid, split.test]
    assert sorted(id_ for part in parts for id_ in part) == sorted(patients)
    for patient in set(patients.values()) - {None}:
        assert sum(any(patients[id_] == patient for id_ in part) for part in parts) == 1


def test_many_images_are_dealt_seventy_ten_twenty() -> None:
    split = make_split([Item(f"image {number}", Path()) for number in range(1000)], None)
    assert [len(split.train), len(split.valid), len(split.test)] == [700, 100, 200]


def test_the_split_file_holds_the_patients(tmp_path: Path) -> None:
    _prepare("tnbc", tmp_path)
    written = json.loads((tmp_path / "made" / "split.json").read_text())
    assert written["patient"]["01_2"] == "Slide_01"
    assert written["modality"] == "histopathology"


def test_preparing_and_checking_need_no_torch(tmp_path: Path) -> None:
    WRITERS["udiat"](tmp_path / "source")
    code = (
        "import sys\nfrom espmedsam_edge import cli\n"
        f"for words in (['prepare', 'udiat', {str(tmp_path / 'source')!r}, {str(tmp_path / 'made')!r}],\n"
        f"              ['check', {str(tmp_path / 'made')!r}]):\n"
        "    try: cli.main(['data', *words])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'torchvision', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Nothing is wrong" in done.stdout
