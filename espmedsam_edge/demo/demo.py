"""The demo: pictures and a clip, segmented with the weights that came with the program or with a bundle of your own.

The shipped weights are shown on scikit-image's own pictures (a retina, the stained nuclei of a tissue) and a clip that
moves over one of them; a bundle is shown on generated pictures of each of its modalities, whose true masks are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bundle import Bundle, Manifest
from espmedsam_edge.destinations import Destination
from espmedsam_edge.files import atomic_path, write_errors
from espmedsam_edge.imaging.decode import read_image
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
from espmedsam_edge.marks import LINES, PICTURE, VIDEO
from espmedsam_edge.metrics import dice
from espmedsam_edge.modalities import target_of
from espmedsam_edge.phantoms import phantom, phantom_clip
from espmedsam_edge.runtime.inference import infer_frames
from espmedsam_edge.runtime.request import Outputs
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.measurements import JsonLines, LineForm
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.source import SourceFrame
from espmedsam_edge.runtime.video.writing import open_writer
from espmedsam_edge.shipped.bundles import shipped_bundle

FIRST_SEED = 9000  # phantoms from here on are the demo's: nothing may be trained on them
PICTURES = 2  # a modality
PICTURE_SIZE = (480, 640)
CLIP_FRAMES = 48
CLIP_SIZE = (384, 512)
_CLIP_MODALITY = "colonoscopy"
_FPS = Fraction(25)
# scikit-image's own pictures, used where they are installed: file -> modalities that can segment it, best first.
_PHOTOGRAPHS = {"retina.jpg": ("fundus",), "ihc.png": ("histopathology", "microscopy")}
_STAINED = ("ihc.png",)  # of these the stain of the nuclei alone is shown, which is like what nuclei were learnt from
_SHIPPED_SHOWN = ("fundus", "microscopy")  # of the shipped weights: those with a photograph
_PAN_SHARE = 0.7  # of a photograph's sides that the clip shows: the retina's frames are then taken whole, not in tiles
_PAN_FRAMES = 24


@dataclass(frozen=True)
class Shown:
    """One picture of the demo: its file, its pixels, the mask found and, where it is known, the true one.

    ``drawn`` has the mask in it, with an outline for each object where they are told apart; ``objects`` is their number
    then. ``tiles`` is how many it was segmented in.
    """

    path: Path
    modality: str
    image: Frame
    mask: NDArray[np.uint8]
    drawn: Frame
    truth: NDArray[np.uint8] | None
    objects: int | None
    tiles: int

    @property
    def dice(self) -> float | None:
        """Dice against the true mask, 0..1; None where that is not known."""
        return None if self.truth is None else dice(self.mask, self.truth)


@dataclass(frozen=True)
class Row:
    """A line of the demo's table: ``dice`` 0..1, None without true masks; ``seconds`` frame to mask, a frame.

    ``objects`` are counted in all frames together; None where they are not told apart.
    """

    name: str
    target: str
    frames: int
    dice: float | None
    objects: int | None
    seconds: float


@dataclass
class Demo:
    """What the demo did. ``bundles``: modality -> bundle; ``clip`` holds some of the clip's frames."""

    bundles: dict[str, Bundle]
    out: Path
    shipped: bool = False
    overwrite: bool | None = None
    backend: str = ""
    rows: list[Row] = field(default_factory=list)
    pictures: list[Shown] = field(default_factory=list)
    photographs: list[Shown] = field(default_factory=list)
    clip: list[Shown] = field(default_factory=list)

    @property
    def manifest(self) -> Manifest:
        """The first bundle's: preset and origin of the weights are those of all."""
        return next(iter(self.bundles.values())).manifest

    @property
    def trained(self) -> bool:
        """Whether the masks mean anything."""
        return self.manifest.weights.origin != "random"


def demo_bundles(path: Path | None = None) -> dict[str, Bundle]:
    """Modality -> bundle: of the bundle at ``path``, or of the weights that came with the program.

    Raises:
        UserError: there is none, or it is not valid.
    """
    if path is None:
        return {name: shipped_bundle(name) for name in _SHIPPED_SHOWN}
    bundle = Bundle.open(path)
    return dict.fromkeys(bundle.manifest.modalities, bundle)


def demo_destinations(bundles: dict[str, Bundle], out: Path) -> list[Destination]:
    """What the demo writes itself; overlays and masks are ``infer_frames``'."""
    names = [f"{modality}-{number + 1}.png" for modality in bundles for number in range(PICTURES)]
    pictures = [out / folder / name for folder in ("pictures", "truth") for name in names]
    pictures += [out / "pictures" / f"scikit-image-{Path(name).stem}.png" for name in _PHOTOGRAPHS]
    return [
        *(Destination(path, PICTURE) for path in pictures),
        Destination(out / "clip.mp4", VIDEO),
        Destination(out / "results.jsonl", LINES),
    ]


