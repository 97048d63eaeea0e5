"""Which file each result goes to: names that do not collide, never leave their folder and never replace an input."""

from __future__ import annotations

import errno
import os
import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from espmedsam_edge.destinations import Claims, Destination, check_destinations, stands
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.encode import WRITABLE_SUFFIXES as IMAGE_OUTPUTS
from espmedsam_edge.imaging.headers import IMAGE_SUFFIXES
from espmedsam_edge.marks import ANNOTATIONS, AREAS, FRAMES, LINES, OBJECT_TABLE, PICTURE, REPORT, SEGMENTATION, VIDEO
from espmedsam_edge.pipes import is_pipe
from espmedsam_edge.runtime.sources.files import VIDEO_SUFFIXES
from espmedsam_edge.runtime.sources.source import Source
from espmedsam_edge.runtime.video.writing import WRITABLE_SUFFIXES as VIDEO_OUTPUTS

DEFAULT_FOLDER = Path("overlays")
_LONGEST_NAME = 255  # bytes


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
        videos: which of the inputs are videos.
        names: what results of each input file are named after.
        number: of what live sources give, see ``numbered``: the first under which an earlier run left nothing.
        kept: the first result of an earlier run that is kept for that; None where there is none.
        overwrite: what may be replaced, see ``check_destinations``.
        reports: the DICOM-SR of each input file, or None for none.
        report_folder: for the report of the run.
        labels: the label map of each input file, as ``masks``.
        label_folder: for the report.
    """

    overlays: dict[Path, Path] | None
    masks: dict[Path, Path] | None
    overlay_folder: Path | None
    mask_folder: Path | None
    mask_videos: dict[Path, Path] | None = None
    segmentations: dict[Path, Path] | None = None
    mask_video_folder: Path | None = None
    segmentation_folder: Path | None = None
    videos: frozenset[Path] = frozenset()
    names: Mapping[Path, str] = field(default_factory=dict)
    number: int = 1
    kept: Path | None = None
    overwrite: bool | None = None
    labels: dict[Path, Path] | None = None
    label_folder: Path | None = None
    reports: dict[Path, Path] | None = None
    report_folder: Path | None = None

    def destinations(self) -> list[Destination]:
        """Every file (for the masks of a video: folder) that is written, and what it is."""
        found = [
            Destination(path, VIDEO if path.suffix.lower() in VIDEO_OUTPUTS else PICTURE)
            for path in (self.overlays or {}).values()
        ]
        found += [
            Destination(path, FRAMES if file in self.videos else PICTURE)
            for paths in (self.masks, self.labels)
            for file, path in (paths or {}).items()
        ]
        found += [Destination(path, VIDEO) for path in (self.mask_videos or {}).values()]
        found += [Destination(path, SEGMENTATION) for path in (self.segmentations or {}).values()]
        return found + [Destination(path, REPORT) for path in (self.reports or {}).values()]

    def of(self, inputs: Collection[Path]) -> Places:
        """The places of some of the inputs."""

        def some(paths: dict[Path, Path] | None) -> dict[Path, Path] | None:
            return paths and {file: path for file, path in paths.items() if file in inputs}

        return replace(
            self,
            overlays=some(self.overlays),
            masks=some(self.masks),
            mask_videos=some(self.mask_videos),
            segmentations=some(self.segmentations),
            labels=some(self.labels),
            reports=some(self.reports),
        )

    def files(self) -> list[Path]:
        """Every file (for the masks of a video: folder) that is written."""
        return [destination.path for destination in self.destinations()]


def plan_places(
    sources: Sequence[Source],
    out: Path | None,
    masks: Path | None,
    jsonl: Path | None,
    *,
    overwrite: bool | None,
    mask_video: Path | None = None,
    dicom_seg: Path | None = None,
    dicom_sr: Path | None = None,
    csv: Path | None = None,
    labels: Path | None = None,
    objects: Path | None = None,
    plot: Path | None = None,
    export: Path | None = None,
    elsewhere: bool = False,
    called: Mapping[Path, str] | None = None,
    also_read: Sequence[Path] = (),
    claims: Claims | None = None,
    left: Callable[[Places], Collection[Path]] | None = None,
) -> Places:
    """Decide on every output's path before anything is read.

    With nothing else wanted, overlays go to ``NAME-overlay.png`` or ``.mp4`` in the current folder for one file, else
    to the folder ``overlays``. What a live source gives cannot be made again, so it replaces nothing: where results of
    an earlier run stand, all that this run has of live sources is numbered (``rec-2.mkv``).

    Args:
        sources: what is segmented.
        out: of the overlays: a file for one input file, else a folder.
        masks, labels: the folders of the masks and of the label maps.
        jsonl: the file of measurements; the caller numbers it, ``csv`` and ``plot`` where there is a live source.
        overwrite: whether files that exist may be replaced, see ``check_destinations``; where they may, live sources'
            are numbered instead.
        mask_video: of the recordings of the masks: a file for one video, else a folder.
        dicom_seg, dicom_sr: of the DICOM-SEGs and reports: a file for one input file, else a folder.
        csv, objects, plot: the tables of areas and of objects, and the areas' picture.
        export: the folder of what annotation tools open.
        elsewhere: whether results are wanted that are no files.
        called: what results of an input file are named after; None: its own name.
        also_read: further files that are no results' places, such as inputs that could not be opened.
        claims: of the run: what others write to is taken, and these places become its own; None: nobody is told.
        left: which input files are to be done, asked once their places are known; None: all.

    Raises:
        UserError: ``out`` does not fit the inputs, or a place will not do: see ``destinations``.
    """
    inputs = [file for source in sources for file in source.files]
    videos = {file for source in sources if source.kind == "video" for file in source.files}
    after = [Path((called or {}).get(file, file)) for file in inputs]
    named = [place for place in (out, masks, labels, mask_video, dicom_seg, dicom_sr, export) if place is not None]
    plain = not all(_takes(folder, [file.stem for file in after]) for folder in named or [Path()])
    names = dict(zip(inputs, output_names(after, plain=plain), strict=True))
    tables = ((jsonl, LINES), (csv, AREAS), (objects, OBJECT_TABLE), (plot, PICTURE))
    others = [Destination(path, kind) for path, kind in tables if path is not None]
    default = not elsewhere and not others and not named
    folder, overlays = _overlays(out, inputs, videos, names, default=default)
    films = {file: names[file] for file in inputs if file in videos}
    places = Places(
        overlays,
        _pictures(masks, "--masks", names, videos),
        folder,
        masks,
        _file_or_folder(mask_video, "--mask-video", VIDEO_OUTPUTS, films),
        _file_or_folder(dicom_seg, "--dicom-seg", (".dcm",), {file: f"{names[file]}-seg" for file in inputs}),
        mask_video,
        dicom_seg,
        frozenset(videos),
        names,
        overwrite=overwrite,
        labels=_pictures(labels, "--labels", names, videos),
        label_folder=labels,
        reports=_file_or_folder(dicom_sr, "--dicom-sr", (".dcm",), {file: f"{names[file]}-sr" for file in inputs}),
        report_folder=dicom_sr,
    )
    if left is not None:
        places = places.of(left(places))
    live = {file for source in sources if source.live for file in source.files}
    with nullcontext() if claims is None else claims.planning():
        return _checked(places, others, live, [*inputs, *also_read], claims, export)


def _checked(
    places: Places,
    others: list[Destination],
    live: set[Path],
    read: Sequence[Path],
    claims: Claims | None,
    export: Path | None,
) -> Places:
    """The places, numbered where that is needed; all may be written to, and are claimed."""
    if live and places.overwrite is not False:
        places = _beside_earlier_ones(places, live, [place.path for place in others], claims or Claims())
        others = [Destination(numbered(path, places.number), kind) for path, kind in others]
    everything = [*places.destinations(), *others]
    if export is not None:
        _check_export(export, read)
        everything.append(Destination(export, ANNOTATIONS))
    check_destinations(everything, read, places.overwrite)
    if claims is not None:
        claims.add([place.path for place in everything])
    return places


def _check_export(folder: Path, read: Sequence[Path]) -> None:
    _check_folder(folder, "--export-to")
    real = Path(os.path.realpath(folder))
    inside = next((file for file in read if real in Path(os.path.realpath(file)).parents), None)
    if inside is not None:
        raise UserError(f"{folder} holds the input {inside}.", "Name another folder: --export-to FOLDER")


def numbered(path: Path, number: int) -> Path:
    """``rec.mkv`` as ``rec-2.mkv``; 1 leaves it as it is, and a pipe stays one."""
    return path if number == 1 or is_pipe(path) else path.with_name(fitting(path.stem, f"-{number}{path.suffix}"))


def _beside_earlier_ones(places: Places, live: set[Path], others: Iterable[Path], claims: Claims) -> Places:
    """The places, those of live sources with the first number under which nothing stands and no other run writes."""
    kinds = (places.overlays, places.masks, places.labels, places.mask_videos)
    wanted = [path for paths in kinds for file, path in (paths or {}).items() if file in live] + [*others]

    def used(path: Path) -> bool:
        return stands(path) or claims.taken(path)

    number, kept = 1, next((path for path in wanted if used(path)), None)
    while any(used(numbered(path, number)) for path in wanted):
        number += 1

    def moved(paths: dict[Path, Path] | None) -> dict[Path, Path] | None:
        return paths and {file: numbered(path, number) if file in live else path for file, path in paths.items()}

    def named(place: Path | None) -> Path | None:  # a folder for several stays
        return numbered(place, number) if place in wanted else place

    return replace(
        places,
        overlays=moved(places.overlays),
        masks=moved(places.masks),
        labels=moved(places.labels),
        mask_videos=moved(places.mask_videos),
        overlay_folder=named(places.overlay_folder),
        mask_video_folder=named(places.mask_video_folder),
        number=number,
        kept=kept,
    )


def _overlays(
    out: Path | None, inputs: Sequence[Path], videos: set[Path], names: Mapping[Path, str], *, default: bool
) -> tuple[Path | None, dict[Path, Path] | None]:
    """Where overlays go, for the report, and each one's file; None without any."""
    suffixes = {file: ".mp4" if file in videos else ".png" for file in inputs}
    if default and len(inputs) == 1:
        out = Path(fitting(names[inputs[0]], f"-overlay{suffixes[inputs[0]]}"))
        return out, {inputs[0]: out}
    out = DEFAULT_FOLDER if default else out
    if out is None:
        return None, None
    if _means_a_file(out, inputs, videos):
        return out, {inputs[0]: out}
    _check_folder(out, "--out")
    return out, {file: out / fitting(names[file], suffixes[file]) for file in inputs}


