"""The child that runs a graph by a plugin of ONNX Runtime, as far as a machine without a GPU goes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from host_build import compiler
from plugin_provider import LIBRARY, NO_DEVICE, PROVIDER, link_libraries, package_folder, run_in_child
from toy_bundles import TOY_SIZE, save_toy_graph

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.runtime.segmenter import Segmenter

pytest.importorskip("onnxruntime", minversion="1.23", reason="needs an ONNX Runtime that takes plugins")


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(6).standard_normal((1, 3, TOY_SIZE, TOY_SIZE)).astype(np.float32)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    save_toy_graph(tmp_path / "toy.onnx")
    return tmp_path / "toy.onnx"


@pytest.fixture
def package() -> Path:
    found = package_folder()
    if found is None:
        pytest.skip("needs the TensorRT-RTX plugin of ONNX Runtime (extra rtx-check)")
    return found


def test_a_device_is_chosen_and_its_logits_are_the_graph_s(
    toy_bundle: Bundle, image: np.ndarray, tmp_path: Path
) -> None:
    entry = toy_bundle.manifest.graphs[0]
    ended, logits = run_in_child(toy_bundle.graph_path(entry), image, tmp_path, "--provider", "CPUExecutionProvider")
    assert ended.returncode == 0, ended.stderr
    with Segmenter.load(toy_bundle, backend="onnxruntime-cpu") as segmenter:
        assert logits is not None
        np.testing.assert_array_equal(logits, segmenter.choice.backend.run(image))


def test_a_provider_that_was_not_registered_offers_none(graph: Path, image: np.ndarray, tmp_path: Path) -> None:
    ended, logits = run_in_child(graph, image, tmp_path)
    assert (ended.returncode, logits) == (NO_DEVICE, None)
    assert f"{PROVIDER} offers no device; there are: CPUExecutionProvider" in ended.stdout


def test_what_the_package_s_import_writes_beside_its_libraries_does_not_matter(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "libtrt.so.1.7.1").write_bytes(b"\x7fELF and so on")
    (package / "libcudart.so.13.4").write_bytes(b"\x7fELF and so on")
    link_libraries(package, tmp_path / "before")
    (package / "libtrt.so").symlink_to("libtrt.so.1.7.1")
    (package / "libtrt.so.1").symlink_to("libtrt.so.1.7.1")
    (package / "libcudart.so.13").write_text("libcudart.so.13.4")  # where the file system has no links
    link_libraries(package, tmp_path / "after")
    links = [{file.name: file.readlink() for file in (tmp_path / when).iterdir()} for when in ("before", "after")]
    assert links[0] == links[1]
    assert links[0] == {
        "libtrt.so": package / "libtrt.so.1.7.1",
        "libtrt.so.1": package / "libtrt.so.1.7.1",
        "libcudart.so": package / "libcudart.so.13.4",
        "libcudart.so.13": package / "libcudart.so.13.4",
    }


def test_with_a_driver_without_a_gpu_the_plugin_registers_and_offers_none(
    package: Path, graph: Path, image: np.ndarray, tmp_path: Path
) -> None:
    """Shows that its libraries are found; the driver's are stand-ins that answer errors."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", package / LIBRARY], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    driver = [name for name in names if name.startswith("cu") and name[2].isupper()]
    stand_ins = {"libcuda.so.1": driver, "libnvidia-ml.so.1": [name for name in names if name.startswith("nvml")]}
    folder = tmp_path / "libraries"
    link_libraries(package, folder)
    for library, functions in stand_ins.items():
        source = folder / f"{library}.c"
        text = 'const char *nvmlErrorString(void) { return "a stand-in"; }\n' if "ml" in library else ""
        text += "".join(f"int {name}(void) {{ return 100; }}\n" for name in functions if name != "nvmlErrorString")
        source.write_text(text)
        command = [compiler(), "-x", "c", "-shared", "-fPIC", str(source), "-o", str(folder / library)]
        subprocess.run(command, check=True)
    ended, logits = run_in_child(graph, image, tmp_path, "--library", str(package / LIBRARY), libraries=(folder,))
    assert (ended.returncode, logits) == (NO_DEVICE, None), ended.stderr
    assert f"{PROVIDER} offers no device" in ended.stdout
