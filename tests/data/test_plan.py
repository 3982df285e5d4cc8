"""The plan: every sample once an epoch, within budget, balanced, and the same whatever the sequence of world sizes.

Sizes are those of benchmarks/packing.py, so that what is published is what is tested.
"""

from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import FLOPS, TXT_TOKENS, MixedIndex, buckets, first_fit_decreasing, ours, random_packing, row
from kontext_train.data.config import DataConfig, Resize
from kontext_train.data.loader import rank_packs
from kontext_train.data.plan import Pack, Planner, Position, Step, Window, plan_digest
from kontext_train.data.sources import Mixture, Source
from kontext_train.data.transforms import Transform
from kontext_train.errors import ConfigError

MEGAPIXEL = 1024 * 1024


def source(n: int, share: Fraction = Fraction(1), seed: int = 0, dropouts: tuple[float, float] = (0.0, 0.0)) -> Source:
    index = MixedIndex(n, seed)
    return Source(f"mixed {seed}", index, share, Transform(MEGAPIXEL, 16), *dropouts)  # type: ignore[arg-type]


class RememberingPlanner(Planner):
    """Plans each window once: tests resume often."""

    def window(self, number: int) -> Window:
        return remembered(self, number)


@lru_cache(maxsize=1000)
def remembered(plan: Planner, number: int) -> Window:
    return Planner.window(plan, number)


def planner(n: int = 500, *, dropouts: tuple[float, float] = (0.0, 0.0), seed: int = 7, **changes: int) -> Planner:
    config = DataConfig(**({"tokens_per_pack": 32_768, "window_samples": 128} | changes))  # type: ignore[arg-type]
    return RememberingPlanner(Mixture([source(n, dropouts=dropouts)], TXT_TOKENS), config, seed, FLOPS.of_tokens)


def visits(packs: Step | list[Pack]) -> list[int]:
    return [int(v) for pack in packs for v in pack.visits[pack.counts]]


def pack_tokens(plan: Planner, pack: Pack) -> np.ndarray:
    target, context = plan.mixture.image_tokens(pack.samples)
    return TXT_TOKENS + target + context * ~pack.drop_context


def seen_until(plan: Planner, packs_per_step: int, visits_wanted: int) -> tuple[list[Step], list[int]]:
    """Steps from the start until so many visits of the stream are done."""
    steps: list[Step] = []
    seen: list[int] = []
    for step in plan.steps(Position(), packs_per_step):
        steps.append(step)
        seen += visits(step)
        if len(set(seen) & set(range(visits_wanted))) == visits_wanted:
            return steps, seen
    raise AssertionError("endless")


# ------------------------------------------------------------------------------------------------- every sample once


@pytest.mark.parametrize("packs_per_step", [1, 2, 8, 13, 64])
def test_every_sample_once_an_epoch_within_budget(packs_per_step: int) -> None:
    """64 packs are more than a window has."""
    plan = planner()
    steps, seen = seen_until(plan, packs_per_step, 500)
    assert max(Counter(seen).values()) == 1
    assert sorted(v % 500 for v in seen if v < 500) == list(range(500))
    for step in steps:
        assert len(step) == packs_per_step
        assert len(visits(step)) == step[0].samples_in_step
        assert max(pack_tokens(plan, pack).sum() for pack in step) <= 32_768


SMALL = planner(200, window_samples=64)
leg = st.tuples(
    st.sampled_from([1, 2, 3, 4, 8]),  # ranks
    st.integers(1, 3),  # microbatches
    st.sampled_from([1, 2]),  # context-parallel size
    st.integers(1, 9),  # steps
)


