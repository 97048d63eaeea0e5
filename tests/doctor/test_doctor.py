"""The doctor reports any machine without failing, and its remedies are commands."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest

from espmedsam_edge.doctor import abilities, probe
from espmedsam_edge.doctor import diagnosis as doctor
from espmedsam_edge.doctor.diagnosis import Diagnosis, Finding, diagnose
from espmedsam_edge.doctor.probe import Answer
from espmedsam_edge.doctor.report import render
from espmedsam_edge.machine import environment, installation

NOTHING = {name: Answer(False) for name in probe.SCRIPTS}
BASE = {
    **NOTHING,
    "onnxruntime": Answer(True, {"version": "1.20", "providers": ["AzureExecutionProvider", "CPUExecutionProvider"]}),
    "opencv": Answer(True, {"version": "4.10", "FFMPEG": True, "GStreamer": False, "encoders": ["mp4v"]}),
    "cuda-driver": Answer(True, {}, "libcuda.so.1: cannot open shared object file"),
}


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with nothing under it, no programs on PATH and none of the optional packages."""
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(doctor, "installed", lambda module: False)
    return tmp_path / "root"


def by_name(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnosis.findings}


def test_a_machine_with_nothing_is_described_not_failed(bare: Path) -> None:
    diagnosis = diagnose(bare, NOTHING)
    found = by_name(diagnosis)
    assert found["onnxruntime"].status == found["OpenCV"].status == "problem"
    assert found["NVIDIA GPU"] == Finding("Machine", "NVIDIA GPU", "absent", "none found")
    assert found["tensorrt"].status == found["PyAV (H.264)"].status == found["train"].status == "absent"
    assert not any(able for able, _ in diagnosis.abilities.values())
    assert "This machine can:" in render(diagnosis)


def test_the_light_base_segments_on_the_cpu_and_says_what_the_rest_needs(bare: Path) -> None:
    diagnosis = diagnose(bare, BASE)
    found = by_name(diagnosis)
    assert found["onnxruntime"].detail == "1.20, providers: CPU"
    assert diagnosis.abilities["segment on the CPU"] == (True, "with onnxruntime")
    assert diagnosis.abilities["record H.264 video"] == (False, "MPEG-4 only; add PyAV")
    text = render(diagnosis)
    for extra in ("export", "train", "calibrate", "bench", "video", "dicom"):
        assert installation.install_command(extra) in text
    assert not [f for f in diagnosis.findings if f.status == "problem"]


def fake_jetson(root: Path, tensorrt_in_system: bool) -> None:
    for path, content in {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\x00",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    if tensorrt_in_system:
        package = root / "usr/lib/python3.10/dist-packages/tensorrt"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")


def test_a_jetson_without_tensorrt_is_told_jetpacks_packages(bare: Path) -> None:
    fake_jetson(bare, tensorrt_in_system=False)
    found = by_name(diagnose(bare, BASE))
    assert found["Jetson"].detail == "NVIDIA Jetson AGX Orin Developer Kit, L4T 36.4.3"
    assert found["tensorrt"].fix == "sudo apt-get install tensorrt python3-libnvinfer"
    assert "tensorrt-rtx" not in found  # does not cover Orin
    assert found["CUDA driver"].status == "problem"
    assert found["CUDA driver"].fix is not None
    assert "docker" in found["CUDA driver"].fix


def test_a_jetson_whose_tensorrt_the_environment_hides_is_told_to_make_it_anew(bare: Path) -> None:
    fake_jetson(bare, tensorrt_in_system=True)
    fix = by_name(diagnose(bare, BASE))["tensorrt"].fix
    assert fix is not None
    assert "rm -rf .venv" in fix


def test_a_jetson_with_everything_segments_on_its_gpu(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abilities.BACKENDS, "tensorrt", "a module")
    fake_jetson(bare, tensorrt_in_system=True)
    works = {
        **BASE,
        "tensorrt": Answer(True, {"version": "10.3.0"}),
        "cuda-driver": Answer(True, {"version": "12.6", "init": 0}),
        "cuda-python": Answer(True, {"version": "12.6.2", "init": "CUDA_SUCCESS"}),
        "nvrtc": Answer(True, {"version": "12.6"}),
    }
    diagnosis = diagnose(bare, works)
    assert by_name(diagnosis)["NVRTC"].detail == "12.6"
    assert diagnosis.abilities["segment on a GPU"] == (True, "with tensorrt")
    assert diagnosis.abilities["build TensorRT engines"] == (True, "with tensorrt")


@pytest.mark.parametrize(
    ("lacking", "reason", "fix"),
    [
        (("cuda-python", "nvrtc"), "cuda-python and NVRTC", None),
        (("nvrtc",), "NVRTC", " -m pip install nvidia-cuda-nvrtc"),
    ],
)
def test_tensorrt_needs_cuda_python_and_nvrtc_to_segment(
    bare: Path, monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...], reason: str, fix: str | None
) -> None:
    monkeypatch.setattr(environment, "gpus", lambda root: [environment.Gpu("NVIDIA L4", "580.1", 23034, "8.9")])
    there = {
        **BASE,
        "tensorrt": Answer(True, {"version": "10.16.1.11"}),
        "cuda-driver": Answer(True, {"version": "13.0", "init": 0}),
        "cuda-python": Answer(True, {"version": "13.0.1", "init": "CUDA_SUCCESS"}),
        "nvrtc": Answer(True, {"version": "13.0"}),
    }
    assert diagnose(bare, there).abilities["segment on a GPU"] == (True, "with tensorrt")
    missing = Answer(True, {}, "NVRTC, which compiles the kernels, is not installed.")
    without = diagnose(bare, {**there, **{name: missing if len(lacking) == 1 else Answer(False) for name in lacking}})
    assert without.abilities["segment on a GPU"] == (False, f"tensorrt cannot, without {reason}")
    assert without.abilities["build TensorRT engines"] == (True, "with tensorrt")
    if fix is not None:
        found = by_name(without)["NVRTC"]
        assert (found.status, found.detail) == ("problem", missing.error)
        assert str(found.fix).endswith(fix)


