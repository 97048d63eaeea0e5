"""A run with its view, or the service alone: puts the parts together for ``infer --serve``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.runtime.bundle_choice import Chosen, choose_bundle
from espmedsam_edge.runtime.run.controls import Adjustable
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.segmenter_pool import SegmenterPool, loader
from espmedsam_edge.runtime.serve.live_view import DEFAULT_OPACITY, LiveView
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.panel import Panel
from espmedsam_edge.runtime.serve.server import Server
from espmedsam_edge.runtime.tiling import AUTO

log = logging.getLogger(__name__)


@contextmanager
def serve_run(
    options: ServeOptions,
    segmenter: Segmenter,
    controls: Adjustable,
    *,
    precision: str | None = None,
    backend: str = "auto",
    threshold: float | None = None,
    threads: int | None = None,
    tta: bool = False,
    tile: str | int = AUTO,
    objects: ObjectOptions = ObjectOptions(),
    opacity: float = DEFAULT_OPACITY,
    writes: bool = False,
    live: bool = False,
    pool: SegmenterPool | None = None,
) -> Iterator[tuple[LiveView, Server]]:
    """Serve the view of a run: give the view to ``run_pipeline`` as a shared sink, and it the controls.

    Args:
        options: where and for whom.
        segmenter: the run's; stays the caller's.
        controls: the run's.
        precision, backend, threshold, threads, tta, tile: for its other modalities; see ``Segmenter.load``.
        objects: which of a mask's objects count in the service's answers; the run's are found by its jobs.
        opacity: of the overlay's tint to begin with, 0 to 1.
        writes: the run writes results, which viewers must not spoil: they cannot change the modality that these are
            labelled with, and a pause holds the picture alone (give the run ``WithoutPause``).
        live: whether there are live sources.
        pool: the run's, where it has more than one segmenter; its modalities are offered unless the run writes.

    Raises:
        UserError: as ``Server``.
    """
    bundle = segmenter.bundle
    load = loader(bundle, precision, backend, threshold=threshold, threads=threads, tta=tta, tile=tile)
    view = LiveView(controls, opacity=opacity, notice=notice_of(bundle), holds=writes, live=live)
    own = SegmenterPool(bundle, load, [segmenter.modality] if writes else None)
    with own if pool is None or writes else nullcontext(pool) as offered:
        offered.add(segmenter)
        panel = Panel(controls, offered, view, segmenter, recognises=offered is pool, objects=objects)
        with Server(panel, options) as server:
            announce(server, "view", options.token)
            try:
                yield view, server
            finally:
                view.end()


@contextmanager
def serve_alone(
    options: ServeOptions,
    chosen: Chosen | Bundle,
    *,
    precision: str | None = None,
    backend: str = "auto",
    threshold: float | None = None,
    threads: int | None = None,
    tta: bool = False,
    tile: str | int = AUTO,
    objects: ObjectOptions = ObjectOptions(),
) -> Iterator[Server]:
    """Serve ``POST /v1/segment`` and the page without a run. The modality, if there is one, is loaded at once.

    Raises:
        UserError: as ``Server`` and ``Segmenter.load``.
    """
    if isinstance(chosen, Bundle):
        chosen = choose_bundle(chosen, None, precision)

    def load(modality: str) -> Segmenter:
        of = first if modality == start else chosen.bundle_of(modality)
        return loader(of, precision, backend, threshold=threshold, threads=threads, tta=tta, tile=tile)(modality)

    controls = Adjustable()
    start = chosen.modality or chosen.among[0]
    first = chosen.bundle_of(start)
    with SegmenterPool(first, load, chosen.among if chosen.bundle is None and chosen.among else None) as pool:
        named = None if chosen.modality is None else pool.get(chosen.modality)
        panel = Panel(controls, pool, LiveView(controls), named, service=True, objects=objects)
        with Server(panel, options) as server:
            announce(server, "service", options.token)
            yield server


def notice_of(bundle: Bundle) -> str:
    """What overlays of this bundle must say."""
    return "untrained weights" if bundle.manifest.weights.origin == "random" else ""


def announce(server: Server, what: str, given: str | None) -> None:
    """Log where it is, and once, if it was made here, the token."""
    log.info("%s: %s", what, server.url)
    if server.token is not None and given is None:
        # A warning, so that it is shown to who wants to hear little: nobody gets in without it.
        log.warning("token: %s (asked for by the page; this is the only time it is shown)", server.token)
    if not server.loopback:
        log.warning("Others can reach this address, and nothing on the way is encrypted: put a TLS proxy before it.")
