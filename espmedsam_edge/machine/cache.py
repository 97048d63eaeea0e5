"""Where the program keeps what it can make again: engines, and bundles made from the weights it came with."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "ESPMEDSAM_CACHE"


def cache_place(cache: str | Path | None = None) -> Path:
    """``cache``, else $ESPMEDSAM_CACHE, else the user's cache folder."""
    chosen = cache or os.environ.get(CACHE_VARIABLE)
    base = Path(chosen) if chosen else platformdirs.user_cache_path("espmedsam-edge")
    return base.expanduser().absolute()
