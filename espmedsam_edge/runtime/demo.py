"""The demo: generated pictures of every modality and a clip, segmented by the bundle that ships with the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bundle import MANIFEST, Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path, write_errors
from espmedsam_edge.imaging.decode import read_image
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
from espmedsam_edge.metrics import dice
from espmedsam_edge.modalities import target_of
from espmedsam_edge.phantoms import phantom, phantom_clip
from espmedsam_edge.runtime.jobs import Job
from espmedsam_edge.runtime.measurements import JsonLines
from espmedsam_edge.runtime.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks import MaskImages, OverlayImages, Sink
from espmedsam_edge.runtime.sources import ImageFiles, Source, SourceFrame, VideoFile
from espmedsam_edge.runtime.video_sinks import overlay_video
from espmedsam_edge.runtime.video_writing import open_writer

BUNDLE = Path(__file__).resolve().parents[1] / "demo_bundle"
FIRST_SEED = 9000  # phantoms from here on are the demo's: nothing may be trained on them
PICTURES = 2  # a modality
PICTURE_SIZE = (480, 640)
CLIP_FRAMES = 48
CLIP_SIZE = (384, 512)
_CLIP_MODALITY = "colonoscopy"
_FPS = Fraction(25)
# scikit-image's own pictures, used where they are installed: file -> modalities that can segment it, best first.
_PHOTOGRAPHS = {"retina.jpg": ("fundus",), "ihc.png": ("histopathology", "microscopy")}


@dataclass(frozen=True)
class Shown:
    """One picture of the demo: its file, its pixels, the mask found and, where it is known, the true one."""

    path: Path
    modality: str
    image: Frame
    mask: NDArray[np.uint8]
    truth: NDArray[np.uint8] | None

    @property
    def dice(self) -> float | None:
        """Dice against the true mask, 0..1; None where that is not known."""
        return None if self.truth is None else dice(self.mask, self.truth)


@dataclass(frozen=True)
class Row:
    """A line of the demo's table: ``dice`` 0..1, None without true masks; ``seconds`` frame to mask, a frame."""

    name: str
    target: str
    frames: int
    dice: float | None
    seconds: float


@dataclass
class Demo:
    """What the demo did. ``clip`` holds some of the clip's frames; ``trained`` tells whether masks mean anything."""

    bundle: Bundle
    out: Path
    trained: bool
    backend: str = ""
    rows: list[Row] = field(default_factory=list)
    pictures: list[Shown] = field(default_factory=list)
    photographs: list[Shown] = field(default_factory=list)
    clip: list[Shown] = field(default_factory=list)


def demo_bundle(path: Path | None = None) -> Bundle:
    """The bundle at ``path``, or the one that ships with the package.

    Raises:
        UserError: there is none, or it is not valid.
    """
    if path is not None:
        return Bundle.open(path)
    if not (BUNDLE / MANIFEST).is_file():
        raise UserError(
            "this installation came without the demo's bundle.",
            "Name one of your own: espmedsam-edge demo --bundle B.bundle",
            exit_code=1,
        )
    return Bundle.open(BUNDLE)


def run_demo(bundle: Bundle, out: Path, say: Callable[[Row], None] = lambda row: None) -> Demo:
    """Draw pictures, segment them as ``infer`` would, and write everything under ``out``.

    Writes pictures/, truth/, overlays/, masks/, clip.mp4, clip-overlay.mp4 and results.jsonl; the contact sheet is
    drawn from what is returned.

    Args:
        bundle: every modality in it is shown.
        out: a folder, made if need be; files of an earlier demo are replaced.
        say: called with each line of the table as soon as it is known.

    Raises:
        UserError: the bundle cannot be run, or a file cannot be written.
    """
    demo = Demo(bundle, out, bundle.manifest.weights.origin != "random")
    modalities = bundle.manifest.modalities
    moving = _CLIP_MODALITY if _CLIP_MODALITY in modalities else modalities[0]
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lines = stack.enter_context(JsonLines(out / "results.jsonl", {"weights": bundle.manifest.weights.origin}))
        for modality in modalities:
            with Segmenter.load(bundle, modality) as segmenter:
                demo.backend = segmenter.choice.taken
                _pictures(demo, segmenter, lines, say)
                _photographs(demo, segmenter, lines, say)
                if modality == moving:
                    _clip(demo, segmenter, lines, say)
    return demo


def _style(demo: Demo, modality: str) -> OverlayStyle:
    return OverlayStyle(color_of(modality), notice="" if demo.trained else "untrained weights")


