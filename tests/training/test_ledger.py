"""Losses read now and then are the same losses, and one that is not finite still spoils nothing that is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from espmedsam_edge.errors import UserError
from espmedsam_edge.model.checkpoint import read_checkpoint
from espmedsam_edge.training.averaging import WeightAverage
from espmedsam_edge.training.objectives import SegmentationObjective, Terms, compile_objective
from espmedsam_edge.training.optimizer import make_optimizer
from espmedsam_edge.training.recipe import Recipe
from espmedsam_edge.training.run_folder import STATE
from espmedsam_edge.training.sections import OptimizerSection
from espmedsam_edge.training.stages import run_stage
from espmedsam_edge.training.state import TrainingProgress, read_state, restore, save_state

MakeRecipe = Callable[..., Recipe]


def test_reading_seldom_changes_nothing(tmp_path: Path, small_recipe: MakeRecipe) -> None:
    changes = ("run.steps_per_epoch=5", "run.accumulate=2", "run.epochs=2")
    tables, states = [], []
    for every in (1, 3):
        run_stage("segment", small_recipe(*changes, f"run.read_every={every}"), tmp_path / str(every))
        lines = (tmp_path / str(every) / "train.csv").read_text().splitlines()
        tables.append([line.rsplit(",", 1)[0] for line in lines])  # all but the speed
        states.append(read_state(tmp_path / str(every) / STATE).part("network"))
    assert len(tables[0]) == 1 + 2 * 5
    assert tables[0] == tables[1]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("save_minutes", ["1e-6", "1000"])
def test_a_loss_found_late_is_named_and_not_saved(
    tmp_path: Path, small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, save_minutes: str
) -> None:
    forward, calls = SegmentationObjective.forward, []

    def broken(self: SegmentationObjective, images: Tensor, masks: Tensor | None, modality: str) -> Terms:
        calls.append(1)
        terms = forward(self, images, masks, modality)
        return {**terms, "loss": terms["loss"] * float("nan")} if len(calls) == 6 else terms

    monkeypatch.setattr(SegmentationObjective, "forward", broken)
    recipe = small_recipe(
        "run.steps_per_epoch=4", "run.epochs=2", "run.read_every=100", f"run.save_minutes={save_minutes}"
    )
    with pytest.raises(UserError, match=r"step 6: the loss is not finite \(loss nan.*phantom"):
        run_stage("segment", recipe, tmp_path / "run")
    saved = read_state(tmp_path / "run" / STATE)
    assert saved.progress.step in (4, 5)  # the epoch before, or the step before
    assert all(value.isfinite().all() for value in saved.part("network").values())


def test_averages_move_as_one_and_as_each() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(5, 2))
    average = WeightAverage(network, 0.99)
    expected = {name: value.clone() for name, value in average.shadow.items()}
    for step in range(30):
        with torch.no_grad():
            for value in (*network.parameters(), *network.buffers()):
                if value.is_floating_point():
                    value += torch.randn_like(value)
        average.update(step)
        decay = min(0.99, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            if name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in expected.items():
        torch.testing.assert_close(average.shadow[name], value)


def test_fused_steps_are_the_others_and_resume(tmp_path: Path) -> None:
    section = OptimizerSection(name="adamw", lr=0.01, weight_decay=0.1)

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Linear(4, 3)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        torch.manual_seed(number)
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    plain, fused, resumed = network(), network(), network()
    plain_optimizer, fused_optimizer = make_optimizer(plain, section), make_optimizer(fused, section, fused=True)
    for number in range(4):
        step(plain, plain_optimizer, number)
        step(fused, fused_optimizer, number)
    progress = TrainingProgress(stage="segment", identity={})
    save_state(tmp_path / "state.safetensors", progress, fused, fused_optimizer, None, {})
    resumed_optimizer = make_optimizer(resumed, section, fused=True)
    restore(read_state(tmp_path / "state.safetensors"), resumed, resumed_optimizer, None)
    for number in range(4, 8):
        step(plain, plain_optimizer, number)
        step(fused, fused_optimizer, number)
        step(resumed, resumed_optimizer, number)
    for one, other, third in zip(plain.parameters(), fused.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert torch.equal(other, third)


def test_every_modality_and_size_gets_a_compiled_form() -> None:
    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, images: Tensor, modality: str) -> Tensor:
            return images * self.scale + len(modality)

    forms = []

    def counting(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        forms.append(graph)
        return graph.forward

    toy = Toy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Toy, "compile", lambda self, **options: torch.nn.Module.compile(self, backend=counting, **options)
        )
        compile_objective(toy)
    for length in range(1, 11):
        for side in (4, 8):
            got = toy(torch.ones(side), "m" * length)
            assert torch.equal(got.detach(), torch.full((side,), 2.0 + length))
    assert len(forms) == 20  # torch gives up at 8 unless told
    assert set(toy.state_dict()) == {"scale"}


def test_a_run_is_compiled_if_asked(tmp_path: Path, small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(SegmentationObjective, "compile", lambda self, **options: compiled.append(options))
    for asked in (False, True):
        run_stage("segment", small_recipe(f"run.compile={str(asked).lower()}"), tmp_path / str(asked))
        assert compiled == ([{"dynamic": False}] if asked else [])


class FailingCompiler:
    """Stands for the compiled call: compiling fails at the forward pass, or only at the backward pass."""

    def __init__(self, objective: SegmentationObjective, at: str, error: Exception) -> None:
        self.objective, self.at, self.error = objective, at, error

    def __call__(self, *arguments: object) -> Terms:
        if self.at == "forward":
            raise self.error
        terms: Terms = self.objective._call_impl(*arguments)

        def fail(gradient: Tensor) -> Tensor:
            raise self.error

        terms["loss"].register_hook(fail)
        return terms


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_a_step_that_cannot_be_compiled_goes_on_uncompiled(
    at: str, tmp_path: Path, small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    changes = ("run.batch_norm_fraction=0", "data.folders={fundus=[]}")
    plain, _ = run_stage("segment", small_recipe(*changes), tmp_path / "plain")

    def broken(error: Exception) -> None:
        def compile_(self: SegmentationObjective, **options: object) -> None:
            self._compiled_call_impl = FailingCompiler(self, at, error)

        monkeypatch.setattr(SegmentationObjective, "compile", compile_)

    broken(TorchDynamoException("\nno C++ compiler\n\nand many lines more"))
    path, progress = run_stage("segment", small_recipe(*changes, "run.compile=true"), tmp_path / "compiled")
    assert progress.finished
    told = [line for line in said if line.startswith("run.compile")]
    assert told == [
        "run.compile: torch cannot compile the training step here (no C++ compiler); it goes on uncompiled."
    ]
    first, second = (read_checkpoint(one)[0] for one in (plain, path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    broken(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        run_stage("segment", small_recipe(*changes, "run.compile=true"), tmp_path / "other")
