"""What pyproject.toml cannot say: the description for an index, where the README's relative links lead nowhere.

Where pyproject.toml names the repository (``Source`` in ``[project.urls]``), links and pictures become addresses in it,
at this version's tag. Until it does, pictures are left out and links are their text.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from setuptools import setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?![a-z]+:|#)(?P<target>[^)\s]+)\)")


def description(readme: str, source: str | None, tag: str) -> str:
    """The README with its relative links as addresses in the repository, or without links where there is none."""

    def link(found: re.Match[str]) -> str:
        picture, text, target = found["picture"], found["text"], found["target"]
        if source is None:
            return "" if picture else text
        return f"{picture}[{text}]({source}/{'raw' if picture else 'blob'}/{tag}/{target})"

    return _LINK.sub(link, readme)


if __name__ == "__main__":
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.search(r'__version__ = "(.+)"', (HERE / "espmedsam_edge" / "version.py").read_text(encoding="utf-8"))
    assert found is not None
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=description(readme, project.get("urls", {}).get("Source"), f"v{found[1]}"),
        long_description_content_type="text/markdown",
    )
