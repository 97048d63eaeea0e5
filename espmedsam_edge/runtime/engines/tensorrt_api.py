"""Finds and loads TensorRT or TensorRT-RTX, and does with it what this package needs: parse a graph, build a plan.

One code path serves TensorRT 10.3 (JetPack 6) to 11.x and TensorRT-RTX 1.x: what differs between them is found by
asking whether a name exists, never by comparing version numbers. A process loads one of the two, once: both export
the same C symbols, and a second one would be bound to the first one's functions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.machine.environment import jetson
from espmedsam_edge.machine.installation import install_command
from espmedsam_edge.machine.installation import installed as module_installed
from espmedsam_edge.runtime.engines.remedies import remedy

if TYPE_CHECKING:
    import tensorrt as trt

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")
TITLES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

# NVIDIA's bindings, which load the libraries of tensorrt-rtx-cu13-libs, and the name of its archive's own wheel.
RTX_MODULES = ("tensorrt_rtx_bindings", "tensorrt_rtx")

_loaded: TensorRT | None = None


@dataclass(frozen=True)
class TensorRT:
    """A loaded TensorRT: which of the two, its version, its Python module."""

    flavour: Flavour
    version: str
    module: Any

    @property
    def title(self) -> str:
        """Name and version for people: ``TensorRT-RTX 1.7.1.116``."""
        return f"{TITLES[self.flavour]} {self.version}"

    @property
    def builds_without_gpu(self) -> bool:
        """Whether a plan can be built for named GPU generations, which needs no GPU."""
        return bool(self.target_names())

    def target_names(self) -> list[str]:
        """The GPU generations a plan can be built for from any machine, such as ``sm86``; empty for TensorRT."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        return [name.lower() for name in members if name.startswith("SM")]

    def not_for(self, generation: str) -> str | None:
        """Why a plan does not load on a GPU generation (``sm90``), as a clause; None if it does, or nobody knows."""
        return not_for(self.target_names(), generation)


def not_for(targets: Sequence[str], generation: str) -> str | None:
    """See ``TensorRT.not_for``.

    TensorRT-RTX builds for any GPU, and refuses to load elsewhere than on the generations it names and later ones:
    1.7.1 says "Supported: 8.0 8.6 8.9 12.0 12.1 >12.0" on an H200 (SM 9.0).

    Args:
        targets: what ``target_names`` gives; empty for TensorRT, which is for each.
        generation: of the GPU.
    """
    known, asked = sorted(int(name[2:]) for name in targets), int(generation[2:])
    if not known or asked in known or asked > known[-1] // 10 * 10:
        return None
    names = ", ".join(f"{number // 10}.{number % 10}" for number in known)
    return f"it runs on SM {names} and later, and not on SM {asked // 10}.{asked % 10}"


@dataclass(frozen=True)
class Refusal:
    """One node that the parser refuses, or with ``node`` -1 the whole graph."""

    node: int
    name: str
    operator: str
    reason: str
    unknown_operator: bool = False

    def __str__(self) -> str:
        where = f"node {self.node} '{self.name}' ({self.operator})" if self.node >= 0 else "the graph"
        return f"{where}: {self.reason}"


@dataclass
class Log:
    """What TensorRT logged, kept so that an error can carry it: (severity name, text)."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    _LIMIT = 5000

    def add(self, severity: str, text: str) -> None:
        """Keep one line; past a limit the oldest informative ones go, errors and warnings stay."""
        self.lines.append((severity, text.strip()))
        if len(self.lines) > self._LIMIT:
            half = self.lines[: self._LIMIT // 2]
            self.lines[: self._LIMIT // 2] = [line for line in half if line[0] not in ("INFO", "VERBOSE")][-500:]

    def of(self, *severities: str) -> list[str]:
        """The texts logged with one of these severities, in order."""
        return [text for severity, text in self.lines if severity in severities]

    def errors(self) -> list[str]:
        """The texts of errors, in order."""
        return self.of("ERROR", "INTERNAL_ERROR")

    def text(self) -> str:
        """The whole log."""
        return "\n".join(f"[{severity}] {text}" for severity, text in self.lines)


@dataclass
class ParsedGraph:
    """A graph in TensorRT's hands. The builder, parser and logger must outlive the network."""

    api: TensorRT
    log: Log
    logger: trt.ILogger
    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser
    refusals: list[Refusal]


