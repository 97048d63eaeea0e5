"""scripts/gpu_check.sh where there is no GPU: it must not look like a pass."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from espmedsam_edge.runtime.cuda_api import unavailable

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    return subprocess.run(
        [bash, SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )


def test_without_a_gpu_it_says_so_and_fails() -> None:
    if unavailable() is None:
        pytest.skip("this machine has a GPU: the script would check it")
    ended = _check()
    assert ended.returncode == 2
    assert "nothing was checked: this machine has no usable GPU" in ended.stderr


@pytest.mark.parametrize("arguments", [["--what"], ["--only", "bench"], ["--wheels"]])
def test_wrong_options(arguments: list[str]) -> None:
    assert _check(*arguments).returncode == 2
