"""What "auto" takes: the fastest of what passed a gate, by expectation or by a trial; never what is slower or wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toy_bundles import save_toy_bundle, toy_graph

from espmedsam_edge import Segmenter
from espmedsam_edge.bundle import Bundle, Graph, write_bundle
from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.machine import children, environment
from espmedsam_edge.runtime.auto import fastest, kept_trials, trial
from espmedsam_edge.runtime.auto.kept_trials import Trial, Tried, depends_on, find_trial, keep_trial
from espmedsam_edge.runtime.auto.trial import try_backends
from espmedsam_edge.runtime.backends import onnxruntime_backend
from espmedsam_edge.runtime.backends.backend import BACKENDS, BackendUnavailable

if find_spec("openvino") is None:
    pytest.skip("needs the extra openvino", allow_module_level=True)

AMX = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> Path:
    """An empty cache of this test alone."""
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the processor have these instructions; to begin with those of a new Xeon."""
    true = environment.cpu()

    def show(*simd: str) -> None:
        for module in (fastest, kept_trials):
            monkeypatch.setattr(module, "cpu", lambda: replace(true, simd=simd))

    show(*AMX)
    return show


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A toy bundle with a graph that calls itself INT8 besides; no gate has passed anything."""
    made = save_toy_bundle(tmp_path / "two.bundle")
    with write_bundle(made.path, extend=True) as draft:
        draft.new_file("int8.onnx").write_bytes(toy_graph(weights=(1.0, -0.5, 0.251)))
        entry = draft.graph("int8.onnx", modality="fundus", precision="int8", image_size=64)
        assert draft.manifest is not None
        draft.manifest = draft.manifest.model_copy(update={"graphs": [*draft.manifest.graphs, entry]})
    return Bundle.open(made.path)


def gated(bundle: Bundle, *passed: str, **changes: object) -> Bundle:
    """The bundle with entries for what passed: "int8", "fp32@openvino:bf16", ...; ``changes`` to each of them."""
    accuracy = {}
    for what in passed:
        sha256 = bundle.graph("fundus", what.partition("@")[0]).sha256
        checked = {"passed": True, "graph_sha256": sha256} if "@" in what else {}
        accuracy[f"fundus/{what}"] = {"dice_loss_mean": 0.2, "budget": 0.5, **checked, **changes}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"accuracy": accuracy}))


EVERYTHING = ("int8", "fp32@openvino:bf16", "int8@openvino:bf16")


def taken(bundle: Bundle, precision: str | None = None) -> str:
    with Segmenter.load(bundle, precision=precision, threads=1) as segmenter:
        return f"{segmenter.precision} on {segmenter.choice.backend.name}"


@pytest.mark.parametrize(
    ("passed", "simd", "expected"),
    [
        ((), AMX, "fp32 on onnxruntime"),
        (("fp32@openvino:bf16",), AMX, "fp32 on openvino:bf16"),
        (("fp32@openvino:bf16",), ("avx2", "avx512_vnni"), "fp32 on onnxruntime"),
        (("int8",), AMX, "int8 on openvino"),
        (("int8",), ("avx2", "avx_vnni"), "int8 on openvino"),
        (("int8",), ("avx2",), "fp32 on onnxruntime"),
        (("int8@openvino:bf16",), AMX, "fp32 on onnxruntime"),
        (EVERYTHING, AMX, "int8 on openvino:bf16"),
        (EVERYTHING, (), "fp32 on onnxruntime"),
    ],
)
def test_only_what_passed_its_gate_and_is_fast_here_is_taken(
    bundle: Bundle, processor: Any, passed: tuple[str, ...], simd: tuple[str, ...], expected: str
) -> None:
    processor(*simd)
    assert taken(gated(bundle, *passed)) == expected


@pytest.mark.parametrize("changes", [{"passed": False}, {"graph_sha256": "0" * 64}, {"passed": "yes"}])
def test_a_check_that_failed_or_was_of_another_graph_counts_for_nothing(
    bundle: Bundle, changes: dict[str, object]
) -> None:
    assert taken(gated(bundle, "fp32@openvino:bf16", **changes)) == "fp32 on onnxruntime"


def test_a_gate_over_its_budget_counts_for_nothing(bundle: Bundle) -> None:
    assert taken(gated(bundle, "int8", dice_loss_mean=0.6)) == "fp32 on onnxruntime"
    assert taken(gated(bundle, "int8", dice_loss_mean=None)) == "fp32 on onnxruntime"


def test_a_precision_that_is_named_is_computed_as_it_says(bundle: Bundle) -> None:
    everything = gated(bundle, *EVERYTHING)
    assert taken(everything, "fp32") == "fp32 on onnxruntime"
    assert taken(everything, "int8") == "int8 on openvino"
    assert taken(bundle, "int8") == "int8 on openvino"  # asked for, so no gate is asked


def test_without_openvino_nothing_changes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espmedsam_edge.machine.installation.installed", lambda module: False)
    assert taken(gated(bundle, *EVERYTHING)) == "fp32 on onnxruntime"


def test_what_does_not_load_gives_way_and_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise BackendUnavailable("the plug-in refuses it.", exit_code=1)

    monkeypatch.setattr("espmedsam_edge.runtime.backends.openvino_backend.load", refuse)
    with Segmenter.load(gated(bundle, *EVERYTHING), threads=1) as segmenter:
        assert (segmenter.precision, segmenter.choice.backend.name) == ("fp32", "onnxruntime")
        assert any(line.endswith("openvino: the plug-in refuses it.") for line in segmenter.choice.passed_over)


# A trial that was kept.


def kept(bundle: Bundle, ratios: dict[str, float | None], dice: float = 1.0, threads: int = 1) -> Trial:
    """Keep a trial that found these times: "int8 on openvino" -> part of the reference's."""
    tried = []
    for title, ratio in ratios.items():
        precision, _, backend = title.partition(" on ")
        graph = bundle.graph("fundus", precision)
        what = {"precision": graph.precision, "graph_sha256": graph.sha256, "backend": backend}
        tried.append(Tried(**what, ratio=ratio, dice=dice, failed="" if ratio is not None else "it crashed."))
    made_of = depends_on(bundle.graph("fundus"), threads)
    found = Trial(made_of=made_of, date="2026-11-28", milliseconds=400, tried=tried)
    assert keep_trial(found) is not None
    return found


