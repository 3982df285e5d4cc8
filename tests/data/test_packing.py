"""Packing alone: budgets hold, samples stay whole, balance is found, and any input is packed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kontext_train.data.packing import FILL, deal, pack


def packed(tokens: np.ndarray, cost: np.ndarray, budget: int, seed: int = 0) -> np.ndarray:
    return pack(tokens, cost, budget, np.random.default_rng(seed))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 100), min_size=1, max_size=80),
    budget=st.integers(100, 400),
    quadratic=st.integers(0, 1 << 40),
)
def test_anything_is_packed_within_budget(tokens: list[int], budget: int, quadratic: int) -> None:
    sizes = np.array(tokens)
    cost = sizes * 1000 + sizes**2 * quadratic
    found = packed(sizes, cost, budget)
    assert np.array_equal(np.unique(found), np.arange(found.max() + 1)), "an empty pack"
    assert np.bincount(found, weights=sizes).max() <= budget
    assert np.array_equal(found, packed(sizes, cost, budget)), "not a function of its arguments"


@pytest.mark.parametrize(
    ("budget", "fit"), [(8704, 1), (9_000, 1), (12_000, 1), (16_384, 1), (17_408, 2), (20_000, 2), (60_000, 6)]
)
def test_samples_of_one_size_fill_packs_as_far_as_they_can(budget: int, fit: int) -> None:
    """1024² edits: nothing fills the gap that the budget leaves."""
    tokens = np.full(3000, 8704)
    found = packed(tokens, tokens, budget)
    assert found.max() + 1 <= 3000 / fit / FILL + 2
    assert np.bincount(found).max() == fit


def test_few_samples_share_one_pack() -> None:
    assert packed(np.array([3, 4, 5]), np.array([3, 4, 5]), 100).tolist() == [0, 0, 0]
    assert packed(np.array([7]), np.array([1]), 7).tolist() == [0]
    assert packed(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), 7).tolist() == []


def test_dealing_gives_every_pack_its_share() -> None:
    size = np.array([9, 8, 7, 3, 2, 1])
    np.testing.assert_array_equal(np.bincount(deal(size, 3), weights=size), [10, 10, 10])


def test_costs_that_tokens_do_not_tell_are_balanced_too() -> None:
    """A cost of its own for each sample. Control: dealing by tokens alone leaves them apart."""
    random = np.random.default_rng(0)
    tokens, cost = random.integers(50, 300, 4000), random.integers(10**12, 10**13, 4000)
    loads = np.bincount(packed(tokens, cost, 4000), weights=cost)
    dealt = np.bincount(deal(tokens, len(loads)), weights=cost)
    assert loads.std() / loads.mean() < 0.002
    assert dealt.std() / dealt.mean() > 0.05
