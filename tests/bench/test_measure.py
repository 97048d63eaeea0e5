"""The bench interleaves, measures long enough, and adds up; its hints say what the numbers show."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espmedsam_edge.bench import measure as bench_module
from espmedsam_edge.bench.hints import interpret
from espmedsam_edge.bench.measure import (
    STAGES,
    BenchResult,
    BenchSettings,
    Contender,
    Material,
    Sample,
    bench,
    run_in_turn,
)
from espmedsam_edge.bench.plot import draw_plot
from espmedsam_edge.bench.report import as_json, as_markdown, as_text
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.segmenter import Segmenter

QUICK = BenchSettings(duration=0.05, warmup=0.0, min_iterations=10)


class Clock:
    """Seconds that pass only when a run says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> Any:
        def run(number: int) -> Sample:
            self.calls.append(f"{name}{number}")
            self.now += seconds
            return Sample(seconds, (0.0, seconds, 0.0, 0.0))

        return run

    def pause(self, seconds: float) -> None:
        self.calls.append("pause")


def test_contenders_run_in_turn_a_round_after_the_other() -> None:
    clock = Clock()
    runs = [clock.run("a", 0.5), clock.run("b", 0.1), clock.run("c", 0.1)]
    samples = run_in_turn(runs, BenchSettings(duration=0.1, min_iterations=3), clock=clock, pause=clock.pause)
    order = [call for call in clock.calls if call != "pause"]
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]
    assert clock.calls.count("pause") == len(order)
    assert [len(own) for own in samples] == [3, 3, 3]
    assert {sample.total for sample in samples[1]} == {0.1}


def test_a_lone_contender_is_not_paused() -> None:
    clock = Clock()
    run_in_turn([clock.run("a", 0.5)], QUICK, clock=clock, pause=clock.pause)
    assert "pause" not in clock.calls


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 10), (0.1, 30), (0.25, 12)])
def test_it_measures_at_least_three_seconds_and_ten_iterations(seconds: float, rounds: int) -> None:
    clock = Clock()
    settings = BenchSettings()
    assert (settings.duration, settings.min_iterations) == (3.0, 10)
    (samples,) = run_in_turn([clock.run("a", seconds)], settings, clock=clock)
    assert len(samples) in (rounds, rounds + 1)  # sums of 0.1 fall short of 3 by rounding


def test_progress_grows_to_one() -> None:
    clock = Clock()
    seen: list[float] = []
    run_in_turn([clock.run("a", 0.4)], BenchSettings(duration=2.0), seen.append, clock=clock)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan"), 1e9])
def test_an_impossible_duration_is_refused(duration: float) -> None:
    with pytest.raises(UserError, match="duration"):
        BenchSettings(duration=duration)


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    return collect_environment()


def frames_of(count: int, height: int = 96, width: int = 128) -> list[Any]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]


def contender(bundle: Bundle, name: str, modality: str | None = None) -> Contender:
    return Contender.load(name, lambda: Segmenter.load(bundle, modality, backend="onnxruntime-cpu", threads=1))


@pytest.fixture
def measured(toy_bundle_of_two: Bundle, environment: dict[str, Any]) -> BenchResult:
    contenders = [
        contender(toy_bundle_of_two, "plain", "fundus"),
        contender(toy_bundle_of_two, "negated", "colonoscopy"),
    ]
    material = Material("3 frames of noise", frames_of(3), decode=[0.001, 0.002], encode=[0.003], encoder="none")
    return bench(contenders, material, QUICK, environment)


def test_stages_add_up_to_frame_to_mask(measured: BenchResult) -> None:
    for series in measured.series:
        assert len(series.samples) >= 10
        outside = [sample.total - sum(sample.stages) for sample in series.samples]
        # Outside the stages there is only Python between two clock readings; a median, as a busy machine may interrupt.
        assert min(outside) >= 0
        assert np.median(outside) < 0.001
        assert 0 < series.around_model < 1
        assert series.fps == pytest.approx(1 / np.mean(series.totals))
        assert series.first_seconds > 0


def test_both_contenders_have_paired_samples_and_the_masks_are_compared(measured: BenchResult) -> None:
    first, second = measured.series
    assert len(first.samples) == len(second.samples)
    assert first.mask_agreement == 1.0
    # The second graph's logits are the first one's negatives: the masks differ everywhere but where a logit is 0.
    assert second.mask_agreement < 0.01
    assert "unlike-masks" in {hint.kind for hint in interpret(measured)}
    (comparison,) = measured.comparisons
    expected = np.median(first.totals) / np.median(second.totals)
    assert comparison.frame_to_mask.value == pytest.approx(expected)
    assert comparison.frame_to_mask.low <= expected <= comparison.frame_to_mask.high


def test_a_batch_counts_all_its_frames(tmp_path: Path, environment: dict[str, Any]) -> None:
    from toy_bundles import save_toy_bundle

    bundle = save_toy_bundle(tmp_path / "four.bundle", batch=4)
    result = bench([contender(bundle, "four")], Material("noise", frames_of(3)), QUICK, environment)
    (series,) = result.series
    assert series.fps == pytest.approx(4 / np.mean(series.totals))
    assert series.per_frame([4.0]) == [1.0]
    for sample in series.samples:
        assert sum(sample.stages) <= sample.total


