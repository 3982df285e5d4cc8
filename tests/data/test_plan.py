"""The plan: every sample once an epoch, within budget, balanced, and the same whatever the sequence of world sizes."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kontext_train.data.config import DataConfig
from kontext_train.data.plan import Pack, Planner, Position, SampleSizes, check_budget, deal_by_cost
from kontext_train.errors import ConfigError
from kontext_train.models.config import FluxConfig
from kontext_train.models.flops import forward_flops

FLOPS = forward_flops(FluxConfig())


def mixed_sizes(n: int, seed: int = 0) -> SampleSizes:
    """Three resolutions, several aspect ratios, 0 to 3 contexts, at the 12B's token counts."""
    rng = np.random.default_rng(seed)

    def grid(count: int) -> np.ndarray:
        side = rng.choice([16, 32, 64], count)
        ratio = rng.choice([0.5, 0.75, 1.0, 1.33, 2.0], count) ** 0.5
        return np.stack([side * ratio, side / ratio], axis=1).round().astype(int)

    contexts = rng.choice([0, 1, 2, 3], n, p=[0.3, 0.5, 0.15, 0.05])
    start = np.concatenate([[0], np.cumsum(contexts)])
    target_hw, context_hw = grid(n), grid(start[-1])
    running = np.concatenate([[0], np.cumsum(context_hw.prod(axis=1))])
    return SampleSizes(512, target_hw, start, context_hw, target_hw.prod(axis=1), np.diff(running[start]))


def planner(n: int = 500, **changes: object) -> Planner:
    config = DataConfig(**({"tokens_per_pack": 32_768, "window_samples": 128} | changes))  # type: ignore[arg-type]
    return Planner(mixed_sizes(n), config, seed=7, cost=FLOPS.by_tokens)


def counted(packs: list[Pack]) -> list[int]:
    return [int(v) for pack in packs for v in pack.visits[pack.counts]]


def first_epoch(plan: Planner, packs_per_step: int, position: Position) -> list[list[Pack]]:
    """The steps from `position` to the end of its epoch."""
    steps = []
    for packs in plan.steps(position, packs_per_step):
        if packs[0].position.epoch != position.epoch:
            return steps
        steps.append(packs)
    raise AssertionError("endless")


@pytest.mark.parametrize("budget", [9_000, 12_000, 16_384, 20_000])
@pytest.mark.parametrize("packs_per_step", [1, 8])
def test_samples_of_one_size_leave_no_step_empty(packs_per_step: int, budget: int) -> None:
    """1024² edits: nothing fills the gap that the budget leaves, so the first guess of the steps is far off."""
    n = 3000
    square, start = np.full((n, 2), 64), np.arange(n + 1)
    sizes = SampleSizes(512, square, start, square, square.prod(axis=1), square.prod(axis=1))
    plan = Planner(sizes, DataConfig(tokens_per_pack=budget, window_samples=n), seed=0, cost=FLOPS.by_tokens)
    steps = first_epoch(plan, packs_per_step, Position())
    assert sorted(v for packs in steps for v in counted(packs)) == list(range(n))
    assert all(packs[0].samples_in_step > 0 for packs in steps)
    assert len(steps) <= -(-n // (packs_per_step * (budget // 8704))) * 1.02 + 1


@pytest.mark.parametrize("packs_per_step", [1, 2, 8, 13])
def test_every_sample_once_an_epoch_within_budget(packs_per_step: int) -> None:
    plan = planner()
    steps = first_epoch(plan, packs_per_step, Position())
    assert sorted(v for packs in steps for v in counted(packs)) == list(range(500))
    for packs in steps:
        assert len(packs) == packs_per_step
        assert sum(len(counted([p])) for p in packs) == packs[0].samples_in_step
        for pack in packs:
            assert plan.sizes.tokens(pack.samples, pack.drop_context).sum() <= 32_768


@settings(max_examples=25, deadline=None)
@given(legs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 9)), min_size=1, max_size=6))
def test_any_sequence_of_world_sizes_sees_every_sample_once(legs: list[tuple[int, int]]) -> None:
    """Run some steps at one world size, resume at the next from the position alone, and so on to the epoch's end."""
    plan, position, seen = planner(300), Position(), []
    for packs_per_step, steps in legs:
        for packs in islice(plan.steps(position, packs_per_step), steps):
            if packs[0].position.epoch == 0:
                seen += counted(packs)
            position = packs[0].position
        if position.epoch:
            break
    if position.epoch == 0:
        seen += [v for packs in first_epoch(plan, 4, position) for v in counted(packs)]
    assert Counter(seen) == Counter(range(300))