def _pictures(
    folder: Path | None, option: str, names: Mapping[Path, str], videos: set[Path]
) -> dict[Path, Path] | None:
    """A PNG for each input, of a video a folder."""
    if folder is None:
        return None
    _check_folder(folder, option)
    return {file: folder / fitting(name, "" if file in videos else ".png") for file, name in names.items()}


def _file_or_folder(
    place: Path | None, option: str, suffixes: Sequence[str], names: Mapping[Path, str]
) -> dict[Path, Path] | None:
    """The file of each input: the one that is named, or in a folder its name with the first of the suffixes."""
    if place is None:
        return None
    if place.is_dir() or not place.suffix:
        _check_folder(place, option)
        return {file: place / fitting(name, suffixes[0]) for file, name in names.items()}
    if place.suffix.lower() not in suffixes:
        raise UserError(f"cannot write {option} to {place}.", f"Name a folder, or a file: {', '.join(suffixes)}.")
    if len(names) != 1:
        raise UserError(f"{option} {place} is one file, but there are {len(names)} inputs for it.", "Name a folder.")
    return dict.fromkeys(names, place)


def output_names(files: Sequence[Path], *, plain: bool = False) -> list[str]:
    """A name without suffix for each input file: its stem; with more of its path where several would share one.

    ``a.jpg`` and ``a.png`` give ``a-jpg`` and ``a-png``; ``x/a.jpg`` and ``y/a.jpg`` give ``x-a-jpg`` and ``y-a-jpg``;
    what still collides is numbered. Upper and lower case count as the same, and so do the ways to compose a letter with
    its accents, for file systems that hold it so.

    Args:
        files: of the inputs.
        plain: whether signs that some file systems refuse become "_"; else names stay as they are.
    """
    forms = [
        [path.stem for path in files],
        [_joined(path.stem, path.suffix) for path in files],
        [_joined(path.absolute().parent.name, path.stem, path.suffix) for path in files],
    ]
    candidates = [[_plain(_safe(name)) if plain else _safe(name) for name in form] for form in forms]
    names = candidates[0]
    for longer in candidates[1:]:
        counts = Counter(_alike(name) for name in names)
        names = [name if counts[_alike(name)] == 1 else other for name, other in zip(names, longer, strict=True)]
    taken: set[str] = set()
    unique = []
    for name in names:
        chosen, number = name, 2
        while _alike(chosen) in taken:
            chosen, number = fitting(name, f"-{number}.png").removesuffix(".png"), number + 1
        taken.add(_alike(chosen))
        unique.append(chosen)
    return unique


