"""Intervals hold the truth as often as they say, also of few base images; where they cannot, there is none."""

from collections.abc import Callable

import numpy as np
import pytest

from kontext_train.evaluation import bootstrap
from kontext_train.evaluation.bootstrap import Estimate

TRIALS = 300


def coverage(estimate: Callable[[np.random.Generator], Estimate | None], truth: float) -> float:
    held = 0
    for seed in range(TRIALS):
        found = estimate(np.random.default_rng(seed))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    return held / TRIALS


@pytest.mark.parametrize("clusters", [5, 10, 40])
def test_a_mean_of_few_base_images(clusters: int) -> None:
    def images(rng: np.random.Generator) -> list[tuple[int, float]]:
        return [(c, base + rng.normal()) for c, base in enumerate(rng.normal(size=clusters)) for _ in range(4)]

    assert 0.91 <= coverage(lambda rng: bootstrap.mean(images(rng), draws=300), 0) <= 0.985


def test_three_base_images_give_no_interval() -> None:
    found = bootstrap.mean([(c, float(c)) for c in range(3) for _ in range(10)])
    assert found == Estimate(1.0, None, None, 30)


@pytest.mark.parametrize("clusters", [5, 10, 40])
@pytest.mark.parametrize("share", [0.95, 0.6])
def test_yes_or_no(clusters: int, share: float) -> None:
    """All alike is no certainty: as plain values they are, and hold the truth far too seldom."""

    def answers(rng: np.random.Generator) -> list[tuple[int, float]]:
        return list(enumerate((rng.random(clusters) < share).astype(float)))

    assert coverage(lambda rng: bootstrap.mean(answers(rng), yes_no=True), share) >= 0.92
    if clusters == 10 and share == 0.95:
        assert coverage(lambda rng: bootstrap.mean(answers(rng)), share) < 0.6


def test_yes_or_no_on_base_images_that_are_alike_inside() -> None:
    def answers(rng: np.random.Generator) -> list[tuple[int, float]]:
        return [(c, float(rng.random() < p)) for c, p in enumerate(rng.beta(4, 1, size=12)) for _ in range(6)]

    assert coverage(lambda rng: bootstrap.mean(answers(rng), yes_no=True), 0.8) >= 0.92


@pytest.mark.parametrize("clusters", [5, 10, 40])
def test_equal_models_are_told_apart_once_in_twenty_times(clusters: int) -> None:
    """Of yes-or-no numbers too: what the report colours is a difference whose interval leaves out 0."""

    def right(rng: np.random.Generator) -> np.ndarray:
        return (rng.random(clusters) < 0.9).astype(float)

    assert coverage(lambda rng: bootstrap.mean(enumerate(rng.normal(size=clusters)), draws=300), 0) >= 0.91
    assert coverage(lambda rng: bootstrap.mean(enumerate(right(rng) - right(rng)), draws=300), 0) >= 0.91


@pytest.mark.parametrize(("share", "n"), [(0.5, 10), (0.5, 150), (0.95, 80), (0.95, 150)])
def test_quantiles(share: float, n: int) -> None:
    truth = -np.log(1 - share)
    assert coverage(lambda rng: bootstrap.quantile(list(rng.exponential(size=n)), share), truth) >= 0.92


def test_a_quantile_beyond_the_values_has_no_interval() -> None:
    assert bootstrap.quantile([], 0.5) is None
    assert bootstrap.quantile([3.0], 0.5) == Estimate(3.0, None, None, 1)
    assert bootstrap.quantile([1.0, 2.0, 3.0, 4.0, 5.0, 9.0], 0.5) == Estimate(3.5, 1.0, 9.0, 6)
    for n, known in ((5, False), (6, True)):
        found = bootstrap.quantile([float(i) for i in range(n)], 0.5)
        assert found is not None
        assert (found.low is not None) == known
    for n, known in ((71, False), (72, True)):
        found = bootstrap.quantile([float(i) for i in range(n)], 0.95)
        assert found is not None
        assert (found.low is not None) == known, n


def test_a_distance_is_not_negative() -> None:
    found = bootstrap.jackknife(0.1, [0.0, 0.5, -0.3, 0.2], 8)
    assert found.low == 0.0
    below = bootstrap.jackknife(-0.01, [0.0, 0.5, -0.3, 0.2], 8)
    assert below.low is not None
    assert below.low < -0.01, "an interval holds its value"
    sure = bootstrap.jackknife(5.0, [5.0, 5.1, 4.9], 8)
    assert sure.low is not None
    assert 0 < sure.low < 5
