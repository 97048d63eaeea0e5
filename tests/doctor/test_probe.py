"""Whatever a native package does to the child process, the answer is a value here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from espmedsam_edge.doctor import probe


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> object:
    def install(text: str, module: str = "json") -> None:
        monkeypatch.setitem(probe.SCRIPTS, "thing", (("no_such_package", module), text))

    return install


def test_values_are_merged_and_foreign_lines_ignored(script) -> None:  # type: ignore[no-untyped-def]
    script("say(version='1.2')\nprint('{loud package}')\nsay(init=0)")
    assert probe.ask("thing") == probe.Answer(True, {"version": "1.2", "init": 0})
    assert probe.ask("thing").works


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import os, signal; say(version='1'); os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV"),
        ("say(version='1'); raise OSError('libthing.so: no such file')", "libthing.so: no such file"),
        ("say(version='1'); sys.exit('its builder could not be made')", "its builder could not be made"),
        ("say(version='1'); sys.exit(7)", "ended with code 7"),
    ],
)
def test_a_child_that_ends_badly_says_why_and_keeps_what_it_said(script, text: str, error: str) -> None:  # type: ignore[no-untyped-def]
    script(text)
    assert probe.ask("thing") == probe.Answer(True, {"version": "1"}, error)


def test_a_child_that_hangs_is_given_up(script) -> None:  # type: ignore[no-untyped-def]
    script("import time; time.sleep(60)")
    assert probe.ask("thing", timeout_s=0.5).error == "gave no answer in 0.5 s"


def test_a_missing_module_is_not_asked(script) -> None:  # type: ignore[no-untyped-def]
    script("raise SystemExit('was run')", module="no_such_package.inside")
    assert probe.ask("thing") == probe.Answer(False)


@pytest.mark.parametrize("name", ["onnxruntime", "opencv"])
def test_the_base_packages_answer(name: str) -> None:
    answer = probe.ask(name)
    assert answer.works, answer.error
    assert answer.values["version"]


def test_openvino_answers_with_its_devices() -> None:
    if find_spec("openvino") is None:
        pytest.skip("needs the extra openvino")
    answer = probe.ask("openvino")
    assert answer.works, answer.error
    assert answer.values["version"][:2] == "20"
    assert answer.values["devices"]["CPU"]


@pytest.mark.parametrize("hidden", [False, True], ids=["there", "missing"])
def test_nvrtc_answers_or_says_that_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    pytest.importorskip("cuda.bindings", reason="needs cuda-python (cuda-bindings)")
    if hidden:  # cuda-python says so when it finds no libnvrtc
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "sitecustomize.py").write_text(
            "from cuda.bindings import nvrtc\n"
            "def nvrtcVersion():\n    raise RuntimeError('Failed to dlopen libnvrtc')\n"
            "nvrtc.nvrtcVersion = nvrtcVersion\n"
        )
    answer = probe.ask("nvrtc")
    if hidden:
        assert answer.error == "NVRTC, which compiles the kernels, is not installed."
    else:
        assert answer.works, answer.error
        assert answer.values["version"].partition(".")[0] in ("12", "13")
