"""Which sinks a source gets: by its kind, and in the background where it is live."""

from __future__ import annotations

from pathlib import Path

import pytest
from sink_material import source_of

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.runtime.run.plan import Measurements, plan_jobs, shared_sinks
from espmedsam_edge.runtime.sinks.background import BackgroundSink, BackgroundSinks
from espmedsam_edge.runtime.sinks.measurements import AreaTable, JsonLines
from espmedsam_edge.runtime.sinks.places import plan_places
from espmedsam_edge.runtime.sinks.recording import Recording
from espmedsam_edge.runtime.sinks.sink import MaskImages, OverlayImages, Paced
from espmedsam_edge.runtime.sources.files import ImageFiles, VideoFile
from espmedsam_edge.runtime.sources.source import Source

STYLE = OverlayStyle((0, 0, 0))
IMAGE, OTHER, CLIP = Path("a.jpg"), Path("b.png"), Path("c.avi")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_jobs_have_the_sinks_of_their_kind() -> None:
    sources: list[Source] = [ImageFiles([IMAGE, OTHER]), VideoFile(CLIP)]
    places = plan_places(sources, Path("o"), Path("m"), None, overwrite=True, mask_video=Path("v"))
    assert [[type(sink) for sink in job.sinks] for job in plan_jobs(sources, places, STYLE)] == [
        [OverlayImages, MaskImages],
        [Recording, MaskImages, Recording],
    ]
    places = plan_places(sources, None, None, Path("a.jsonl"), overwrite=True)
    assert [job.sinks for job in plan_jobs(sources, places, STYLE)] == [[], []]


def test_sinks_of_live_sources_work_in_the_background() -> None:
    sources: list[Source] = [source_of(Path("cam"), live=True), VideoFile(CLIP)]
    places = plan_places(sources, Path("o"), Path("m"), None, overwrite=True)
    background = BackgroundSinks()
    kinds = [[type(sink) for sink in job.sinks] for job in plan_jobs(sources, places, STYLE, background=background)]
    assert kinds == [[BackgroundSink, BackgroundSink], [Recording, MaskImages]]
    wanted = Measurements(jsonl="a.jsonl", table="a.csv")
    assert [type(sink) for sink in shared_sinks(sources, wanted, {}, background)] == [BackgroundSink, BackgroundSink]
    assert [sink.name for sink in background.sinks] == ["o/cam.mp4", "m/cam", "a.jsonl", "a.csv"]
    assert [type(sink) for sink in shared_sinks(sources[1:], wanted, {})] == [JsonLines, AreaTable]


def test_videos_that_are_only_looked_at_are_paced_each_for_itself() -> None:
    """Not in a shared sink, which one lane calls at a time: there it would hold live sources up."""
    sources: list[Source] = [source_of(Path("cam"), live=True), VideoFile(CLIP), ImageFiles([IMAGE])]
    places = plan_places(sources, None, None, None, overwrite=True, elsewhere=True)
    assert [[type(sink) for sink in job.sinks] for job in plan_jobs(sources, places, STYLE, paced=True)] == [
        [],
        [Paced],
        [],
    ]


def test_a_live_source_has_no_segmentations() -> None:
    source = source_of(Path("cam"), live=True)
    places = plan_places([source], None, None, None, overwrite=True, dicom_seg=Path("s"))
    with pytest.raises(UserError, match="--dicom-seg is for DICOM files"):
        plan_jobs([source], places, STYLE)


def test_a_stream_is_of_one_video() -> None:
    clip, image = VideoFile(CLIP), ImageFiles([IMAGE])
    for sources in ([clip, clip], [image]):
        places = plan_places([image], None, None, None, overwrite=True, elsewhere=True)
        with pytest.raises(UserError, match="--stream sends one video"):
            plan_jobs(sources, places, STYLE, stream="udp://127.0.0.1:5000")  # type: ignore[arg-type]
