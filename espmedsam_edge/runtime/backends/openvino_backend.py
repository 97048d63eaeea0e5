"""Runs a graph with OpenVINO on an Intel processor, GPU or NPU; on other x86 and ARM processors, too."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import BytesIO, FileIO
from typing import Any

import numpy as np

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.installation import install_command, why_missing
from espmedsam_edge.runtime.backends.backend import BackendUnavailable, check_batch, check_process
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec
from espmedsam_edge.runtime.backends.openvino_api import core as openvino_core
from espmedsam_edge.runtime.backends.openvino_api import load_openvino
from espmedsam_edge.runtime.engines.compiled_networks import CompiledNetworks, Compiler, read_hashed
from espmedsam_edge.runtime.onnx_session import Node, check_nodes

log = logging.getLogger(__name__)

_STREAMS = 4  # at most: each holds activations of its own

_FIRST_RESULT_SECONDS = 1.0

_SET_WHEN_LOADED = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT")

_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "graph": "dynamic"}
_ARITHMETICS = {type_name: arithmetic for arithmetic, type_name in _TYPES.items()}


def _installed() -> str:
    """The version that is installed, as its networks name it; empty without one."""
    if why_missing("openvino", "openvino") is not None:
        return ""
    try:
        return str(load_openvino().get_version())
    except (ImportError, OSError):
        return ""


COMPILER = Compiler(
    "openvino", "openvino", "OpenVINO", ".blob", "INFERENCE_PRECISION_HINT", _installed, outlived=("openvino",)
)
"""Whose networks are kept in the cache."""


def unavailable(name: str) -> str | None:
    """Why OpenVINO cannot run on this machine, or None; loads nothing."""
    return why_missing("openvino", "openvino")


def load(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> OpenVinoBackend:
    """Compile a graph, or take it compiled from the cache; see ``BackendModule.load``.

    Args:
        name: ``openvino``, which may name a device and an arithmetic; without them the processor and FP32.
        threads: of the processor.

    Raises:
        BackendUnavailable: no such device here, or it does not take the graph or the arithmetic.
        UserError: not the graph that the manifest describes.
    """
    spec = BackendSpec.parse(name)
    try:
        core = openvino_core()
    except (ImportError, OSError, RuntimeError) as error:  # of a wheel that lacks a library, or of another system
        raise BackendUnavailable(
            f"OpenVINO is installed and cannot be loaded: {_reason(error)}",
            f"Install it again: {install_command('openvino')}",
            exit_code=1,
        ) from error
    asked = (spec.device or "CPU").upper()
    refusals = []
    for device in _devices(core, asked):
        try:
            return _load_on(core, device, spec, bundle, graph, threads or usable_cores())
        except BackendUnavailable as error:
            refusals.append(error)
            if asked != "AUTO":
                break
            log.info("%s", error)
    raise refusals[0]


def _devices(core: Any, asked: str) -> list[str]:
    """The devices that are meant, best first.

    OpenVINO's own AUTO starts on the processor and changes to the GPU while it runs: masks of one run would differ, and
    it does not tell what it computes in. So that choice is made here, once, and never for an NPU: it has no FP32.
    """
    if asked == "CPU":  # always there; asking for all of them would load the plug-ins of the others, too
        return [asked]
    there = list(core.available_devices)
    if asked == "AUTO":
        return [*(name for name in there if name.partition(".")[0] == "GPU"), "CPU"]
    if asked in there or any(name.startswith(f"{asked}.") for name in there):
        return [asked]
    kind = asked.partition(".")[0]
    raise BackendUnavailable(
        f"OpenVINO finds no device {asked} here, only {', '.join(there) or 'none'}.",
        f"Install Intel's driver of the {kind}, or leave the device out." if kind in ("GPU", "NPU") else "",
        exit_code=1,
    )


def _load_on(core: Any, device: str, spec: BackendSpec, bundle: Bundle, graph: Graph, threads: int) -> OpenVinoBackend:
    wanted = spec.arithmetic or "fp32"
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _TYPES[wanted], "PERFORMANCE_HINT": "LATENCY"}
    on_processor, streams = device == "CPU", 1
    if on_processor:
        if spec.hint == "throughput":
            streams = min(threads, _STREAMS)  # a network on one core wastes less of it than one on all of them
            settings["PERFORMANCE_HINT"] = "THROUGHPUT"
        # Pinned threads of two processes would share cores while others idle.
        settings |= {"NUM_STREAMS": streams, "ENABLE_CPU_PINNING": False, "INFERENCE_NUM_THREADS": threads}
    compiled, keep = _found_or_compiled(core, device, settings, bundle, graph)
    inputs, outputs = [_node(port) for port in compiled.inputs], [_node(port) for port in compiled.outputs]
    check_nodes(inputs, outputs, graph, bundle.graph_path(graph))
    arithmetic = _arithmetic_of(compiled, device, wanted)
    parts = [device] if on_processor else [f"{device}, {core.get_property(device, 'FULL_DEVICE_NAME')}"]
    parts += [f"{threads} thread{'s' if threads > 1 else ''}"] if on_processor else []
    parts += ["arithmetic as the graph has it" if arithmetic == "graph" else f"{arithmetic} arithmetic"]
    parts += [f"{streams} frames at once"] if streams > 1 else []
    name = str(replace(spec, hint=""))
    return OpenVinoBackend(name, ", ".join(parts), graph, compiled, arithmetic, streams, keep)


def _found_or_compiled(
    core: Any, device: str, settings: dict[str, Any], bundle: Bundle, graph: Graph
) -> tuple[Any, Callable[[], None] | None]:
    """The graph compiled, and what puts it into the cache, if it is not there.

    The graph's file is read only where the cache has no network of it, which its SHA-256 stands for.
    """
    try:
        made_of = _made_of(core, device, settings, graph)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"OpenVINO's {device} does not start: {_reason(error)}",
            f"Install it again: {install_command('openvino')}",
            exit_code=1,
        ) from error
    kept = CompiledNetworks(COMPILER, f"{graph.modality} {graph.precision}", made_of)
    found = kept.find(_read_tensor)
    if found is not None:
        try:
            return _import(core, found, device, settings), None
        except RuntimeError as error:
            kept.refused(f"OpenVINO does not take it ({_reason(error)})")
    content = bundle.read_graph(graph)
    try:
        model = _read(content)
        compiled = core.compile_model(model, device, settings)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"OpenVINO does not take {bundle.graph_path(graph)} on {device}: {_reason(error)}",
            "Use --backend onnxruntime, or another --device.",
            exit_code=1,
        ) from error
    if "EXPORT_IMPORT" not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
        return compiled, None
    return compiled, partial(_keep, kept, compiled, model)  # freeing the model would hold the first result up, too


def _read_tensor(stream: FileIO) -> tuple[Any, str]:
    """A compiled network and its SHA-256, in memory of OpenVINO's own: what comes of it holds that, and copies none."""
    openvino = load_openvino()
    tensor = openvino.Tensor(openvino.Type.u8, openvino.Shape([os.fstat(stream.fileno()).st_size]))
    return tensor, read_hashed(stream, memoryview(tensor.data))