def run_leg(
    plan: Planner, position: Position, ranks: int, microbatches: int, cp: int, steps: int
) -> tuple[list[int], Position]:
    """What all processes of one session see, each asking the plan on its own, and where they all stand after it."""
    seen, ends = [], set()
    for process in range(ranks * cp):
        mine = rank_packs(plan.steps(position, ranks * microbatches), process // cp, ranks)
        packs = list(islice(mine, steps * microbatches))
        assert len(packs) == steps * microbatches
        ends.add(packs[-1].position)
        if process % cp == 0:
            seen += visits(packs)
            partner = packs
        else:  # ranks of one context-parallel group see the same
            assert visits(packs) == visits(partner)
    assert len(ends) == 1
    return seen, ends.pop()


@settings(max_examples=25, deadline=None)
@given(legs=st.lists(leg, min_size=1, max_size=6))
def test_any_sequence_of_sessions_sees_every_sample_once(legs: list[tuple[int, int, int, int]]) -> None:
    """Run some steps, resume at other sizes from the position alone, and so on until the epoch is over."""
    plan, position, seen = SMALL, Position(), list[int]()
    for ranks, microbatches, cp, steps in legs:
        more, position = run_leg(plan, position, ranks, microbatches, cp, steps)
        seen += more
    for step in plan.steps(position, 3):
        if set(range(200)) <= set(seen):
            break
        seen += visits(step)
    assert max(Counter(seen).values()) == 1
    rows = Counter(v % 200 for v in seen if v < 200)
    assert rows == Counter(range(200))


def test_a_wrong_position_is_seen() -> None:
    """Negative control: one step off repeats samples."""
    plan = planner()
    steps = list(islice(plan.steps(Position(), 4), 5))
    again = next(plan.steps(steps[3][0].position, 4))
    assert visits(again) == visits(steps[4])
    assert set(visits(again)) <= {v for step in steps for v in visits(step)}


def test_resume_at_the_same_size_continues_step_for_step() -> None:
    plan = planner()
    straight = list(islice(plan.steps(Position(), 4), 30))
    for stop in range(1, 29):
        resumed = islice(plan.steps(straight[stop - 1][0].position, 4), 2)
        for expected, step in zip(straight[stop:], resumed, strict=False):
            assert [p.visits.tolist() for p in step] == [p.visits.tolist() for p in expected]
            assert step[0].position == expected[0].position


def test_packs_are_the_same_at_every_world_size() -> None:
    """So a change of world size moves packs between ranks and never takes one apart."""
    plan = planner()
    packs = [{tuple(p.visits) for step in islice(plan.steps(Position(), n), 48 // n) for p in step} for n in (1, 4, 12)]
    first_window = {tuple(plan.window(0).visits[a:b]) for a, b in pairwise(plan.window(0).first)}
    assert all(first_window <= found for found in packs)


# ---------------------------------------------------------------------------------------------- resume costs no replay


class CountingPlanner(Planner):
    """Counts the windows it plans."""

    planned = 0

    def window(self, number: int) -> Window:
        self.planned += 1
        return super().window(number)


def test_resume_at_step_a_million_plans_what_step_zero_plans() -> None:
    plan = planner(2000, window_samples=500)
    packs = len(plan.window(0))
    work = {}
    for name, position in (
        ("start", Position()),
        ("late", Position(window=1_000_000 * 8 // packs)),
        ("late, inside a window", Position(1_000_000 * 8 // packs, 3, ((8, 2), (4, 1)))),
    ):
        counting = CountingPlanner(plan.mixture, DataConfig(tokens_per_pack=32_768, window_samples=500), 7, plan.cost)
        step = next(counting.steps(position, 8))
        work[name] = counting.planned
        assert len(step) == 8
    assert max(work.values()) == 2  # the window, and at most the one that fills up its last step


def test_a_late_window_has_its_exact_share() -> None:
    """Fractions: floats would be off by more than a sample here."""
    mixture = Mixture([source(300, Fraction(1, 3)), source(700, Fraction(2, 3), seed=1)], TXT_TOKENS)
    drawn = mixture.draw(0, 3 * 10**15, 1000)
    assert abs(int((drawn.rows < 300).sum()) - 333) <= 1
    assert len(np.unique(drawn.visits)) == len(drawn.visits)


def test_many_legs_in_one_window_cost_sorts_not_plans() -> None:
    plan, position, seen = planner(4000, window_samples=4000), Position(), list[int]()
    for number in range(60):
        step = next(plan.steps(position, 2 + number % 3))
        seen, position = seen + visits(step), step[0].position
    assert len(position.legs) == 60
    counting = CountingPlanner(plan.mixture, DataConfig(tokens_per_pack=32_768, window_samples=4000), 7, plan.cost)
    seen += visits(next(counting.steps(position, 8)))
    assert counting.planned <= 2
    assert max(Counter(seen).values()) == 1


# ------------------------------------------------------------------------------------------------------ honest shuffles


def test_epochs_and_seeds_are_fresh_permutations() -> None:
    orders = []
    for seed in (7, 8):
        _, seen = seen_until(planner(3000, window_samples=1000, seed=seed), 4, 6000)
        for epoch in (0, 1):
            orders.append([v % 3000 for v in seen if v // 3000 == epoch])
            assert sorted(orders[-1]) == list(range(3000))
    for a in range(4):
        for b in range(a):
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.1


def autocorrelation(values: np.ndarray, lag: int) -> float:
    return float(np.corrcoef(values[:-lag], values[lag:])[0, 1])


def test_length_says_nothing_about_time() -> None:
    """Mean length of a step against that of the steps after it, and against time. 17,408: packs of unlike costs."""
    plan = planner(24_000, window_samples=6000, tokens_per_pack=17_408)
    steps = list(islice(plan.steps(Position(), 8), 700))
    lengths = np.array([np.concatenate([pack_tokens(plan, p) for p in step]).mean() for step in steps])
    flops = np.array(
        [sum(FLOPS.of_tokens(TXT_TOKENS, *plan.mixture.image_tokens(p.samples)).sum() for p in step) for step in steps]
    )
    for values in (lengths, flops.astype(float)):
        for lag in (1, 2, 3, 10):
            assert abs(autocorrelation(values, lag)) < 0.12, lag
        assert abs(np.corrcoef(np.arange(700), values)[0, 1]) < 0.12
        by_size = np.concatenate([np.sort(part) for part in np.split(values, 4)])  # control: windows in order of size
        assert autocorrelation(by_size, 1) > 0.8


def test_dropout_is_decided_here_at_its_rate_and_changes_lengths() -> None:
    plan = planner(4000, dropouts=(0.25, 0.5), window_samples=1000)
    packs = [p for step in islice(plan.steps(Position(), 2), 180) for p in step]
    assert np.concatenate([p.drop_prompt for p in packs]).mean() == pytest.approx(0.25, abs=0.03)
    assert np.concatenate([p.drop_context for p in packs]).mean() == pytest.approx(0.5, abs=0.03)
    row = int(np.flatnonzero(plan.mixture.image_tokens(np.arange(100))[1])[0])
    target, context = (int(part[0]) for part in plan.mixture.image_tokens(np.array([row])))
    assert plan.mixture.shape(row, drop_context=True).contexts == ()
    assert plan.mixture.shape(row, drop_context=False).tokens == TXT_TOKENS + target + context


# -------------------------------------------------------------------------------------------------------------- balance


@pytest.fixture(scope="module", params=[65_536, 32_768])
def published(request: pytest.FixtureRequest) -> tuple[Planner, list[Window]]:
    plan = planner(100_000, tokens_per_pack=request.param, window_samples=32_768, seed=0)
    return plan, [plan.window(0)]


@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_packs_of_a_step_cost_the_same_and_are_full(published: tuple[Planner, list[Window]], ranks: int) -> None:
    """The published targets, on the published workload."""
    plan, windows = published
    found = row("ours", plan, ranks, ours(plan, ranks, windows, 1.0))
    assert found.imbalance_mean <= 0.01
    assert found.imbalance_p99 <= 0.03
    assert found.padding <= 0.02
    assert found.step_time <= 1.06


def test_other_ways_to_batch_are_worse(published: tuple[Planner, list[Window]]) -> None:
    """Controls: the same measures on the same samples see the imbalance that ours has not."""
    plan, windows = published
    for method in (buckets, random_packing, first_fit_decreasing):
        found = row("other", plan, 64, method(plan, windows))
        assert found.imbalance_mean > 0.05
        assert found.step_time > 1.1


# ------------------------------------------------------------------------------------------------------------ the rest


def test_ranks_of_a_microbatch_are_neighbours_in_cost() -> None:
    plan = planner(4000, window_samples=4000, tokens_per_pack=17_408)
    step = next(plan.steps(Position(), 8))
    cost = [int(FLOPS.of_tokens(TXT_TOKENS, *plan.mixture.image_tokens(p.samples)).sum()) for p in step]
    assert cost == sorted(cost)
    ranks = [[step.places.tolist().index(place) for place in step.places[r::4].tolist()] for r in range(4)]
    assert ranks == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [visits([p]) for p in rank_packs([step], 1, 4)] == [visits([step[1]]), visits([step[5]])]


def test_a_sample_beyond_the_budget_is_refused_by_key() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.tokens_per_pack=1000: must hold the largest sample: sample \d+ of mixed 0"
    ):
        Mixture([source(50)], TXT_TOKENS).check_budget(1000)
    longest = int(sum(Mixture([source(50)], TXT_TOKENS).image_tokens(np.arange(50))).max()) + TXT_TOKENS  # type: ignore[union-attr]
    Mixture([source(50)], TXT_TOKENS).check_budget(longest)
    with pytest.raises(ConfigError, match=rf"has {longest} tokens"):
        Mixture([source(50)], TXT_TOKENS).check_budget(longest - 1)


def test_a_bound_that_holds_spares_the_look_at_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = Mixture([source(50)], TXT_TOKENS)
    monkeypatch.setattr(Mixture, "_image_tokens", lambda *_: pytest.fail("looked at samples"))
    mixture.check_budget(TXT_TOKENS + 4 * 4096)


def test_the_bound_knows_that_kontext_sizes_exceed_a_megapixel() -> None:
    """(1328, 800) has 4,150 tokens, a megapixel 4,096: between the two, the samples must be looked at."""
    index = MixedIndex(50)
    index.target_hw[:], index.context_hw[:] = (13280, 8000), (13280, 8000)
    transform = Transform(MEGAPIXEL, 16, resize=Resize.kontext)
    mixture = Mixture([Source("kontext", index, Fraction(1), transform, 0.0, 0.0)], TXT_TOKENS)  # type: ignore[arg-type]
    most = TXT_TOKENS + 4 * 4150
    mixture.check_budget(most)
    with pytest.raises(ConfigError, match=rf"has {most} tokens"):
        mixture.check_budget(most - 1)


def test_validation_covers_the_first_samples_once_and_ranks_without_any_get_filler() -> None:
    plan = planner(50, dropouts=(1.0, 1.0))
    packs = [p for step in plan.fixed(20, 3) for p in step]
    assert len(packs) % 3 == 0
    assert sorted(visits(packs)) == list(range(20))
    assert not any(p.drop_prompt.any() or p.drop_context.any() for p in packs)
    ((one, *filler),) = plan.fixed(2, 8)
    assert visits([one]) == [0, 1]
    assert [p.counts.tolist() for p in filler] == [[False]] * 7


def test_the_digest_names_all_that_moves_samples() -> None:
    def digest(plan: Planner, **changes: int) -> str:
        return plan_digest(plan.mixture, DataConfig(**changes), plan.seed)  # type: ignore[arg-type]

    base = digest(planner())
    assert digest(planner(), workers=9) == base
    others = [digest(planner(501)), digest(planner(seed=8)), digest(planner(dropouts=(0.1, 0)))]
    others += [digest(planner(), tokens_per_pack=99), digest(planner(), window_samples=99)]
    assert len({base, *others}) == 6
