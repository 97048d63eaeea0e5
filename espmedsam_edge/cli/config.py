"""``--config FILE.toml``: a command's options from a file; what the command line says wins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import typer

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.files import read_regular, read_toml

_MAX_BYTES = 1 << 20
_NAME = re.compile(r"[a-z][a-z_-]{0,30}")  # what else stands as a name may be a value that went astray


def _take(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's values the command's defaults.

    Raises:
        UserError: the file cannot be read or is not TOML, has a key that is no option or a value that it refuses.
    """
    if path is None or context.resilient_parsing:
        return path
    options = {_key(parameter): parameter for parameter in context.command.params if parameter.name != "config"}
    defaults = {}
    for key, value in _read(path).items():
        if key not in options:
            named = f"no option '{key}'" if _NAME.fullmatch(key) else "no option of one of the names in it"
            raise UserError(f"{path}: there is {named}.", nearest(key, options))
        try:
            _check(context, options[key], value)
        except ValueError as error:
            raise UserError(f"{path}: {key}: {error}") from None
        except typer.BadParameter as error:
            fault = error.message.removeprefix("Value error, ")
            if _quotes(fault, value):
                fault = _wanted(options[key])
            raise UserError(f"{path}: {key}: {fault}") from None
        defaults[options[key].name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


CONFIG = typer.Option(
    None,
    "--config",
    is_eager=True,
    callback=_take,
    help="A TOML file of these options by their names, such as max-latency = 0.5; the command line wins.",
)


def _quotes(text: str, value: object) -> bool:
    """Whether a text has a part of a value: it may be a password that went to the wrong line, and is never shown."""
    words = [str(item) for item in (value if isinstance(value, list) else [value])]
    return any(word[start : start + 3] in text for word in words for start in range(max(1, len(word) - 2)))


def _wanted(parameter: Any) -> str:
    """What an option takes, in the words of its type."""
    wanted = parameter.type_descriptor.annotation
    choices = [f"'{choice}'" for choice in get_args(wanted)]
    kind = {int: "a whole number", float: "a number"}.get(wanted, "something else")
    return f"it takes one of {', '.join(choices)}." if choices else f"it takes {kind}: see --help."


def _key(parameter: Any) -> str:
    """What a parameter is called in a file: its option's long name; ``arguments`` are what stands without one."""
    if parameter.param_type_name == "argument":
        return str(parameter.name)
    return str(max(parameter.opts, key=len)).lstrip("-")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_toml(read_regular(path, _MAX_BYTES))
    except ValueError as error:  # of UTF-8 and of numbers, too
        raise UserError(f"{path} is not TOML: {error}.", "A line is an option and its value: threads = 2") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.", "Check the name of --config.") from error


def _check(context: typer.Context, parameter: Any, value: object) -> None:
    """See that an option takes a value of TOML's, which has types where the command line has words.

    Raises:
        ValueError: the value is of another kind.
        typer.BadParameter: it is none of the option's.
    """
    several = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    if several != isinstance(value, list):
        raise ValueError('it takes a list: ["a", "b"]' if several else "it takes one value.")
    flag = bool(getattr(parameter, "is_flag", False))
    for item in value if isinstance(value, list) else [value]:
        if flag != isinstance(item, bool) or not isinstance(item, str | int | float):
            raise ValueError("it takes true or false." if flag else "it takes a text or a number.")
        if "\0" in str(item):  # which no command line can hold, nor the name of a file
            raise ValueError("it takes no text with a character of value 0.")
    parameter.process_value(context, value)