def _alike(name: str) -> str:
    """The same for names that some file systems hold to be one: of other case, or composed otherwise."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _joined(*parts: str) -> str:
    return "-".join(part.lstrip(".") for part in parts if part.lstrip("."))


def _safe(name: str) -> str:
    """A file name that cannot lead elsewhere or hide, and leaves room for a suffix; else it stays as it is."""
    cleaned = re.sub(r"[/\0]", "_", name).lstrip(".") or "unnamed"
    return fitting(cleaned, ".png").removesuffix(".png")


def _plain(name: str) -> str:
    """A name that every file system takes: no sign that Windows reserves, nothing that is not printable Unicode."""
    return "".join(sign if sign.isprintable() and sign not in '<>:"|?*\\' else "_" for sign in name).rstrip(". ") or "_"


def _takes(folder: Path, names: Iterable[str]) -> bool:
    """Whether a folder's file system takes the signs in names; tried with a file where there are unusual ones."""
    unusual = "".join(sorted({sign for name in names for sign in name if _plain(sign) != sign and sign not in ". "}))
    if not unusual:
        return True
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    tried = there / fitting(f".{secrets.token_hex(6)}{unusual[:60]}", "")
    try:
        os.close(os.open(tried, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        return error.errno not in (errno.EINVAL, errno.EILSEQ, errno.ENOENT, errno.EIO)
    tried.unlink()
    return True


def fitting(stem: str, ending: str) -> str:
    """A stem and its ending, the stem shortened to what file systems take: 255 bytes for both."""
    while len(os.fsencode(stem + ending)) > _LONGEST_NAME:
        stem = stem[:-1]
    return stem + ending


def _means_a_file(out: Path, inputs: Sequence[Path], videos: set[Path]) -> bool:
    """Whether ``--out`` names a file, by its suffix; refuses what cannot be written or cannot hold the inputs."""
    suffix = out.suffix.lower()
    nameless = not suffix and is_pipe(out)  # a pipe: Matroska, or PNG
    if not nameless and (out.is_dir() or suffix not in IMAGE_SUFFIXES | VIDEO_SUFFIXES):
        return False
    if len(inputs) > 1:
        raise UserError(f"--out {out} is one file, but there are {len(inputs)} inputs.", "Name a folder.")
    if nameless:
        return True
    writable = VIDEO_OUTPUTS if inputs[0] in videos else IMAGE_OUTPUTS
    if suffix not in writable:
        kind = "a video" if inputs[0] in videos else "an image"
        raise UserError(f"cannot write the overlay of {kind} to {out}.", f"Use one of {', '.join(writable)}.")
    return True


def _check_folder(folder: Path, option: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file.", "Name a folder.")