def run_demo(
    bundles: dict[str, Bundle],
    out: Path,
    on_row: Callable[[Row], None] = lambda row: None,
    *,
    shipped: bool = False,
    overwrite: bool | None = None,
) -> Demo:
    """Draw pictures, segment them as ``infer`` would, and write everything under ``out``.

    Writes pictures/, truth/, overlays/, masks/, clip.mp4, clip-overlay.mp4 and results.jsonl; the contact sheet is
    drawn from what is returned.

    Args:
        bundles: from ``demo_bundles``; every modality is shown.
        shipped: they are of the weights that came with the program: photographs in place of generated pictures, where
            scikit-image is installed.
        out: a folder, made if need be; files of an earlier demo are replaced.
        overwrite: whether files that exist are replaced, see ``check_destinations``; None: those of this program.
        on_row: called with each line of the table as soon as it is known.

    Raises:
        UserError: the bundle cannot be run, or a file cannot be written.
    """
    demo = Demo(bundles, out, shipped, overwrite)
    photographs = _find_photographs(bundles)
    generated = [name for name in bundles if not (shipped and name in photographs)]
    moving = _CLIP_MODALITY if _CLIP_MODALITY in generated else next(iter(bundles))
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lines = stack.enter_context(
            JsonLines(out / "results.jsonl", LineForm({"weights": demo.manifest.weights.origin}))
        )
        for modality, bundle in bundles.items():
            with Segmenter.load(bundle, modality) as segmenter:
                segmenter.choice.tell()
                demo.backend = segmenter.choice.taken
                if modality in generated:
                    _pictures(demo, segmenter, lines, on_row)
                if modality in photographs:
                    _photographs(demo, segmenter, photographs[modality], lines, on_row)
                if modality == moving:
                    _clip(demo, segmenter, None if modality in generated else photographs[modality][0], lines, on_row)
    return demo


def _pictures(demo: Demo, segmenter: Segmenter, lines: Sink, on_row: Callable[[Row], None]) -> None:
    truths: dict[Path, NDArray[np.uint8]] = {}
    for number in range(PICTURES):
        image, truth = phantom(segmenter.modality, FIRST_SEED + number, PICTURE_SIZE)
        path = demo.out / "pictures" / f"{segmenter.modality}-{number + 1}.png"
        write_image(path, image)
        write_image(demo.out / "truth" / path.name, truth)
        truths[path] = truth
    seen = _segment(segmenter, list(truths), _folders(demo), lines)
    demo.pictures += [_shown(segmenter, frame, result, truths[frame.path]) for frame, result in seen]
    _tell(demo, segmenter.modality, seen, [truths[frame.path] for frame, _ in seen], on_row)


def _find_photographs(modalities: Iterable[str]) -> dict[str, list[Path]]:
    """scikit-image's pictures by the modality that segments them, where that package is installed."""
    spec = find_spec("skimage")
    names = set(modalities)
    found: dict[str, list[Path]] = {}
    if spec is None or spec.origin is None:
        return found
    for name, fitting in _PHOTOGRAPHS.items():
        file = Path(spec.origin).parent / "data" / name
        chosen = next((modality for modality in fitting if modality in names), None)
        if chosen is not None and file.is_file():
            found.setdefault(chosen, []).append(file)
    return found


def _photographs(
    demo: Demo, segmenter: Segmenter, files: Sequence[Path], lines: Sink, on_row: Callable[[Row], None]
) -> None:
    """Real pictures, without a true mask."""
    paths = []
    for file in files:
        paths.append(demo.out / "pictures" / f"scikit-image-{file.stem}.png")
        picture = read_image(file)
        write_image(paths[-1], nuclear_stain(picture) if file.name in _STAINED else picture)
    seen = _segment(segmenter, paths, _folders(demo), lines)
    demo.photographs += [_shown(segmenter, frame, result, None) for frame, result in seen]
    _tell(demo, paths[0].stem, seen, None, on_row)


