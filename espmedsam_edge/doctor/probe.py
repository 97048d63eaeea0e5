"""Asks in a child process whether a native package works, so that a crash or a hang there is only an answer here."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from espmedsam_edge.machine.children import OWN_PATH, PACKAGE_ROOT
from espmedsam_edge.machine.installation import installed


@dataclass(frozen=True)
class Answer:
    """``values`` is what the child printed; ``error`` is None when it ended well, else one line that says why not."""

    installed: bool
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def works(self) -> bool:
        """Installed, and the child ended well."""
        return self.installed and self.error is None


_TENSORRT = """
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines.tensorrt_api import load
try:
    api = load("{flavour}")
except UserError as error:
    sys.exit(error.message)
say(version=api.version, targets=api.target_names())
if api.module.Builder(api.module.Logger(api.module.Logger.ERROR)) is None:
    sys.exit("its builder could not be made")
"""

# name -> (modules of which one must exist, the script; it may say values several times, they are merged)
SCRIPTS: dict[str, tuple[tuple[str, ...], str]] = {
    "onnxruntime": (
        ("onnxruntime",),
        """
import onnxruntime as ort
say(version=ort.__version__, providers=ort.get_available_providers())
""",
    ),
    "tensorrt": (("tensorrt",), _TENSORRT.format(flavour="tensorrt")),
    "tensorrt-rtx": (("tensorrt_rtx_bindings", "tensorrt_rtx"), _TENSORRT.format(flavour="tensorrt-rtx")),
    "openvino": (
        ("openvino",),
        """
from espmedsam_edge.runtime.backends.openvino_api import load_openvino
openvino = load_openvino()
core = openvino.Core()
say(version=openvino.__version__.partition("-")[0])
say(devices={name: str(core.get_property(name, "FULL_DEVICE_NAME")) for name in core.available_devices})
""",
    ),
    "cuda-python": (
        ("cuda.bindings",),
        """
from cuda.bindings import driver
import cuda.bindings
say(version=cuda.bindings.__version__)
error, = driver.cuInit(0)
say(init=str(error).rpartition(".")[2].partition(":")[0])
""",
    ),
    "nvrtc": (
        ("cuda.bindings",),
        """
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda.nvrtc import nvrtc_version
try:
    say(version=nvrtc_version())
except UserError as error:
    sys.exit(error.message)
""",
    ),
    "cuda-driver": (
        ("ctypes",),
        """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
number = ctypes.c_int()
cuda.cuDriverGetVersion(ctypes.byref(number))
say(version=f"{number.value // 1000}.{number.value % 1000 // 10}", init=cuda.cuInit(0))
""",
    ),
    "opencv": (
        ("cv2",),
        r"""
import os, re, tempfile
os.environ["OPENCV_LOG_LEVEL"] = "SILENT"
import cv2
text = cv2.getBuildInformation()
has = {name: re.search(rf"^\s+{name}:\s+YES", text, re.M) is not None for name in ("FFMPEG", "GStreamer")}
say(version=cv2.__version__, **has)
with tempfile.TemporaryDirectory() as folder:
    def opens(tag):
        writer = cv2.VideoWriter(f"{folder}/{tag}.mp4", cv2.VideoWriter_fourcc(*tag), 25, (64, 64))
        opened = writer.isOpened()
        writer.release()
        return opened
    say(encoders=[tag for tag in ("avc1", "mp4v") if opens(tag)])
""",
    ),
    "pyav": (
        ("av",),
        """
import av
say(version=av.__version__)
known = ("libx264", "libopenh264", "h264_nvenc", "h264_v4l2m2m", "h264_nvmpi")
say(encoders=[name for name in known if name in av.codecs_available])
""",
    ),
    "gstreamer": (
        ("gi",),
        """
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.video.gstreamer import load_gstreamer
try:
    gst = load_gstreamer()
except UserError as error:
    sys.exit(error.message)
wanted = ("nvarguscamerasrc", "nvv4l2decoder", "nvv4l2h264enc", "x264enc", "avdec_h264", "rtspsrc")
say(version=".".join(map(str, gst.version()[:3])), elements=[e for e in wanted if gst.ElementFactory.find(e)])
""",
    ),
    "dicom": (
        ("pydicom",),
        """
import pydicom
from espmedsam_edge.runtime.dicom.decoding import decoders
say(version=pydicom.__version__, decoders=decoders())
""",
    ),
}
_MARK = "answer:"  # a package may print lines of its own
_PRELUDE = f"{OWN_PATH}import json\ndef say(**values):\n    print('{_MARK}' + json.dumps(values), flush=True)\n"


def ask(name: str, timeout_s: float = 60) -> Answer:
    """Run one of ``SCRIPTS`` in a child of this Python. Never raises for what the child does."""
    modules, script = SCRIPTS[name]
    if not any(installed(module) for module in modules):
        return Answer(False)
    try:
        child = subprocess.run(
            [sys.executable, "-c", _PRELUDE + script, str(PACKAGE_ROOT)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Answer(True, error=f"gave no answer in {timeout_s:g} s")
    except OSError as error:
        return Answer(True, error=f"could not be asked: {error.strerror}")
    values: dict[str, Any] = {}
    for line in child.stdout.decode("utf-8", "replace").splitlines():
        if line.startswith(_MARK):
            values.update(json.loads(line[len(_MARK) :]))
    return Answer(True, values, _failure(child.returncode, child.stderr.decode("utf-8", "replace")))


def _failure(code: int, stderr: str) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if not lines:
        return f"ended with code {code}"
    return re.sub(r"^[\w.]+(Error|Exception|NotFound\w*): ", "", lines[-1])[:300]


def ask_all() -> Mapping[str, Answer]:
    """Every script of ``SCRIPTS``, two at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(SCRIPTS, pool.map(ask, SCRIPTS), strict=True))
