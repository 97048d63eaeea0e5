"""The Inductor backend on the processor: built, kept, found again; what it computes; what it refuses, a line each."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch (extra inductor)")
pytest.importorskip("onnx", reason="needs onnx (extra export) to make the graph")

from trained_graphs import MODALITY, save_bundle, save_images, tensor

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.machine import environment
from espmedsam_edge.runtime.auto import fastest, gates
from espmedsam_edge.runtime.auto.kept_trials import Trial, Tried, depends_on, keep_trial
from espmedsam_edge.runtime.backends.backend import BackendUnavailable, load_backend
from espmedsam_edge.runtime.engines import child
from espmedsam_edge.runtime.engines.compiled_networks import kept_networks
from espmedsam_edge.runtime.inductor import building
from espmedsam_edge.runtime.inductor.building import COMPILER, find_or_build
from espmedsam_edge.runtime.inductor.package import load_package

# Two compilations for all, which take minutes where other tests take the cores.
pytestmark = [pytest.mark.xdist_group("inductor"), pytest.mark.timeout(1800)]

if shutil.which("g++") is None:
    pytest.skip("needs g++ to compile", allow_module_level=True)

HAS_BF16 = bool(building._BF16 & set(environment.cpu().simd))
ARITHMETICS = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not HAS_BF16, reason="needs bfloat16"))]
NAMES = {"fp32": "inductor", "bf16": "inductor:bf16"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the trained bundle and the cache that ``build`` filled, and what it printed."""
    folder = tmp_path_factory.mktemp("built")
    save_bundle(folder / "b.bundle")
    arguments = ["--precision", "fp32", *(["--precision", "bf16"] if HAS_BF16 else [])]
    # Where torch keeps its compiler's checks, and that it need not make those of the processor's instructions.
    torch = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"), "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "espmedsam_edge", "build", folder / "b.bundle", "--backend", "inductor", *arguments],
        env={**os.environ, **torch, "ESPMEDSAM_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture
def bundle(built: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The trained bundle, with a copy of the filled cache."""
    folder, _ = built
    shutil.copytree(folder / "cache", tmp_path / "cache")
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    return Bundle.open(folder / "b.bundle")


@pytest.fixture
def networks(bundle: Bundle, tmp_path: Path) -> Path:
    return tmp_path / "cache" / "inductor"


@pytest.fixture
def compiled(built: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arithmetic of each compilation: in place of the child a copy of what it made before."""
    folder, _ = built
    begun: list[str] = []

    def copy(work: child.Work, request: building.InductorRequest, on_progress: Any) -> dict[str, Any]:
        begun.append(request.arithmetic)
        on_progress("compiling", 0.1)
        time.sleep(0.3)  # seconds in which another may come
        facts = [json.loads(file.read_text()) for file in (folder / "cache" / "inductor").glob("*.json")]
        stem = next(
            file.stem
            for file, found in zip((folder / "cache" / "inductor").glob("*.json"), facts, strict=True)
            if found["arithmetic"] == request.arithmetic
        )
        shutil.copy(next((folder / "cache" / "inductor").glob(f"{stem}-*.pt2")), request.package)
        agreement = {"finite": True, "dice": 1.0, "foreground": 0.2, "expected_foreground": 0.2}
        return {"seconds": 1.0, "peak_memory_bytes": None, "agreement": agreement}

    monkeypatch.setattr(building, "ask", copy)
    return begun


def load(bundle: Bundle, name: str = "inductor", threads: int = 1) -> Any:
    return load_backend(bundle, bundle.graph(), name, threads).backend


def reference(bundle: Bundle) -> Any:
    return load(bundle, "onnxruntime-cpu")


def package_of(networks: Path, arithmetic: str) -> Path:
    stems = [file.stem for file in networks.glob("*.json") if json.loads(file.read_text())["arithmetic"] == arithmetic]
    return next(networks.glob(f"{stems[0]}-*.pt2"))


def test_build_says_what_it_made(built: tuple[Path, str]) -> None:
    folder, printed = built
    assert f"{MODALITY} fp32, inductor: compiled for " in printed
    assert "of a phantom" in printed
    files = list((folder / "cache" / "inductor").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert {file.suffix for file in files} == {".pt2", ".json", ".lock"}
    facts = json.loads(next(file for file in files if file.suffix == ".json").read_text())
    assert facts["graph"] == Bundle.open(folder / "b.bundle").graph().sha256
    assert {"torch", "device", "machine", "driver", "arithmetic", "seconds", "agreement"} <= set(facts)


def test_in_fp32_the_masks_are_onnx_runtimes(bundle: Bundle) -> None:
    backend, other = load(bundle), reference(bundle)
    for seed in range(8):
        found, expected = backend.run(tensor(seed)), other.run(tensor(seed))
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))  # rounding over some sixty layers
        assert ((found >= 0) == (expected >= 0)).mean() >= 0.999
        assert 0 < (expected >= 0).mean() < 1


@pytest.mark.skipif(not HAS_BF16, reason="needs bfloat16")
def test_bf16_passes_the_gate_and_only_then_auto_takes_it(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "b.bundle"
    shutil.copytree(bundle.path, own)
    pictures = save_images(tmp_path / "images", 24)  # so small a network is rough: the truth is what counts
    graph = Bundle.open(own).graph()
    assert "has not passed the gate" in str(fastest.why_not(Bundle.open(own), graph, "inductor:bf16", False))
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "calibrate",
                str(own),
                str(pictures),
                "--check",
                "inductor:bf16",
                "--masks",
                str(pictures.parent / "truth"),
            ]
        )
    assert not ended.value.code, capsys.readouterr()
    assert "gate passed" in capsys.readouterr().out
    checked = Bundle.open(own)
    entry = checked.manifest.accuracy[gates.accuracy_key(graph, "inductor:bf16")]
    assert entry["passed"] is True
    assert entry["versions"]["torch"] == building.torch_version()
    assert fastest.why_not(checked, graph, "inductor:bf16", False) is None


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_what_was_built_is_found_again(bundle: Bundle, compiled: list[str], said: list[str], arithmetic: str) -> None:
    for threads in (1, 2):
        backend = load(bundle, NAMES[arithmetic], threads)
        plural = "s" if threads > 1 else ""
        assert backend.device == f"CPU, {threads} thread{plural}, {arithmetic} arithmetic"
        assert backend.arithmetic == arithmetic
    assert (compiled, said) == ([], [])


