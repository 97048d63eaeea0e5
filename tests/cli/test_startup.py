"""Importing the package and listing the commands load nothing heavy (how fast they are: benchmarks/startup.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "onnx", "onnxruntime", "cv2", "scipy", "numpy", "pydantic", "matplotlib", "av", "tensorrt"}
HELP = "from espmedsam_edge.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"


@pytest.mark.parametrize("code", ["import espmedsam_edge", HELP], ids=["import", "help"])
def test_nothing_heavy_is_loaded(code: str) -> None:
    code += f"\nimport sys; print(sorted({HEAVY} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.splitlines()[-1] == "[]"
    assert ("infer" in shown) == ("--help" in code)


def test_a_run_loads_no_more_than_it_needs() -> None:
    code = "import sys, espmedsam_edge.runtime.inference\nprint([*sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    heavy = ("torch", "onnx", "onnxruntime", "matplotlib", "av", "tensorrt", "openvino", "scipy", "skimage", "pydicom")
    heavy += ("espmedsam_edge.runtime.inductor", "espmedsam_edge.runtime.backends.device_backend")
    assert [name for name in heavy if f"'{name}'" in loaded] == []


def test_the_end_of_a_run_looks_for_no_garbage(tmp_path: Path) -> None:
    code = "import atexit, gc; gc.freeze(); atexit.register(lambda: print(len(gc.get_objects()) < 100)); "
    code += "from espmedsam_edge.cli import main; main(['infer', 'missing.png'])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout == "True\n"
    assert ended.stderr == "failed: no file missing.png. Check the name.\n"


def test_modules_are_loaded_without_a_look_for_garbage(tmp_path: Path) -> None:
    """It would take an eighth of that time."""
    code = """
import gc, sys
name, looks = "espmedsam_edge.runtime.inference", []
def look(phase, _):
    looks.append(name in sys.modules and not hasattr(sys.modules[name], "Inference"))
gc.callbacks.append(look)
from espmedsam_edge.cli import main
try: main(["infer", "missing.png"])
except SystemExit: print(any(looks), gc.isenabled())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout == "False True\n"


def test_ctrl_c_while_the_program_is_loaded_is_one_line() -> None:
    code = "import sys\nclass Interrupted:\n def find_spec(self, name, *rest):\n"
    code += "  if name == 'typer': raise KeyboardInterrupt\nsys.meta_path.insert(0, Interrupted())\n"
    code += "from espmedsam_edge.__main__ import main\nmain()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Aborted!\n")


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    """For every command: here for one that makes a folder, stopped while it is in it."""
    code = "import os, signal\nfrom espmedsam_edge.bundle import BundleDraft\nfrom espmedsam_edge.cli import main\n"
    code += "BundleDraft.new_file = lambda *given: os.kill(os.getpid(), signal.SIGTERM)\n"
    code += f"main(['weights', '--modality', 'fundus', '--out', {str(tmp_path / 'new.bundle')!r}])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