@pytest.mark.parametrize(
    ("ratios", "expected", "why"),
    [
        (
            {"fp32 on openvino:bf16": 0.4, "int8 on openvino": 0.5, "fp32 on openvino": 0.9},
            "fp32 on openvino:bf16",
            "0.40 of onnxruntime's time, tried on 2026-11-28",
        ),
        ({"fp32 on openvino:bf16": None, "int8 on openvino": 0.5}, "int8 on openvino", "0.50 of"),
        ({"fp32 on openvino": 0.8}, "fp32 on openvino", "0.80 of"),
        ({"fp32 on openvino": 0.99, "int8 on openvino": 1.4}, "fp32 on onnxruntime", "nothing was faster"),
    ],
)
def test_the_fastest_of_a_trial_is_taken_and_nothing_slower_than_the_reference(
    bundle: Bundle, ratios: dict[str, float | None], expected: str, why: str
) -> None:
    everything = gated(bundle, *EVERYTHING)
    kept(everything, ratios)
    assert taken(everything) == expected
    with Segmenter.load(everything, threads=1) as segmenter:
        assert why in segmenter.choice.why


def test_a_trial_does_not_stand_for_a_gate(bundle: Bundle) -> None:
    kept(bundle, {"fp32 on openvino:bf16": 0.4, "int8 on openvino": 0.5, "fp32 on openvino": 0.9})
    assert taken(bundle) == "fp32 on openvino"


def test_what_gave_another_mask_in_a_trial_is_not_taken(bundle: Bundle) -> None:
    everything = gated(bundle, *EVERYTHING)
    kept(everything, {"fp32 on openvino:bf16": 0.4}, dice=0.5)
    assert taken(everything) == "fp32 on onnxruntime"


