"""Ratings against an optimiser we did not write, and their intervals."""

import numpy as np
import pytest
from scipy.optimize import minimize

from kontext_train.evaluation.rating import Vote, bradley_terry, elo, ratings


def test_strengths_are_those_of_greatest_likelihood() -> None:
    wins = np.random.default_rng(0).integers(1, 9, (4, 4)).astype(float)
    np.fill_diagonal(wins, 0)

    def cost(log_strength: np.ndarray) -> float:
        margin = log_strength[:, None] - log_strength[None, :]
        return float((wins * np.logaddexp(0, -margin)).sum() + log_strength.sum() ** 2)

    expected = minimize(cost, np.zeros(4), tol=1e-12).x
    np.testing.assert_allclose(np.log(bradley_terry(wins[None])[0]), expected, atol=1e-4)


def test_ten_wins_to_one_are_400_points() -> None:
    value = elo(bradley_terry(np.array([[[0.0, 10.0], [1.0, 0.0]]])))[0]
    assert value[0] - value[1] == pytest.approx(400)
    assert value.mean() == pytest.approx(1000)


def test_ratings_recover_who_is_better_and_say_how_sure_they_are() -> None:
    rng = np.random.default_rng(1)
    strength = {"good": 4.0, "same": 4.0, "bad": 1.0}
    names = list(strength)

    def votes(count: int) -> list[Vote]:
        found = []
        for i in range(count):
            a, b = rng.choice(names, 2, replace=False)
            found.append(Vote(a, b, float(rng.random() < strength[a] / (strength[a] + strength[b])), i // 3))
        return found

    few, many = ratings(names, votes(60)), ratings(names, votes(1500))
    assert few is not None
    assert many is not None
    assert many["good"]["low"] > many["bad"]["high"]
    assert many["good"]["low"] < many["same"]["high"]
    assert many["same"]["low"] < many["good"]["high"], "equal models are not told apart"
    expected = 400 * np.log10(4)
    assert many["good"]["value"] - many["bad"]["value"] == pytest.approx(expected, abs=60)
    assert many["good"]["high"] - many["good"]["low"] < (few["good"]["high"] - few["good"]["low"]) / 2


def test_ties_pull_together_and_a_model_that_never_lost_is_finite() -> None:
    won = [Vote("a", "b", 1.0, i) for i in range(5)]
    tied = [Vote("a", "b", 0.5, i) for i in range(5, 10)]
    alone, both = ratings(["a", "b"], won), ratings(["a", "b"], won + tied)
    assert alone is not None
    assert both is not None
    assert np.isfinite(alone["a"]["value"])
    assert alone["a"]["value"] > both["a"]["value"] > 1000
    assert alone["a"]["n"] == 5


def test_intervals_of_few_votes_hold_the_truth_as_often_as_they_say() -> None:
    for share, count in ((0.9, 10), (0.9, 5), (0.5, 10), (0.95, 20)):
        truth, held = 1000 + 200 * np.log10(share / (1 - share)), 0
        for seed in range(100):
            won = np.random.default_rng(seed).random(count) < share
            found = ratings(["a", "b"], [Vote("a", "b", float(w), i) for i, w in enumerate(won)])
            assert found is not None
            held += found["a"]["low"] <= truth <= found["a"]["high"]
        assert held >= 90, (share, count)


def test_votes_for_one_side_are_no_certainty() -> None:
    """However many of them are on one base image: those are one opinion of one picture."""
    for repeats in (1, 8):
        few = ratings(["a", "b"], [Vote("a", "b", 1.0, i) for i in range(4) for _ in range(repeats)])
        some = ratings(["a", "b"], [Vote("a", "b", 1.0, i) for i in range(6) for _ in range(repeats)])
        assert few is not None
        assert few["a"]["low"] is few["a"]["high"] is None, "too few"
        assert some is not None
        assert some["a"]["low"] < some["a"]["value"] - 100
        assert some["a"]["value"] + 300 < some["a"]["high"]


def test_models_that_never_met_are_not_ranked() -> None:
    votes = [Vote("a", "b", 1.0, 0), Vote("c", "d", 1.0, 1)]
    assert ratings(["a", "b", "c", "d"], votes) is None
    assert ratings(["a", "b", "c", "d"], [*votes, Vote("b", "c", 1.0, 2)]) is not None
    assert ratings(["a", "b"], []) is None
