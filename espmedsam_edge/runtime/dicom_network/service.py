"""The listener as a whole: what came is segmented, one after the other, and delivered until it has arrived."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.backends.backend import BackendAway
from espmedsam_edge.runtime.dicom.segmentation import Algorithm
from espmedsam_edge.runtime.dicom_network.delivery import Delivery, NotDeliveredError
from espmedsam_edge.runtime.dicom_network.inbox import Inbox
from espmedsam_edge.runtime.dicom_network.listener import ListenOptions, check_address, listening
from espmedsam_edge.runtime.networks import Networks
from espmedsam_edge.runtime.segmentation import DeviceLost
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.dicom_seg import DicomSegmentations
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries
_DAY = 24 * 60 * 60.0
_NAP = 0.5  # seconds between two looks, where nothing comes


def serve(
    options: ListenOptions,
    queue: Path,
    delivery: Delivery,
    segmenter: Segmenter,
    stop: threading.Event,
    ready: Callable[[str, int], None] = lambda host, port: None,
) -> None:
    """Listen, segment and deliver, until ``stop`` is set.

    Args:
        options: who may send what.
        queue: the folder of what was received and is not delivered yet; another listener goes on from it.
        delivery: where segmentations go.
        segmenter: stays the caller's.
        stop: from any thread.
        ready: called with the address once it is listened on.

    Raises:
        UserError: the address or the folder will not do, or the GPU is lost.
    """
    came = threading.Event()
    due = time.monotonic()
    check_address(options)
    with Inbox(queue, options.free << 20) as inbox, listening(options, inbox, came.set) as (host, port):
        work = Work(inbox, segmenter, delivery)
        ready(host, port)
        while not stop.is_set():
            if time.monotonic() >= due:
                inbox.forget(options.remember)
                due = time.monotonic() + _DAY
            came.clear()
            work.once(stop)
            came.wait(_NAP)


class _Pauses:
    """When to try again: a second later, then twice as long each time, a minute at most."""

    def __init__(self) -> None:
        self._due, self._pause = 0.0, _FIRST_PAUSE

    def over(self) -> bool:
        return time.monotonic() >= self._due

    def begin(self) -> float:
        """Seconds until the next try."""
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        self._due = time.monotonic() + pause
        return pause


class Work:
    """Segments and delivers what an inbox has.

    Args:
        inbox: of the listener.
        segmenter: what segments.
        delivery: where segmentations go.
    """

    def __init__(self, inbox: Inbox, segmenter: Segmenter, delivery: Delivery) -> None:
        self._inbox, self._segmenter, self._delivery = inbox, segmenter, delivery
        with ExitStack() as stack:
            networks = Networks(segmenter)
            networks.load(stack, None)
            trained = segmenter.bundle.manifest.weights.origin != "random"
            self._algorithm = Algorithm(__version__, networks.parameters, trained)
        self._disk, self._way = _Pauses(), _Pauses()
        self._refused: dict[str, _Pauses] = {}

    def once(self, stop: threading.Event) -> None:
        """Do what can be done now."""
        try:
            for name in self._inbox.waiting():
                if stop.is_set():
                    return
                if self._disk.over():
                    self._segment(name)
                if self._way.over() and self._inbox.result(name).exists():
                    self._deliver(name)
        finally:
            self._delivery.close()

    def _segment(self, name: str) -> None:
        result = self._inbox.result(name)
        if result.exists() or (file := self._inbox.begin(name)) is None:
            return
        try:
            why = self._written(file, result)
        except DeviceLost:
            raise
        except UserError as error:
            if isinstance(error.__cause__, OSError) or isinstance(error, BackendAway):  # not the picture's fault
                log.error("%s Tried again in %.0f s.", error, self._disk.begin())
                return
            why = str(error)
        if not result.exists():
            why = why or "no segmentation came of it."
            if not self._noted(lambda: self._inbox.fail(name, why), self._disk):
                return
            log.error("failed: %s", why)
        self._disk = _Pauses()

    def _noted(self, note: Callable[[], None], pauses: _Pauses) -> bool:
        """Note in the inbox what became of an instance; whether that could be written."""
        try:
            note()
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            log.error("%s Tried again in %.0f s.", error, pauses.begin())
            return False
        return True

    def _written(self, file: Path, result: Path) -> str:
        """Write the segmentation of a file; why that is not possible, "" where it is not known."""
        sources, failures = open_sources([str(file)])
        for source in sources:
            with source, DicomSegmentations({file: result}, self._algorithm) as sink:
                for frame in source:
                    sink.write(frame, self._segmenter.segment(frame.image))
            failures += source.failures
        return failures[0].message if failures else ""

    def _deliver(self, name: str) -> None:
        refused = self._refused.get(name)
        if refused is not None and not refused.over():
            return
        try:
            self._delivery.deliver(self._inbox.result(name))
        except NotDeliveredError as error:
            pauses = self._way if error.nothing_arrives else self._refused.setdefault(name, _Pauses())
            log.warning("%s: %s. Tried again in %.0f s.", self._delivery, error, pauses.begin())
            return
        if not self._noted(lambda: self._inbox.finish(name), self._way):
            return  # it is delivered again, and is the same instance there
        self._way = _Pauses()
        self._refused.pop(name, None)
        log.info("%s: segmented and delivered.", name)
