"""Which frames are segmented, turned which way and which part of them; results are the whole frame's."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_bundles import save_toy_bundle
from video_files import save_clip

from espmedsam_edge import Outputs, ReadingOptions, Segmenter, UserError, infer, infer_frames
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main as command_line
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.runtime.sources.files import ImageFiles, VideoFile
from espmedsam_edge.runtime.sources.selection import AUTO_FRAMES, SelectedSource, Selection
from espmedsam_edge.runtime.sources.source import SourceFrame

BOX = Crop(70, 20, 96, 80)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def main(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        command_line(arguments)
    return int(ended.value.code or 0)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colours all over, reddish in parts: what the toy network's mask depends on."""
    coarse = np.random.default_rng(seed).integers(40, 256, (5, 6, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(30), np.uint8)


def capture(seed: int = 0, box: Crop = BOX) -> np.ndarray:
    frame = np.zeros((120, 180, 3), np.uint8)
    cv2.putText(frame, "NAME", (4, 30), cv2.FONT_HERSHEY_PLAIN, 0.8, (255, 255, 255))
    box.of(frame)[:] = photo(box.height, box.width, seed)
    return frame


def save(path: Path, picture: np.ndarray) -> Path:
    assert cv2.imwrite(str(path), picture)
    return path


def frames_of(path: Path, **wanted: object) -> list[SourceFrame]:
    with SelectedSource(VideoFile(path), Selection(**wanted)) as source:  # type: ignore[arg-type]
        return list(source)


@pytest.fixture
def toy_bundle(tmp_path: Path) -> Bundle:
    """Of a modality that nothing is recognised as: the overlay would say that it doubts these pictures."""
    return save_toy_bundle(tmp_path / "toy.bundle", ("histopathology",))


@pytest.mark.parametrize("way", ["named", "auto", "python"])
def test_results_of_a_crop_are_those_of_the_part_alone_at_its_place(way: str, toy_bundle: Bundle) -> None:
    frame = capture()
    save(Path("capture.png"), frame)
    crop: object = {"named": str(BOX), "auto": "auto", "python": BOX}[way]
    outputs = Outputs(out="overlay.png", masks="masks", jsonl="lines.jsonl", contours="polygons")
    report = infer("capture.png", toy_bundle, outputs, ReadingOptions(crop=crop))  # type: ignore[arg-type]
    assert report.failures == []
    with Segmenter.load(toy_bundle) as segmenter:
        alone, whole = segmenter.segment(BOX.of(frame)), segmenter.segment(frame)
    assert 0 < alone.area < BOX.width * BOX.height
    expected = np.zeros(frame.shape[:2], np.uint8)
    expected[20:100, 70:166] = alone.mask
    mask = cv2.imread("masks/capture.png", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(mask, expected)
    assert (whole.mask != expected).any()
    line = json.loads(Path("lines.jsonl").read_text())
    assert (line["width"], line["height"], line["area"]) == (180, 120, alone.area)
    assert line["area_fraction"] == round(alone.area / (180 * 120), 6)
    assert alone.bounding_box is not None
    assert alone.centroid is not None
    x, y, width, height = alone.bounding_box
    assert line["bounding_box"] == [x + 70, y + 20, width, height]
    assert line["centroid"] == [round(alone.centroid[0] + 70, 2), round(alone.centroid[1] + 20, 2)]
    for polygon in line["polygons"]:
        points = np.reshape(polygon, (-1, 2)).astype(int)
        assert (expected[points[:, 1], points[:, 0]] == 255).all()
    overlay = cv2.imread("overlay.png")
    assert overlay.shape == frame.shape
    untouched = cv2.dilate(expected, np.ones((31, 31))) == 0
    np.testing.assert_array_equal(overlay[untouched], frame[untouched])
    [(_, result)] = list(infer_frames("capture.png", toy_bundle, reading=ReadingOptions(crop=str(BOX))))
    np.testing.assert_array_equal(result.mask, expected)
    probability = result.probability()
    np.testing.assert_array_equal(BOX.of(probability), alone.probability())
    assert probability.sum() == pytest.approx(alone.probability().sum())
    np.testing.assert_array_equal(BOX.of(result.at(0.7).mask), np.where(alone.probability() >= 0.7, 255, 0))


@pytest.mark.parametrize("live", [False, True])
def test_auto_holds_what_the_first_frames_show(live: bool, toy_bundle: Bundle, said: list[str]) -> None:
    pictures = [capture(seed) for seed in range(14)]
    pictures[0][:, 100:] = 0  # the light is not on yet
    source = _Scripted(pictures, live=live)
    with SelectedSource(source, Selection(auto=True)) as selected:  # type: ignore[arg-type]
        frames = [selected.poll() for _ in pictures] if live else list(selected)
    crops = [frame.crop for frame in frames if frame is not None]
    assert [frame.index for frame in frames if frame is not None] == list(range(14))
    held = crops[AUTO_FRAMES - 1 :] if live else crops
    assert len(set(held)) == 1
    assert held[0] is not None
    assert np.abs(np.subtract(held[0], BOX)).max() <= 2
    assert said == [f"scripted: the picture in its 180x120 pixels is --crop {held[0]}"]


class _Scripted:
    """A video or a live source whose frames are those of a list."""

    kind, name, fps, length = "video", "scripted", Fraction(10), None

    def __init__(self, pictures: list[np.ndarray], *, live: bool) -> None:
        self.live, self.failures, self.files, self.skipped, self.reconnects = live, [], [Path("scripted")], 0, 0
        self.stopped = False
        self._frames = iter([SourceFrame(p, self.files[0], i, i / 10) for i, p in enumerate(pictures)])

    def __enter__(self) -> _Scripted:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> object:
        return self._frames

    waiting, finished = True, False

    def poll(self) -> SourceFrame | None:
        return next(self._frames, None)

    def stop(self) -> None:
        self.stopped = True


def test_auto_holds_few_frames_of_a_large_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espmedsam_edge.runtime.sources.selection._HELD_BYTES", 3 * capture().nbytes)
    source = _Scripted([capture(seed) for seed in range(6)], live=False)
    with SelectedSource(source, Selection(auto=True)) as selected:  # type: ignore[arg-type]
        first = next(iter(selected))
        assert first.index == 0
        taken = source.poll()
    assert taken is not None
    assert taken.index <= 4


def test_pictures_are_looked_at_one_by_one(said: list[str]) -> None:
    other = Crop(60, 8, 110, 100)
    files = [
        save(Path("a.png"), capture(1)),
        save(Path("b.png"), capture(2, other)),
        save(Path("c.png"), photo(60, 80)),
    ]
    with SelectedSource(ImageFiles(files), Selection(auto=True)) as source:
        crops = [frame.crop for frame in source]
    assert crops[0] is not None
    assert crops[1] is not None
    assert crops[2] is None
    assert np.abs(np.subtract(crops[0], BOX)).max() <= 2
    assert np.abs(np.subtract(crops[1], other)).max() <= 2
    assert said == ["3 images: --crop auto cut borders off 2 of 3."]


def test_a_crop_that_does_not_fit_is_one_line_an_input(toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    for name, picture in (("a", capture(1)), ("b", photo(60, 80)), ("c", capture(2))):
        save(Path(f"{name}.png"), picture)
    assert (
        main(["infer", str(toy_bundle.path), "a.png", "b.png", "c.png", "--masks", "m", "--crop", "70,20,96,80"]) == 1
    )
    assert sorted(path.name for path in Path("m").iterdir()) == ["a.png", "c.png"]
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("failed: ")]
    assert len(lines) == 1
    assert "b.png: it has 80x60 pixels, the first one 180x120" in lines[0]
    assert main(["infer", str(toy_bundle.path), "a.png", "--masks", "n", "--crop", "100,20,96,80"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "crop 100,20,96,80 is not inside the frame of 180x120 pixels" in lines[0]
    for bad in ("1,2,3", "0,0,0,4", "x"):
        assert main(["infer", str(toy_bundle.path), "a.png", "--crop", bad]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_live_source_that_a_crop_does_not_fit_ends_with_a_line() -> None:
    source = _Scripted([photo(60, 80), photo(60, 80)], live=True)
    selected = SelectedSource(source, Selection(crop=BOX))  # type: ignore[arg-type]
    assert selected.poll() is None
    assert source.stopped
    assert selected.finished
    assert not selected.waiting
    assert ["not inside" in failure.message for failure in selected.failures] == [True]


def test_a_live_run_with_a_crop(toy_bundle: Bundle) -> None:
    reading = ReadingOptions(frames=4, crop=(8, 4, 40, 30), every=2)
    got = list(infer_frames("test://fundus?size=64x48&fps=100", toy_bundle, reading=reading))
    assert len(got) == 4
    with Segmenter.load(toy_bundle) as segmenter:
        for frame, result in got:
            assert result.size == (48, 64)
            np.testing.assert_array_equal(Crop(8, 4, 40, 30).of(result.mask), segmenter.segment(frame.segmented).mask)
            assert result.area == np.count_nonzero(result.mask[4:34, 8:48])
    indices = [frame.index for frame, _ in got]
    assert (np.diff(indices) >= 2).all()


def test_which_frames(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip.avi", 30, fps=30)
    times = {frame.index: frame.time for frame in frames_of(clip)}
    assert list(times) == list(range(30))

    def indices(**wanted: object) -> list[int]:
        frames = frames_of(clip, **wanted)
        assert all(frame.time == times[frame.index] for frame in frames)
        return [frame.index for frame in frames]

    assert indices(every=4) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert indices(start=0.5) == list(range(15, 30))
    assert indices(start=0.5, every=5) == [15, 20, 25]
    assert indices(fps=10) == list(range(0, 30, 3))
    assert len(indices(fps=25)) == 25
    assert indices(fps=60) == list(range(30))
    assert indices(fps=0.5) == [0]
    assert indices(start=5) == []
    with SelectedSource(VideoFile(clip), Selection(every=4)) as source:
        assert (source.fps, source.length) == (Fraction(30, 4), 8)
    with SelectedSource(VideoFile(clip), Selection(fps=10)) as source:
        assert (source.fps, source.length) == (10, None)


def test_what_is_written_has_the_times_of_the_source(toy_bundle: Bundle) -> None:
    save_clip(Path("clip.avi"), 20, fps=10)
    options = ["--start", "0.5", "--every", "5", "--csv", "areas.csv", "--out", "o.mkv"]
    assert main(["infer", str(toy_bundle.path), "clip.avi", *options]) == 0
    rows = [line.split(",")[1:3] for line in Path("areas.csv").read_text().splitlines()[1:]]
    assert [(int(index), float(time)) for index, time in rows] == [(5, 0.5), (10, 1.0), (15, 1.5)]
    with VideoFile(Path("o.mkv")) as written:
        assert [frame.time for frame in written] == pytest.approx([0, 0.5, 1], abs=0.01)


@pytest.mark.parametrize("rotate", [90, 180, 270])
def test_frames_are_turned_first(rotate: int, toy_bundle: Bundle) -> None:
    picture = photo(60, 80)
    save(Path("a.png"), picture)
    [(frame, result)] = list(infer_frames("a.png", toy_bundle, reading=ReadingOptions(rotate=rotate, crop="4,6,40,50")))
    turned = np.rot90(picture, -rotate // 90)
    np.testing.assert_array_equal(frame.image, turned)
    with Segmenter.load(toy_bundle) as segmenter:
        expected = segmenter.segment(np.ascontiguousarray(turned)[6:56, 4:44])
    np.testing.assert_array_equal(result.mask[6:56, 4:44], expected.mask)
    shown = Selection(rotate=rotate).turned(
        SourceFrame(picture, Path("a"), spacing=(0.1, 0.2), aspect=Fraction(16, 15))
    )
    assert shown.spacing == ((0.1, 0.2) if rotate == 180 else (0.2, 0.1))
    assert shown.aspect == (Fraction(16, 15) if rotate == 180 else Fraction(15, 16))


@pytest.mark.parametrize(
    "wrong",
    [{"every": 0}, {"fps": 0.0}, {"fps": float("nan")}, {"start": -1.0}, {"rotate": 45}, {"every": 2, "fps": 2.0},
     {"crop": (1, 2, 3)}],
)  # fmt: skip
def test_options_that_mean_nothing(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        ReadingOptions(**wrong)  # type: ignore[arg-type]


def test_a_turned_frame_has_no_dicom_seg() -> None:
    with pytest.raises(UserError, match="--dicom-seg"):
        infer("a.dcm", "b.bundle", Outputs(dicom_seg="seg"), ReadingOptions(rotate=90))


@pytest.mark.parametrize("frames", [None, 3])
def test_a_dicom_seg_of_a_crop_has_the_sources_size(frames: int | None, toy_bundle: Bundle) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
    pytest.importorskip("highdicom", reason="needs highdicom (extra dicom)")
    from seg_sources import save_dicom

    save_dicom(Path("d.dcm"), (60, 80), frames)
    crop = Crop(30, 10, 40, 40)
    report = infer("d.dcm", toy_bundle, Outputs(dicom_seg="seg.dcm", csv="a.csv"), ReadingOptions(crop=crop))
    assert report.failures == []
    written = pydicom.dcmread("seg.dcm")
    assert (written.Rows, written.Columns) == (60, 80)
    rows = [line.split(",") for line in Path("a.csv").read_text().splitlines()[1:]]
    areas = [int(row[3]) for row in rows]
    assert len(areas) == (frames or 1)
    masks = [result.mask for _, result in infer_frames("d.dcm", toy_bundle, reading=ReadingOptions(crop=crop))]
    assert [np.count_nonzero(mask) for mask in masks] == areas
    assert all(not np.delete(mask, np.s_[10:50], 0).any() for mask in masks)
    planes = np.reshape(written.pixel_array, (-1, 60, 80))
    np.testing.assert_array_equal(planes.astype(bool), [mask > 0 for mask in masks if mask.any()])