def _import(core: Any, network: Any, device: str, settings: dict[str, Any]) -> Any:
    try:
        return core.import_model(network, device, settings)
    except TypeError:  # up to 2025.3 it takes bytes alone
        return core.import_model(network.data.tobytes(), device, settings)


def _read(content: bytes) -> Any:
    """A graph for OpenVINO, by its reader of ONNX, which it would ask last, after loading those of other formats."""
    from openvino.frontend import FrontEndManager

    reader = FrontEndManager().load_by_framework("onnx")
    return reader.convert(reader.load(BytesIO(content)))


def _keep(kept: CompiledNetworks, compiled: Any, model: Any) -> None:
    try:
        content = compiled.export_model().getvalue()
    except RuntimeError as error:
        log.info("The network that OpenVINO compiled is not kept: %s", _reason(error))
    else:
        kept.keep(content)


def _made_of(core: Any, device: str, settings: dict[str, Any], graph: Graph) -> dict[str, str]:
    """What a compiled network depends on; threads, streams and what counts are set when it is loaded."""
    properties = [name for name in core.get_property(device, "SUPPORTED_PROPERTIES") if name.endswith("DRIVER_VERSION")]
    facts = {
        name: str(core.get_property(device, name))
        for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES", *properties)
    }
    chosen = {name: str(value) for name, value in settings.items() if name not in _SET_WHEN_LOADED}
    return {"graph": graph.sha256, "openvino": load_openvino().get_version(), "device": device, **facts, **chosen}


