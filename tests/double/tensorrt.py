"""A recording double of TensorRT's Python API, cut to what one published release really has.

Whatever is called or set is recorded, and a name that the release does not have raises AttributeError, so a test sees
both the exact calls and any call that would fail. ``TENSORRT_DOUBLE`` in the environment chooses release and behaviour
as JSON: ``release``, ``errors`` (of the parser: [node, name, operator, reason]), ``build_log`` (with it the build
fails), ``dla`` (cores), ``inspector`` (the engine's JSON), ``record`` (a file that gets one JSON line a call),
``crash`` (a signal that ends the process in the build), ``dtype``, and ``logits`` (all of them; without it an engine
computes what ONNX Runtime makes of the graph that it was built from).
"""

import enum
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import tensorrt_surface

SETTINGS = json.loads(os.environ.get("TENSORRT_DOUBLE", "{}"))
RELEASE = SETTINGS.get("release", "10.3.0")
SURFACE = tensorrt_surface.surface(RELEASE)
__version__ = RELEASE
CALLS = []  # what was called, in order: ["Class.member", argument...]


def _record(what, *arguments):
    shown = [a if isinstance(a, (int, float, str, bool, type(None))) else type(a).__name__ for a in arguments]
    shown = [a.name if isinstance(a, enum.IntEnum) else s for a, s in zip(arguments, shown, strict=True)]
    CALLS.append([what, *shown])
    if "record" in SETTINGS:
        with open(SETTINGS["record"], "a") as stream:
            stream.write(json.dumps(CALLS[-1]) + "\n")


def _enumeration(name):
    return enum.IntEnum(name, SURFACE["enumerations"][name])


BuilderFlag = _enumeration("BuilderFlag")
DataType = _enumeration("DataType")
DeviceType = _enumeration("DeviceType")
LayerInformationFormat = _enumeration("LayerInformationFormat")
LayerType = _enumeration("LayerType")
MemoryPoolType = _enumeration("MemoryPoolType")
NetworkDefinitionCreationFlag = _enumeration("NetworkDefinitionCreationFlag")
ProfilingVerbosity = _enumeration("ProfilingVerbosity")
TensorIOMode = _enumeration("TensorIOMode")


class _Cut:
    """Base of all: a member that the release lacks is not there, and everything else is recorded."""

    def _allowed(self, name):
        return any(name in SURFACE["classes"].get(kind.__name__, {}) for kind in type(self).__mro__)

    def __getattribute__(self, name):
        value = object.__getattribute__(self, name)
        if name.startswith("_"):
            return value
        kind = object.__getattribute__(self, "__class__").__name__
        if not object.__getattribute__(self, "_allowed")(name):
            raise AttributeError(f"TensorRT {RELEASE} has no {kind}.{name}")
        if not callable(value):
            return value

        def recorded(*arguments, **keywords):
            assert not keywords, "positional arguments only, so that records can be compared"
            _record(f"{kind}.{name}", *arguments)
            return value(*arguments)

        return recorded

    def __setattr__(self, name, value):
        if not name.startswith("_"):
            if not self._allowed(name):
                raise AttributeError(f"TensorRT {RELEASE} has no {type(self).__name__}.{name}")
            _record(f"{type(self).__name__}.{name} =", value)
        object.__setattr__(self, name, value)


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self):
        self._initialised = True


class IProgressMonitor:
    def __init__(self):
        self._initialised = True


class ITensor(_Cut):
    def __init__(self, name, dtype, shape):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", shape)


class ILayer(_Cut):
    def __init__(self, kind, name, inputs, outputs, **more):
        for key, value in {"type": kind, "name": name, "_inputs": inputs, "_outputs": outputs, **more}.items():
            object.__setattr__(self, key, value)

    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_input(self, index):
        return self._inputs[index]

    def get_output(self, index):
        return self._outputs[index]


class IConvolutionLayer(ILayer):
    pass


class IDeconvolutionLayer(ILayer):
    pass


class INetworkDefinition(_Cut):
    def __init__(self, flags):
        self._flags = flags
        self._layers, self._inputs, self._outputs = [], [], []

    num_layers = property(lambda self: len(self._layers))
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_layer(self, index):
        return self._layers[index]

    def get_input(self, index):
        return self._inputs[index]

    def get_output(self, index):
        return self._outputs[index]

    def _fill(self, dtype):
        """image -> cast -> 4x4 convolution (3 to 1 channels, stride 4) -> cast -> logits, as in the toy bundle."""
        image, logits = (
            ITensor("image", DataType.FLOAT, (1, 3, 64, 64)),
            ITensor("logits", DataType.FLOAT, (1, 1, 16, 16)),
        )
        inner, out = ITensor("inner", dtype, (1, 3, 64, 64)), ITensor("out", dtype, (1, 1, 16, 16))
        self._layers = [
            ILayer(LayerType.CAST, "first", [image], [inner]),
            ILayer(LayerType.CONVOLUTION, "conv", [inner], [out], kernel_size_nd=(4, 4), num_groups=1),
            ILayer(LayerType.CAST, "last", [out], [logits]),
        ]
        self._inputs, self._outputs = [image], [logits]


class ParserError(_Cut):
    def __init__(self, node, name, operator, reason):
        self._values = node, name, operator, reason

    def node(self):
        return self._values[0]

    def node_name(self):
        return self._values[1]

    def node_operator(self):
        return self._values[2]

    def desc(self):
        return self._values[3]


