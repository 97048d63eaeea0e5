"""What the command line says of serving; needs no package of the extra ``serve``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ServeOptions:
    """Where and for whom to serve.

    Examples:
        >>> from espmedsam_edge import ServeOptions, infer
        >>> infer("retina.png", "fundus.bundle", serve=ServeOptions("127.0.0.1:0")).frames
        1

    Attributes:
        address: ``[HOST:]PORT``.
        token: what clients must show; None: see ``Server``.
        allowed_hosts: further names that the server may be called.
    """

    address: str
    token: str | None = None
    allowed_hosts: Sequence[str] = ()
