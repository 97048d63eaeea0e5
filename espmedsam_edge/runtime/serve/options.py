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
        trusted_proxies: addresses or networks of proxies: whom they name as the client counts as that (X-Forwarded-For,
            X-Forwarded-Proto). Others than this machine reach the server by them, so it needs a token.
    """

    address: str
    token: str | None = None
    allowed_hosts: Sequence[str] = ()
    trusted_proxies: Sequence[str] = ()