def installed(flavour: Flavour) -> bool:
    """Whether the flavour's Python module is there (it may still fail to load)."""
    return any(module_installed(name) for name in (("tensorrt",) if flavour == "tensorrt" else RTX_MODULES))


def load(flavour: str | None = None) -> TensorRT:
    """Load a flavour (None: TensorRT where it is installed, else TensorRT-RTX).

    Raises:
        UserError: not installed (with the command that installs it), its libraries do not load, or this process has
            already loaded the other one.
    """
    global _loaded
    if flavour is not None and flavour not in FLAVOURS:
        raise UserError(f"'{flavour}' does not build engines.", nearest(flavour, FLAVOURS))
    if flavour is None:
        flavour = _loaded.flavour if _loaded else next((name for name in FLAVOURS if installed(name)), None)
        if flavour is None:
            raise UserError("neither TensorRT nor TensorRT-RTX is installed.", how_to_install())
    if _loaded is not None:
        if _loaded.flavour != flavour:
            raise UserError(
                f"this process already runs {_loaded.title}; it cannot load {TITLES[flavour]} as well.",
                "Use one process for each.",
            )
        return _loaded
    _loaded = _load_tensorrt() if flavour == "tensorrt" else _load_rtx()
    return _loaded


def how_to_install(flavour: Flavour | None = None) -> str:
    """The command that brings a flavour (None: what fits this machine) to this machine, as one sentence."""
    if jetson() is not None:
        if flavour == "tensorrt-rtx":
            return "TensorRT-RTX does not run on a Jetson; use --backend tensorrt."
        return (
            "On a Jetson it comes with JetPack: sudo apt install tensorrt python3-libnvinfer, and make the virtual "
            "environment with --system-site-packages."
        )
    if flavour == "tensorrt":
        return f"Install it: {install_command('trt')}"
    if flavour == "tensorrt-rtx":
        return f"Install it: {install_command('rtx')}"
    return f"Install one: {install_command('rtx')} (also without a GPU), or {install_command('trt')}"


def _load_tensorrt() -> TensorRT:
    if not module_installed("tensorrt"):
        raise UserError("TensorRT is not installed.", how_to_install("tensorrt"))
    try:
        module = import_module("tensorrt")
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"TensorRT is installed but does not load: {error}.",
            "Its libraries and Python package must be of one version, for this machine's CUDA.",
            exit_code=1,
        ) from error
    if not hasattr(module, "Builder"):  # the lean runtime installs under other names; this is a broken install
        raise UserError("the package 'tensorrt' that is installed has no builder.", how_to_install("tensorrt"))
    return TensorRT("tensorrt", str(module.__version__), module)


def _load_rtx() -> TensorRT:
    name = next((name for name in RTX_MODULES if module_installed(name)), None)
    if name is None:
        raise UserError("TensorRT-RTX is not installed.", how_to_install("tensorrt-rtx"))
    try:
        module = import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"TensorRT-RTX is installed but does not load: {error}.",
            f"Its libraries and bindings must be of one version: {install_command('rtx')}",
            exit_code=1,
        ) from error
    return TensorRT("tensorrt-rtx", str(module.__version__), module)


def make_logger(api: TensorRT, log: Log) -> trt.ILogger:
    """A TensorRT logger that writes to ``log`` and nowhere else."""
    base: type[Any] = api.module.ILogger

    def initialise(self: Any) -> None:
        base.__init__(self)  # pybind11 wants its own constructor called, not through super()

    def keep(self: Any, severity: Any, text: str) -> None:
        log.add(str(getattr(severity, "name", severity)), text)

    return cast("trt.ILogger", type("Logger", (base,), {"__init__": initialise, "log": keep})())