def nuclear_stain(picture: Frame) -> Frame:
    """The haematoxylin of stained tissue alone, light on dark as in fluorescence, by scikit-image.

    Args:
        picture: (H, W, 3) uint8 BGR, tissue stained with haematoxylin and DAB or eosin.

    Returns:
        (H, W, 3) uint8, three times the same.
    """
    from skimage.color import rgb2hed

    stain = rgb2hed(picture[..., ::-1])[..., 0]
    low, high = np.percentile(stain, (30, 99.9))
    grey = np.clip((stain - low) / max(high - low, 1e-6), 0, 1) ** 2 * 255  # what lies between nuclei is dark
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _segment(
    segmenter: Segmenter, sources: Sequence[Path], outputs: Outputs, lines: Sink
) -> list[tuple[SourceFrame, Segmentation]]:
    """Every frame with its result, for the table and the contact sheet."""
    seen = []
    for frame, result in infer_frames(sources, segmenter, outputs):
        lines.write(frame, result)
        seen.append((frame, result))
    return seen


def _folders(demo: Demo) -> Outputs:
    return Outputs(out=demo.out / "overlays", masks=demo.out / "masks", overwrite=demo.overwrite)


def _shown(segmenter: Segmenter, frame: SourceFrame, result: Segmentation, truth: NDArray[np.uint8] | None) -> Shown:
    image = frame.image
    drawn = result.overlay(image, OverlayStyle(color_of(result.modality)))
    tiles = len(segmenter.tiler.tiles(image, segmenter.graph) or (1,))
    return Shown(frame.path, result.modality, image, result.mask, drawn, truth, _count([result]), tiles)


def _count(results: Iterable[Segmentation]) -> int | None:
    """Objects in all; None where they are not told apart."""
    counts = [None if result.instances is None else result.instances.count for result in results]
    return None if None in counts else sum(filter(None, counts))


def _clip(
    demo: Demo, segmenter: Segmenter, photograph: Path | None, lines: Sink, on_row: Callable[[Row], None]
) -> None:
    """A clip: generated, with true masks, or a window that moves over a photograph."""
    path = demo.out / "clip.mp4"
    frames: Iterator[tuple[Frame, NDArray[np.uint8] | None]]
    if photograph is None:
        frames = phantom_clip(segmenter.modality, FIRST_SEED + PICTURES, CLIP_FRAMES, CLIP_SIZE)
    else:
        frames = _pan(read_image(photograph), _PAN_FRAMES)
    truths = list(_write_clip(path, frames))
    seen = _segment(segmenter, [path], Outputs(out=demo.out / "clip-overlay.mp4", overwrite=demo.overwrite), lines)
    step = max(1, len(seen) // (3 * PICTURES))
    demo.clip = [_shown(segmenter, frame, result, truths[frame.index]) for frame, result in seen[::step]]
    known = [truth for frame, _ in seen if (truth := truths[frame.index]) is not None]
    _tell(demo, f"{segmenter.modality} clip", seen, known or None, on_row)


def _pan(picture: Frame, count: int) -> Iterator[tuple[Frame, NDArray[np.uint8] | None]]:
    """A window that circles over a picture, ``count`` frames for a round; no true masks."""
    height, width = (int(side * _PAN_SHARE) // 2 * 2 for side in picture.shape[:2])  # codecs want even sides
    for angle in np.linspace(0, 2 * np.pi, count, endpoint=False):
        top = round((1 - np.cos(angle)) / 2 * (picture.shape[0] - height))
        left = round((1 + np.sin(angle)) / 2 * (picture.shape[1] - width))
        yield np.ascontiguousarray(picture[top : top + height, left : left + width]), None


def _write_clip(
    path: Path, frames: Iterable[tuple[Frame, NDArray[np.uint8] | None]]
) -> Iterator[NDArray[np.uint8] | None]:
    """Write a clip frame by frame; yields the true masks, where there are any."""
    with atomic_path(path) as temporary, ExitStack() as stack:
        writer = None
        for index, (image, truth) in enumerate(frames):
            if writer is None:
                writer = open_writer(temporary, image.shape[:2], _FPS)
                stack.callback(writer.close)
            writer.write(image, float(index / _FPS))
            yield truth
        if writer is not None:
            writer.finish()


def _tell(
    demo: Demo,
    name: str,
    seen: Sequence[tuple[SourceFrame, Segmentation]],
    truths: Sequence[NDArray[np.uint8]] | None,
    on_row: Callable[[Row], None],
) -> None:
    scores = None if truths is None else [dice(r.mask, truth) for (_, r), truth in zip(seen, truths, strict=True)]
    row = Row(
        name=name,
        target=target_of(seen[0][1].modality),
        frames=len(seen),
        dice=float(np.mean(scores)) if scores and demo.trained else None,
        objects=_count(result for _, result in seen),
        seconds=float(np.median([result.timings.total for _, result in seen])),
    )
    demo.rows.append(row)
    on_row(row)
