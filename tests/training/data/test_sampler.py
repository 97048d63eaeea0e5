"""The batch sampler: one modality a batch, balanced, covering, repeatable, resumable, split over ranks."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espmedsam_edge.errors import UserError
from espmedsam_edge.training.data.sampler import ModalityBatchSampler

PAPER_SIZES = {"dermoscopy": 2594, "xray": 394, "fundus": 16, "colonoscopy": 490, "ultrasound": 114, "microscopy": 536}

_sizes = st.dictionaries(st.sampled_from(list(PAPER_SIZES)), st.integers(1, 60), min_size=1)


@settings(max_examples=60, deadline=None)
@given(_sizes, st.integers(1, 8), st.integers(0, 2**31), st.integers(0, 5))
def test_an_epoch_depends_only_on_seed_and_number(sizes: dict[str, int], batch: int, seed: int, epoch: int) -> None:
    first, second = (ModalityBatchSampler(sizes, batch, seed) for _ in range(2))
    for earlier in range(epoch):  # one walks there, the other jumps
        first.set_epoch(earlier)
        list(first)
    first.set_epoch(epoch)
    second.set_epoch(epoch)
    plans = list(first)
    assert plans == list(second)
    assert len(plans) == len(first)
    for plan in plans:
        assert len(plan.draws) == batch
        assert all(0 <= draw.index < sizes[plan.modality] for draw in plan.draws)


def test_a_set_is_covered_before_any_image_comes_again() -> None:
    sampler = ModalityBatchSampler({"fundus": 16, "dermoscopy": 103}, 4, seed=1, batches=10)
    seen: dict[str, list[int]] = {"fundus": [], "dermoscopy": []}
    for epoch in range(12):
        sampler.set_epoch(epoch)
        for plan in sampler:
            seen[plan.modality] += [draw.index for draw in plan.draws]
    for name, size in sampler.sizes.items():
        assert len(seen[name]) >= 2 * size
        for start in range(0, len(seen[name]) - size, size):
            assert sorted(seen[name][start : start + size]) == list(range(size))


def test_small_sets_come_round_more_often_but_not_as_often_as_all_others() -> None:
    plans = Counter(plan.modality for plan in ModalityBatchSampler(PAPER_SIZES, 4))
    images = sum(PAPER_SIZES.values())
    assert 4 * sum(plans.values()) == pytest.approx(images, rel=0.01)
    for name, size in PAPER_SIZES.items():
        expected = images * size**0.5 / sum(other**0.5 for other in PAPER_SIZES.values())
        assert 4 * plans[name] == pytest.approx(expected, abs=4)
    equal = Counter(plan.modality for plan in ModalityBatchSampler(PAPER_SIZES, 4, balance=0))
    assert max(equal.values()) - min(equal.values()) <= 1
    by_size = Counter(plan.modality for plan in ModalityBatchSampler(PAPER_SIZES, 4, balance=1))
    assert by_size["dermoscopy"] == pytest.approx(2594 / 4, abs=1)
    assert by_size["fundus"] == 4


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_modality_and_part_the_global_batch(world_size: int) -> None:
    ranks = [
        ModalityBatchSampler(PAPER_SIZES, 2, seed=5, batches=20, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    whole = ModalityBatchSampler(PAPER_SIZES, 2 * world_size, seed=5, batches=20)
    for sampler in (*ranks, whole):
        sampler.set_epoch(3)
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert {part.modality for part in parts} == {expected.modality}
        assert tuple(draw for part in parts for draw in part.draws) == expected.draws


@settings(max_examples=30, deadline=None)
@given(_sizes, st.integers(0, 3), st.integers(0, 200))
def test_a_resumed_sampler_goes_on_where_the_other_stopped(sizes: dict[str, int], epoch: int, after: int) -> None:
    one = ModalityBatchSampler(sizes, 3, seed=9)
    one.set_epoch(epoch)
    after = min(after, one.batches)
    plans = list(one)
    for _ in range(after):
        one.advance()
    state = json.loads(json.dumps(one.state_dict()))  # it must survive a file
    other = ModalityBatchSampler(sizes, 3, seed=9)
    other.load_state_dict(state)
    assert list(other) == plans[after:]
    assert other.epoch == epoch


def test_draws_of_the_same_image_have_different_seeds() -> None:
    sampler = ModalityBatchSampler({"fundus": 3}, 2, batches=30)
    seeds = [draw.seed for plan in sampler for draw in plan.draws]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": {"fundus": 17}}, "numbers of training images changed"),
        ({"seed": 2}, "seed changed from 1 to 2"),
        ({"batch_size": 2}, "batch size over all processes changed from 4 to 2"),
        ({"batches": 9}, "batches an epoch changed"),
    ],
)
def test_resuming_another_run_is_refused(change: dict, message: str) -> None:
    arguments = {"sizes": {"fundus": 16}, "batch_size": 4, "seed": 1, "batches": 8}
    state = ModalityBatchSampler(**arguments).state_dict()
    with pytest.raises(UserError, match=message):
        ModalityBatchSampler(**{**arguments, **change}).load_state_dict(state)


def test_two_ranks_may_resume_what_one_began() -> None:
    state = ModalityBatchSampler(PAPER_SIZES, 4, seed=3, batches=50).state_dict()
    ModalityBatchSampler(PAPER_SIZES, 2, seed=3, batches=50, rank=1, world_size=2).load_state_dict(state)


@pytest.mark.parametrize("sizes", [{}, {"fundus": 0}])
def test_nothing_to_train_on_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"nothing to train on|no training images"):
        ModalityBatchSampler(sizes, 4)
