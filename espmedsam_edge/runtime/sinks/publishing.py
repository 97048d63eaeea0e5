"""Where lines of results are sent as they come, by an address: ``mqtt://HOST/TOPIC``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.runtime.sinks.measurements import LineForm
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.source import Failure
from espmedsam_edge.runtime.sources.uris import Scheme

_MQTT = "espmedsam_edge.runtime.sinks.mqtt:open_mqtt"
PUBLISHERS: dict[str, Scheme] = {
    "mqtt": Scheme(_MQTT, "mqtt://HOST/TOPIC", network=True),
    "mqtts": Scheme(_MQTT, "mqtts://HOST/TOPIC", network=True),
}
"""By what stands before ``://``; openers are called with a ``Publication``. A new kind is a module and a line here."""


@dataclass(frozen=True)
class Publication:
    """What is published, and where.

    Attributes:
        address: as it was given; it may hold a user name.
        form: makes the line of JSON of a frame.
        failures: takes what could not be published, so that the rest of the run goes on.
    """

    address: str
    form: LineForm
    failures: list[Failure]


class Publisher(Sink, Protocol):
    """A sink with a name that holds no secret."""

    @property
    def name(self) -> str:
        """What messages call it."""


def open_publisher(publication: Publication) -> Publisher:
    """The sink for an address, not yet entered.

    Raises:
        UserError: no such kind, an address that will not do, or a missing package.
    """
    kind, separator, _ = publication.address.partition("://")
    if not separator or kind.lower() not in PUBLISHERS:
        shown = f"{kind}://..." if separator else "an address without ://"
        examples = ", ".join(scheme.example for scheme in PUBLISHERS.values())
        raise UserError(f"cannot publish to {shown}", f"{nearest(kind, PUBLISHERS)} For example {examples}")
    module, _, opener = PUBLISHERS[kind.lower()].opener.partition(":")
    made: Publisher = getattr(import_module(module), opener)(publication)
    return made
