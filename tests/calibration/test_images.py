"""Calibration images: what is found, how it is divided, when it counts as the same."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from dicom_files import save_dicom
from trained_graphs import save_images
from video_files import cut, save_clip

from espmedsam_edge.calibration.images import evenly, find_images
from espmedsam_edge.calibration.resemblance import Resemblance
from espmedsam_edge.errors import UserError
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.sources.opening import open_sources


def test_evenly_spaces_and_keeps_the_order() -> None:
    assert evenly(range(10), 5) == [1, 3, 5, 7, 9]
    assert evenly([1, 2], 5) == [1, 2]


def test_a_folder_is_divided_without_overlap(tmp_path: Path) -> None:
    images = find_images([str(save_images(tmp_path, 20))], count=12, held_out=4)
    assert len(images.calibration) == 12
    assert len(images.held_out) == 4
    assert not {p.path for p in images.calibration} & {p.path for p in images.held_out}
    assert any("Only 12" in note for note in images.notes)


def test_a_dataset_folder_calibrates_on_train_and_holds_out_valid(tmp_path: Path) -> None:
    save_images(tmp_path, 6)
    (tmp_path / "pictures").rename(tmp_path / "images")
    (tmp_path / "truth").rename(tmp_path / "masks")
    ids = [f"case {seed}" for seed in range(6)]
    (tmp_path / "split.json").write_text(
        '{"origin": "derived", "train": ["case 0", "case 2", "case 3"], "valid": ["case 1", "case 5"], "test": []}'
    )
    images = find_images([str(tmp_path)])
    assert [p.path.stem for p in images.calibration] == [ids[0], ids[2], ids[3]]
    assert [p.path.stem for p in images.held_out] == [ids[1], ids[5]]
    assert all(p.mask is not None and p.mask.parent.name == "masks" for p in images.held_out)


@pytest.mark.parametrize("listed", ["train", "valid"])
def test_test_images_are_never_used(tmp_path: Path, listed: str) -> None:
    save_images(tmp_path, 10)
    (tmp_path / "pictures").rename(tmp_path / "images")
    ids = [f"case {seed}" for seed in range(10)]
    (tmp_path / "split.json").write_text(json.dumps({listed: ids[:6], "test": ids[6:]}))
    images = find_images([str(tmp_path)])
    calibration, held_out = ({p.path.stem for p in part} for part in (images.calibration, images.held_out))
    assert calibration | held_out == set(ids[:6])
    assert calibration
    assert held_out
    assert not calibration & held_out


def test_a_dataset_of_test_images_alone_is_refused(tmp_path: Path) -> None:
    save_images(tmp_path, 2)
    (tmp_path / "pictures").rename(tmp_path / "images")
    (tmp_path / "split.json").write_text('{"test": ["case 0", "case 1"]}')
    with pytest.raises(UserError, match=r"lists test images only. Give others"):
        find_images([str(tmp_path)])
    (tmp_path / "split.json").write_text("{}")  # lists nothing
    assert len(find_images([str(tmp_path)]).calibration) == 1


def test_a_video_gives_its_frames(tmp_path: Path) -> None:
    file = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for level in range(0, 200, 10):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    images = find_images([str(file)], count=4, held_out=1)
    levels = [int(frame.mean()) for _, frame in images.read(images.calibration)]
    wanted = [10 * (p.index or 0) for p in images.calibration]
    assert levels == pytest.approx(wanted, abs=3)  # JPEG


def test_dicom_is_read_as_infer_reads_it(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in (2, 10, 1):
        pixels = random.integers(0, 4000, (40, 60)).astype(np.uint16)
        save_dicom(tmp_path / f"s{number}.dcm", pixels, InstanceNumber=number, WindowCenter=1500, WindowWidth=900)
    loop = random.integers(0, 256, (6, 40, 60, 3)).astype(np.uint8)
    save_dicom(tmp_path / "loop.dcm", loop, "RGB", FrameTime=40)
    wanted = []
    for source in open_sources([str(tmp_path)])[0]:
        with source:
            wanted += [(frame.path, frame.index, frame.image) for frame in source]
    images = find_images([str(tmp_path)], held_out=2)
    assert len(images.calibration) + len(images.held_out) == len(wanted) == 9
    found = {(p.path, p.index or 0): frame for p, frame in images.read([*images.calibration, *images.held_out])}
    assert not images.failures
    for path, index, frame in wanted:
        assert (found[path, index] == frame).all()


def test_a_video_that_ends_early_is_a_failure(tmp_path: Path) -> None:
    whole = save_clip(tmp_path / "whole.avi", 20)
    short = cut(save_clip(tmp_path / "short.avi", 20), 0.5)
    loop = np.random.default_rng(0).integers(0, 256, (20, 40, 60)).astype(np.uint8)
    cine = cut(save_dicom(tmp_path / "cine.dcm", loop, FrameTime=40), 0.5)
    images = find_images([str(whole), str(short), str(cine)], held_out=1)
    assert len(list(images.read(images.calibration))) == len(images.calibration) < 58
    assert {Path(failure.name) for failure in images.failures} == {short, cine}
    assert len(images.failures) == 2
    save_clip(whole, 3)  # changed since it was counted
    assert len(list(images.read(images.calibration))) < len(images.calibration)
    assert f"{whole} ended before frame 4." in images.failures[-1].message


def test_the_hash_follows_content_and_nothing_else(tmp_path: Path) -> None:
    first = save_images(tmp_path / "a", 6)
    second = save_images(tmp_path / "b", 6)
    for number, file in enumerate(sorted(second.iterdir())):
        file.rename(second / f"renamed {number}.png")
    one, two = find_images([str(first)]), find_images([str(second)])
    assert one.content_hash() == two.content_hash()
    chosen = two.calibration[0].path
    cv2.imwrite(str(chosen), 255 - cv2.imread(str(chosen)))
    assert one.content_hash() != two.content_hash()


def test_no_image_is_an_error_and_a_bad_one_is_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image to calibrate with"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="no image to calibrate with: no file"):
        find_images([str(tmp_path / "misspelt.png")])
    folder = save_images(tmp_path, 6)
    (folder / "case 0.png").write_bytes(b"not a picture")
    images = find_images([str(folder)])
    assert len(list(images.read([*images.calibration, *images.held_out]))) == 5
    assert [Path(failure.name).name for failure in images.failures] == ["case 0.png"]


def test_masks_are_matched_by_name(tmp_path: Path) -> None:
    folder = save_images(tmp_path, 8)
    images = find_images([str(folder)], masks=tmp_path / "truth")
    assert all(p.mask and p.mask.stem == p.path.stem for p in images.held_out)
    with pytest.raises(UserError, match="no mask in"):
        find_images([str(folder)], masks=save_images(tmp_path / "other", 0))


def test_a_single_image_is_used_twice_and_said_so(tmp_path: Path) -> None:
    images = find_images([str(save_images(tmp_path, 1))])
    assert images.held_out == images.calibration
    assert any("single image" in note for note in images.notes)


@pytest.mark.parametrize("modality", ["dermoscopy", "xray", "fundus", "colonoscopy", "ultrasound", "microscopy"])
def test_phantoms_resemble_their_modality(modality: str) -> None:
    seen = Resemblance.of(modality)
    for seed in range(8):
        seen.add(phantom(modality, seed, (192, 192))[0])
    assert seen.warning() is None


def test_another_modality_and_noise_are_noticed() -> None:
    grey = Resemblance.of("fundus")
    grey.add(phantom("ultrasound", 1, (192, 192))[0])
    assert "do not look like fundus" in (grey.warning() or "")
    noise = Resemblance.of("colonoscopy")
    noise.add(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))
    assert "roughness" in (noise.warning() or "")
    assert Resemblance.of("thermography").warning() is None
