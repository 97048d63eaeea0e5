"""The commands of ``espmedsam-edge``: one module a command, typer, no logic of their own.

Only the module of the command that runs is imported, so ``--help`` is fast and a command whose extra is not installed
still shows up. A command's module defines ``command`` (a typer function) or ``app`` (a typer group).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import typer

from espmedsam_edge.cli.messages import QUIET, VERBOSE, Messages, talking
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.terminal import show_tracebacks_printable, tell
from espmedsam_edge.version import __version__

# command -> (module in this package, its line in the list of commands)
COMMANDS: dict[str, tuple[str, str]] = {
    "import": ("import_", "Convert published checkpoints into this project's format."),
    "train": ("train", "Train the teacher and the student: a recipe in, a checkpoint out."),
    "data": ("data", "Convert published data sets into dataset folders, and check such folders."),
    "evaluate": ("evaluate", "Score a checkpoint or a bundle on labelled images, beside the paper's figures."),
    "export": ("export", "Fuse a checkpoint's modalities and write them as a bundle of ONNX graphs."),
    "calibrate": ("calibrate", "Lower a graph to FP16 or INT8 within an accuracy budget."),
    "build": ("build", "Compile a bundle's graphs to engines for this machine."),
    "engines": ("engines", "Show, verify and clear the cache of engines."),
    "infer": ("infer", "Segment images, folders and videos with a bundle."),
    "batch": ("scale.batch", "Segment any number of files on the workers of a Ray cluster; masks and Parquet."),
    "slide": ("slide", "Segment whole slides: masks and outlines that QuPath opens."),
    "dicom": ("scale.dicom", "Take pictures from the DICOM network, segment them, send the segmentations on."),
    "bench": ("bench", "Measure latency and FPS of a bundle, stage by stage."),
    "deploy": ("scale.deploy", "Write bundles as what other servers serve: a model repository of Triton."),
    "push": ("push", "Put a bundle into a repository at Hugging Face."),
    "weights": ("weights", "List the weights that came with the program; write them as a bundle or checkpoint."),
    "doctor": ("doctor", "Show what this machine can run and what is missing."),
    "demo": ("demo", "Segment generated pictures and a clip, to see it work."),
}


def _version(show: bool) -> None:
    if show:
        tell(f"espmedsam-edge {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    verbose: bool = VERBOSE,
    quiet: bool = QUIET,
) -> None:
    """Promptless medical segmentation on a device: import or train, export, calibrate, build, infer, bench."""
    context.with_resource(Messages()).choose(verbose=verbose, quiet=quiet)


def _listed() -> None:
    """Stands in the list of commands for a command that is not the one to run."""


def build_app(name: str | None) -> typer.Typer:
    """The typer application: every command listed, only ``name`` imported."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_root)
    for command, (module_name, line) in COMMANDS.items():
        if command != name:
            app.command(command, help=line)(_listed)
            continue
        module = import_module(f"espmedsam_edge.cli.{module_name}")
        if hasattr(module, "app"):
            for below in module.app.registered_commands:
                below.callback = talking(below.callback)
            app.add_typer(module.app, name=command, help=line)
        else:
            app.command(command)(talking(module.command))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code: 0 all well, 1 some inputs failed, 2 wrong use."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    name = _completed_command() if _COMPLETE in os.environ else _command_of(args)
    _take_standard_files()
    show_tracebacks_printable()
    try:
        if name is not None and name not in COMMANDS:
            raise UserError(f"no command '{name}'.", nearest(name, COMMANDS))
        with _terminated_like_interrupted():
            code = build_app(name)(args=args, prog_name="espmedsam-edge", standalone_mode=False)
    except _USAGE_ERROR as error:  # click's own
        tell(_usage_line(error, name), err=True)
        sys.exit(2)
    except typer.Abort:
        tell("Aborted!", err=True)
        sys.exit(1)
    except KeyboardInterrupt:  # while the command was loaded; later it is an Abort, or the command's own
        tell("Aborted!", err=True)
        sys.exit(130)
    except UserError as error:
        cause = error.__cause__  # a package that found no memory is not missing, nor a server away
        told = _fault_of_the_machine(cause, name) if isinstance(cause, Exception) and _is_memory(cause) else None
        line, code = told or (f"error: {error}", error.exit_code)
        tell(line, err=True)
        sys.exit(code)
    except Exception as error:
        told = None if os.environ.get("ESPMEDSAM_DEBUG") else _fault_of_the_machine(error, name)
        if told is None:
            raise
        line, code = told
        tell(line, err=True)
        sys.exit(code)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_line(error: Any, command: str | None) -> str:
    """What click says of wrong options and arguments, as a line like that of a UserError; of a group alone its help."""
    fault = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(fault)
    fault = fault.replace(": Value error, ", ": ").rstrip(".")  # the prefix is pydantic's
    path = error.ctx.command_path if error.ctx is not None else " ".join(filter(None, ("espmedsam-edge", command)))
    return f"error: {UserError(f'{fault}.', f'See: {path} --help')}"


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: stages stopped, unfinished files and folders removed."""

    def interrupt(number: int, stack_frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, as when a program calls ``main``
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _take_standard_files() -> None:
    """Put /dev/null where standard input, output or error is closed (``<&-``).

    Else the first files to be opened, a user's results, would take their numbers, and libraries would print into them.
    What is written to a closed standard output is still an error.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115