def test_on_a_jetson_no_remedy_puts_another_tensorrt_over_jetpacks(bare: Path) -> None:
    fake_jetson(bare, tensorrt_in_system=True)
    driver = {**BASE, "cuda-driver": Answer(True, {"version": "12.6", "init": 0})}
    assert str(by_name(diagnose(bare, driver))["cuda-python"].fix).endswith(" -m pip install 'cuda-python==12.*'")
    installed = {**driver, "cuda-python": Answer(True, {"version": "12.6.2", "init": "CUDA_SUCCESS"})}
    assert by_name(diagnose(bare, installed))["NVRTC"].fix == "sudo apt-get install nvidia-jetpack"


def test_openvino_is_listed_with_its_devices_by_name(bare: Path) -> None:
    devices = {"CPU": "Some Core i5", "GPU": "Some Arc (iGPU)"}
    answers = {**BASE, "openvino": Answer(True, {"version": "2026.4", "devices": devices})}
    diagnosis = diagnose(bare, answers)
    found = by_name(diagnosis)["openvino"]
    assert (found.status, found.detail) == ("ok", "2026.4, devices: CPU (Some Core i5), GPU (Some Arc (iGPU))")
    assert diagnosis.abilities["segment on the CPU"] == (True, "with onnxruntime and openvino")
    absent = by_name(diagnose(bare, BASE))["openvino"]
    assert (absent.status, absent.fix) == ("absent", installation.install_command("openvino"))
    broken = by_name(diagnose(bare, {**BASE, "openvino": Answer(True, {}, "crashed with SIGSEGV")}))["openvino"]
    assert (broken.status, broken.detail) == ("problem", "installed, crashed with SIGSEGV")


def test_onnxruntimes_cuda_provider_counts_only_with_a_driver(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda root: [environment.Gpu("NVIDIA T4", "550.54", 15360, "7.5")])
    cuda = {**BASE, "onnxruntime": Answer(True, {"version": "1.20", "providers": ["CUDAExecutionProvider"]})}
    assert diagnose(bare, cuda).abilities["segment on a GPU"] == (False, "no GPU with a CUDA driver")
    driver = {**cuda, "cuda-driver": Answer(True, {"version": "12.4", "init": 0})}
    assert diagnose(bare, driver).abilities["segment on a GPU"] == (True, "with onnxruntime-cuda")


@pytest.mark.parametrize(("capability", "runs"), [("8.9", True), ("9.0", False), ("13.0", True)])
def test_tensorrt_rtx_is_not_for_every_gpu(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capability: str, runs: bool
) -> None:
    monkeypatch.setattr(environment, "gpus", lambda root: [environment.Gpu("NVIDIA", "590.1", 150000, capability)])
    works = Answer(True, {"version": "1.7.1", "targets": ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]})
    there = {name: Answer(True, {"version": "13.0"}) for name in ("cuda-python", "nvrtc")}
    answers = {**BASE, **there, "cuda-driver": Answer(True, {"version": "13.0", "init": 0}), "tensorrt-rtx": works}
    diagnosis = diagnose(bare, answers)
    found = by_name(diagnosis)["tensorrt-rtx"]
    assert found.status == ("ok" if runs else "problem")
    assert ("not for this GPU: it runs on SM 7.5, 8.0, 8.6, 8.9, 12.0, 12.1 and later" in found.detail) != runs
    assert diagnosis.abilities["segment on a GPU"][0] == runs
    assert diagnosis.abilities["build TensorRT engines"] == (True, "with tensorrt-rtx")
    assert runs or "onnxruntime-cuda" in str(found.fix)


def test_a_gpu_without_driver_is_a_problem_with_a_command(bare: Path) -> None:
    device = bare / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030000\n")
    found = by_name(diagnose(bare, BASE))["NVIDIA GPU"]
    assert (found.status, found.fix) == ("problem", "sudo apt-get install nvidia-driver")


