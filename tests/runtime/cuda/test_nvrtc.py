"""Compilation of the kernels by NVRTC, without a GPU, and the cache of what it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda import nvrtc as nvrtc_module
from espmedsam_edge.runtime.cuda.nvrtc import (
    CompileTarget,
    KernelSource,
    compile_kernels,
    compile_target,
    kernel_image,
    kernels_folder,
    supported_targets,
)
from espmedsam_edge.runtime.kernels.cu_sources import KERNELS, kernel_source

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
# All of NVRTC and ptxas runs, only optimisation is short: a few seconds for the lot instead of a minute.
QUICK = ("--Ofast-compile=max",)
SOURCE = KernelSource(
    "toy", '#include "two.cuh"\nextern "C" __global__ void toy(int* p) { *p = TWO; }', {"two.cuh": ""}
)


@pytest.fixture(scope="module")
def nvrtc() -> list[int]:
    """What NVRTC compiles for."""
    pytest.importorskip("cuda.bindings", reason="needs cuda-python (cuda-bindings) for NVRTC")
    try:
        return supported_targets()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_every_gpu(nvrtc: list[int], name: str, architecture: str) -> None:
    number = int(architecture.removeprefix("sm_"))
    if number not in nvrtc:
        pytest.skip(f"this NVRTC compiles for {nvrtc}")
    image = compile_kernels(kernel_source(name), CompileTarget(architecture), QUICK)
    assert image.startswith(b"\x7fELF")
    for kernel in KERNELS[name]:
        assert f".text.{kernel}".encode() in image


def test_as_it_is_done_for_a_user(nvrtc: list[int]) -> None:
    image = compile_kernels(kernel_source("preprocess"), CompileTarget("sm_86"))
    assert image.startswith(b"\x7fELF")


def test_ptx_for_a_gpu_newer_than_nvrtc(nvrtc: list[int]) -> None:
    image = compile_kernels(kernel_source("preprocess"), compile_target("sm999", nvrtc), QUICK)
    assert b".visible .entry preprocess" in image


@pytest.mark.parametrize(
    ("sm", "supported", "expected"),
    [
        ("sm87", [75, 86, 87, 90], "sm_87"),
        ("sm120", [75, 90, 120], "sm_120"),
        ("sm88", [75, 86, 87, 90], "compute_87"),  # machine code of a sibling may not run; PTX of an older one does
        ("sm130", [75, 90, 120], "compute_120"),
    ],
)
def test_the_target_of_a_gpu(sm: str, supported: list[int], expected: str) -> None:
    target = compile_target(sm, supported)
    assert target.architecture == expected
    assert target.machine_code == expected.startswith("sm_")


def test_a_gpu_too_old_for_nvrtc() -> None:
    with pytest.raises(UserError, match=r"generation sm61; this NVRTC compiles for sm75 and newer\. Install an older"):
        compile_target("sm61", [75, 80])


def test_a_source_that_nvrtc_refuses_is_told_with_its_first_error(nvrtc: list[int]) -> None:
    with pytest.raises(UserError, match=r'NVRTC cannot compile toy.cu for sm_90: toy.cu\(2\).*"TWO" is undefined'):
        compile_kernels(SOURCE, CompileTarget("sm_90"))


def test_a_header_is_found_without_a_file(nvrtc: list[int]) -> None:
    source = KernelSource(SOURCE.name, SOURCE.text, {"two.cuh": "#define TWO 2\n"})
    assert compile_kernels(source, CompileTarget("sm_90")).startswith(b"\x7fELF")


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python (cuda-bindings)")

    def missing(*_: object) -> None:
        raise RuntimeError("Failure finding libnvrtc.so")

    monkeypatch.setattr(nvrtc, "nvrtcGetSupportedArchs", missing)
    with pytest.raises(UserError, match=r"^NVRTC, which compiles the kernels, is not installed\. pip install nvidia"):
        supported_targets()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compilations asked for; what they make is the source's name and target."""
    asked: list[str] = []

    def compile_it(source: KernelSource, target: CompileTarget) -> bytes:
        asked.append(f"{source.name} {target.architecture}")
        return asked[-1].encode()

    monkeypatch.setattr(nvrtc_module, "compile_kernels", compile_it)
    monkeypatch.setattr(nvrtc_module, "supported_targets", lambda: [86, 90])
    return asked


def test_a_source_is_compiled_once_for_a_gpu(compiled: list[str], tmp_path: Path, said: list[str]) -> None:
    for sm in ("sm86", "sm86", "sm90"):
        assert kernel_image(SOURCE, sm, tmp_path) == f"toy sm_{sm[2:]}".encode()
    assert compiled == ["toy sm_86", "toy sm_90"]
    assert said[0] == "Compiling toy for this GPU (sm_86), once."
    assert {file.suffix for file in kernels_folder(tmp_path).iterdir()} == {".bin"}


@pytest.mark.parametrize(
    "changed",
    [
        KernelSource("toy", SOURCE.text + " ", SOURCE.headers),
        KernelSource("toy", SOURCE.text, {"two.cuh": "#define TWO 2\n"}),
    ],
    ids=["source", "header"],
)
def test_a_changed_source_is_compiled_anew(compiled: list[str], tmp_path: Path, changed: KernelSource) -> None:
    kernel_image(SOURCE, "sm86", tmp_path)
    kernel_image(changed, "sm86", tmp_path)
    assert len(compiled) == 2


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 100])
def test_a_damaged_file_is_not_used(compiled: list[str], tmp_path: Path, content: bytes) -> None:
    kernel_image(SOURCE, "sm86", tmp_path)
    (file,) = kernels_folder(tmp_path).iterdir()
    file.write_bytes(content)
    assert kernel_image(SOURCE, "sm86", tmp_path) == b"toy sm_86"
    assert len(compiled) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(compiled: list[str], tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "kernels").write_text("a file where the folder should be")
    assert kernel_image(SOURCE, "sm86", tmp_path) == b"toy sm_86"
    assert said[1].startswith("The compiled kernels cannot be kept: cannot write ")


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path))
    assert kernels_folder() == tmp_path / "kernels"