def _fault_of_the_machine(error: Exception, command: str | None) -> tuple[str, int] | None:
    """The line and the exit code for what is no fault of the program; None for what is."""
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return "error: no more threads can be started here. Raise the limits: ulimit -v, ulimit -u", 1
    if _is_memory(error):
        return "error: memory ran out. Close other programs, or choose a smaller --image-size or picture.", 1
    if isinstance(error, OSError):
        if error.errno == errno.ENOENT and _is_nowhere():
            return "error: the current folder is gone. Go to another one, and repeat the command there.", 2
        if error.errno not in _OF_PLACES:
            return None
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        line = f"error: {place}{error.strerror}. Check the name, its permissions and the disk."
        return line, 2 if error.errno == errno.ENAMETOOLONG else 1
    if isinstance(error, ImportError):
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):  # as numpy says an interrupt
            return "Aborted!", 130
        extra = _EXTRA_OF.get((error.name or "").split(".")[0]) if isinstance(error, ModuleNotFoundError) else None
        if extra is not None:
            from espmedsam_edge.machine.installation import install_command

            return f"error: '{command}' needs the package {error.name}. Install it: {install_command(extra)}", 2
    return None


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out, also by libraries that know no MemoryError: the loader, ONNX Runtime, OpenCV."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _is_nowhere() -> bool:
    """Whether the current folder was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _command_of(args: Sequence[str]) -> str | None:
    """The command's name, which --verbose and --quiet may stand before."""
    first = next((word for word in args if word not in _TALKING), "-")
    return None if first.startswith("-") else first


def _completed_command() -> str | None:
    """The command whose words a shell wants completed, if it is written already."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")  # bash's, other shells'
    name = _command_of(line.split()[1:])
    return name if name in COMMANDS else None


_COMPLETE = "_ESPMEDSAM_EDGE_COMPLETE"  # set by the script that --show-completion prints
_TALKING = ("--verbose", "-v", "--quiet", "-q")
_USAGE_ERROR: Any = typer.BadParameter.__base__

_OUT_OF_MEMORY = ("failed to map segment", "cannot allocate memory", "bad_alloc", "insufficient memory")

# What a name that a user gave, or the disk that it is on, may be wrong with anywhere; others are faults of the program.
_OF_PLACES = {
    errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE,
    errno.ENOTDIR, errno.EMFILE, errno.ENFILE,
}  # fmt: skip

_EXTRA_OF = {
    "torch": "export", "timm": "export", "onnx": "export", "onnxscript": "export", "onnxsim": "export",
    "safetensors": "export", "torchvision": "train", "segment_anything": "train", "lightning_fabric": "train",
    "tensorboard": "train",
    "monai": "train", "PIL": "train", "modelopt": "calibrate", "av": "video", "pydicom": "dicom", "highdicom": "dicom",
    "ray": "ray", "pyarrow": "ray", "pynetdicom": "dicom-network", "dicomweb_client": "dicom-network",
    "matplotlib": "bench", "psutil": "bench",
    "starlette": "serve", "uvicorn": "serve", "anyio": "serve", "websockets": "serve", "wsproto": "serve",
    "prometheus_client": "serve", "huggingface_hub": "hub", "tifffile": "slide",
}  # fmt: skip