def test_a_trial_holds_for_its_graph_threads_processor_and_versions(
    bundle: Bundle, tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle.graph("fundus")
    kept(bundle, {"fp32 on openvino": 0.5})
    assert find_trial(graph, 1) is not None
    assert find_trial(graph, 2) is None
    assert find_trial(graph.model_copy(update={"sha256": "1" * 64}), 1) is None
    with monkeypatch.context() as changed:
        changed.setattr(kept_trials, "version", lambda name: "2031.1")
        assert find_trial(graph, 1) is None
    processor("avx2")
    assert find_trial(graph, 1) is None


def test_where_nothing_was_ever_tried_versions_are_not_looked_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding them takes longer than seeing that there is no folder."""
    asked: list[str] = []
    monkeypatch.setattr(kept_trials, "version", lambda name: asked.append(name) or "1")
    assert find_trial(bundle.graph("fundus"), 1) is None
    assert asked == []
    kept(bundle, {"fp32 on openvino": 0.5})
    assert find_trial(bundle.graph("fundus"), 1) is not None
    assert asked


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:50]), "it is damaged"),
        (lambda file: file.write_text(file.read_text().replace("0.5", "-0.5")), "it is damaged"),
        (lambda file: file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 2')), "dam"),
        (lambda file: file.chmod(0o666), "other users may write"),
    ],
)
def test_a_trial_that_is_damaged_or_foreign_is_told_and_not_used(
    bundle: Bundle, cache: Path, said: list[str], spoil: Any, words: str
) -> None:
    kept(bundle, {"fp32 on openvino": 0.5})
    (file,) = (cache / "trials").iterdir()
    spoil(file)
    assert taken(bundle) == "fp32 on onnxruntime"
    assert len(said) == 1
    assert words in said[0]
    assert "bench BUNDLE --choose" in said[0]


def test_a_trial_that_cannot_be_kept_is_one_line(bundle: Bundle, cache: Path, said: list[str]) -> None:
    cache.write_text("a file where the folder should be")
    made_of = depends_on(bundle.graph("fundus"), 1)
    assert keep_trial(Trial(made_of=made_of, date="2026-11-28", milliseconds=1, tried=[])) is None
    assert len(said) == 1


# On a GPU.

H200 = "NVIDIA H200|9|0|132|150000000000|140000000000|0|1.94"


@pytest.fixture
def card(gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Call it with the backends that work on a GPU that is there then; gives those that were loaded, as they are."""
    loaded: list[str] = []

    def put_in(*usable: str) -> list[str]:
        gpu(H200)
        monkeypatch.setattr(fastest, "built_here", lambda name, graph: True)
        for name in fastest.ON_GPU:
            module: Any = ModuleType(f"{name}_double")
            module.unavailable = lambda name, there=name in usable: None if there else f"{name} is not there."

            def load(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> Any:
                loaded.append(name)
                return replaced_name(onnxruntime_backend.load("onnxruntime-cpu", bundle, graph, threads), name)

            module.load = load
            monkeypatch.setitem(sys.modules, module.__name__, module)
            monkeypatch.setitem(BACKENDS, name, module.__name__)
        return loaded

    return put_in


def replaced_name(backend: Any, name: str) -> Any:
    backend.name = name
    return backend


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (fastest.ON_GPU, "tensorrt"),
        (("tensorrt-rtx", "onnxruntime-cuda"), "tensorrt-rtx"),
        (("inductor", "onnxruntime-cuda"), "inductor"),
        (("onnxruntime-cuda",), "onnxruntime-cuda"),
        ((), "onnxruntime"),
    ],
)
def test_on_a_card_the_best_that_works_is_taken_and_a_trial_is_advised_where_there_are_several(
    bundle: Bundle, card: Callable[..., list[str]], usable: tuple[str, ...], expected: str
) -> None:
    card(*usable)
    with Segmenter.load(bundle, threads=1) as segmenter:
        assert segmenter.choice.backend.name == expected
        assert ("bench BUNDLE --choose" in segmenter.choice.why) == bool(usable)  # of ONNX Runtime there are two
        for name in fastest.ON_GPU[: fastest.ON_GPU.index(expected) if usable else None]:
            assert any(f"{name} is not there." in line for line in segmenter.choice.passed_over)


