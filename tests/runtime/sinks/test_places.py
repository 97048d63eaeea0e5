"""Where results go: no collisions, no escapes, no input overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sink_material import source_of

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sinks.places import Places, numbered, output_names, plan_places
from espmedsam_edge.runtime.sources.files import ImageFiles, VideoFile
from espmedsam_edge.runtime.sources.source import Source


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


IMAGE, OTHER, CLIP = Path("a.jpg"), Path("b.png"), Path("c.avi")


def plan(
    files: list[Path],
    out: str | None = None,
    masks: str | None = None,
    jsonl: str | None = None,
    overwrite: bool = True,
) -> Places:
    sources: list[Source] = [ImageFiles([f for f in files if f.suffix != ".avi"])] if files[0] != CLIP else []
    sources += [VideoFile(file) for file in files if file.suffix == ".avi"]
    paths = [Path(text) if text else None for text in (out, masks, jsonl)]
    return plan_places(sources, *paths, overwrite=overwrite)


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")


def test_what_live_sources_gave_is_never_replaced() -> None:
    """A restarted recorder writes beside what it has; all of one run has one number."""
    cameras: list[Source] = [source_of(Path(name), live=True) for name in ("cam", "cam-2")]

    def planned(overwrite: bool = True) -> Places:
        return plan_places(
            [*cameras, VideoFile(CLIP)],
            Path("o"),
            Path("m"),
            Path("r.jsonl"),
            overwrite=overwrite,
            mask_video=Path("v"),
            csv=Path("r.csv"),
        )

    assert (planned().number, planned().kept) == (1, None)
    make("o/c.mp4", "m/c/000000.png")  # a file's results can be made again
    assert planned().number == 1
    make("m/cam-2/000000.png")
    places = planned()
    assert (places.number, places.kept) == (3, Path("m/cam-2"))  # cam with a 2 would be the other camera's
    assert [str(path) for path in places.files()] == [
        *("o/cam-3.mp4", "o/cam-2-3.mp4", "o/c.mp4"),
        *("m/cam-3", "m/cam-2-3", "m/c"),
        *("v/cam-3.mp4", "v/cam-2-3.mp4", "v/c.mp4"),
    ]
    assert (places.overlay_folder, places.mask_folder) == (Path("o"), Path("m"))
    make("r-3.csv")
    assert planned().number == 4
    with pytest.raises(UserError, match="exist"):
        planned(overwrite=False)


def test_one_recording_is_numbered_by_its_own_name() -> None:
    camera: list[Source] = [source_of(Path("cam"), live=True)]
    make("rec.mkv", "rec-2.mkv", "cam-overlay.mp4")
    places = plan_places(camera, Path("rec.mkv"), None, None, overwrite=True)
    assert places.files() == [Path("rec-3.mkv")]
    assert (places.overlay_folder, places.number, places.kept) == (Path("rec-3.mkv"), 3, Path("rec.mkv"))
    assert plan_places(camera, None, None, None, overwrite=True).files() == [Path("cam-overlay-2.mp4")]
    assert plan_places(camera, Path("/dev/null.mp4"), None, None, overwrite=True).number == 1


def test_names() -> None:
    cases = {
        ("a.jpg", "b.png"): ["a", "b"],
        ("a.jpg", "a.png"): ["a-jpg", "a-png"],
        ("x/a.jpg", "y/a.jpg"): ["x-a-jpg", "y-a-jpg"],
        ("x/a.jpg", "y/a.png", "b.jpg"): ["a-jpg", "a-png", "b"],
        ("p/x/a.jpg", "q/x/a.jpg"): ["x-a-jpg", "x-a-jpg-2"],
        ("A.jpg", "a.jpg"): [f"{Path.cwd().name}-A-jpg", f"{Path.cwd().name}-a-jpg-2"],
        ("ryct.2020.fig5-day7.jpg",): ["ryct.2020.fig5-day7"],
        ("benign (12).png",): ["benign (12)"],
        ("a\n<b>|c.png",): ["a\n<b>|c"],
        ("scan [1] (copy).png", "100%d.png"): ["scan [1] (copy)", "100%d"],
        ("e\u0301.png",): ["e\u0301"],
        ("e\u0301.png", "\u00e9.jpg"): ["e\u0301-png", "\u00e9-jpg"],
        ("M\udcfcller.png",): ["M\udcfcller"],
        ("..png",): ["unnamed"],
        ("...",): ["unnamed"],
        (".hidden.png",): ["hidden"],
        ("ü" * 120 + ".png",): ["ü" * 120],
        ("ü" * 130 + ".png",): ["ü" * 125],
    }
    for files, names in cases.items():
        assert output_names([Path(file) for file in files]) == names


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1), max_size=8))
def test_names_are_unique_and_stay_in_their_folder(names: list[str]) -> None:
    found = output_names([Path("in") / name for name in names])
    assert len({name.casefold() for name in found}) == len(names)
    for name in found:
        assert (Path("/out") / f"{name}.png").resolve().parent == Path("/out")
        assert not name.startswith(".")
        assert len(os.fsencode(numbered(Path(f"{name}.png"), 12).name)) <= 255


def test_defaults() -> None:
    assert plan([IMAGE]).overlays == {IMAGE: Path("a-overlay.png")}
    assert plan([CLIP]).overlays == {CLIP: Path("c-overlay.mp4")}
    assert plan([IMAGE, CLIP]).overlays == {IMAGE: Path("overlays/a.png"), CLIP: Path("overlays/c.mp4")}


def test_masks_or_lines_alone_need_no_overlay() -> None:
    places = plan([IMAGE, CLIP], masks="m")
    assert places.overlays is None
    assert places.masks == {IMAGE: Path("m/a.png"), CLIP: Path("m/c")}
    assert plan([IMAGE], jsonl="a.jsonl").overlays is None


def test_out_is_a_file_for_one_input_and_else_a_folder() -> None:
    assert plan([IMAGE], out="x/o.jpg").overlays == {IMAGE: Path("x/o.jpg")}
    assert plan([CLIP], out="o.mkv").overlays == {CLIP: Path("o.mkv")}
    assert plan([IMAGE], out="folder").overlays == {IMAGE: Path("folder/a.png")}
    Path("folder.png").mkdir()
    assert plan([IMAGE], out="folder.png").overlays == {IMAGE: Path("folder.png/a.png")}


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ([IMAGE, OTHER], {"out": "o.png"}, "is one file, but there are 2 inputs"),
        ([IMAGE], {"out": "o.mp4"}, "overlay of an image"),
        ([CLIP], {"out": "o.png"}, "overlay of a video"),
        ([CLIP], {"out": "o.avi"}, r"\.mp4"),
        ([IMAGE], {"out": "o.tiff"}, r"\.png"),
        ([IMAGE], {"out": "results", "masks": "results"}, "a place of its own"),
        ([IMAGE], {"out": "o.png", "jsonl": "o.png"}, "two results"),
    ],
)
def test_impossible_places_are_refused(files: list[Path], options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan(files, **options)  # type: ignore[arg-type]


def test_a_file_in_the_place_of_a_folder_is_refused() -> None:
    Path("taken").touch()
    with pytest.raises(UserError, match="--out taken is a file"):
        plan([IMAGE], out="taken")
    with pytest.raises(UserError, match="--masks taken is a file"):
        plan([IMAGE], masks="taken")


def test_an_input_is_never_replaced() -> None:
    OTHER.touch()
    Path("link").symlink_to(".")
    for options in ({"out": "b.png"}, {"out": "."}, {"masks": "."}, {"out": "link"}, {"jsonl": "b.png"}):
        with pytest.raises(UserError, match="would replace an input"):
            plan([OTHER], **options)  # type: ignore[arg-type]
    frame = Path("c/000000.png")
    with pytest.raises(UserError, match="would replace an input"):
        plan_places([ImageFiles([frame]), VideoFile(CLIP)], None, Path(), None, overwrite=True)


def test_results_that_exist_are_replaced_unless_told() -> None:
    Path("o.png").touch()
    plan([IMAGE], out="o.png")
    with pytest.raises(UserError, match=r"o\.png exists\. Choose another place"):
        plan([IMAGE], out="o.png", overwrite=False)
    Path("m/c").mkdir(parents=True)
    plan([CLIP], masks="m", overwrite=False)
    Path("m/c/000000.png").touch()
    with pytest.raises(UserError, match="m/c exists"):
        plan([CLIP], masks="m", overwrite=False)


def test_mask_videos_and_segmentations_have_places() -> None:
    image, clip = ImageFiles([IMAGE]), VideoFile(CLIP)
    folders = plan_places([image, clip], None, None, None, overwrite=True, mask_video=Path("m"), dicom_seg=Path("s"))
    assert folders.overlays is None
    assert folders.mask_videos == {CLIP: Path("m/c.mp4")}
    assert folders.segmentations == {IMAGE: Path("s/a-seg.dcm"), CLIP: Path("s/c-seg.dcm")}
    files = plan_places([clip], None, None, None, overwrite=True, mask_video=Path("m.MKV"), dicom_seg=Path("s.dcm"))
    assert files.files() == [Path("m.MKV"), Path("s.dcm")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_video": "m.avi"}, r"cannot write --mask-video to m\.avi.*\.mp4, \.mov, \.mkv"),
        ({"dicom_seg": "s.png"}, r"cannot write --dicom-seg to s\.png"),
        ({"dicom_seg": "s.dcm"}, "one file, but there are 2 inputs"),
        ({"mask_video": "o.mp4", "jsonl": "o.mp4"}, "two results"),
        ({"mask_video": "taken"}, "--mask-video taken is a file"),
    ],
)
def test_impossible_places_of_recordings_are_refused(options: dict[str, str], words: str) -> None:
    Path("taken").touch()
    places = {name: Path(value) for name, value in options.items()}
    with pytest.raises(UserError, match=words):
        plan_places(
            [VideoFile(CLIP), ImageFiles([IMAGE])], None, None, places.pop("jsonl", None), overwrite=True, **places
        )


def test_tables_and_streams_alone_need_no_overlay() -> None:
    tables = plan_places([VideoFile(CLIP)], None, None, None, overwrite=True, csv=Path("a.csv"))
    stream = plan_places([VideoFile(CLIP)], None, None, None, overwrite=True, elsewhere=True)
    assert tables.overlays is stream.overlays is None
    with pytest.raises(UserError, match="would replace an input"):
        plan_places([VideoFile(CLIP)], None, None, None, overwrite=True, csv=CLIP)
