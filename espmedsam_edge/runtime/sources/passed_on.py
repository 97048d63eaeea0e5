"""A source whose frames come from another one: what the wrappers of sources share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar, cast

from espmedsam_edge.runtime.sources.source import (
    Failure,
    Interruptible,
    LiveFrames,
    Narrowable,
    Skippable,
    Source,
    SourceFrame,
)


class PassedOn:
    """Passes on all that a source is and does, files or live.

    Args:
        source: not yet entered.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._live = cast(LiveFrames, source)  # asked only where it is

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def kind(self) -> Literal["images", "video"]:
        return self._source.kind

    @property
    def live(self) -> bool:
        return self._source.live

    @property
    def files(self) -> Sequence[Path]:
        return self._source.files

    @property
    def fps(self) -> Fraction | None:
        return self._source.fps

    @property
    def length(self) -> int | None:
        return self._source.length

    @property
    def failures(self) -> list[Failure]:
        return self._source.failures

    def __enter__(self: _Type) -> _Type:
        self._source.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._source.__exit__(kind, error, traceback)

    def __iter__(self) -> Iterator[SourceFrame]:
        return iter(self._source)

    def interrupt(self) -> bool:
        return isinstance(self._source, Interruptible) and self._source.interrupt()

    def skip_to(self, start: float) -> None:
        """See ``Skippable``."""
        if isinstance(self._source, Skippable):
            self._source.skip_to(start)

    def narrow(self, wanted: Collection[Path]) -> None:
        """See ``Narrowable``."""
        if isinstance(self._source, Narrowable):
            self._source.narrow(wanted)

    @property
    def waiting(self) -> bool:
        return self._live.waiting

    @property
    def finished(self) -> bool:
        return self._live.finished

    @property
    def skipped(self) -> int:
        return self._live.skipped

    @property
    def reconnects(self) -> int:
        return self._live.reconnects

    def poll(self) -> SourceFrame | None:
        return self._live.poll()

    def listen(self, call: Callable[[], None]) -> None:
        self._live.listen(call)

    def stop(self) -> None:
        self._live.stop()


_Type = TypeVar("_Type", bound=PassedOn)
