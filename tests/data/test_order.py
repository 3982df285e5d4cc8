"""The keyed permutation: a bijection for every n, a fresh one each epoch, and as good as shuffling."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kontext_train.data.order import permuted
from kontext_train.randomness import key_of


def order(n: int, epoch: int = 0, key: int = key_of(0, "order")) -> np.ndarray:
    return permuted(np.arange(n), np.full(n, epoch), n, key)


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 5000), epoch=st.integers(0, 1 << 40), key=st.integers(0, (1 << 128) - 1))
@example(n=1, epoch=0, key=0)
@example(n=2, epoch=1, key=0)
@example(n=4093, epoch=3, key=1)
@example(n=4096, epoch=3, key=1)
@example(n=65 * 65, epoch=3, key=1)
def test_every_number_once(n: int, epoch: int, key: int) -> None:
    assert np.array_equal(np.sort(order(n, epoch, key)), np.arange(n))


def test_a_part_is_the_part_of_the_whole() -> None:
    """In any order and across epochs, so that a window costs what it holds."""
    whole = np.concatenate([order(1000, epoch) for epoch in range(3)])
    places = np.random.default_rng(0).integers(0, 3000, 500)
    part = permuted(places % 1000, places // 1000, 1000, key_of(0, "order"))
    assert np.array_equal(part, whole[places])


def test_a_billion_samples_cost_what_is_asked_for() -> None:
    n = 10**9 + 7
    part = permuted(np.arange(n - 1000, n), np.zeros(1000), n, 1)
    assert len(np.unique(part)) == 1000
    assert part.min() >= 0
    assert part.max() < n


def disorder(orders: np.ndarray) -> dict[str, float]:
    """What a shuffle has none of, in standard deviations of chance. orders: [epochs, n]."""
    epochs, n = orders.shape
    places = np.arange(n)
    rank = [np.corrcoef(places, o)[0, 1] for o in orders]
    neighbours = [np.abs(np.diff(o)).mean() / n - 1 / 3 for o in orders]
    between = [np.corrcoef(a, b)[0, 1] for a, b in pairwise(orders)]
    return {
        "rank correlation": abs(np.mean(rank)) * (epochs * n) ** 0.5,
        "neighbour distance": abs(np.mean(neighbours)) * (epochs * n) ** 0.5 / 0.25,
        "between epochs": abs(np.mean(between)) * (epochs * n) ** 0.5,
        "fixed points": abs((orders == places).sum() - epochs) / epochs**0.5,
    }


@pytest.mark.parametrize("n", [1009, 4096, 100_000])
def test_orders_are_unrelated_to_place_and_to_each_other(n: int) -> None:
    found = disorder(np.stack([order(n, epoch) for epoch in range(30)]))
    assert max(found.values()) < 4.5, found


def test_relations_would_be_seen() -> None:
    """Controls: rotated ranges, one order for all epochs, and an order that keeps blocks of neighbours."""
    n = 4096
    rotated = disorder(np.stack([np.roll(np.arange(n), 131 * k) for k in range(30)]))
    assert rotated["rank correlation"] > 10
    assert disorder(np.stack([order(n)] * 30))["between epochs"] > 10
    blocks = np.arange(n).reshape(-1, 8)
    blocky = np.stack([blocks[order(n // 8, k)].ravel() for k in range(30)])
    assert disorder(blocky)["neighbour distance"] > 10


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 13, 36])
def test_small_orders_are_uniform(n: int) -> None:
    """Every number at every place equally often (chi-squared over 4,000 epochs; sparse keys would stand out)."""
    epochs = 4000
    orders = permuted(np.tile(np.arange(n), epochs), np.repeat(np.arange(epochs), n), n, key_of(n)).reshape(epochs, n)
    seen = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi2, freedom = ((seen - epochs / n) ** 2 / (epochs / n)).sum(), (n - 1) ** 2
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 10
    if n <= 5:
        assert len(np.unique(orders, axis=0)) == [0, 1, 2, 6, 24, 120][n]