@pytest.mark.skipif(not HAS_BF16, reason="needs bfloat16")
def test_networks_beside_each_other_stay_what_they_are(bundle: Bundle) -> None:
    """The system's loader takes a name that it has seen for the library that it loaded by it."""
    first, reduced, again = load(bundle), load(bundle, "inductor:bf16"), load(bundle)
    image = tensor(3)
    exact, rough = first.run(image), reduced.run(image)
    assert np.abs(exact - rough).max() > 1e-3
    np.testing.assert_array_equal(again.run(image), exact)
    first.close()
    first.close()
    reduced.close()
    np.testing.assert_array_equal(again.run(image), exact)


def test_other_threads_go_on_while_it_runs(bundle: Bundle) -> None:
    """torch's own loader holds Python's lock for the whole run."""
    package = load_package(package_of(Path(os.environ["ESPMEDSAM_CACHE"]) / "inductor", "fp32").read_bytes(),
                           bundle.graph(), "cpu")  # fmt: skip
    held: list[bool] = []
    true = package._call

    def call(name: str, *arguments: Any) -> int:
        held.append(bool(getattr(package._library, name)._flags_ & 4))  # ctypes' FUNCFLAG_PYTHONAPI: with the lock
        return true(name, *arguments)

    package._call = call  # type: ignore[method-assign]
    package.run_on_host(tensor(0), 1)
    assert held == [False]


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_threads_that_wait_sleep_unless_told_otherwise(bundle: Bundle, chosen: str | None) -> None:
    script = (
        "import os, sys\nfrom espmedsam_edge.bundle import Bundle\n"
        "from espmedsam_edge.runtime.backends.backend import load_backend\n"
        "bundle = Bundle.open(sys.argv[1])\nload_backend(bundle, bundle.graph(), 'inductor', 1)\n"
        "print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "TRUE", **({"OMP_WAIT_POLICY": chosen} if chosen else {})}
    done = subprocess.run(
        [sys.executable, "-c", script, bundle.path], capture_output=True, text=True, env=environment, check=True
    )
    assert f"OMP_WAIT_POLICY = '{chosen or 'PASSIVE'}'" in done.stderr
    assert done.stdout.strip() == str(chosen)


def test_a_process_that_was_split_off_is_told(bundle: Bundle) -> None:
    """The threads of torch stay in the process that loaded it."""
    backend = load(bundle)
    backend.run(tensor(0))
    child = os.fork()
    if child == 0:
        try:
            backend.run(tensor(0))
        except UserError as error:
            os._exit(0 if "split off (fork)" in error.message else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_frames_that_may_not_be_written_to(bundle: Bundle) -> None:
    image = tensor(1)
    expected = load(bundle).run(image)
    image.flags.writeable = False
    np.testing.assert_array_equal(load(bundle).run(image), expected)
    with pytest.raises(ValueError, match="run wants"):
        load(bundle).run(image[:, :, :32])


def spoil_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def spoil_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def spoil_others(file: Path) -> None:
    file.chmod(0o666)


def spoil_owner(file: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs the superuser, to give a file away")
    os.chown(file, 12345, 12345)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_cut, "it is damaged"),
        (spoil_bit, "it is damaged"),
        (spoil_others, "other users may write to"),
        (spoil_owner, r"belongs to another user \(number 12345\)"),
    ],
)
def test_a_package_that_is_not_what_was_kept_is_compiled_anew(
    bundle: Bundle, networks: Path, compiled: list[str], said: list[str], spoil: Callable[[Path], None], words: str
) -> None:
    spoil(package_of(networks, "fp32"))
    load(bundle).run(tensor(0))
    assert compiled == ["fp32"]
    (line,) = [line for line in said if "is not used" in line]
    assert line.startswith(f"{MODALITY} fp32: Inductor of torch's network in the cache is not used, ")
    assert line.endswith("; compiling anew.")
    assert re.search(words, line)
    load(bundle)
    assert compiled == ["fp32"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("torch", "it is of torch 9.9.0 and this is"),
        ("machine", "it is of machine Another: avx2 and this is"),
    ],
)
def test_a_package_of_another_torch_or_machine_is_left_behind(
    bundle: Bundle, networks: Path, compiled: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], change: str, words: str,
) -> None:  # fmt: skip
    shutil.rmtree(networks)
    with pytest.MonkeyPatch.context() as before:
        if change == "torch":
            before.setattr(building, "torch_version", lambda: "9.9.0")
        else:
            before.setattr(building, "cpu", lambda: environment.Cpu("Another", 1, 1, 1, ("avx2",)))
        find_or_build(bundle, bundle.graph(), "cpu", "fp32")
    assert not building.is_built(bundle.graph(), "cpu", "fp32")
    load(bundle).run(tensor(0))
    assert compiled == ["fp32", "fp32"]
    assert [words in line for line in said if "is not used" in line] == [True]
    if change == "torch":
        left = [network for network in kept_networks(COMPILER) if network.unwanted]
        assert [network.unwanted for network in left] == [f"Inductor of torch is {building.torch_version()} now"]
        main_ends(["engines", "clean"])
        assert "9.9.0 for cpu, fp32: Inductor of torch is" in capsys.readouterr().out
        assert len(kept_networks(COMPILER)) == 1


