"""ONNX Runtime with TensorRT-RTX as a plugin, in a process of its own: a second way from a graph to its logits.

    python tests/support/plugin_provider.py GRAPH.onnx IMAGE.npy LOGITS.npy [--library PROVIDER.so] [--provider NAME]

Ends with 3 where the provider offers no device of this machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
PROVIDER = "NvTensorRTRTXExecutionProvider"
LIBRARY = "libonnxruntime_providers_nv_tensorrt_rtx.so"
NO_DEVICE = 3


def package_folder() -> Path | None:
    """Where the plugin is installed. Its package is not imported: that would write links beside its files."""
    spec = find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places and (Path(places[0]) / LIBRARY).is_file() else None


def link_libraries(package: Path, folder: Path) -> None:
    """The names by which the plugin looks for the libraries that come with it: libx.so and libx.so.1 of libx.so.1.7.

    What the package's own import has written beside them (links, or short texts where links should be) is left out.
    """
    folder.mkdir()
    for file in sorted(package.glob("lib*.so.*")):
        if file.is_symlink() or not _is_library(file):
            continue
        base, version = file.name.split(".so.")
        for name in (f"{base}.so", f"{base}.so.{version.split('.')[0]}"):
            (folder / name).symlink_to(file)


def _is_library(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"


def run_in_child(
    graph: Path, image: np.ndarray, folder: Path, *options: str, libraries: tuple[Path, ...] = ()
) -> tuple[subprocess.CompletedProcess[str], np.ndarray | None]:
    """Run a graph in a child: how it ended, and the logits if it gave any."""
    given, got = folder / "image.npy", folder / "logits.npy"
    np.save(given, image)
    known = [*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    ended = subprocess.run(
        [sys.executable, __file__, str(graph), str(given), str(got), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, known)),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
        },
    )
    return ended, np.load(got) if got.exists() else None


def main() -> int:
    """The child."""
    import onnxruntime

    parser = argparse.ArgumentParser()
    parser.add_argument("graph")
    parser.add_argument("image", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--library")
    parser.add_argument("--provider", default=PROVIDER)
    arguments = parser.parse_args()
    if arguments.library:
        onnxruntime.register_execution_provider_library(arguments.provider, arguments.library)
    offered = onnxruntime.get_ep_devices()
    devices = [device for device in offered if device.ep_name == arguments.provider]
    if not devices:
        print(f"{arguments.provider} offers no device; there are: {', '.join(each.ep_name for each in offered)}")
        return NO_DEVICE
    options = onnxruntime.SessionOptions()
    options.add_provider_for_devices(devices[:1], {})
    if arguments.provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # all of the graph, or an error
    session = onnxruntime.InferenceSession(arguments.graph, options)
    assert session.get_providers()[0] == arguments.provider, session.get_providers()
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    np.save(arguments.logits, session.run([logits.name], {image.name: np.load(arguments.image)})[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
