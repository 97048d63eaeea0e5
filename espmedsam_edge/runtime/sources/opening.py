"""From what a user names to sources: files, folders, globs and URIs."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.header_errors import HeaderError
from espmedsam_edge.imaging.headers import IMAGE_SUFFIXES, UNREAD_SUFFIXES, image_format, read_header
from espmedsam_edge.runtime.dicom.reading import SUFFIXES as DICOM_SUFFIXES
from espmedsam_edge.runtime.dicom.reading import NoPicture, is_dicom, read_dicom_header
from espmedsam_edge.runtime.sources.anonymous import NumberedSource, SourceNames, hide
from espmedsam_edge.runtime.sources.files import VIDEO_SUFFIXES, DicomCine, ImageFiles, VideoFile
from espmedsam_edge.runtime.sources.live import LiveOptions
from espmedsam_edge.runtime.sources.paged import PagedPicture, is_paged
from espmedsam_edge.runtime.sources.piped import LABEL, STANDARD_INPUT, open_standard_input
from espmedsam_edge.runtime.sources.source import Failure, Source
from espmedsam_edge.runtime.sources.uris import SCHEMES, Uri, parse_uri
from espmedsam_edge.runtime.video.containers import START_BYTES, looks_like_video
from espmedsam_edge.runtime.video.pyav import has_pyav

log = logging.getLogger(__name__)


def open_sources(
    specifications: Iterable[str], live: LiveOptions | None = None, names: SourceNames | None = None
) -> tuple[list[Source], list[Failure]]:
    """What to read for a list of files, folders, globs (``**`` for any depth) and URIs, each file once, in order.

    A folder stands for the images, videos and DICOM files in it by their suffix (without one, by content), in natural
    order (2 before 10), DICOM pictures by series and number; hidden files are passed over. With a DICOMDIR, or nothing
    else in it, it stands for the DICOM files in its subfolders, too, as exports nest them. Files named one by one are
    told apart by content, as is what comes on standard input, named ``-``. A file of the name goes before a URI.

    Args:
        specifications: as the user wrote them.
        live: how cameras and streams are opened; None: they are refused.
        names: takes in the sources and numbers them; None: they are called what they are.

    Returns:
        Sources not yet opened, and a failure for each specification that leads to nothing.

    Raises:
        UserError: a URI that is written wrongly.
    """
    sources: list[Source] = []
    failures: list[Failure] = []
    seen: set[str] = set()
    for number, specification in enumerate(specifications, 1):
        uri = None if _exists(specification) else parse_uri(specification)
        if uri is not None and uri.scheme != "file":
            uri = _named_apart(uri, seen)
            if names is not None:
                uri = replace(uri, address=names.add(number), label=names.add(number))
            sources.append(_open_uri(uri, live))
            continue
        specification = specification if uri is None else uri.place
        files, problem, opened = [], "", None
        try:
            if specification == STANDARD_INPUT and not _exists(STANDARD_INPUT):
                files = [] if _repeated(LABEL, seen) else [LABEL]
                opened = [open_standard_input() for _ in files]
            else:
                files = [path for path in _expand(specification, names is None) if not _repeated(path, seen)]
        except UserError as error:
            files, problem = [], str(error)
        except OSError as error:
            problem = f"cannot read {specification}: {error.strerror}. Check the name."
        opened = _sources_of(files, specification) if opened is None else opened
        if names is not None:
            name = names.add(number, files)
            if specification != STANDARD_INPUT:  # whose name hides nothing
                problem = hide(problem, (specification, specification.rstrip("/"), str(Path(specification))), name)
            opened = [NumberedSource(source, name, names) for source in opened]
            specification = name
        sources += opened
        failures += [Failure(specification, problem)] if problem else []
    return sources, failures


def _sources_of(files: Sequence[Path], specification: str) -> list[Source]:
    """One source for all pictures, then one for each video and cine loop."""
    pictures: list[Path] = []
    slices: list[tuple[tuple[int, int], Path]] = []  # single DICOM pictures and what they are sorted by
    videos: list[Source] = []
    series: dict[str, int] = {}
    others: Counter[str] = Counter()  # what lies in studies beside pictures
    for path in files:
        if is_dicom(path):
            try:
                header = read_dicom_header(path)
            except NoPicture as error:
                if len(files) > 1:
                    others[error.kind] += 1
                else:
                    pictures.append(path)
                continue
            except UserError:  # said when it is read
                pictures.append(path)
                continue
            if header.frames > 1:
                videos.append(DicomCine(path))
            else:
                slices.append(((series.setdefault(header.order[0], len(series)), header.order[1]), path))
        elif _is_video(path):
            videos.append(VideoFile(path))
        elif is_paged(path):
            videos.append(PagedPicture(path))
        else:
            pictures.append(path)
    if others:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        log.info("DICOM objects that are no pictures are passed over: %s.", listed)
    pictures += [path for _, path in sorted(slices, key=lambda item: item[0])]
    return [*([ImageFiles(pictures, specification)] if pictures else []), *videos]


def _exists(specification: str) -> bool:
    try:
        return os.path.exists(specification)
    except ValueError:  # a null character
        return False


def _named_apart(uri: Uri, seen: set[str]) -> Uri:
    """The URI with a label of its own, where the same camera or phantom is named more than once."""
    label, number = uri.label, 2
    while f"{label}://" in seen:
        label, number = f"{uri.label}-{number}", number + 1
    seen.add(f"{label}://")
    return replace(uri, label=label)


def _open_uri(uri: Uri, live: LiveOptions | None) -> Source:
    if live is None:
        raise UserError(f"{uri.address} cannot be used here.", "Give files, folders or globs.")
    module, _, function = SCHEMES[uri.scheme].opener.partition(":")
    opener: Callable[[Uri, LiveOptions], Source] = getattr(import_module(module), function)
    return opener(uri, live)


def _expand(specification: str, named: bool = True) -> list[Path]:
    """The files that a path or pattern stands for; ``named``: messages may name them."""
    path = Path(specification)
    if path.is_dir():
        entries = list(path.iterdir())
        found = [entry for entry in entries if _is_known(entry)]
        _tell_no_files(entries, named)
        if not found or any(_is_dicomdir(entry) for entry in entries):
            found += _dicom_below(path)
        if not found:
            raise UserError(
                f"no images, videos or DICOM files in {path}, and no DICOM files in its subfolders.",
                f"Name a glob for more: '{specification.rstrip('/')}/**/*.png'",
                exit_code=1,
            )
        return sorted(_without_masks(found, named), key=_natural)
    if not path.exists() and (numbered := _numbered_files(path)):
        return numbered
    if not path.exists() and glob.has_magic(specification):
        found = [Path(name) for name in glob.glob(specification, recursive=True)]
        found = [entry for entry in found if _is_known(entry)]
        if not found:
            raise UserError(f"no image or video matches {specification}.", "Check the pattern.", exit_code=1)
        return sorted(_without_masks(found, named), key=_natural)
    return [path]


def _tell_no_files(entries: Sequence[Path], named: bool) -> None:
    """Say what is called like a picture or video and is no file: links that lead nowhere, pipes, devices."""
    odd = [entry for entry in entries if entry.suffix.lower() in _KNOWN and not (entry.is_file() or entry.is_dir())]
    if odd:
        example = f", such as {odd[0].name}" if named else ""
        log.warning("Passed over, broken links and what else is no file: %d%s.", len(odd), example)


def _without_masks(found: Sequence[Path], named: bool) -> list[Path]:
    """Files without the masks that lie beside their pictures, as in BUSI: a_mask.png and a_mask_1.png beside a.png."""
    pictures = {(path.parent, path.stem) for path in found}

    def is_mask(path: Path) -> bool:
        match = _MASK_NAME.fullmatch(path.stem)
        return match is not None and (path.parent, match[1]) in pictures

    masks = [path for path in found if is_mask(path)]
    if masks:
        example = f", such as {masks[0].name}" if named else ""
        log.info("Passed over, masks beside their pictures: %d%s.", len(masks), example)
    return [path for path in found if path not in masks] if masks else list(found)


_MASK_NAME = re.compile(r"(.+?)[ _-](?:mask|masks|seg|segmentation|groundtruth|gt)(?:[ _-]?\d+)?", re.IGNORECASE)


def _numbered_files(pattern: Path) -> list[Path]:
    """The files that FFmpeg would take for a name such as frame_%04d.png, in the order of their numbers."""
    parts = re.split(r"%(0?)(\d*)d", pattern.name)
    if len(parts) != 4 or not pattern.parent.is_dir():  # none, or more than one number
        return []
    before, zeros, width, after = parts
    digits = rf"\d{{{width}}}" if zeros and width else r"\d+"
    name = re.compile(f"{re.escape(before)}({digits}){re.escape(after)}")
    found = [(int(match[1]), entry) for entry in pattern.parent.iterdir() if (match := name.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found)]


def _dicom_below(folder: Path) -> list[Path]:
    """The DICOM files in the subfolders, at any depth; links to folders and hidden ones are not followed."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if Path(place) != folder:
            found += [path for path in map(Path(place).joinpath, names) if _is_known(path) and is_dicom(path)]
    return found