def main_ends(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


def test_engines_lists_verifies_and_cleans(bundle: Bundle, networks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(list(networks.glob("*.pt2")))
    main_ends(["engines", "list"])
    shown = capsys.readouterr().out
    assert f"{MODALITY} fp32, Inductor of torch {building.torch_version()} for cpu, fp32, " in shown
    assert f"{count} network{'s' if count > 1 else ''} that Inductor of torch compiled" in shown
    main_ends(["engines", "clean"])
    assert len(list(networks.glob("*.pt2"))) == count
    spoil_bit(package_of(networks, "fp32"))
    main_ends(["engines", "verify"], 1)
    assert f"damaged: {MODALITY} fp32, Inductor" in capsys.readouterr().out
    main_ends(["engines", "clean"])
    assert len(list(networks.glob("*.pt2"))) == count - 1
    main_ends(["engines", "clean", "--all"])
    assert list(networks.iterdir()) == []


def test_a_network_whose_bundle_is_gone_is_cleaned(bundle: Bundle, networks: Path, tmp_path: Path) -> None:
    for file in networks.glob("*.json"):
        file.write_text(file.read_text().replace(str(bundle.path), str(tmp_path / "gone.bundle")))
    assert {network.unwanted for network in kept_networks(COMPILER)} == {
        f"its bundle {tmp_path / 'gone.bundle'} is gone"
    }


def test_of_two_builds_at_once_one_compiles(
    bundle: Bundle, networks: Path, compiled: list[str], said: list[str]
) -> None:
    shutil.rmtree(networks)
    found: list[bool] = []

    def build() -> None:
        found.append(find_or_build(bundle, bundle.graph(), "cpu", "fp32").built_now)

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled == ["fp32"]
    assert sorted(found) == [False, True]
    assert any("Another process is building" in line for line in said)


def test_what_is_wrong_is_not_kept(
    bundle: Bundle, networks: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(networks)
    copy = building.ask

    def wrong(*arguments: Any) -> dict[str, Any]:
        answer = copy(*arguments)
        return {**answer, "agreement": {**answer["agreement"], "foreground": 0.0, "dice": 0.0}}

    monkeypatch.setattr(building, "ask", wrong)
    with pytest.raises(BackendUnavailable, match=r"Inductor made of fp32\.onnx is wrong: it gives an empty mask"):
        load(bundle)
    assert list(networks.glob("*.pt2")) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inductor:tpu", "knows no device 'tpu'"),
        ("inductor:cpu:fp16", "on a processor backend inductor computes no FP16"),
        ("inductor:cpu:fp61", "unknown arithmetic 'fp61'"),
        ("inductor:cuda", "there is no NVIDIA GPU with a driver here"),
    ],
)
def test_what_cannot_be_is_one_line(bundle: Bundle, no_gpu: None, compiled: list[str], name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(bundle, name)
    assert "\n" not in str(caught.value)
    assert compiled == []


def test_a_processor_without_bfloat16(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "cpu", lambda: environment.Cpu("Old", 1, 1, 1, ("avx2", "fma")))
    with pytest.raises(BackendUnavailable, match="this processor has no bfloat16"):
        load(bundle, "inductor:bf16")


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (None, "there is no g\\+\\+. Install it: sudo apt-get install g\\+\\+"),
        ("nowhere-g++", "nowhere-g\\+\\+, is not there"),
    ],
)
def test_without_a_compiler_nothing_is_begun_and_what_is_built_runs(
    bundle: Bundle, networks: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    compiler: str | None, words: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", compiler) if compiler else monkeypatch.delenv("CXX", raising=False)
    load(bundle).run(tensor(0))
    shutil.rmtree(networks)
    with pytest.raises(BackendUnavailable, match=words):
        load(bundle)
    assert compiled == []
    assert not networks.exists()


def test_an_interrupted_build_leaves_nothing(
    bundle: Bundle, networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the child, nor what it had written."""
    shutil.rmtree(networks)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))

    def interrupt(phase: str, fraction: float) -> None:
        if phase == "tracing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_or_build(bundle, bundle.graph(), "cpu", "fp32", on_progress=interrupt)
    assert [file.suffix for file in networks.iterdir()] == [".lock"]
    assert list((tmp_path / "tmp").iterdir()) == []
    main_ends(["engines", "clean"])
    assert list(networks.iterdir()) == []


def test_a_build_that_takes_too_long_is_ended_with_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_LIMIT_S", 0.2)
    with pytest.raises(UserError, match=r"Inductor's build of fp32\.onnx was not done after 0 s and was ended"):
        find_or_build(bundle, bundle.graph(), "cpu", "fp32", force=True)


def test_without_torch(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "why_missing", lambda module, extra: f"{module} is not installed. Install {extra}.")
    with pytest.raises(BackendUnavailable, match=r"torch is not installed\. Install inductor"):
        load(toy_bundle)


def test_an_old_torch(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "torch_version", lambda: "2.7.1")
    with pytest.raises(BackendUnavailable, match=r"torch 2\.7\.1 is too old: .* wants 2\.8"):
        load(toy_bundle)


def test_auto_never_compiles_and_takes_it_where_a_trial_found_it_faster(
    bundle: Bundle, networks: Path, no_gpu: None, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle.graph()
    tried = [Tried(precision="fp32", graph_sha256=graph.sha256, backend="inductor", ratio=0.5, dice=1.0)]
    keep_trial(Trial(made_of=depends_on(graph, 1), date="2026-11-28", milliseconds=1.0, tried=tried))
    chosen = fastest.load_fastest(bundle, threads=1)
    assert chosen.backend.name == "inductor"
    assert chosen.why == "0.50 of onnxruntime's time, tried on 2026-11-28"
    shutil.rmtree(networks)
    assert fastest.load_fastest(bundle, threads=1).backend.name.startswith("onnxruntime")
    assert fastest.why_not(bundle, graph, "inductor", False) is not None
    assert compiled == []


def test_a_command_segments_with_it(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = save_images(tmp_path / "images", 2)
    for name, folder in (("inductor", "a"), ("onnxruntime-cpu", "b")):
        arguments = ["infer", str(bundle.path), str(pictures), "--backend", name]
        main_ends([*arguments, "--out", str(tmp_path / folder)])
    import cv2

    for file in (tmp_path / "b").glob("*.png"):
        mask, expected = (cv2.imread(str(tmp_path / folder / file.name)) for folder in "ab")
        assert mask is not None
        assert np.mean(mask == expected) >= 0.999
    assert "inductor (CPU" in capsys.readouterr().out


@pytest.mark.skipif("ESPMEDSAM_INDUCTOR_PRESETS" not in os.environ, reason="set ESPMEDSAM_INDUCTOR_PRESETS: minutes")
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_the_preset_of_the_weights_that_came_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arithmetic: str
) -> None:
    """The tiny preset is built above, the other one here."""
    from espmedsam_edge.phantoms import phantom
    from espmedsam_edge.runtime.bundle_choice import choose_bundle
    from espmedsam_edge.runtime.segmenter import Segmenter

    bundle = choose_bundle(None, "microscopy").bundle_of("microscopy")
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    picture, _ = phantom("microscopy", seed=2, size=(300, 400))
    with (
        Segmenter.load(bundle, "microscopy", "fp32", NAMES[arithmetic]) as segmenter,
        Segmenter.load(bundle, "microscopy", "fp32", "onnxruntime-cpu") as expected,
    ):
        mask, other = segmenter.segment(picture).mask, expected.segment(picture).mask
    assert 0 < np.count_nonzero(other) < other.size
    assert np.mean(mask == other) >= (0.999 if arithmetic == "fp32" else 0.99)
