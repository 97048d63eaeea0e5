#!/usr/bin/env python3
"""Writes down the Python API of published TensorRT releases, which the tests' double of TensorRT is cut to.

    tools/tensorrt_surface.py tensorrt_cu12_bindings-10.3.0-cp311-none-manylinux_2_17_x86_64.whl ... \
        > tests/support/tensorrt_surfaces.json

Needs a C compiler, and the Python the wheels are for; no TensorRT library and no GPU: the bindings are imported against
libraries whose functions do nothing, which is enough to list classes, members, signatures and enumerations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CLASSES = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "OnnxParser", "ParserError", "Runtime", "ICudaEngine",
    "IExecutionContext", "EngineInspector", "ILayer", "IConvolutionLayer", "IDeconvolutionLayer", "ITensor",
    "IHostMemory", "ITimingCache", "ILogger", "IProgressMonitor",
)  # fmt: skip
ENUMERATIONS = (
    "BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType", "ProfilingVerbosity", "LayerInformationFormat",
    "DataType", "LayerType", "DeviceType", "TensorIOMode",
)  # fmt: skip
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL", "getPluginRegistry",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip

_LISTER = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("tensorrt", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

def signature(text):
    lines = [line.strip() for line in (text or "").splitlines() if "->" in line]
    return lines[0].removeprefix("1. ").replace("tensorrt.", "") if lines else ""

def members(kind):
    inherited = set(dir(kind.__bases__[0])) if kind.__bases__[0].__module__ == kind.__module__ else set()
    found = {{}}
    for name in sorted(set(dir(kind)) - inherited):
        value = getattr(kind, name)
        if name.startswith("_") or isinstance(value, type) or name.startswith("add_") and kind.__name__[0] == "I":
            continue
        if isinstance(value, property):
            found[name] = "property" + signature(value.fget.__doc__) + (" writable" if value.fset else "")
        elif callable(value):
            found[name] = signature(value.__doc__)
    return found

print(json.dumps({{
    "classes": {{name: members(getattr(module, name)) for name in {CLASSES!r}}},
    "enumerations": {{
        name: {{key: int(value) for key, value in getattr(module, name).__members__.items()}}
        for name in {ENUMERATIONS!r}
    }},
}}))
"""


def surface(wheel: Path) -> tuple[str, dict[str, object]]:
    """The release a wheel of TensorRT's bindings is of, and its API."""
    version = wheel.name.split("-")[1]
    major = version.split(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "nothing.c")
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
            name = f"lib{library}.so.{major}"
            subprocess.run(
                ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", f"{folder}/{name}", str(source)], check=True
            )
        with zipfile.ZipFile(wheel) as archive:
            bindings = archive.extract("tensorrt_bindings/tensorrt.so", folder)
        listed = subprocess.run(
            [sys.executable, "-c", _LISTER, bindings],
            env={**os.environ, "LD_LIBRARY_PATH": folder},
            check=True,
            capture_output=True,
        )
    return version, json.loads(listed.stdout)


if __name__ == "__main__":
    json.dump(dict(surface(Path(wheel)) for wheel in sys.argv[1:]), sys.stdout, indent=0, sort_keys=True)
    sys.stdout.write("\n")