def test_a_native_package_that_crashes_is_a_problem_not_a_crash(bare: Path) -> None:
    crashed = {**BASE, "tensorrt": Answer(True, {"version": "10.9"}, "crashed with SIGSEGV")}
    found = by_name(diagnose(bare, crashed))["tensorrt"]
    assert (found.status, found.detail) == ("problem", "10.9, crashed with SIGSEGV")
    assert found.fix == installation.install_command("trt")


def test_cameras_gstreamer_and_dicom_decoders_are_listed(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(diagnose(bare, BASE))
    for name in ("cameras", "GStreamer, Python", "DICOM"):
        assert found[name].status == "absent"
    (bare / "dev").mkdir(parents=True)
    for number in (10, 2):
        (bare / "dev" / f"video{number}").touch()
    decoders = {"JPEG": True, "lossless JPEG": False, "RLE": True}
    works = {
        **BASE,
        "gstreamer": Answer(True, {"version": "1.22.0", "elements": ["rtspsrc"]}),
        "dicom": Answer(True, {"version": "3.0.1", "decoders": decoders}),
    }
    found = by_name(diagnose(bare, works))
    assert (found["cameras"].status, found["cameras"].detail) == ("ok", "/dev/video2, /dev/video10")
    assert found["GStreamer, Python"].detail == "1.22.0, RTSP"
    assert found["DICOM"].status == "problem"
    assert "reads JPEG, RLE; missing: lossless JPEG, DICOM-SEG (highdicom)" in found["DICOM"].detail
    monkeypatch.setattr(doctor, "installed", lambda module: True)
    works["dicom"] = Answer(True, {"version": "3.0.1", "decoders": dict.fromkeys(decoders, True)})
    assert by_name(diagnose(bare, works))["DICOM"].status == "ok"
    fake_jetson(bare, tensorrt_in_system=False)
    found = by_name(diagnose(bare, works))
    assert found["GStreamer, Python"].fix == "sudo apt-get install nvidia-l4t-gstreamer"


def test_more_threads_than_cores_are_pointed_out(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    found = by_name(diagnose(bare, BASE))["threads"]
    assert (found.status, found.fix) == ("problem", "unset OMP_NUM_THREADS")


def test_a_cache_that_cannot_be_written_is_a_problem(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "sealed" / "cache"))
    (tmp_path / "sealed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "sealed")
    found = by_name(diagnose(bare, BASE))["engine cache"]
    assert found.status == "problem"
    assert "ESPMEDSAM_CACHE" in (found.fix or "")


def test_a_machine_without_a_place_for_temporary_files_is_told(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    found = by_name(diagnose(bare, BASE))["temporary"]
    assert (found.status, found.fix) == ("problem", "export TMPDIR=/a/folder/you/can/write")


@pytest.mark.parametrize("fault", ["open", "file", "name"])
def test_a_cache_that_is_not_used_is_a_problem(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    place = tmp_path / ("x" * 300 if fault == "name" else "cache")
    if fault == "open":
        place.mkdir()
        place.chmod(0o777)
    elif fault == "file":
        place.write_text("mine")
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(place))
    found = by_name(diagnose(bare, BASE))["engine cache"]
    assert found.status == "problem"
    assert {"open": "other users may write", "file": "is no folder", "name": "cannot be at"}[fault] in found.detail
    assert "ESPMEDSAM_CACHE" in (found.fix or "")


def test_commands_stand_on_one_line_each_to_be_copied(bare: Path) -> None:
    diagnosis = diagnose(bare, BASE)
    lines = render(diagnosis).splitlines()
    for finding in diagnosis.findings:
        if finding.fix:
            assert f"    {finding.fix}" in lines


def test_this_machine_diagnoses_itself_and_the_json_is_plain() -> None:
    data = diagnose().as_json()
    assert json.loads(json.dumps(data)) == data
    assert data["schema"] == 1
    assert data["abilities"]["segment on the CPU"]["able"]


@pytest.mark.parametrize(
    ("torch", "compiler", "status", "words", "fix"),
    [
        (None, None, "ok", "torch 2.14.1 with a C++ compiler, for the processor", None),
        ("torch is not installed. Install it: pip", None, "absent", "torch is not installed", "[inductor]'"),
        (None, "there is no g++. Install it: apt-get g++", "absent", "torch 2.14.1; there is no g++", "apt-get g++"),
    ],
)
def test_inductor_is_told_with_what_it_lacks(
    bare: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch: str | None,
    compiler: str | None,
    status: str,
    words: str,
    fix: str | None,
) -> None:
    for name, value in (("why_no_torch", torch), ("why_no_cuda", "there is no GPU."), ("torch_version", "2.14.1")):
        monkeypatch.setattr(doctor, name, lambda value=value: value)
    monkeypatch.setattr(doctor, "why_no_compiler", lambda device: compiler)
    diagnosis = diagnose(bare, BASE)
    found = by_name(diagnosis)["inductor"]
    assert (found.status, found.detail) == (status, words)
    assert (found.fix or "").endswith(fix or "")
    assert ("inductor" in diagnosis.abilities["segment on the CPU"][1]) == (status == "ok")
