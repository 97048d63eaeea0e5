"""Which bundle runs: the one that is named, or one made from the weights that came with the program."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from espmedsam_edge.bundle import MANIFEST, PRECISIONS, Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.recognition import recognisable
from espmedsam_edge.remote_bundles import is_remote, open_bundle
from espmedsam_edge.runtime.sources.piped import STANDARD_INPUT
from espmedsam_edge.runtime.sources.uris import lacks_scheme
from espmedsam_edge.shipped.bundles import shipped_bundle, shipped_scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """Which network segments.

    Attributes:
        bundle: None: of the weights that came with the program, one is made for each modality that is needed.
        modality: what everything is segmented as; None: what each picture is recognised as.
        among: the modalities that it may be recognised as.
    """

    bundle: Bundle | None
    modality: str | None
    among: tuple[str, ...] = ()

    def bundle_of(self, modality: str) -> Bundle:
        """The bundle that has a modality; made, if need be, and told how good it is.

        Raises:
            UserError: see ``shipped_bundle``.
        """
        if self.bundle is not None:
            return self.bundle
        made = shipped_bundle(modality)
        log.info("%s", made.manifest.weights.note)
        return made


def choose_bundle(bundle: Bundle | str | Path | None, modality: str | None, precision: str | None = None) -> Chosen:
    """The bundle and the modality that are wanted.

    Without a bundle, they are made from the weights that came with the program. Where no modality is named and there
    are several, each picture is to be recognised.

    Args:
        bundle: a bundle, its path or its address, if one was named.
        modality: as the user named it.
        precision: as the user named it, which each modality that a picture may be of must have; the weights that came
            along are fp32.

    Raises:
        UserError: no such bundle, no weights here, or a modality must be named.
    """
    if bundle is None:
        _check_shipped(modality, precision)
        return Chosen(None, modality, () if modality else tuple(recognisable(shipped_scores())))
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    names = opened.manifest.modalities
    if modality is None and len(names) > 1 and len(recognisable(names)) == len(names):
        precisions = {opened.graph(name, precision).precision for name in names}
        if len(precisions) == 1:  # results of one run are of one precision
            return Chosen(opened, None, tuple(names))
    return Chosen(opened, opened.graph(modality, precision).modality)


def _check_shipped(modality: str | None, precision: str | None) -> None:
    if precision in PRECISIONS and precision != "fp32":
        name = modality or "NAME"
        raise UserError(
            f"the weights that came with the program are fp32, not {precision}.",
            f"Make a bundle of your own: espmedsam-edge weights --modality {name} --out {name}.bundle; then "
            f"espmedsam-edge calibrate {name}.bundle IMAGES --precision {precision}",
        )


def means_a_bundle(argument: str) -> bool:
    """Whether an argument names a bundle, there or not, rather than something to segment."""
    path = Path(argument)
    if argument == STANDARD_INPUT or lacks_scheme(argument):
        return False
    if is_remote(argument):
        return True
    if path.name.endswith(".bundle") or (path / MANIFEST).is_file() or any(path.glob("*.onnx")):
        return True
    # What exists otherwise is a source; so is an address, a pattern, a camera's number or a name with a suffix.
    return not (
        path.exists() or path.suffix or "://" in argument or any(c in argument for c in "*?[") or argument.isdecimal()
    )