class OnnxParser(_Cut):
    def __init__(self, network, logger):
        assert logger._initialised
        _record("OnnxParser", network, logger)
        self._network, self._logger, self._found = network, logger, []

    num_errors = property(lambda self: len(self._found))

    def parse(self, model, path=None):
        assert isinstance(model, bytes)
        self._network._path = path
        errors = SETTINGS.get("errors", [])
        self._found = errors[:1]  # a parser that stops at the first error
        if not errors:
            self._network._fill(DataType[SETTINGS.get("dtype", "HALF" if "fp16" in path else "FLOAT")])
        return not errors

    def supports_model_v2(self, model, path=None):
        self._found = SETTINGS.get("errors", [])
        return not self._found

    def get_error(self, index):
        return ParserError(*self._found[index])


class ITimingCache(_Cut):
    def __init__(self, content):
        self._content = content

    def serialize(self):
        return b"timings of " + RELEASE.encode()


class IBuilderConfig(_Cut):
    progress_monitor = profiling_verbosity = default_device_type = DLA_core = None

    def set_flag(self, flag):
        pass

    def clear_flag(self, flag):
        pass

    def set_memory_pool_limit(self, pool, size):
        pass

    def create_timing_cache(self, serialized_timing_cache):
        object.__setattr__(self, "_timing", ITimingCache(serialized_timing_cache))
        return self._timing

    def set_timing_cache(self, cache, ignore_mismatch):
        return cache._content in (b"", b"timings of " + RELEASE.encode())

    def get_timing_cache(self):
        return self._timing

    def can_run_on_DLA(self, layer):
        return layer.type == LayerType.CONVOLUTION


class IHostMemory(bytes):
    nbytes = property(len)


class Builder(_Cut):
    def __init__(self, logger):
        assert logger._initialised
        _record("Builder", logger)
        self._logger = logger

    num_DLA_cores = property(lambda self: SETTINGS.get("dla", 0))

    def create_network(self, flags=0):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        assert monitor._initialised
        monitor.phase_start("Building Engine", None, 2)
        monitor.step_complete("Building Engine", 0)
        time.sleep(SETTINGS.get("seconds", 0))
        if "crash" in SETTINGS:
            os.write(2, b"corrupted size vs. prev_size\n")
            os.kill(os.getpid(), SETTINGS["crash"])
        monitor.phase_finish("Building Engine")
        if "build_log" in SETTINGS:
            for line in SETTINGS["build_log"]:
                self._logger.log(ILogger.Severity.ERROR, line)
            return None
        plan = json.dumps([RELEASE, network._outputs[0].name]) * 100
        return IHostMemory(f"{plan}\n{network._path}".encode())


class EngineInspector(_Cut):
    def get_engine_information(self, format):
        return SETTINGS.get("inspector", '{"Layers": ["conv"]}')


class IExecutionContext(_Cut):
    def __init__(self, path):
        self._path, self._addresses, self._session = path, {}, None

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return memory > 0

    def execute_async_v3(self, stream_handle):
        if "logits" in SETTINGS or os.path.isfile(self._path):
            self._compute(stream_handle)
        return stream_handle > 0

    def _compute(self, stream_handle):
        """At once, rather than when the stream comes to it; through the driver, which may be a real GPU's."""
        import numpy as np
        import onnxruntime

        from espmedsam_edge.runtime.cuda.driver import cuda_driver

        driver = cuda_driver()
        stream = driver.handle("CUstream", stream_handle)
        image, logits = (np.empty(shape, np.float32) for _, shape in ICudaEngine._tensors)
        if "logits" in SETTINGS:
            logits[:] = SETTINGS["logits"]
        else:
            driver.call("cuMemcpyDtoHAsync", image.ctypes.data, self._addresses["image"], image.nbytes, stream)
            driver.call("cuStreamSynchronize", stream)
            if self._session is None:
                self._session = onnxruntime.InferenceSession(self._path, providers=["CPUExecutionProvider"])
            logits[:] = self._session.run(None, {"image": image})[0]
        driver.call("cuMemcpyHtoDAsync", self._addresses["logits"], logits.ctypes.data, logits.nbytes, stream)
        driver.call("cuStreamSynchronize", stream)


class ICudaEngine(_Cut):
    def __init__(self, path=""):
        self._path = path

    _tensors = (("image", (1, 3, 64, 64)), ("logits", (1, 1, 16, 16)))
    num_io_tensors = property(lambda self: 2)

    def get_tensor_name(self, index):
        return self._tensors[index][0]

    def get_tensor_dtype(self, name):
        return DataType[SETTINGS.get("engine_dtype", "FLOAT")]

    def get_tensor_shape(self, name):
        return dict(self._tensors)[name]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name == "image" else TensorIOMode.OUTPUT

    def create_engine_inspector(self):
        return EngineInspector()

    def create_execution_context(self):
        return IExecutionContext(self._path)


class Runtime(_Cut):
    def __init__(self, logger):
        assert logger._initialised
        _record("Runtime", logger)

    def deserialize_cuda_engine(self, serialized_engine):
        return ICudaEngine(bytes(serialized_engine).rpartition(b"\n")[2].decode("utf-8", "replace"))
