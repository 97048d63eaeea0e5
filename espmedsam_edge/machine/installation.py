"""How this package is installed: what is there beside it, what adds an extra, how to call the program."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


def checkout() -> Path | None:
    """The source checkout this package runs from, or None when it was installed as a wheel."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def install_command(extra: str) -> str:
    """The command that adds one of this package's extras to the Python that is running."""
    source = checkout()
    what = f"-e '{source}[{extra}]'" if source else f"'espmedsam-edge[{extra}]'"
    return f"{sys.executable} -m pip install {what}"


def program_command() -> str:
    """How to call this program from the shell: its name where PATH leads to it, else the file beside this Python."""
    name = "espmedsam-edge"
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not beside.exists() else near(beside)


def near(path: Path) -> str:
    """A path as seen from the working directory, where it lies under it."""
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here


def why_missing(module: str, extra: str) -> str | None:
    """Why a module cannot be used, with what installs it, or None where it is there."""
    return None if installed(module) else f"{module} is not installed. Install it: {install_command(extra)}"


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it (its parents are imported).

    A folder that some other package left under that name is a namespace without a file, and does not count.
    """
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None
