"""The frames a bench runs on, and what reading them and writing their overlays takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from espmedsam_edge.bench.measure import Material
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import temporary_folder
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
from espmedsam_edge.phantoms import phantom_clip
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.recording import overlay_video
from espmedsam_edge.runtime.sinks.sink import OverlayImages, Sink
from espmedsam_edge.runtime.sources.files import ImageFiles, VideoFile
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.source import Source, SourceFrame
from espmedsam_edge.runtime.video.pyav import has_pyav
from espmedsam_edge.runtime.video.writing import open_writer

MAX_FRAMES = 32
MAX_BYTES = 256 << 20  # frames stay in memory while measuring; more would measure the machine's paging
GENERATED_SIZE = (1080, 1920)
GENERATED_FRAMES = 4  # each takes half a second to draw
_FPS = Fraction(25)


def read_material(source: str | None, modality: str) -> Material:
    """Read the first frames of a file, folder or glob, timing each; without a source, of a generated 1080p clip.

    Raises:
        UserError: nothing in it can be read.
    """
    if source is None:
        with _generated_clip(modality) as clip:
            return _read([VideoFile(clip)], f"a generated {modality} clip")
    sources, failures = open_sources([source])
    if failures:
        raise UserError(failures[0].message, exit_code=1)
    # Results are published: they shall not tell where on somebody's disk the frames lay.
    return _read(sources, Path(source).name if Path(source).is_absolute() else source)


def _read(sources: Sequence[Source], described: str) -> Material:
    frames: list[Frame] = []
    seconds: list[float] = []
    size = 0
    for source in sources:
        with source:
            supply = iter(source)
            while len(frames) < MAX_FRAMES and size < MAX_BYTES:
                start = time.perf_counter()
                found = next(supply, None)
                if found is None:
                    break
                seconds.append(time.perf_counter() - start)
                frames.append(found.image)
                size += found.image.nbytes
    if not frames:
        failures = [failure for source in sources for failure in source.failures]
        reason = failures[0].message if failures else f"no frame could be read from {described}."
        raise UserError(reason, exit_code=1)
    height, width = frames[0].shape[:2]
    count = f"{len(frames)} frame{'s' if len(frames) > 1 else ''}"
    moving = sources[0].fps is not None
    return Material(f"{count} of {described}, {width} x {height}", frames, seconds, moving=moving)


@contextmanager
def _generated_clip(modality: str) -> Iterator[Path]:
    with temporary_folder() as folder:
        path = folder / "clip.mp4"
        writer = open_writer(path, GENERATED_SIZE, _FPS)
        try:
            for index, (image, _) in enumerate(phantom_clip(modality, 0, GENERATED_FRAMES, GENERATED_SIZE)):
                writer.write(image, float(index / _FPS))
            writer.finish()
        finally:
            writer.close()
        yield path


def time_encoding(material: Material, segmenter: Segmenter) -> Material:
    """The material with the seconds that each frame's overlay takes to be written, to video or to PNG files.

    The time to draw it is part of them, unless the segmenter draws on the GPU.
    """
    frames = material.frames
    style = segmenter.frame_options.overlay or OverlayStyle(color_of(segmenter.modality))
    results = [segmenter.segment(frame) for frame in frames]
    seconds = []
    with temporary_folder() as folder:
        paths = [folder / f"{index}.png" for index in range(len(frames))]
        sink: Sink
        if material.moving:
            source = ImageFiles(paths)
            source.fps = _FPS
            sink = overlay_video(folder / "overlay.mp4", source, style)
        else:
            sink = OverlayImages({path: path for path in paths}, style)
        with sink:
            for index, (frame, result) in enumerate(zip(frames, results, strict=True)):
                start = time.perf_counter()
                sink.write(SourceFrame(frame, paths[index], index), result)
                seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        # An encoder holds frames back until the end: its last work belongs to all of them.
        share = (time.perf_counter() - start) / len(frames)
    kind = ("H.264 video by PyAV" if has_pyav() else "MPEG-4 video by OpenCV") if material.moving else "PNG files"
    return replace(material, encode=[value + share for value in seconds], encoder=kind)