def _pictures(demo: Demo, segmenter: Segmenter, lines: Sink, say: Callable[[Row], None]) -> None:
    truths: dict[Path, NDArray[np.uint8]] = {}
    for number in range(PICTURES):
        image, truth = phantom(segmenter.modality, FIRST_SEED + number, PICTURE_SIZE)
        path = demo.out / "pictures" / f"{segmenter.modality}-{number + 1}.png"
        write_image(path, image)
        write_image(demo.out / "truth" / path.name, truth)
        truths[path] = truth
    seen = _segment_files(demo, segmenter, list(truths), lines)
    demo.pictures += [seen.shown(frame, truths[frame.path]) for frame in seen.frames]
    _tell(demo, segmenter.modality, seen, [truths[frame.path] for frame in seen.frames], say)


def _photographs(demo: Demo, segmenter: Segmenter, lines: Sink, say: Callable[[Row], None]) -> None:
    """scikit-image's pictures of this modality, where that package is installed: real ones, without a true mask."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        return
    modalities = demo.bundle.manifest.modalities
    paths = []
    for name, fitting in _PHOTOGRAPHS.items():
        file = Path(spec.origin).parent / "data" / name
        chosen = next((modality for modality in fitting if modality in modalities), None)
        if chosen == segmenter.modality and file.is_file():
            path = demo.out / "pictures" / f"scikit-image-{file.stem}.png"
            write_image(path, read_image(file))
            paths.append(path)
    if paths:
        seen = _segment_files(demo, segmenter, paths, lines)
        demo.photographs += [seen.shown(frame, None) for frame in seen.frames]
        _tell(demo, paths[0].stem, seen, None, say)


def _segment_files(demo: Demo, segmenter: Segmenter, paths: Sequence[Path], lines: Sink) -> _Seen:
    seen = _Seen()
    sinks: list[Sink] = [
        OverlayImages({path: demo.out / "overlays" / path.name for path in paths}, _style(demo, segmenter.modality)),
        MaskImages({path: demo.out / "masks" / path.name for path in paths}),
        seen,
    ]
    _run(segmenter, ImageFiles(paths), sinks, lines)
    return seen


def _clip(demo: Demo, segmenter: Segmenter, lines: Sink, say: Callable[[Row], None]) -> None:
    path = demo.out / "clip.mp4"
    truths = list(_write_clip(path, segmenter.modality))
    source, seen = VideoFile(path), _Seen()
    overlay = overlay_video(demo.out / "clip-overlay.mp4", source, _style(demo, segmenter.modality))
    _run(segmenter, source, [overlay, seen], lines)
    step = max(1, len(seen.frames) // (3 * PICTURES))
    demo.clip = [seen.shown(frame, truths[frame.index]) for frame in seen.frames[::step]]
    _tell(demo, f"{segmenter.modality} clip", seen, [truths[frame.index] for frame in seen.frames], say)


def _write_clip(path: Path, modality: str) -> Iterator[NDArray[np.uint8]]:
    """Draw the clip frame by frame into a video file; yields the true masks."""
    with atomic_path(path) as temporary:
        writer = open_writer(temporary, CLIP_SIZE, _FPS)
        try:
            frames = phantom_clip(modality, FIRST_SEED + PICTURES, CLIP_FRAMES, CLIP_SIZE)
            for index, (image, truth) in enumerate(frames):
                writer.write(image, float(index / _FPS))
                yield truth
            writer.finish()
        finally:
            writer.close()


def _run(segmenter: Segmenter, source: Source, sinks: Sequence[Sink], lines: Sink) -> None:
    report = run_pipeline(segmenter, [Job(source, sinks)], [lines])
    if report.failures:
        raise UserError(report.failures[0].message, exit_code=1)


def _tell(
    demo: Demo, name: str, seen: _Seen, truths: Sequence[NDArray[np.uint8]] | None, say: Callable[[Row], None]
) -> None:
    scores = None if truths is None else [dice(r.mask, truth) for r, truth in zip(seen.results, truths, strict=True)]
    row = Row(
        name=name,
        target=target_of(seen.results[0].modality),
        frames=len(seen.frames),
        dice=float(np.mean(scores)) if scores and demo.trained else None,
        seconds=float(np.median([result.timings.total for result in seen.results])),
    )
    demo.rows.append(row)
    say(row)


class _Seen:
    """A sink that keeps frames and results for the table and the contact sheet."""

    def __init__(self) -> None:
        self.frames: list[SourceFrame] = []
        self.results: list[Segmentation] = []

    def __enter__(self) -> _Seen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``."""
        self.frames.append(frame)
        self.results.append(result)

    def shown(self, frame: SourceFrame, truth: NDArray[np.uint8] | None) -> Shown:
        result = self.results[self.frames.index(frame)]
        return Shown(frame.path, result.modality, frame.image, result.mask, truth)
