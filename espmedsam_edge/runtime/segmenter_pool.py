"""A bundle's segmenters, one a modality, loaded when one is first asked for and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.tiling import AUTO

_PATIENCE = 10.0

Load = Callable[[str], Segmenter]


class SegmenterPool(Closing):
    """Segmenters by modality; switching to one that was loaded before costs nothing. Any thread may ask.

    Args:
        bundle: what there is.
        load: makes the segmenter of a modality; called once for each, by one thread at a time.
        modalities: those that may be asked for; None: all of the bundle.
    """

    def __init__(self, bundle: Bundle, load: Load, modalities: Sequence[str] | None = None) -> None:
        self.bundle = bundle
        self.modalities = tuple(bundle.manifest.modalities if modalities is None else modalities)
        self._load = load
        self._loaded: dict[str, Segmenter] = {}
        self._owned: list[Segmenter] = []
        self._lock = threading.Lock()
        self._closed = False

    def add(self, segmenter: Segmenter) -> None:
        """Know a segmenter that somebody else loaded, and closes."""
        self._loaded[segmenter.modality] = segmenter

    def loaded(self, modality: str) -> Segmenter | None:
        """The modality's segmenter if it is loaded; never waits."""
        return self._loaded.get(modality)

    def get(self, modality: str) -> Segmenter:
        """The modality's segmenter; loading may take minutes where an engine has to be built.

        Raises:
            UserError: no such modality, or it cannot be loaded.
        """
        if modality not in self.modalities:
            raise UserError(f"no modality '{modality}' here.", nearest(modality, self.modalities))
        found = self._loaded.get(modality)
        if found is not None:
            return found
        with self._lock:
            if self._closed:
                raise UserError("the server is stopping.", "Start it again.")
            if modality not in self._loaded:
                segmenter = self._load(modality)
                self._owned.append(segmenter)
                self._loaded[modality] = segmenter
            return self._loaded[modality]

    def close(self) -> None:
        """Free what this pool loaded; a load under way is waited for ten seconds, then left to the process's end."""
        self._closed = True
        if self._lock.acquire(timeout=_PATIENCE):
            try:
                while self._owned:
                    self._owned.pop().close()
            finally:
                self._lock.release()


def loader(
    bundle: Bundle,
    precision: str | None,
    backend: str,
    *,
    threshold: float | None = None,
    threads: int | None = None,
    tta: bool = False,
    tile: str | int = AUTO,
) -> Load:
    """Loads modalities as ``Segmenter.load`` does with these arguments; one that lacks the precision gets another."""

    def load(modality: str) -> Segmenter:
        has = {graph.precision for graph in bundle.manifest.graphs if graph.modality == modality}
        chosen = precision if precision in has else None
        return Segmenter.load(bundle, modality, chosen, backend, threshold, threads, tta=tta, tile=tile)

    return load