def _is_dicomdir(path: Path) -> bool:
    """The index of a medium, whose files lie in subfolders; some systems show its name in small letters."""
    return path.name.upper() == "DICOMDIR"


_KNOWN = IMAGE_SUFFIXES | VIDEO_SUFFIXES | DICOM_SUFFIXES | UNREAD_SUFFIXES


def _is_known(path: Path) -> bool:
    if path.name.startswith(".") or _is_dicomdir(path) or not path.is_file():
        return False
    suffix = path.suffix.lower()
    if suffix in _KNOWN:
        return True
    return re.fullmatch(r"(\.\d*)?", suffix) is not None and is_dicom(path)  # scanners name files by numbers


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sorting key with numbers by value."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), part) if part.isdecimal() else (-1, part.casefold()) for part in parts]


def _repeated(path: Path, seen: set[str]) -> bool:
    name = os.path.abspath(path)
    if name in seen:
        return True
    seen.add(name)
    return False


_JPEG_STREAMS = (".mjpeg", ".mjpg")  # pictures one after the other, which start like one


def _is_animated(picture: Path) -> bool:
    with suppress(OSError, HeaderError):
        return picture.stat().st_size < _LARGEST_ANIMATION and read_header(picture.read_bytes()).pictures > 1
    return False


_LARGEST_ANIMATION = 1 << 28  # bytes


def _is_video(path: Path) -> bool:
    """By content, else by suffix; what is neither is left to the image reader to refuse."""
    start = b""
    if path.is_file():  # opening a pipe would wait for its writer
        with suppress(OSError), path.open("rb") as stream:
            start = stream.read(START_BYTES)
    form = image_format(start)
    if form == "GIF" or (form == "AVIF" and has_pyav()):
        return _is_animated(path)
    if form:
        return path.suffix.lower() in _JPEG_STREAMS
    return looks_like_video(start) or path.suffix.lower() in VIDEO_SUFFIXES
