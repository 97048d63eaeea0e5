"""Which bundle runs: the one that is named, or one made from the weights that came with the program."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from espmedsam_edge.bundle import MANIFEST, PRECISIONS, Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.recognition import recognise
from espmedsam_edge.runtime.sources.anonymous import SourceNames
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.piped import STANDARD_INPUT
from espmedsam_edge.runtime.sources.uris import parse_uri
from espmedsam_edge.shipped.bundles import shipped_bundle, shipped_scores

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """A bundle, and the modality to run (None: its only one)."""

    bundle: Bundle
    modality: str | None


def choose_bundle(
    bundle: Bundle | str | Path | None,
    modality: str | None,
    sources: Sequence[str],
    names: SourceNames | None = None,
    precision: str | None = None,
) -> Chosen:
    """The bundle and the modality that are wanted.

    Without a bundle, it is made from the weights that came with the program; then the modality, unless named, is
    recognised from the first picture.

    Args:
        bundle: a bundle or its path, if one was named.
        modality: as the user named it.
        sources: as the user named them; none where a service alone is wanted.
        names: what lines call the picture by; None: its own name.
        precision: as the user named it; the weights that came along are fp32.

    Raises:
        UserError: no such bundle, no weights here, or the modality is not clear.
    """
    if bundle is not None:
        return Chosen(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), modality)
    if modality is None:
        if not sources:
            raise UserError("no bundle and no modality is named.", f"Name one: --modality {'|'.join(shipped_scores())}")
        modality = _recognise(sources[0], names)
    if precision in PRECISIONS and precision != "fp32":
        raise UserError(
            f"the weights that came with the program are fp32, not {precision}.",
            f"Make a bundle of your own: espmedsam-edge weights --modality {modality} --out {modality}.bundle; then "
            f"espmedsam-edge calibrate {modality}.bundle IMAGES --precision {precision}",
        )
    made = shipped_bundle(modality)
    log.info("%s", made.manifest.weights.note)
    return Chosen(made, modality)


def means_a_bundle(argument: str) -> bool:
    """Whether an argument names a bundle, there or not, rather than something to segment."""
    path = Path(argument)
    if argument == STANDARD_INPUT:
        return False
    if path.name.endswith(".bundle") or (path / MANIFEST).is_file() or any(path.glob("*.onnx")):
        return True
    # What exists otherwise is a source; so is an address, a pattern, a camera's number or a name with a suffix.
    return not (
        path.exists() or path.suffix or "://" in argument or any(c in argument for c in "*?[") or argument.isdecimal()
    )


def _recognise(source: str, names: SourceNames | None) -> str:
    known = list(shipped_scores())
    choices = f"Name it: --modality {'|'.join(known)}"
    picture = _first_picture(source, names)
    uri = parse_uri(source)  # whose address leaves out what is secret in it
    shown = source if uri is None else uri.address
    if names is not None:
        shown = "source-1"
    if picture is None:
        raise UserError(f"the modality of {shown} cannot be told.", choices)
    guess = recognise(picture, known)
    if guess is None or not guess.sure:
        raise UserError(f"{shown} looks like none of the modalities with certainty.", choices)
    log.info("%s looks like %s (%.0f%%). Another: --modality NAME", shown, guess.modality, 100 * guess.probability)
    return guess.modality


def _first_picture(source: str, names: SourceNames | None) -> Frame | None:
    """The first frame that can be read; None for live sources, which are read only once, and for what has none."""
    if source == STANDARD_INPUT or parse_uri(source) is not None:  # which is read only once
        return None
    found, failures = open_sources([source], names=names)
    if not found and failures:
        raise UserError(failures[0].message, exit_code=1)
    for candidate in found:
        if candidate.live:
            return None
        with suppress(UserError), candidate as opened:
            for frame in opened:
                return frame.image
        if candidate.failures:
            raise UserError(candidate.failures[0].message, exit_code=1)
    return None
