"""Which of a run's files are to be done: those of its shard, without those that an earlier run has finished."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from espmedsam_edge.annotations.formats import OneDocument, writer
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.destinations import stands
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import sha256_file
from espmedsam_edge.pipes import is_pipe
from espmedsam_edge.runtime.dicom.identifiers import KEY_VARIABLE
from espmedsam_edge.runtime.request import InferenceRequest, ModelOptions, Outputs
from espmedsam_edge.runtime.sinks.journal import Journal, Record
from espmedsam_edge.runtime.sinks.places import Places
from espmedsam_edge.runtime.sinks.resumed import ResumedTables, State, Table, state_of
from espmedsam_edge.runtime.sources.piped import LABEL
from espmedsam_edge.runtime.sources.shards import Shard
from espmedsam_edge.runtime.sources.source import Source
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}(\.[^.]*)")
"""The name of a file that is being written, see ``files.atomic_path``."""

_WHOLE_STEM = 40  # characters, up to which such a name tells whose it is


DEFAULT_ANNOTATIONS = Path("annotations")

_PLACES = ("out", "masks", "mask_video", "dicom_seg", "dicom_sr", "labels", "jsonl", "csv", "objects", "plot")
"""The outputs' places, in the order in which the journal is put beside one."""

_NO_MATTER = {
    "bundle", "threads", "url",  # what the bundle is is said by its content
    "frames", "duration", "max_latency", "give_up", "decoder", "shard",
    "overwrite", "resume", "stream", "publish", "export", "export_to",
}  # fmt: skip
"""Options on which a file's results do not depend; every other one counts, but for places."""