def _node(port: Any) -> Node:
    type_name = port.get_element_type().get_type_name()
    shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
    return port.get_any_name(), f"tensor({'float' if type_name == 'f32' else type_name})", shape


def _arithmetic_of(compiled: Any, device: str, wanted: str) -> str:
    """What the compiled network computes in, asked of itself.

    Raises:
        BackendUnavailable: less than the FP32 that was wanted.
    """
    type_name: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    found = _ARITHMETICS.get(type_name, type_name)
    if found != wanted:
        if wanted == "fp32":
            raise BackendUnavailable(
                f"OpenVINO's {device} computes in {found}, not in fp32.",
                f"Ask for it, if that is right for you: --arithmetic {found}",
                exit_code=1,
            )
        log.warning("OpenVINO's %s computes in %s here, not in %s.", device, found, wanted)
    return found


def _reason(error: Exception) -> str:
    """The line that says something, of a message that begins with places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = ("Exception from ", "Check '")
    said = [line for line in lines if not line.startswith(places)] or lines or [type(error).__name__]
    return said[0][:300]


class _Keeping:
    """Puts a compiled network into the cache in a thread of its own, which the process's end waits for.

    It begins with the second run, a second after the first or at the end: before, it would hold the first result up.
    """

    def __init__(self, keep: Callable[[], None]) -> None:
        self._keep, self._due = keep, threading.Event()
        self._thread = threading.Thread(target=self._work, name="espmedsam-keep")

    def ran(self) -> None:
        """A run has started."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._due.set()

    def end(self) -> None:
        """Keep it now, if that has not begun, and wait for it."""
        self._due.set()
        if self._thread.ident is None:
            self._keep()
        else:
            self._thread.join()

    def _work(self) -> None:
        self._due.wait(_FIRST_RESULT_SECONDS)
        self._keep()


class OpenVinoBackend:
    """A compiled network and the requests that run it, on NumPy memory in place; one or several frames at once."""

    def __init__(
        self,
        name: str,
        device: str,
        graph: Graph,
        compiled: Any,
        arithmetic: str,
        streams: int = 1,
        keep: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self.graph = graph
        self.arithmetic = arithmetic
        # Beside those that compute, one more: the frame before it becomes a mask, and the one after it the next input.
        self.in_flight = streams + 1
        self._process = os.getpid()
        self._keeping = None if keep is None else _Keeping(keep)
        self._idle = [compiled.create_infer_request() for _ in range(self.in_flight)]
        self._started: deque[_Run] = deque()

    def run(self, image: Tensor) -> Tensor:
        return self.start(image).logits()

    def start(self, image: Tensor) -> _Run:
        check_batch(self.graph, image)
        check_process(self._process, "OpenVINO")
        if not self._idle:
            self._started[0].wait()
        run = _Run(self, self._idle.pop(), image)
        self._started.append(run)
        if self._keeping is not None:
            self._keeping.ran()
        return run

    def _take_back(self, run: _Run, request: Any) -> None:
        self._started.remove(run)
        self._idle.append(request)

    def close(self) -> None:
        while self._started and os.getpid() == self._process:
            self._started[0].wait()
        if self._keeping is not None and os.getpid() == self._process:
            self._keeping.end()
            self._keeping = None
        self._idle.clear()


class _Run:
    """One run of the network under way; it reads and writes NumPy memory in place."""

    def __init__(self, backend: OpenVinoBackend, request: Any, image: Tensor) -> None:
        shared = load_openvino().Tensor
        self._backend, self._request, self._image = backend, request, image
        self._logits = np.empty(backend.graph.output_shape, np.float32)
        self._error: UserError | None = None
        request.set_input_tensor(shared(image, shared_memory=True))
        request.set_output_tensor(shared(self._logits, shared_memory=True))
        request.start_async()

    def wait(self) -> None:
        """Wait for the end, whatever it is; a second call does nothing."""
        request, self._request = self._request, None
        if request is None:
            return
        try:
            request.wait()
        except RuntimeError as error:
            graph = self._backend.graph
            self._error = UserError(
                f"openvino failed on the {graph.modality} {graph.precision} graph: {_reason(error)}",
                "If memory ran out, close other programs or export a smaller --image-size.",
                exit_code=1,
            )
        self._backend._take_back(self, request)

    def logits(self) -> Tensor:
        check_process(self._backend._process, "OpenVINO")
        self.wait()
        if self._error is not None:
            raise self._error
        return self._logits
