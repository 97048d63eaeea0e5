"""Hooks of the site (mkdocs.yml): pages outside docs/ join it, and links between them go where the site has them.

Pages are written for the repository, where README.md links to docs/quickstart.md and docs/ to ../benchmarks/. On the
site docs/ is the root, and whatever a page links to lies beside it: pages as pages, everything else as a file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DECISIONS = "decisions/README.md"
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")
_IN_REPOSITORY: dict[str, str] = {}
"""A page of the site -> the file it is in the repository."""


def on_files(files: Files, config: Any) -> Files:
    """Add what pages outside docs/ there are to read, and what any page links to."""
    waiting = ["README.md"]
    for file in files.documentation_pages():
        _IN_REPOSITORY[file.src_uri] = f"docs/{file.src_uri}"
        waiting += _linked(f"docs/{file.src_uri}")
    while waiting:
        path = waiting.pop()
        if path.startswith("docs/") or path in _IN_REPOSITORY.values() or not (ROOT / path).is_file():
            continue
        _IN_REPOSITORY[path] = path
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += _linked(path)
    decisions = sorted(uri for uri in _IN_REPOSITORY if uri.startswith("decisions/"))
    lines = [f"- [{_title(f'docs/{uri}')}]({posixpath.basename(uri)})" for uri in decisions]
    files.append(File.generated(config, DECISIONS, content="# Decisions\n\n" + "\n".join(lines) + "\n"))
    _IN_REPOSITORY[DECISIONS] = f"docs/{DECISIONS}"
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn a page's links into the site's."""
    here = page.file.src_uri
    source = _IN_REPOSITORY[here]

    def link(found: re.Match[str]) -> str:
        target = _target(source, found[2])
        if target == "docs/decisions":
            target = f"docs/{DECISIONS}"
        return found[1] + posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(here) or ".")

    return _LINK.sub(link, markdown)


def _linked(path: str) -> list[str]:
    return [_target(path, found[2]) for found in _LINK.finditer((ROOT / path).read_text(encoding="utf-8"))]


def _target(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _title(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