def test_resume_at_the_same_size_continues_step_for_step() -> None:
    plan = planner()
    straight = list(islice(plan.steps(Position(), 4), 30))
    for stop in (1, 7, 19):
        resumed = islice(plan.steps(straight[stop - 1][0].position, 4), 30 - stop)
        for expected, packs in zip(straight[stop:], resumed, strict=True):
            assert [p.visits.tolist() for p in packs] == [p.visits.tolist() for p in expected]


def test_a_wrong_position_is_seen() -> None:
    """Negative control: one step off repeats samples."""
    plan = planner()
    steps = list(islice(plan.steps(Position(), 4), 5))
    seen = [v for packs in steps for v in counted(packs)]
    again = next(iter(plan.steps(steps[3][0].position, 4)))
    assert set(counted(again)) <= set(seen)


def test_epochs_and_seeds_are_fresh_permutations_and_size_says_nothing_about_time() -> None:
    plan = planner(12_000, window_samples=6000, prompt_dropout=0.0)
    orders = []
    for epoch in (0, 1):
        steps = first_epoch(plan, 4, Position(epoch=epoch))
        orders.append([v - 12_000 * epoch for packs in steps for v in counted(packs)])
        mean_tokens = [np.mean([plan.sizes.tokens(p.samples, p.drop_context).mean() for p in packs]) for packs in steps]
        assert abs(np.corrcoef(np.arange(len(steps)), mean_tokens)[0, 1]) < 0.2
    assert orders[0] != orders[1]
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1


def test_packs_of_a_step_cost_the_same() -> None:
    """At 8 ranks on the mixed workload; random packs of as many samples are the control."""
    plan = planner(6000, tokens_per_pack=65_536, window_samples=6000)
    imbalance, fill = [], []
    for packs in first_epoch(plan, 8, Position()):
        tokens = [plan.sizes.tokens(p.samples, p.drop_context) for p in packs]
        cost = np.array([plan.cost(t).sum() for t in tokens])
        imbalance.append(cost.max() / cost.mean() - 1)
        fill.append(np.mean([t.sum() for t in tokens]) / 65_536)
    assert np.mean(imbalance) <= 0.01
    assert np.mean(fill) >= 0.9
    rng = np.random.default_rng(0)
    costs = plan.cost(plan.sizes.tokens(np.arange(6000), np.zeros(6000, dtype=bool)))
    chance = [rng.choice(costs, (8, 12)).sum(axis=1) for _ in range(50)]
    assert np.mean([c.max() / c.mean() - 1 for c in chance]) > 0.1


def test_dropout_is_decided_here_at_its_rate_and_changes_lengths() -> None:
    plan = planner(4000, prompt_dropout=0.25, context_dropout=0.5, window_samples=1000)
    packs = [p for packs in first_epoch(plan, 2, Position()) for p in packs]
    assert np.concatenate([p.drop_prompt for p in packs]).mean() == pytest.approx(0.25, abs=0.03)
    assert np.concatenate([p.drop_context for p in packs]).mean() == pytest.approx(0.5, abs=0.03)
    sample = int(np.flatnonzero(plan.sizes.context_tokens)[0])
    assert plan.sizes.shape(sample, drop_context=True).contexts == ()
    assert plan.sizes.shape(sample, drop_context=False).tokens == plan.sizes.tokens(
        np.array([sample]), np.array([False])
    )


def test_a_rank_without_samples_gets_filler_that_does_not_count() -> None:
    plan = planner(3, window_samples=3)
    (packs,) = first_epoch(plan, 8, Position())
    assert sorted(counted(packs)) == [0, 1, 2]
    assert all(len(p.samples) >= 1 for p in packs)
    assert {p.samples_in_step for p in packs} == {3}


def test_a_sample_beyond_the_budget_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokens_per_pack=1000: must hold the largest sample: sample \d+"):
        check_budget(mixed_sizes(50), DataConfig(tokens_per_pack=1000))


def test_validation_covers_the_first_samples_once() -> None:
    plan = planner(50, prompt_dropout=1.0)
    packs = [p for step in plan.fixed(20, 3) for p in step]
    assert sorted(counted(packs)) == list(range(20))
    assert not any(p.drop_prompt.any() for p in packs)


def test_dealing_gives_every_pack_its_share() -> None:
    cost = np.array([9.0, 8, 7, 3, 2, 1])
    loads = np.bincount(deal_by_cost(cost, 3), weights=cost)
    np.testing.assert_array_equal(loads, [10, 10, 10])