def network_flags(api: TensorRT) -> int:
    """Creation flags of a strongly typed network: its flag's bit where the API still has one, else 0.

    Every TensorRT from 10 on has explicit batch alone. Where STRONGLY_TYPED is gone, nothing else exists.
    """
    flag = getattr(api.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def parse_graph(api: TensorRT, content: bytes, path: Path) -> ParsedGraph:
    """Parse an ONNX graph into a strongly typed network; what the parser refuses is in ``refusals``.

    Args:
        api: whose parser.
        content: the graph, whole: parsed from memory, so that it is what was checked.
        path: where it is from, which the parser would look beside for weights in other files.

    Raises:
        UserError: TensorRT could not even make a builder (a driver too old for it, most often).
    """
    log = Log()
    logger = make_logger(api, log)
    builder = cast("trt.Builder | None", api.module.Builder(logger))
    if builder is None:
        hint = remedy(" ".join(log.errors()), "Check the GPU driver.")
        raise UserError(f"{api.title} could not start: {_last(log)}.", hint, exit_code=1)
    network = builder.create_network(network_flags(api))
    parser = cast("trt.OnnxParser", api.module.OnnxParser(network, logger))
    refusals: list[Refusal] = []
    if not parser.parse(content, os.fspath(path)):
        refusals = _errors_of(parser)
        if hasattr(parser, "supports_model_v2"):
            # Parsers differ in whether they go on after the first refused node; this call always does.
            second = builder.create_network(network_flags(api))
            survey = cast("trt.OnnxParser", api.module.OnnxParser(second, logger))
            survey.supports_model_v2(content, os.fspath(path))
            refusals += [found for found in _errors_of(survey) if found.node not in {r.node for r in refusals}]
            del survey, second  # in this order: a parser must not outlive its network
        if not refusals:
            refusals = [Refusal(-1, "", "", _last(log))]
    elif network.num_layers == 0 or network.num_outputs == 0:
        refusals = [Refusal(-1, "", "", "it holds no layers or no outputs")]
    return ParsedGraph(api, log, logger, builder, network, parser, sorted(refusals, key=lambda r: r.node))


def _errors_of(parser: trt.OnnxParser) -> list[Refusal]:
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        operator, reason = error.node_operator() or "", " ".join((error.desc() or "").split())
        unknown = "Plugin not found" in reason
        if unknown:
            reason = f"this parser does not know the operator {operator}"
        elif reason in ("", "false"):  # the text of the parser's own assertion, which says nothing
            reason = f"this parser does not support {operator or 'it'}"
        found.append(Refusal(int(error.node()), error.node_name() or "", operator, reason, unknown))
    return found


def _last(log: Log) -> str:
    errors = log.errors()
    return errors[-1].rstrip(".") if errors else "it gave no reason"


def resolve_targets(api: TensorRT, targets: Sequence[str]) -> list[str]:
    """Targets as the API calls them (``sm86``), in order and without repeats; ``8.6``, ``86`` and ``SM86`` work too.

    Raises:
        UserError: a target this TensorRT cannot build for.
    """
    known = api.target_names()
    if targets and not known:
        raise UserError(
            f"{api.title} builds for the GPU it runs on; it takes no --target.",
            "Leave --target out and build on the device, or use --backend tensorrt-rtx.",
        )
    found = []
    for target in targets:
        name = "sm" + target.strip().lower().removeprefix("sm").lstrip("_").replace(".", "")
        if name not in known:
            raise UserError(f"{api.title} cannot build for '{target}'.", nearest(name, known))
        found.append(name)
    return list(dict.fromkeys(found))


def set_targets(api: TensorRT, config: trt.IBuilderConfig, targets: Sequence[str]) -> None:
    """Tell the builder which GPU generations the plan is for (``sm86``); with none, the GPU of this machine."""
    if not targets:
        return
    rtx_config = cast(Any, config)  # TensorRT's own configuration has no targets
    rtx_config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        if not rtx_config.set_compute_capability(getattr(api.module.ComputeCapability, name.upper()), index):
            raise UserError(f"{api.title} refused the target {name}.", "Choose other targets.", exit_code=1)


def refusal_error(path: Path, api: TensorRT, refusals: Sequence[Refusal]) -> UserError:
    """The one line that says why a graph cannot be built."""
    more = f" (and {len(refusals) - 1} more; build --check lists all)" if len(refusals) > 1 else ""
    hint = "Export the graph again with this version of espmedsam-edge."
    if any(refusal.unknown_operator for refusal in refusals):
        hint = "The graph is newer than this parser: update TensorRT, or export the graph again for an older one."
    return UserError(f"{api.title} refuses {path.name}: {refusals[0]}{more}.", hint, exit_code=1)
