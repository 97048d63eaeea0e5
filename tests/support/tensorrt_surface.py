"""The published API of TensorRT releases (``tensorrt_surfaces.json``): the double is cut to it; type stubs of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "tensorrt_surfaces.json"
RELEASES = ("10.3.0", "10.16.1.11", "11.4.0.106")

# What the bindings' signatures call things -> what a stub may
_TYPES = {"buffer": "Any", "typing_extensions.Buffer": "Any", "Buffer": "Any", "capsule": "Any", "Dims": "Dims"}
_HEAD = """\
from typing import Any, ClassVar, SupportsInt

class Dims:
    def __getitem__(self, index: int) -> int: ...
    def __len__(self) -> int: ...

"""


def surface(release: str) -> dict[str, Any]:
    """``{"classes": {class: {member: signature}}, "enumerations": {name: {member: value}}}``."""
    found: dict[str, Any] = json.loads(FILE.read_text())[release]
    return found


def stub(release: str) -> str:
    """The text of a ``tensorrt/__init__.pyi`` with exactly the members of the release's classes and enumerations."""
    api = surface(release)
    known = {*api["classes"], *api["enumerations"]}
    lines = [_HEAD]
    for name, members in api["enumerations"].items():
        lines += [f"class {name}:", "    name: str", "    value: int", f"    __members__: ClassVar[dict[str, {name}]]",
                  "    def __int__(self) -> int: ..."]  # fmt: skip
        lines += [f"    {member}: ClassVar[{name}]" for member in members] + [""]
    for name, members in api["classes"].items():
        base = "(ILayer)" if name in ("IConvolutionLayer", "IDeconvolutionLayer") else ""
        lines += [f"class {name}{base}:", "    def __init__(self, *args: Any) -> None: ..."]
        lines += [f"    {line}" for member, text in members.items() for line in _member(member, text, known)] + [""]
    return "\n".join(lines)


def _member(name: str, text: str, known: set[str]) -> list[str]:
    result = _type(text.rpartition("->")[2].replace(" writable", "").strip(), known) if "->" in text else "Any"
    if text.startswith("property"):
        if text.endswith("writable"):
            return [f"{name}: {result}"]
        return ["@property", f"def {name}(self) -> {result}: ..."]
    inside = re.search(r"\((.*)\)\s*->", text)
    if inside is None:
        return [f"def {name}(self, *args: Any, **kwargs: Any) -> {result}: ..."]
    parameters = ["self"]
    for part in inside[1].split(", ")[1:]:
        key, _, rest = part.partition(": ")
        kind, _, default = rest.partition(" = ")
        kind = _type(kind, known) + (" | None" if default == "None" else "")
        parameters.append(f"{key}: {kind}" + (" = ..." if default else ""))
    return [f"def {name}({', '.join(parameters)}) -> {result}: ..."]


def _type(text: str, known: set[str]) -> str:
    text = text.removeprefix("typing.")
    if text in _TYPES:
        return _TYPES[text]
    return text if text in known or text in ("int", "str", "bool", "float", "None", "bytes", "SupportsInt") else "Any"
