"""Which file each result goes to: names that do not collide, never leave their folder and never replace an input."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.encode import WRITABLE_SUFFIXES as IMAGE_OUTPUTS
from espmedsam_edge.imaging.headers import IMAGE_SUFFIXES
from espmedsam_edge.runtime.sources.files import VIDEO_SUFFIXES
from espmedsam_edge.runtime.sources.source import Source
from espmedsam_edge.runtime.video.writing import WRITABLE_SUFFIXES as VIDEO_OUTPUTS

DEFAULT_FOLDER = Path("overlays")


@dataclass(frozen=True)
class Places:
    """Where results go.

    Attributes:
        overlays: the overlay of each input file, or None for no overlays.
        masks: the mask of each input file (for a video the folder of its frames' masks), or None for no masks.
        overlay_folder, mask_folder: for the report; the file itself where there is one.
        mask_videos: the recording of the masks of each video, or None for none.
        segmentations: the DICOM-SEG of each input file, or None for none.
        mask_video_folder, segmentation_folder: for the report.
        number: of what live sources give, see ``numbered``: the first under which an earlier run left nothing.
        kept: the first result of an earlier run that is kept for that; None where there is none.
    """

    overlays: dict[Path, Path] | None
    masks: dict[Path, Path] | None
    overlay_folder: Path | None
    mask_folder: Path | None
    mask_videos: dict[Path, Path] | None = None
    segmentations: dict[Path, Path] | None = None
    mask_video_folder: Path | None = None
    segmentation_folder: Path | None = None
    number: int = 1
    kept: Path | None = None

    def files(self) -> list[Path]:
        """Every file (for the masks of a video: folder) that is written."""
        kinds = (self.overlays, self.masks, self.mask_videos, self.segmentations)
        return [path for paths in kinds for path in (paths or {}).values()]


def plan_places(
    sources: Sequence[Source],
    out: Path | None,
    masks: Path | None,
    jsonl: Path | None,
    *,
    overwrite: bool,
    mask_video: Path | None = None,
    dicom_seg: Path | None = None,
    tables: Sequence[Path] = (),
    elsewhere: bool = False,
    called: Mapping[Path, str] | None = None,
) -> Places:
    """Decide on every output's path before anything is read.

    With nothing else wanted, overlays go to ``NAME-overlay.png`` or ``.mp4`` in the current folder for one file, else
    to the folder ``overlays``. What a live source gives cannot be made again, so it replaces nothing: where results of
    an earlier run stand, all that this run has of live sources is numbered (``rec-2.mkv``).

    Args:
        sources: what is segmented.
        out: of the overlays: a file for one input file, else a folder.
        masks: the folder of the mask PNGs.
        jsonl: the file of measurements; the caller numbers it and ``tables`` where there is a live source.
        overwrite: whether files that exist may be replaced, or live sources' be numbered.
        mask_video: of the recordings of the masks: a file for one video, else a folder.
        dicom_seg: of the DICOM-SEGs: a file for one input file, else a folder.
        tables: further files that are written, one a run.
        elsewhere: whether results are wanted that are no files.
        called: what results of an input file are named after; None: its own name.

    Raises:
        UserError: ``out`` does not fit the inputs, an output would replace an input or another output, or, without
            ``overwrite``, a file that exists.
    """
    inputs = [file for source in sources for file in source.files]
    videos = {file for source in sources if source.kind == "video" for file in source.files}
    names = dict(zip(inputs, output_names([Path((called or {}).get(file, file)) for file in inputs]), strict=True))
    suffixes = {file: ".mp4" if file in videos else ".png" for file in inputs}
    overlays, folder = None, out
    wanted = (out, masks, jsonl, mask_video, dicom_seg)
    if not elsewhere and not tables and all(place is None for place in wanted):
        if len(inputs) == 1:
            folder = Path(f"{names[inputs[0]]}-overlay{suffixes[inputs[0]]}")
            overlays = {inputs[0]: folder}
        else:
            folder = DEFAULT_FOLDER
    if folder is not None and overlays is None:
        if _means_a_file(folder, inputs, videos):
            overlays = {inputs[0]: folder}
        else:
            _check_folder(folder, "--out")
            overlays = {file: folder / f"{names[file]}{suffixes[file]}" for file in inputs}
    mask_paths = None
    if masks is not None:
        _check_folder(masks, "--masks")
        mask_paths = {file: masks / (names[file] if file in videos else f"{names[file]}.png") for file in inputs}
    places = Places(
        overlays,
        mask_paths,
        folder,
        masks,
        _file_or_folder(
            mask_video, "--mask-video", VIDEO_OUTPUTS, {file: names[file] for file in inputs if file in videos}
        ),
        _file_or_folder(dicom_seg, "--dicom-seg", (".dcm",), {file: f"{names[file]}-seg" for file in inputs}),
        mask_video,
        dicom_seg,
    )
    others = [*([jsonl] if jsonl else []), *tables]
    live = {file for source in sources if source.live for file in source.files}
    if live and overwrite:
        places = _beside_earlier_ones(places, live, others)
        others = [numbered(path, places.number) for path in others]
    _check_conflicts(inputs, places, others, overwrite=overwrite)
    return places


def numbered(path: Path, number: int) -> Path:
    """``rec.mkv`` as ``rec-2.mkv``; 1 leaves it as it is."""
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _beside_earlier_ones(places: Places, live: set[Path], others: Iterable[Path]) -> Places:
    """The places, those of live sources with the first number under which nothing stands."""
    kinds = (places.overlays, places.masks, places.mask_videos)
    wanted = [path for paths in kinds for file, path in (paths or {}).items() if file in live] + [*others]
    number, kept = 1, next((path for path in wanted if _stands(path)), None)
    while any(_stands(numbered(path, number)) for path in wanted):
        number += 1

    def moved(paths: dict[Path, Path] | None) -> dict[Path, Path] | None:
        return paths and {file: numbered(path, number) if file in live else path for file, path in paths.items()}

    def named(place: Path | None) -> Path | None:  # a folder for several stays
        return numbered(place, number) if place in wanted else place

    return replace(
        places,
        overlays=moved(places.overlays),
        masks=moved(places.masks),
        mask_videos=moved(places.mask_videos),
        overlay_folder=named(places.overlay_folder),
        mask_video_folder=named(places.mask_video_folder),
        number=number,
        kept=kept,
    )


def _stands(output: Path) -> bool:
    """Whether a file, or a folder with something in it, is there."""
    return output.is_file() or (output.is_dir() and any(output.iterdir()))


def _file_or_folder(
    place: Path | None, option: str, suffixes: Sequence[str], names: Mapping[Path, str]
) -> dict[Path, Path] | None:
    """The file of each input: the one that is named, or in a folder its name with the first of the suffixes."""
    if place is None:
        return None
    if place.is_dir() or not place.suffix:
        _check_folder(place, option)
        return {file: place / f"{name}{suffixes[0]}" for file, name in names.items()}
    if place.suffix.lower() not in suffixes:
        raise UserError(f"cannot write {option} to {place}.", f"Name a folder, or a file: {', '.join(suffixes)}.")
    if len(names) != 1:
        raise UserError(f"{option} {place} is one file, but there are {len(names)} inputs for it.", "Name a folder.")
    return dict.fromkeys(names, place)


def output_names(files: Sequence[Path]) -> list[str]:
    """A name without suffix for each input file: its stem; with more of its path where several would share one.

    ``a.jpg`` and ``a.png`` give ``a-jpg`` and ``a-png``; ``x/a.jpg`` and ``y/a.jpg`` give ``x-a-jpg`` and ``y-a-jpg``;
    what still collides is numbered. Upper and lower case count as the same, for file systems that hold it so.
    """
    forms = [
        [path.stem for path in files],
        [_joined(path.stem, path.suffix) for path in files],
        [_joined(path.absolute().parent.name, path.stem, path.suffix) for path in files],
    ]
    candidates = [[_safe(name) for name in form] for form in forms]
    names = candidates[0]
    for longer in candidates[1:]:
        counts = Counter(name.casefold() for name in names)
        names = [name if counts[name.casefold()] == 1 else other for name, other in zip(names, longer, strict=True)]
    taken: set[str] = set()
    unique = []
    for name in names:
        chosen, number = name, 2
        while chosen.casefold() in taken:
            chosen, number = f"{name}-{number}", number + 1
        taken.add(chosen.casefold())
        unique.append(chosen)
    return unique


def _joined(*parts: str) -> str:
    return "-".join(part.lstrip(".") for part in parts if part.lstrip("."))


def _safe(name: str) -> str:
    """A file name that cannot lead elsewhere, hide, or be too long: 180 bytes leave room for suffixes and numbers."""
    cleaned = re.sub(r"[^\w .()+,=@-]", "_", name).lstrip(". ").rstrip(". ")
    shortened = cleaned.encode("utf-8", "replace")[:180].decode("utf-8", "ignore")
    return shortened or "unnamed"


def _means_a_file(out: Path, inputs: Sequence[Path], videos: set[Path]) -> bool:
    """Whether ``--out`` names a file, by its suffix; refuses what cannot be written or cannot hold the inputs."""
    suffix = out.suffix.lower()
    if out.is_dir() or suffix not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return False
    if len(inputs) > 1:
        raise UserError(f"--out {out} is one file, but there are {len(inputs)} inputs.", "Name a folder.")
    writable = VIDEO_OUTPUTS if inputs[0] in videos else IMAGE_OUTPUTS
    if suffix not in writable:
        kind = "a video" if inputs[0] in videos else "an image"
        raise UserError(f"cannot write the overlay of {kind} to {out}.", f"Use one of {', '.join(writable)}.")
    return True


def _check_folder(folder: Path, option: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file.", "Name a folder.")


def _check_conflicts(inputs: Sequence[Path], places: Places, others: Sequence[Path], *, overwrite: bool) -> None:
    outputs = [*places.files(), *others]
    read = {os.path.realpath(file) for file in inputs}
    written: set[str] = set()
    for output in outputs:
        real = os.path.realpath(output)
        if real in read or any(os.path.dirname(file) == real for file in read):
            raise UserError(f"{output} would replace an input.", "Choose another place for the results.")
        if real in written:
            raise UserError(
                f"two results would be written to {output}.", "Give each kind of result a place of its own."
            )
        written.add(real)
    standing = [output for output in outputs if _stands(output)]
    if standing and not overwrite:
        raise UserError(
            f"{standing[0]} exists{f', and {len(standing) - 1} more' if len(standing) > 1 else ''}.",
            "Choose another place, or leave out --no-overwrite.",
        )
