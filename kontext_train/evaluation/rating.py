"""Ratings from pairwise votes: Bradley–Terry strengths on the scale of Elo, with intervals of a Bayesian bootstrap.

P(i beats j) = s_i / (s_i + s_j) (Bradley & Terry 1952); a rating is 400 log10 s, 1000 on average, so 400 more means ten
wins to one. A tie is half a win for each. Models that met get one more base image on top, tied, or one that never lost
would be infinite. Draws weigh base images at random (Rubin 1981) and each side of that tie too: for two models and one
vote a base image this is Jeffreys' interval, which is no certainty after any number of votes for one side.

Legend: K models; R bootstrap draws; C clusters of votes.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse.csgraph import connected_components

from kontext_train.evaluation.bootstrap import FEW, LEVELS, Estimate

DRAWS = 1000
ROUNDS = 2000  # of the iteration, at most
MEAN, SCALE = 1000.0, 400.0


@dataclass(frozen=True, slots=True)
class Vote:
    """first and second: models. score: 1 if the first won, 0 if the second did, 0.5 for a tie."""

    first: str
    second: str
    score: float
    cluster: Hashable  # votes on one base image are not independent


def ratings(models: Sequence[str], votes: Sequence[Vote]) -> dict[str, dict[str, Any]] | None:
    """{model: {value, low, high, n}}; None while not every model is compared to every other, directly or not.

    low and high are None where votes are on FEW base images or fewer.
    """
    number = {model: i for i, model in enumerate(models)}
    clusters = {cluster: i for i, cluster in enumerate(dict.fromkeys(vote.cluster for vote in votes))}
    wins_CKK = np.zeros((len(clusters), len(models), len(models)))
    for vote in votes:
        a, b, c = number[vote.first], number[vote.second], clusters[vote.cluster]
        wins_CKK[c, a, b] += vote.score
        wins_CKK[c, b, a] += 1 - vote.score
    wins_KK = wins_CKK.sum(0)
    met_KK = (wins_KK + wins_KK.T) > 0
    if connected_components(met_KK, directed=False)[0] > 1:
        return None
    clusters_KK = (wins_CKK + wins_CKK.transpose(0, 2, 1) > 0).sum(0)
    prior_KK = (wins_KK + wins_KK.T) / np.maximum(clusters_KK, 1) / 2  # as many votes as a base image has
    value_K = elo(bradley_terry((wins_KK + prior_KK)[None]))[0]
    rng = np.random.default_rng(0)
    weight_RC, tie_RKK = rng.gamma(1, size=(DRAWS, len(clusters))), rng.gamma(0.5, size=(DRAWS, *prior_KK.shape))
    drawn_RKK = np.einsum("rc,cij->rij", weight_RC, wins_CKK) + 2 * tie_RKK * prior_KK
    low_K, high_K = np.percentile(elo(bradley_terry(drawn_RKK)), LEVELS, axis=0)
    n_K = (wins_KK + wins_KK.T).sum(1)
    several = len(clusters) > FEW
    return {
        model: Estimate(
            float(value_K[i]), float(low_K[i]) if several else None, float(high_K[i]) if several else None, int(n_K[i])
        ).as_json()
        for model, i in number.items()
    }


def bradley_terry(wins_RKK: np.ndarray) -> np.ndarray:
    """Strengths [R, K] of greatest likelihood, their logarithms 0 on average. wins[r, i, j]: how often i beat j.

    The iteration of Hunter 2004 (MM algorithms for generalized Bradley-Terry models).
    """
    met_RKK = wins_RKK + wins_RKK.transpose(0, 2, 1)
    won_RK = wins_RKK.sum(2)
    strength_RK = np.ones(won_RK.shape)
    for _ in range(ROUNDS):
        sums_RKK = strength_RK[:, :, None] + strength_RK[:, None, :]
        new_RK = won_RK / (met_RKK / sums_RKK).sum(2)
        new_RK /= np.exp(np.log(new_RK).mean(1, keepdims=True))
        if np.allclose(new_RK, strength_RK, rtol=1e-9, atol=0):
            break
        strength_RK = new_RK
    return new_RK


def elo(strength_RK: np.ndarray) -> np.ndarray:
    return MEAN + SCALE * np.log10(strength_RK)