def test_on_a_card_what_would_have_to_be_compiled_first_is_left_out(
    bundle: Bundle, card: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    card("inductor", "onnxruntime-cuda")
    monkeypatch.setattr(fastest, "built_here", lambda name, graph: False)
    assert taken(bundle) == "fp32 on onnxruntime-cuda"


def test_on_a_card_a_trial_decides(bundle: Bundle, card: Callable[..., list[str]]) -> None:
    card(*fastest.ON_GPU)
    kept(bundle, {"fp32 on onnxruntime-cuda": 0.021, "fp32 on inductor": 0.0048, "fp32 on tensorrt": None})
    with Segmenter.load(bundle, threads=1) as segmenter:
        assert segmenter.choice.backend.name == "inductor"
        assert segmenter.choice.why.startswith("0.0048 of onnxruntime's time, tried on")


def test_a_trial_of_another_card_does_not_count(
    bundle: Bundle, card: Callable[..., list[str]], gpu: Callable[[str], None]
) -> None:
    card(*fastest.ON_GPU)
    kept(bundle, {"fp32 on onnxruntime-cuda": 0.02})
    assert taken(bundle) == "fp32 on onnxruntime-cuda"
    gpu(H200.replace("H200", "L4"))
    assert taken(bundle) == "fp32 on tensorrt"


def test_a_card_whose_engines_fail_to_load_leaves_the_cpu(
    bundle: Bundle, card: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = card("inductor", "onnxruntime-cuda")
    for name in ("inductor", "onnxruntime-cuda"):

        def refuse(name: str, *_: object) -> None:
            tried.append(name)
            raise BackendUnavailable(f"{name} does not start.", exit_code=1)

        monkeypatch.setattr(sys.modules[f"{name}_double"], "load", refuse)
    assert taken(bundle) == "fp32 on onnxruntime-cpu"
    assert tried == ["inductor", "onnxruntime-cuda", "onnxruntime-cuda:nhwc"]  # each once


def test_the_trial_times_what_the_card_has(
    bundle: Bundle, card: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    card("inductor", "onnxruntime-cuda")
    monkeypatch.setattr(children, "_START", CHILD)
    monkeypatch.setattr(trial, "_SECONDS", 0.0)
    found, passed_over = try_backends(bundle, threads=1)
    results = {f"{one.precision} on {one.backend}": one for one in found.tried}
    cuda = "fp32 on onnxruntime-cuda"
    assert set(results) == {"fp32 on openvino", "fp32 on inductor", cuda, f"{cuda}:nhwc"}
    assert results["fp32 on inductor"].usable
    assert results["fp32 on onnxruntime-cuda"].usable
    assert "not fp32 on tensorrt: tensorrt is not there." in passed_over


# The trial itself: real processes, whose graphs take no time.

CHILD = """
import os, signal, sys, time
sys.path[0] = sys.argv[1]
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.auto import trial
true = trial.load_backend
def load(bundle, graph, backend, threads):
    what = f"{graph.precision} on {backend}"
    if what == "fp32 on openvino":
        raise UserError("no such layer.", "Update it.")
    if what == "int8 on openvino":
        print("a line of a library's own", flush=True)
        print("terminate called", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    choice = true(bundle, graph, "onnxruntime-cpu" if "inductor" in backend or "cuda" in backend else backend, threads)
    run = choice.backend.run
    if what == "fp32 on openvino:bf16":
        choice.backend.run = lambda image: time.sleep(600)
    if what == "int8 on openvino:bf16":
        choice.backend.run = lambda image: -run(image)
    return choice
trial.load_backend = load
trial.main()
"""


def test_what_crashes_hangs_or_refuses_is_a_line_of_the_trial(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_START", CHILD)
    monkeypatch.setattr(trial, "_RUN_S", 3.0)
    monkeypatch.setattr(trial, "_SECONDS", 0.0)
    found, passed_over = try_backends(gated(bundle, *EVERYTHING), threads=1)
    assert passed_over == []
    results = {f"{one.precision} on {one.backend}": one for one in found.tried}
    assert {title: one.failed for title, one in results.items()} == {
        "fp32 on openvino": "no such layer. Update it.",
        "fp32 on openvino:bf16": "it gave no answer within 3 s.",
        "int8 on onnxruntime-cpu": "",
        "int8 on openvino": "it crashed (SIGSEGV): terminate called.",
        "int8 on openvino:bf16": "",
    }
    assert results["int8 on onnxruntime-cpu"].usable
    assert results["int8 on onnxruntime-cpu"].dice == 1
    assert not results["int8 on openvino:bf16"].usable  # its mask is the negative
    assert found.milliseconds > 0


def test_the_command_tries_keeps_and_shows_and_auto_goes_by_it(
    bundle: Bundle, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "_SECONDS", 0.0)
    monkeypatch.setattr(kept_trials, "FASTER", 1e6)  # everything counts as faster, so that something is
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(bundle.path), "--choose", "--threads", "1"])
    assert ended.value.code in (None, 0)
    out = capsys.readouterr().out
    assert re.search(r"fp32 on onnxruntime-cpu\s+1\.000\s+[\d.]+ ms", out)
    assert re.search(r"fp32 on openvino\s+\d+\.\d+\s+mask 100\.00% Dice", out)
    assert "not int8 on openvino: calibrate's gate has not passed the int8 graph." in out
    assert re.search(r"not fp32 on openvino:bf16: .* --check openvino:bf16", out)
    assert "--backend auto takes fp32 on openvino here from now on" in out
    assert taken(bundle) == "fp32 on openvino"


def test_the_trial_is_written_as_json_and_as_a_page(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = kept(bundle, {"fp32 on openvino": 0.5, "fp32 on openvino:bf16": None})
    monkeypatch.setattr(trial, "try_backends", lambda *_: (found, ["not int8 on openvino: its gate."]))
    files = [tmp_path / "out" / name for name in ("trial.json", "trial.md")]
    command = ["bench", str(bundle.path), "--choose", "--threads", "1", "--json", str(files[0])]
    for _ in range(2):  # what this program wrote is replaced
        with pytest.raises(SystemExit) as ended:
            main([*command, "--markdown", str(files[1])])
        assert ended.value.code in (None, 0)
    data = json.loads(files[0].read_text())
    assert (data["kind"], data["reference_ms"], data["taken"]) == ("trial", 400.0, "fp32 on openvino")
    assert [(one["backend"], one["ratio"]) for one in data["tried"]] == [("openvino", 0.5), ("openvino:bf16", None)]
    assert data["environment"]["cpu"]["model"]
    page = files[1].read_text()
    assert re.search(r"\| fp32 on openvino +\| +0\.500 \| mask 100\.00% Dice", page)
    assert "fails: it crashed." in page
    assert "- not int8 on openvino: its gate." in page
    (tmp_path / "mine.md").write_text("my own notes")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--markdown", str(tmp_path / "mine.md")])
    assert ended.value.code == 2  # before anything is tried
    assert "exists and is no page of a benchmark" in capsys.readouterr().err
    assert (tmp_path / "mine.md").read_text() == "my own notes"


@pytest.mark.parametrize(
    "options",
    [
        ["--plot", "p.png"],
        ["clip.mp4"],
        ["--backend", "openvino"],
        ["--compare", "fp32"],
        ["--duration", "1"],
        ["--no-roofline"],
    ],
)
def test_what_a_trial_has_no_use_for_is_refused_in_one_line(
    bundle: Bundle, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(bundle.path), *options, "--choose", "--verbose"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    name = "--roofline" if options == ["--no-roofline"] else options[0] if options[0].startswith("-") else "a SOURCE"
    assert line.startswith(f"error: {name} has no effect with --choose.")


def test_auto_imports_nothing_for_what_it_does_not_take(bundle: Bundle, processor: Any) -> None:
    """No other runtime, and without a GPU nothing of the way there: a first result would wait for it."""
    processor(*environment.cpu().simd)
    modules = ["onnxruntime", "torch"]
    modules += [f"espmedsam_edge.runtime.{one}" for one in ("backends.device_backend", "engines.cache", "cuda.device")]
    code = (
        "import sys; from espmedsam_edge import Segmenter\n"
        f"taken = Segmenter.load({str(bundle.path)!r}, threads=1).choice.backend.name\n"
        f"print(taken, [name for name in {modules} if name in sys.modules])"
    )
    kept(bundle, {"fp32 on openvino": 0.5})
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=without_gpu, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["openvino", "[]"]


def test_onnx_runtime_that_does_not_run_ends_the_trial_with_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "_START", "import sys; sys.exit('no onnxruntime here')")
    with pytest.raises(
        UserError, match=r"onnxruntime does not run .*: it ended with code 1 and no answer: no onnxruntime here"
    ):
        try_backends(bundle, threads=1)
