"""What a machine can do, by what was found on it."""

from __future__ import annotations

from collections.abc import Mapping

from espmedsam_edge.doctor.finding import Finding
from espmedsam_edge.doctor.probe import Answer
from espmedsam_edge.runtime.backends.backend import BACKENDS


def abilities(findings: list[Finding], answers: Mapping[str, Answer]) -> dict[str, tuple[bool, str]]:
    """What the machine can do with this program: task -> (able, how or why not)."""
    status = {finding.name: finding.status for finding in findings}
    gpu = status.get("NVIDIA GPU") == "ok" or "Jetson" in status
    flavours = [name for name in ("tensorrt", "tensorrt-rtx") if status.get(name) == "ok"]
    builders = [name for name in ("tensorrt", "tensorrt-rtx") if name in flavours or answers[name].works]
    cuda = gpu and status.get("CUDA driver") == "ok"
    on_cpu = status["onnxruntime"] == "ok" and status["OpenCV"] == "ok"
    lacking = [name for name in ("cuda-python", "NVRTC") if status.get(name) != "ok"]
    ways = [] if lacking else [name for name in flavours if name in BACKENDS]
    if "CUDAExecutionProvider" in answers["onnxruntime"].values.get("providers", []):
        ways.append("onnxruntime-cuda")
    if cuda and ways:
        on_gpu = (True, f"with {' and '.join(ways)}")
    elif not cuda:
        on_gpu = (False, "no GPU with a CUDA driver")
    elif flavours:
        on_gpu = (False, f"{' and '.join(flavours)} cannot, without {' and '.join(lacking)}")
    else:
        on_gpu = (False, "no backend installed that uses it")
    openvino = status.get("openvino") == "ok"
    on = ["onnxruntime", *(["openvino"] if openvino and "CPU" in answers["openvino"].values["devices"] else [])]
    on += ["inductor"] if status.get("inductor") == "ok" else []
    recording = "OpenCV" if "avc1" in answers["opencv"].values.get("encoders", []) else None
    if status["PyAV (H.264)"] == "ok":
        recording = "PyAV"
    can_export, can_train, can_calibrate = (status[extra] == "ok" for extra in ("export", "train", "calibrate"))
    return {
        "segment on the CPU": (on_cpu, f"with {' and '.join(on)}" if on_cpu else "onnxruntime or OpenCV does not work"),
        "segment on a GPU": on_gpu,
        "build TensorRT engines": (
            bool(builders),
            f"with {' and '.join(builders)}" if builders else "no TensorRT here",
        ),
        "record H.264 video": (recording is not None, f"with {recording}" if recording else "MPEG-4 only; add PyAV"),
        "import and export checkpoints": (can_export, "" if can_export else "add the extra 'export'"),
        "train": (can_train, "" if can_train else "add the extra 'train'"),
        "calibrate FP16 and INT8": (can_calibrate, "" if can_calibrate else "add the extra 'calibrate'"),
    }