def settings_of(request: InferenceRequest, bundle: Bundle) -> str:
    """A hash of all that a file's results depend on besides its content: network, options, version of the program.

    Raises:
        UserError: the network was loaded by the caller, who alone knows how.
    """
    model, outputs, reading = request.model, request.outputs or Outputs(), request.reading
    if not isinstance(model, ModelOptions):
        raise UserError("a run with a segmenter that is loaded already cannot be resumed.", "Give ModelOptions.")
    # Of the weights that came along a bundle is made for each modality that pictures are recognised as.
    recognised = model.bundle is None and model.modality is None
    said = {
        "version": __version__,
        "bundle": bundle.manifest.weights.checkpoint_sha256 if recognised else bundle.manifest.model_dump(mode="json"),
        "options": [
            {name: str(value) for name, value in sorted(vars(part).items()) if name not in left_out}
            for part, left_out in ((model, _NO_MATTER), (reading, _NO_MATTER), (outputs, _NO_MATTER.union(_PLACES)))
        ],
        "key": os.environ.get(KEY_VARIABLE, ""),
        "tables": [
            place is not None for place in (outputs.export, outputs.jsonl, outputs.csv, outputs.objects, outputs.plot)
        ],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


class Part:
    """What of the files a run does, and how it notes that they are done.

    Args:
        request: asks for a shard, or to be resumed, or neither.
        sources: all of the request, not yet entered.
        called: what results call files that do not go by their own names.
        bundle: what will run.

    Attributes:
        shard: None: all files.
        files: those that are to be done, once ``left`` was asked.
        done: how many of its files an earlier run has finished.
        size: (H, W) of one of them.
        export: the folder of annotations; None where none are asked for.

    Raises:
        UserError: a request that cannot be gone on with.
    """

    def __init__(
        self, request: InferenceRequest, sources: Sequence[Source], called: Mapping[Path, str], bundle: Bundle
    ) -> None:
        outputs, reading = request.outputs or Outputs(), request.reading
        self.shard = None if reading.shard is None else Shard.parse(reading.shard)
        live = next((source for source in sources if source.live or _piped(source)), None)
        asked = "--resume is" if outputs.resume else "--shard is"
        if live is not None and (outputs.resume or self.shard is not None):
            raise UserError(f"{asked} for files, and {live.name} is none.", "Leave it out.")
        files = [file for source in sources for file in source.files]
        self._files = self.files = files if self.shard is None else self.shard.share(files)
        self._labels = {file: called.get(file, str(file)) for file in self._files}
        self._states: dict[Path, State | None] = {}
        self._places: Places | None = None
        self._journal: Journal | None = None
        self._settings = ""
        self.done = 0
        self.size: tuple[int, int] | None = None
        self.export = _export_folder(outputs, self.shard)
        self._writer = None if outputs.export is None else writer(outputs.export)
        self._overwrite = outputs.overwrite
        if outputs.resume:
            _check(request, outputs)
            self._settings = settings_of(request, bundle)
            self._folder = journal_folder(outputs)
        self._resume = outputs.resume
        tables = (outputs.jsonl, outputs.csv, outputs.objects, outputs.plot)
        places = [Path(place) for place in tables if place is not None]
        self._growing = places if self.shard is None else [self.shard.named(place) for place in places]

    @property
    def whole(self) -> bool:
        """Whether every file is done."""
        return self.shard is None and not self._resume

    def left(self, places: Places) -> list[Path]:
        """The files that are to be done, once all places are known; opens the journal.

        Raises:
            UserError: see ``Journal``; or annotations stand that may be corrections.
        """
        self._places = places
        if not self._resume:
            return self._files
        name = "all" if self.shard is None else f"{self.shard.number}-of-{self.shard.of}"
        self._journal = journal = Journal(self._folder, name)
        self._begin_export(journal)
        left: list[Path] = []
        for file in self._files:
            record = journal.record(self._labels[file], self._settings)
            if record is not None and self._is_done(file, record):
                self.size = (record.size[0], record.size[1])
            else:
                left.append(file)
                self._states[file] = state_of(file)
        self.done = len(self._files) - len(left)
        if left and self._document is not None and self._document.exists() and not self._overwrite:
            text = f"{self._document} is whole, may hold corrections, and is without {len(left)} of the files."
            raise UserError(text, "Name a new folder: --export-to FOLDER")
        if journal.found:
            self._sweep(left)
            log.info("%s: %d of %d files are done already.", self._folder, self.done, len(self._files))
        self.files = left
        return left

    def _begin_export(self, journal: Journal) -> None:
        """Note whose folder the annotations are in: what stands there is either this run's own, or refused."""
        if self.export is None:
            return
        ours = os.path.relpath(self.export, self._folder.parent)
        if ours not in journal.begun:
            check_new(self.export, self._overwrite)
            journal.began(ours)

    @property
    def _document(self) -> Path | None:
        if self.export is None or not isinstance(self._writer, OneDocument):
            return None
        return self.export / self._writer.document

    def _exported(self, record: Record) -> bool:
        """Whether the pictures of a file's annotations are there."""
        if self.export is None or self._writer is None or self._journal is None:
            return True
        folder = self.export / self._writer.images
        names = [first.get("name") for first, *_ in self._journal.lines(record)]
        return all(name is None or (folder / name).exists() for name in names)

    def _is_done(self, file: Path, record: Record) -> bool:
        assert self._journal is not None
        names = [os.path.relpath(path, self._folder.parent) for path in self._outputs(file)]
        if not record.whole or [name for name, _ in record.outputs] != names or not self._journal.stand(record):
            return False
        try:
            return self._exported(record) and sha256_file(file) == record.sha256
        except OSError:
            return False

    def _outputs(self, file: Path) -> list[Path]:
        assert self._places is not None
        return self._places.of([file]).files()

    def _sweep(self, left: Iterable[Path]) -> None:
        """Remove what a kill left beside the places of files that are done again: nothing else has such names."""
        assert self._journal is not None
        unfinished: dict[Path, set[tuple[str, str]] | None] = {}
        growing = [Path(place) for place in (*self._growing, self._document) if place is not None]
        if self.export is not None and self._writer is not None:  # all that is in there is of this run
            unfinished = dict.fromkeys(
                [self.export / self._writer.images, (self.export / self._writer.place("any")).parent]
            )
        for file in left:
            for path in self._outputs(file):
                names = unfinished.setdefault(path.parent, set())
                if names is not None:
                    names.add((path.stem, path.suffix))
                if path.is_dir():
                    unfinished[path] = {(f"{number:06d}", ".png") for number in range(len(os.listdir(path)) + 1)}
                if self._labels[file] in self._journal.begun:
                    growing.append(path)
        for folder, wanted in unfinished.items():
            with suppress(OSError):
                for entry in list(os.scandir(folder)):
                    match = _TEMPORARY.fullmatch(entry.name)
                    if match is None or len(match[1]) >= _WHOLE_STEM or not entry.is_file(follow_symlinks=False):
                        continue
                    if wanted is None or (match[1], match[2]) in wanted:
                        os.unlink(entry.path)
        for path in growing:
            partial = re.compile(rf"{re.escape(path.stem)}\.partial(-\d+)?{re.escape(path.suffix)}")
            with suppress(OSError):
                for entry in list(os.scandir(path.parent)):
                    if partial.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        os.unlink(entry.path)

    def resumed(self, tables: Sequence[Table]) -> ResumedTables:
        """What notes that files are done, and writes the tables in the end; once ``left`` was asked."""
        assert self._journal is not None
        return ResumedTables(self._journal, self._settings, self._labels, self._outputs, self._states, tables)


def _piped(source: Source) -> bool:
    return any(is_pipe(file) or file == LABEL for file in source.files)


def _check(request: InferenceRequest, outputs: Outputs) -> None:
    reading = request.reading
    if reading.frames is not None or reading.duration is not None:
        raise UserError("--resume takes whole files.", "Leave --frames and --duration out.")
    if outputs.overwrite is False:
        raise UserError(
            "--resume replaces what a run that was killed left unnoted.", "Leave --no-overwrite out: done files stay."
        )
    if outputs.stream is not None:
        raise UserError("a stream cannot be resumed.", "Leave --stream or --resume out.")
    for place in _places(outputs):
        if place is not None and (str(place) == "-" or is_pipe(Path(place))):
            raise UserError(f"--resume goes on in files, and {place} is none.", "Name a file, or leave --resume out.")


def _places(outputs: Outputs) -> list[str | Path | None]:
    return [*(getattr(outputs, name) for name in _PLACES), _export_folder(outputs)]


def _export_folder(outputs: Outputs, shard: Shard | None = None) -> Path | None:
    if outputs.export is None:
        return None
    folder = Path(outputs.export_to or DEFAULT_ANNOTATIONS)
    return folder if shard is None else shard.named(folder)


def check_new(folder: Path, overwrite: bool | None) -> None:
    """Corrections are made in place, so what stands in a folder of annotations is not replaced unasked.

    Raises:
        UserError: something does.
    """
    if stands(folder) and not overwrite:
        raise UserError(f"{folder} holds files, which may be corrections.", "Name a new folder: --export-to FOLDER")


def journal_folder(outputs: Outputs) -> Path:
    """Where the journal is: beside the first of the results that are named, ``masks.journal`` for ``masks``.

    Raises:
        UserError: none is named.
    """
    first = next((Path(place) for place in _places(outputs) if place is not None), None)
    if first is None or not first.name:
        raise UserError("--resume needs a place for results that has a name.", "Name one, such as --out overlays.")
    return first.with_name(f"{first.name}.journal")
