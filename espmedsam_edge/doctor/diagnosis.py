"""What this machine can run, what is missing, and the command that adds it. Fails on no machine."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from espmedsam_edge.doctor.abilities import abilities
from espmedsam_edge.doctor.finding import Finding, Status
from espmedsam_edge.doctor.probe import Answer, ask_all
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import temporary_place
from espmedsam_edge.machine import environment
from espmedsam_edge.machine.cache import CACHE_VARIABLE, cache_place, distrusted
from espmedsam_edge.machine.environment import ROOT, run_tool
from espmedsam_edge.machine.installation import install_command, installed
from espmedsam_edge.runtime.engines.cache import ELSEWHERE
from espmedsam_edge.runtime.engines.tensorrt_api import not_for
from espmedsam_edge.runtime.inductor.building import Device, torch_version, why_no_compiler, why_no_cuda, why_no_torch
from espmedsam_edge.version import __version__

_GIB = 1 << 30
_NEEDED_MEMORY = 2 * _GIB  # a 1024 x 1024 graph and its activations in ONNX Runtime, with room to read a frame
_NEEDED_CACHE = 1 * _GIB


@dataclass(frozen=True)
class Diagnosis:
    """Every finding, and what the machine can do with this program: task -> (able, how or why not)."""

    environment: dict[str, Any]
    findings: list[Finding]
    abilities: dict[str, tuple[bool, str]]

    def as_json(self) -> dict[str, Any]:
        """Plain values; ``schema`` counts up when a field changes its meaning."""
        abilities = {task: {"able": able, "how": how} for task, (able, how) in self.abilities.items()}
        findings = [asdict(finding) for finding in self.findings]
        return {"schema": 1, "abilities": abilities, "findings": findings, "environment": self.environment}


def diagnose(root: Path = ROOT, answers: Mapping[str, Answer] | None = None) -> Diagnosis:
    """Look at everything once.

    Args:
        root: the file system's root, another one in tests.
        answers: what native packages answered, by name; None asks them.
    """
    answers = ask_all() if answers is None else answers
    has_gpu = bool(environment.gpus(root)) or _unclaimed_gpu(root)
    findings = [
        *_machine(root, answers),
        *_backends(root, answers, has_gpu),
        *_video(root, answers),
        *_extras(),
        *_folders(),
    ]
    return Diagnosis(environment.collect_environment(root), findings, abilities(findings, answers))


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / _GIB:.1f} GiB"


def _machine(root: Path, answers: Mapping[str, Answer]) -> Iterator[Finding]:
    area = "Machine"
    yield Finding(area, "program", "ok", f"espmedsam-edge {__version__}, Python {platform.python_version()}")
    yield Finding(area, "system", "ok", f"{environment.system_name(root)}, {platform.machine()}")
    cpu = environment.cpu(root)
    simd = f" ({', '.join(cpu.simd)})" if cpu.simd else ""
    yield Finding(area, "processor", "ok", f"{cpu.model}, {cpu.usable} of {cpu.logical} cores usable{simd}")
    yield _threads(cpu.usable)
    if cpu.governor and cpu.governor not in ("performance", "schedutil"):
        command = "sudo cpupower frequency-set -g performance"
        yield Finding(area, "frequency", "problem", f"governor '{cpu.governor}' slows short work", command)
    memory = environment.memory(root)
    enough = memory.available is None or memory.available >= _NEEDED_MEMORY
    detail = f"{_gib(memory.total)}, {_gib(memory.available)} free" + ("" if enough else ": too little for 1024 x 1024")
    fix = None if enough else "Close other programs, or export with a smaller --image-size."
    yield Finding(area, "memory", "ok" if enough else "problem", detail, fix)
    board = environment.jetson(root)
    if board:
        mode = f", power mode {board.power_mode}" if board.power_mode else ""
        yield Finding(area, "Jetson", "ok", f"{board.model}, L4T {board.l4t or 'unknown'}{mode}")
    yield from _gpu(root, answers, board is not None)


def _threads(usable: int) -> Finding:
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdigit() and int(setting) > usable:
        detail = f"OMP_NUM_THREADS={setting}, but only {usable} cores are usable: threads will wait for each other"
        return Finding("Machine", "threads", "problem", detail, "unset OMP_NUM_THREADS")
    return Finding("Machine", "threads", "ok", f"OMP_NUM_THREADS={setting}" if setting else f"up to {usable}")


def _gpu(root: Path, answers: Mapping[str, Answer], on_jetson: bool) -> Iterator[Finding]:
    area = "Machine"
    gpus = environment.gpus(root)
    for gpu in gpus:
        facts = [
            f"driver {gpu.driver}" if gpu.driver else "",
            f"{gpu.memory_mib / 1024:.0f} GiB" if gpu.memory_mib else "",
            f"compute capability {gpu.compute_capability}" if gpu.compute_capability else "",
        ]
        yield Finding(area, "NVIDIA GPU", "ok", ", ".join([gpu.name, *filter(None, facts)]))
    if not gpus and _unclaimed_gpu(root):
        name = environment.system_name(root)
        command = "sudo ubuntu-drivers install" if "Ubuntu" in name else "sudo apt-get install nvidia-driver"
        yield Finding(area, "NVIDIA GPU", "problem", "there is one, but its driver is not loaded", command)
    elif not gpus and not on_jetson:
        yield Finding(area, "NVIDIA GPU", "absent", "none found")
    driver = answers["cuda-driver"]
    if driver.works and driver.values.get("init") == 0:
        yield Finding(area, "CUDA driver", "ok", f"CUDA {driver.values['version']}")
    elif driver.works:
        detail = f"libcuda.so.1 is there but answers error {driver.values.get('init')}"
        yield Finding(area, "CUDA driver", "problem" if gpus or on_jetson else "absent", detail)
    elif gpus or on_jetson:
        fix = "In a container, start it with: docker run --gpus all (Jetson: --runtime nvidia)"
        yield Finding(area, "CUDA driver", "problem", f"libcuda.so.1: {driver.error}", fix)
    else:
        yield Finding(area, "CUDA driver", "absent", "no libcuda.so.1")


def _unclaimed_gpu(root: Path) -> bool:
    """An NVIDIA display controller on the PCI bus, whether or not a driver runs it."""
    for device in (root / "sys/bus/pci/devices").glob("*"):
        vendor, kind = environment.read_text(device / "vendor"), environment.read_text(device / "class")
        if vendor == "0x10de" and (kind or "").startswith("0x03"):
            return True
    return False


def _backends(root: Path, answers: Mapping[str, Answer], has_gpu: bool) -> Iterator[Finding]:
    area = "Backends"
    ort = answers["onnxruntime"]
    if ort.works:
        providers = [str(p).removesuffix("ExecutionProvider") for p in ort.values["providers"]]
        providers = [p for p in providers if p != "Azure"]  # calls a web service; runs nothing here
        yield Finding(area, "onnxruntime", "ok", f"{ort.values['version']}, providers: {', '.join(providers)}")
    else:
        command = f"{sys.executable} -m pip install --force-reinstall onnxruntime"
        yield Finding(area, "onnxruntime", "problem", ort.error or "not installed", command)
    yield _openvino(area, answers["openvino"])
    yield _inductor(area)
    on_jetson = environment.jetson(root) is not None
    yield _tensorrt(area, root, answers["tensorrt"], on_jetson)
    if not on_jetson:  # TensorRT-RTX covers desktop GPUs, not Orin
        possible = platform.machine() in ("x86_64", "AMD64")
        yield _rtx(area, root, answers["tensorrt-rtx"], install_command("rtx") if possible else None)
    yield from _cuda_python(area, answers, has_gpu, on_jetson)


def _openvino(area: str, answer: Answer) -> Finding:
    """OpenVINO with its devices as ``--device`` takes them, and what they are called."""
    if not answer.works:
        return _native(area, "openvino", answer, install_command("openvino"))
    devices = [f"{name} ({title})" for name, title in answer.values["devices"].items()]
    return Finding(area, "openvino", "ok", f"{answer.values['version']}, devices: {', '.join(devices) or 'none'}")


def _inductor(area: str) -> Finding:
    """torch with what it compiles networks with; torch itself is not asked, since importing it takes seconds."""
    missing = why_no_torch()
    if missing is not None:
        return Finding(area, "inductor", "absent", missing.partition(". ")[0], install_command("inductor"))
    device: Device = "cpu" if why_no_cuda() is not None else "cuda"
    lacking, _, remedy = (why_no_compiler(device) or "").partition(". ")
    if lacking:
        fix = remedy.partition(": ")[2] or remedy
        return Finding(area, "inductor", "absent", f"torch {torch_version()}; {lacking}", fix)
    where = "the GPU and the processor" if device == "cuda" else "the processor"
    return Finding(area, "inductor", "ok", f"torch {torch_version()} with a C++ compiler, for {where}")


def _cuda_python(area: str, answers: Mapping[str, Answer], has_gpu: bool, on_jetson: bool) -> Iterator[Finding]:
    """cuda-python, and NVRTC, which compiles the kernels around an engine."""
    cuda, nvrtc = answers["cuda-python"], answers["nvrtc"]
    major = str(answers["cuda-driver"].values.get("version", "12")).partition(".")[0]
    # The extra would put PyPI's TensorRT in front of JetPack's.
    fix = f"{sys.executable} -m pip install 'cuda-python=={major}.*'" if on_jetson else install_command("trt")
    if cuda.installed and cuda.error and not has_gpu and not on_jetson:
        yield Finding(
            area, "cuda-python", "ok", f"{cuda.values.get('version', 'installed')}, no CUDA driver to talk to"
        )
    else:
        yield _native(area, "cuda-python", cuda, fix)
    if nvrtc.works:
        yield Finding(area, "NVRTC", "ok", str(nvrtc.values["version"]))
    elif cuda.installed:
        of_cuda_12 = str(cuda.values.get("version", "")).startswith("12.")
        package = "nvidia-cuda-nvrtc-cu12" if of_cuda_12 else "nvidia-cuda-nvrtc"
        fix = "sudo apt-get install nvidia-jetpack" if on_jetson else f"{sys.executable} -m pip install {package}"
        status: Status = "problem" if has_gpu or on_jetson else "absent"
        yield Finding(area, "NVRTC", status, nvrtc.error or "not installed", fix)


def _native(area: str, name: str, answer: Answer, fix: str | None) -> Finding:
    if not answer.installed:
        return Finding(area, name, "absent", "not installed", fix)
    version = str(answer.values.get("version", "installed"))
    if answer.error:
        return Finding(area, name, "problem", f"{version}, {answer.error}", fix)
    return Finding(area, name, "ok", version)


def _tensorrt(area: str, root: Path, answer: Answer, on_jetson: bool) -> Finding:
    if not on_jetson:
        return _native(area, "tensorrt", answer, install_command("trt"))
    if not answer.installed and list((root / "usr/lib").glob("python3*/dist-packages/tensorrt/__init__.py")):
        detail = "JetPack's is installed, but this virtual environment was made without the system's packages"
        return Finding(area, "tensorrt", "absent", detail, "rm -rf .venv && make demo")
    return _native(area, "tensorrt", answer, "sudo apt-get install tensorrt python3-libnvinfer")


def _rtx(area: str, root: Path, answer: Answer, fix: str | None) -> Finding:
    """TensorRT-RTX, which builds for other GPUs where it does not run on the one here."""
    found = _native(area, "tensorrt-rtx", answer, fix)
    capabilities = [gpu.compute_capability for gpu in environment.gpus(root) if gpu.compute_capability]
    reasons = [not_for(answer.values.get("targets", []), f"sm{each.replace('.', '')}") for each in capabilities]
    if found.status != "ok" or not reasons or None in reasons:
        return found
    return Finding(area, "tensorrt-rtx", "problem", f"{found.detail}, not for this GPU: {reasons[0]}", ELSEWHERE)


def _video(root: Path, answers: Mapping[str, Answer]) -> Iterator[Finding]:
    area = "Images and video"
    cv = answers["opencv"]
    if cv.works:
        reads = "reads video" if cv.values.get("FFMPEG") else "reads no video (built without FFmpeg)"
        encoders = cv.values.get("encoders", [])
        names = {"avc1": "H.264", "mp4v": "MPEG-4"}
        writes = f"writes {' and '.join(names[e] for e in encoders)}" if encoders else "writes no video"
        yield Finding(area, "OpenCV", "ok", f"{cv.values['version']}, {reads}, {writes}")
    else:
        command = f"{sys.executable} -m pip install --force-reinstall opencv-python-headless"
        yield Finding(area, "OpenCV", "problem", cv.error or "not installed", command)
    av = answers["pyav"]
    if av.works and av.values.get("encoders"):
        detail = f"{av.values['version']}, H.264 encoders built in: {', '.join(av.values['encoders'])}"
        yield Finding(area, "PyAV (H.264)", "ok", detail)
    elif av.works:
        detail = f"{av.values['version']}, built without an H.264 encoder"
        yield Finding(area, "PyAV (H.264)", "problem", detail, install_command("video"))
    else:
        yield _native(area, "PyAV (H.264)", av, install_command("video"))
    on_jetson = environment.jetson(root) is not None
    yield _gstreamer(on_jetson)
    yield _gstreamer_for_python(answers["gstreamer"], on_jetson)
    yield _cameras(root)
    yield _dicom(answers["dicom"])


def _gstreamer_for_python(answer: Answer, on_jetson: bool) -> Finding:
    """What ``infer`` reads CSI cameras and decodes streams in hardware with."""
    area, name = "Images and video", "GStreamer, Python"
    packages = "sudo apt-get install python3-gi gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0"
    if not answer.works:
        return Finding(area, name, "absent", answer.error or "PyGObject is not installed", packages)
    uses = {"nvarguscamerasrc": "CSI camera", "nvv4l2decoder": "hardware decoder", "rtspsrc": "RTSP"}
    there = [what for element, what in uses.items() if element in answer.values.get("elements", [])]
    detail = ", ".join([str(answer.values["version"]), *there])
    if on_jetson and "CSI camera" not in there:
        fix = "sudo apt-get install nvidia-l4t-gstreamer"
        return Finding(area, name, "problem", f"{detail}; the Jetson's own elements are missing", fix)
    return Finding(area, name, "ok", detail)


def _cameras(root: Path) -> Finding:
    area, name = "Images and video", "cameras"
    devices = sorted((root / "dev").glob("video*"), key=lambda path: (len(path.name), path.name))
    if not devices:
        return Finding(area, name, "absent", "no /dev/video*")
    names = [f"/dev/{device.name}" for device in devices]
    if not all(os.access(device, os.R_OK | os.W_OK) for device in devices):
        return Finding(area, name, "problem", f"{', '.join(names)}: may not be used", "sudo usermod -aG video $USER")
    return Finding(area, name, "ok", ", ".join(names))


def _dicom(answer: Answer) -> Finding:
    area, name, fix = "Images and video", "DICOM", install_command("dicom")
    if not answer.works:
        return Finding(area, name, "absent" if not answer.installed else "problem", answer.error or "no pydicom", fix)
    decoders: dict[str, bool] = answer.values.get("decoders", {})
    missing = [kind for kind, there in decoders.items() if not there]
    detail = f"pydicom {answer.values['version']}, reads {', '.join(kind for kind, there in decoders.items() if there)}"
    if not installed("highdicom"):
        missing.append("DICOM-SEG (highdicom)")
    if missing:
        return Finding(area, name, "problem", f"{detail}; missing: {', '.join(missing)}", fix)
    return Finding(area, name, "ok", detail)


def _gstreamer(on_jetson: bool) -> Finding:
    area, name = "Images and video", "GStreamer"
    packages = "gstreamer1.0-tools gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly"
    version = run_tool(["gst-launch-1.0", "--version"])
    if version is None:
        return Finding(area, name, "absent", "no gst-launch-1.0 on PATH", f"sudo apt-get install {packages}")
    wanted = {
        "nvarguscamerasrc": "CSI camera",
        "nvv4l2decoder": "hardware decoder",
        "nvv4l2h264enc": "hardware H.264 encoder",
        "x264enc": "software H.264 encoder",
        "rtspsrc": "RTSP",
    }
    elements = wanted if on_jetson else {key: wanted[key] for key in ("x264enc", "rtspsrc")}
    # `gst-inspect-1.0 ELEMENT` prints its description, and nothing for an element that is not there.
    there = [what for element, what in elements.items() if run_tool(["gst-inspect-1.0", element])]
    return Finding(area, name, "ok", ", ".join([version.splitlines()[0].rpartition(" ")[2], *there]))


def _modules(*modules: str) -> str:
    missing = [name for name in modules if not installed(name)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return ", ".join(modules)


def _extras() -> Iterator[Finding]:
    work = {
        "export": ("torch", "timm", "onnx", "onnxscript", "onnxsim", "safetensors"),
        "train": ("torch", "torchvision", "timm", "segment_anything", "lightning_fabric", "monai", "safetensors"),
        "calibrate": ("modelopt", "onnx"),
        "bench": ("matplotlib", "psutil"),
    }
    for extra, modules in work.items():
        complete = all(installed(module) for module in modules)
        fix = None if complete else install_command(extra)
        yield Finding("Extras", extra, "ok" if complete else "absent", _modules(*modules), fix)


def _folders() -> Iterator[Finding]:
    yield _cache(f"export {CACHE_VARIABLE}=/a/folder/you/can/write")
    fix = "export TMPDIR=/a/folder/you/can/write"
    try:
        yield _folder("temporary", temporary_place(), fix)
    except UserError as error:
        yield Finding("Folders", "temporary", "problem", error.message, fix)


def _cache(fix: str) -> Finding:
    try:
        place = cache_place()
    except UserError as error:
        return Finding("Folders", "engine cache", "problem", error.message, fix)
    if (reason := distrusted(place, place)) is not None:
        return Finding("Folders", "engine cache", "problem", f"{place} is not used: {reason}", fix)
    return _folder("engine cache", place, fix)


def _folder(name: str, folder: Path, fix: str) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        return Finding("Folders", name, "problem", f"{folder}: {there} is no folder", fix)
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("Folders", name, "problem", f"{folder}: may not be written", fix)
    free = shutil.disk_usage(there).free
    if free < _NEEDED_CACHE:
        return Finding("Folders", name, "problem", f"{folder}: only {_gib(free)} free", fix)
    return Finding("Folders", name, "ok", f"{folder}, {_gib(free)} free")
