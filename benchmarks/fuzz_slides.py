"""Damaged slides, in TIFF and DICOM: segmenting them must neither crash, hang nor fill the memory.

    python benchmarks/fuzz_slides.py --name fuzz-slides-MACHINE [--inputs 5000] [--seed 0]

Small slides of every kind are generated and changed as in ``fuzz.py``, and so are the regions that a run which ended
has kept. All tiles of all levels are read in one process under the limits of the child that does so in ``slide``. What
ends that process, or is raised by it, is segmented as ``slide`` does, with a child, and that is what counts; so is
every 25th, as its results are written, too.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import tifffile
from fuzzing import FINE, Reader, Tally, mutated

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from made_slides import save_dicom_level, save_slide, tissue_picture
from toy_bundles import save_toy_bundle

from espmedsam_edge.imaging.child import limit_memory
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.slide import apart
from espmedsam_edge.runtime.slide.regions import Regions
from espmedsam_edge.runtime.slide.segmenting import SlideOptions, SlideResults, segment_slide

SIZE = (200, 260)
_SURE_EVERY = 25


def read(line: str) -> str:
    """Read what a line names: tiles, kept regions, or with a bundle a whole slide."""
    how, path, *bundle = line.split("\t")
    if how == "regions":
        return _regions(Path(path))
    return _whole(Path(path), Path(bundle[0])) if how == "whole" else _tiles(Path(path))


def _regions(folder: Path) -> str:
    regions = Regions(folder, SIZE, 128)
    regions.open(_plan(), anew=False)
    regions.part(Crop(0, 0, SIZE[1], SIZE[0]))
    return "read"


def _plan() -> dict[str, Any]:
    return {"slide": ["a.tif", 1, 1], "graph": "0", "threshold": 0.5}


_limited = False


def _tiles(path: Path) -> str:
    global _limited
    if not _limited:
        limit_memory(apart._MEMORY)
        _limited = True
    damaged = 0
    try:
        slide = apart.open_slide(path)
        for level in slide.levels:
            for index in np.flatnonzero(level.there):
                try:
                    level.part(int(index))
                except MemoryError:
                    raise
                except Exception:  # noqa: BLE001 (as the child has it)
                    damaged += 1
        slide.close()
    except MemoryError:
        return "refused"
    return "partly" if damaged else "read"


def _whole(path: Path, bundle: Path) -> str:
    out = path.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    options = SlideOptions(tile=64, region=256, everything=True)
    with Segmenter.load(bundle, backend="onnxruntime-cpu", threads=1, tile="off") as segmenter:
        failure = segment_slide(path, segmenter, SlideResults.of(path, out), options).failure
    return fuzzing.told([] if failure is None else [failure])


class SlideReader(Reader):
    """Reads tiles, and where that is a finding, and now and then, the whole slide as ``slide`` does."""

    def __init__(self, bundle: Path) -> None:
        super().__init__("fuzz_slides")
        self._bundle, self._tiles_read = bundle, 0

    def read(self, what: str, starts: int = 0) -> tuple[str, int]:
        """See ``Reader.read``."""
        outcome, memory = super().read(what, starts)
        how, _, path = what.partition("\t")
        if how != "tiles":
            return outcome, memory
        self._tiles_read += 1
        if outcome in FINE and memory <= fuzzing.MEMORY and self._tiles_read % _SURE_EVERY:
            return outcome, memory
        self.close()  # it is limited, and children would be
        try:
            return super().read(f"whole\t{path}\t{self._bundle}", starts=2)  # the tiles' child, which a tile may end
        finally:
            self.close()


def seeds(folder: Path) -> Iterator[tuple[str, Path]]:
    """Whole slides in a folder: kind and file."""
    picture = tissue_picture(SIZE)
    deep = picture.astype(np.uint16) * 257
    common: dict[str, Any] = {"tile": (64, 64)}
    for name, options in {
        "zlib": {}, "lzw": {"compression": "lzw"}, "jpeg": {"compression": "jpeg"},
        "jpeg2000": {"compression": "jpeg2000"}, "webp": {"compression": "webp"}, "zstd": {"compression": "zstd"},
        "packbits": {"compression": "packbits"}, "predictor": {"predictor": True}, "plain": {"compression": None},
    }.items():  # fmt: skip
        yield f"{name}.tif", save_slide(folder / f"{name}.tif", picture, **(common | options))
    yield "deep.tif", save_slide(folder / "deep.tif", deep, **common)
    with tifffile.TiffWriter(folder / "aperio.svs") as file:
        described = "Aperio Image Library v12\r\n260x200 [0,0 260x200] (64x64)|AppMag = 20|MPP = 0.4990"
        options = {"photometric": "rgb", "metadata": None, "tile": (64, 64), "compression": "jpeg"}
        file.write(picture, description=described, **options)
        file.write(np.ascontiguousarray(picture[::4, ::4]), photometric="rgb", description="Aperio thumbnail")
        file.write(np.ascontiguousarray(picture[::2, ::2]), description="Aperio level", **options)
    yield "aperio.svs", folder / "aperio.svs"
    with tifffile.TiffWriter(folder / "levels.ome.tif", ome=True) as file:
        options = {"photometric": "rgb", "tile": (64, 64), "compression": "zlib"}
        file.write(picture, subifds=1, metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, **options)
        file.write(np.ascontiguousarray(picture[::2, ::2]), subfiletype=1, **options)
    yield "levels.ome.tif", folder / "levels.ome.tif"
    tifffile.imwrite(folder / "strips.tif", picture, photometric="rgb", rowsperstrip=16, compression="zlib")
    yield "strips.tif", folder / "strips.tif"
    for name, form in {"jpeg": {}, "sparse": {"sparse": True}, "plain": {"jpeg": False}}.items():
        save_dicom_level(folder / f"{name}.dcm", picture, **form)
        yield f"{name}.dcm", folder / f"{name}.dcm"


def kinds(folder: Path) -> dict[str, Callable[[random.Random], str]]:
    """What changes a slide of each kind, alone in a folder, as DICOM slides are read with all that is beside them."""
    whole, place = folder / "whole", folder / "changed"
    whole.mkdir()
    place.mkdir()

    def changed(kind: str, content: bytes, chance: random.Random) -> str:
        for file in place.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        (place / kind).write_bytes(mutated(content, chance.randrange(1 << 30)))
        return f"tiles\t{place / kind}"

    kept = folder / "kept"
    made = Regions(kept, SIZE, 128)
    made.open(_plan(), anew=False)
    generator = np.random.default_rng(0)
    for row in range(made.rows):
        for column in range(made.columns):
            there = made.place(row, column)
            noise = generator.integers(0, 2, (there.height, there.width), np.uint8)
            made.write(row, column, np.asarray(255 * noise, np.uint8))

    def regions(chance: random.Random) -> str:
        unfinished = folder / "changed.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(kept, unfinished)
        file = chance.choice(sorted(unfinished.iterdir()))
        if file.suffix == ".json" and chance.random() < 0.5:
            fuzzing.json_changed(file, chance)
        else:
            fuzzing.file_changed(file, chance)
        return f"regions\t{unfinished}"

    slides = {kind: partial(changed, kind, path.read_bytes()) for kind, path in seeds(whole)}
    return {**slides, "regions": regions}


def fuzz(inputs: int, seed: int, tell: Callable[[str], None] = print) -> Tally:
    """Read that many changed slides, and all whole ones before.

    Raises:
        AssertionError: a whole one is not read.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reader = SlideReader(save_toy_bundle(folder / "toy.bundle", ("histopathology",)).path)
        made = kinds(folder)
        for path in sorted((folder / "whole").iterdir()):
            alone = folder / "alone" / path.name
            alone.parent.mkdir(exist_ok=True)
            shutil.copy(path, alone)
            outcome = reader.read(f"tiles\t{alone}")[0]
            assert outcome == "read", (path, outcome)
            alone.unlink()
        return fuzzing.count(reader, made, inputs, seed, tell)


if __name__ == "__main__":
    fuzzing.main(__doc__, "fuzz-slides", lambda inputs, seed: fuzz(inputs, seed).to_dict())