def test_cores_busy_is_cpu_time_over_the_clock(measured: BenchResult) -> None:
    # One thread computes; on a busy machine it gets only a part of a core. OpenCV may use a second one to resize.
    assert all(0 < series.cores_busy < 2.5 for series in measured.series)


def test_json_holds_everything_and_is_plain(measured: BenchResult) -> None:
    data = as_json(measured)
    assert json.loads(json.dumps(data)) == data
    assert (data["schema"], data["kind"]) == (2, "bench")
    assert data["source"] == {"description": "3 frames of noise", "frames": 3, "height": 96, "width": 128}
    assert re.fullmatch(r"[0-9a-f]{64}", data["bundle"]["manifest_sha256"])
    assert data["environment"]["packages"]["onnxruntime"]
    first = data["contenders"][0]
    assert set(first["stages_ms"]) == set(STAGES)
    assert first["frame_to_mask_ms"]["samples"] == len(first["samples_ms"])
    assert data["decode_ms"]["p50"] == 1.5
    assert data["comparisons"][0]["of"] == "plain"
    assert data["comparisons"][0]["to"] == "negated"


def test_text_and_markdown_name_every_stage_and_contender(measured: BenchResult) -> None:
    for page in (as_text(measured), as_markdown(measured)):
        for word in (*STAGES, "frame to mask", "decode", "encode", "plain", "negated", "unlike-masks", "p99"):
            assert word in page
    rows = [line for line in as_markdown(measured).splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_the_plot_is_a_png(measured: BenchResult) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib (extra bench)")
    picture = draw_plot(measured)
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 10_000


def steady(result: BenchResult, samples: list[Sample]) -> BenchResult:
    """The result of a single contender on a quiet machine, with samples of our choice."""
    series = replace(result.series[0], samples=samples, mask_agreement=1.0)
    cpu = {**result.environment["cpu"], "usable": 4, "governor": "performance"}
    quiet = {**result.environment, "cpu": cpu, "load_average_1min": 0.1, "thread_variables": {}}
    memory = {"at_start": 500 << 20, "at_end": 501 << 20, "peak": 600 << 20}
    material = replace(result.material, decode=[0.001], encode=[0.001])
    bundle = {**result.bundle, "weights_origin": "trained"}
    return replace(
        result,
        series=[series],
        environment=quiet,
        memory=memory,
        material=material,
        bundle=bundle,
        major_page_faults=0,
        other_cores_busy=0.1,
    )


def sample(total: float, preprocess: float = 0.0) -> Sample:
    return Sample(total, (preprocess, total - preprocess, 0.0, 0.0))


def kinds(result: BenchResult) -> list[str]:
    return [hint.kind for hint in interpret(result)]


def test_a_quiet_steady_run_raises_no_hint(measured: BenchResult) -> None:
    assert kinds(steady(measured, [sample(0.1)] * 120)) == []


def test_each_trouble_raises_its_hint(measured: BenchResult) -> None:
    good = steady(measured, [sample(0.1)] * 120)
    assert kinds(steady(measured, [sample(0.1), sample(0.13)] * 60)) == ["noisy"]
    assert kinds(steady(measured, [sample(0.1)] * 12)) == ["few-samples"]
    # 3 % a step over three plateaus: a spread of 2.5 %, below the noise limit, and 6 % between the ends
    slowing = [sample(0.1)] * 40 + [sample(0.103)] * 40 + [sample(0.106)] * 40
    assert kinds(steady(measured, slowing)) == ["drifting"]
    bound = interpret(steady(measured, [sample(0.1, preprocess=0.03)] * 120))
    assert [hint.kind for hint in bound] == ["bound-around-model"]
    assert "preprocess" in bound[0].text
    assert kinds(replace(good, major_page_faults=1000)) == ["short-of-memory"]
    grown = {"at_start": 500 << 20, "at_end": 700 << 20, "peak": 700 << 20}
    assert kinds(replace(good, memory=grown)) == ["growing-memory"]
    assert kinds(replace(good, material=replace(good.material, decode=[0.5]))) == ["bound-by-codec"]
    assert kinds(replace(good, environment={**good.environment, "load_average_1min": 3.0})) == ["busy-machine"]
    assert kinds(replace(good, other_cores_busy=1.5)) == ["busy-machine"]
    assert kinds(replace(good, other_cores_busy=None)) == []
    threads = {**good.environment, "thread_variables": {"OMP_NUM_THREADS": "64"}}
    assert kinds(replace(good, environment=threads)) == ["oversubscribed"]
    powersave = {**good.environment, "cpu": {**good.environment["cpu"], "governor": "powersave"}}
    assert kinds(replace(good, environment=powersave)) == ["noisy"]
    assert kinds(replace(good, bundle={**good.bundle, "weights_origin": "random"})) == ["random-weights"]


def test_warm_up_runs_at_least_twice_before_anything_counts(
    toy_bundle: Bundle, environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    original = bench_module._sample

    def spy(segmenter: Segmenter, frames: Any, number: int) -> Sample:
        numbers.append(number)
        return original(segmenter, frames, number)

    monkeypatch.setattr(bench_module, "_sample", spy)
    result = bench([contender(toy_bundle, "toy")], Material("noise", frames_of(2)), QUICK, environment)
    assert numbers[:3] == [0, 1, 0]
    assert len(numbers) == 2 + len(result.series[0].samples)
