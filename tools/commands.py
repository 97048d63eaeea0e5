"""Write docs/commands.md, the reference of the commands, from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from espmedsam_edge.cli import COMMANDS, build_app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
EVERYWHERE = ("verbose", "quiet")
_HEAD = """\
# Commands

Made by `tools/commands.py` from the program itself; each command's `--help` shows the same.

## Exit codes

| code | meaning |
|---|---|
| 0 | all is well |
| 1 | some inputs failed and are named on standard error, the rest is done; or the machine failed (memory, disk, GPU) |
| 2 | wrong use: one line on standard error says what to change; nothing was written |
| 130 | `infer` was interrupted before files were finished: what live sources gave was kept, unfinished files removed |

Every command takes `--verbose` (`-v`), `--quiet` (`-q`) and `--help`; `espmedsam-edge --version` shows the version.
Results go to standard output, everything else to standard error. `ESPMEDSAM_DEBUG=1` shows where an error came from.

## Options from a file

`espmedsam-edge infer --config run.toml` takes options by their names, without dashes before them. What the command line
or the environment says wins. Paths start where the program starts, not where the file lies; `arguments` are the words
without an option, bundle and sources:

```toml
arguments = ["colonoscopy.bundle", "rtsp://192.168.1.20/stream"]
out = "recording.mkv"
max-latency = 0.5
serve = 8080
overwrite = false
allow-host = ["theatre-3.example"]
```

An option that does not exist is refused, with the nearest one that does.

## Completion

`espmedsam-edge --install-completion` teaches your shell (bash, zsh, fish) to complete commands and options;
`--show-completion` prints what it would install.

"""


def page() -> str:
    """The page's text. The words are the program's own; how typer lays a help text out differs between its versions."""
    return _HEAD + "\n".join(line for name in COMMANDS for line in _lines(f"espmedsam-edge {name}", _command(name), 2))


def _command(name: str) -> Any:
    group: Any = typer.main.get_command(build_app(name))
    return group.commands[name]


def _lines(name: str, command: Any, level: int) -> Iterator[str]:
    below = getattr(command, "commands", {})
    yield f"{'#' * level} `{name}`\n\n{inspect.cleandoc(command.help)}\n"
    for parameter in () if below else command.params:
        if parameter.name not in EVERYWHERE:
            yield f"- `{_spelt(parameter)}`: {parameter.help}{_default(parameter)}"
    if not below:
        yield ""
    for part, inner in below.items():
        yield from _lines(f"{name} {part}", inner, level + 1)


def _spelt(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper() + ("..." if parameter.nargs == -1 else ""))
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or 'VALUE'}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return " [required]"
    shown = parameter.default if not getattr(parameter, "is_flag", False) else None
    return "" if shown in (None, (), []) else f" [default: {shown}]"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
