"""Means and quantiles with 95 % intervals.

Results on one base image are not independent (KontextBench has 1,026 prompts on 108 images), so what is drawn again are
base images with all that belongs to them: a cluster bootstrap (Field & Welsh 2007). The draws are the same each time.

Legend: C clusters; R draws.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binom
from scipy.stats import t as student_t

DRAWS = 2000
FEW, MANY = 4, 40  # clusters
LEVELS = (2.5, 97.5)  # percent
NORMAL = 1.96  # standard errors, to the same levels


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, the interval it is known to, and how many images it is of. Too few give no interval."""

    value: float
    low: float | None
    high: float | None
    n: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def mean(values: Iterable[tuple[Hashable, float]], draws: int = DRAWS, *, yes_no: bool = False) -> Estimate | None:
    """The mean of (cluster, value) pairs; None of nothing.

    FEW clusters give no interval. From MANY on it is the bootstrap's; between, whose draws are too alike to each other,
    Student's with the clusters' own standard error. yes_no: values are 0 or 1, and all of them alike are no certainty.
    """
    sums: dict[Hashable, list[float]] = {}
    for cluster, value in values:
        total = sums.setdefault(cluster, [0.0, 0.0])
        total[0] += value
        total[1] += 1
    if not sums:
        return None
    sum_C, count_C = np.array(list(sums.values())).T
    value, n = float(sum_C.sum() / count_C.sum()), int(count_C.sum())
    if len(sums) <= FEW:
        return Estimate(value, None, None, n)
    if yes_no:
        low, high = _share(value, sum_C, count_C)
    elif len(sums) < MANY:
        error = student_t.ppf(LEVELS[1] / 100, len(sums) - 1) * _standard_error(value, sum_C, count_C)
        low, high = value - error, value + error
    else:
        times_RC = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
        low, high = np.percentile((times_RC @ sum_C) / (times_RC @ count_C), LEVELS)
    return Estimate(value, float(low), float(high), n)


def _standard_error(value: float, sum_C: np.ndarray, count_C: np.ndarray) -> float:
    """Of a ratio of sums, linearised (Cochran 1977, 6.3)."""
    clusters = len(sum_C)
    return float(np.sqrt(clusters / (clusters - 1) * ((sum_C - value * count_C) ** 2).sum()) / count_C.sum())


def _share(value: float, sum_C: np.ndarray, count_C: np.ndarray) -> tuple[float, float]:
    """Wilson's interval of a share, with as many independent answers as its standard error says (Korn & Graubard 1998);
    where all are alike, which says nothing of that, as many as there are clusters.
    """
    clusters, error = len(sum_C), _standard_error(value, sum_C, count_C)
    answers = min(value * (1 - value) / error**2, count_C.sum()) if error > 0 else clusters
    t = student_t.ppf(LEVELS[1] / 100, clusters - 1)
    middle = (value + t**2 / (2 * answers)) / (1 + t**2 / answers)
    half = t / (1 + t**2 / answers) * np.sqrt(value * (1 - value) / answers + t**2 / (4 * answers**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def quantile(values: Sequence[float], share: float) -> Estimate | None:
    """The value that `share` of independent values stay below; None of nothing.

    The interval is between two of the sorted values, by the binomial distribution (David & Nagaraja 2003), whatever
    theirs is. None where they are too few for both ends: 6 have a median's, 72 a 95th percentile's.
    """
    if not values:
        return None
    sorted_N, n = np.sort(values), len(values)
    below, upto = (int(binom.ppf(level / 100, n, share)) for level in LEVELS)
    value = float(np.quantile(sorted_N, share))
    if below < 1 or upto >= n:
        return Estimate(value, None, None, n)
    return Estimate(value, float(sorted_N[below - 1]), float(sorted_N[upto]), n)


def jackknife(value: float, parts: Sequence[float], n: int) -> Estimate:
    """value +- 1.96 standard errors of what is found with each group left out (Efron & Stein 1981), n: images.

    For distances between sets, whose value over a bootstrap's repeated images is of another size: its interval would
    not hold the value. A distance is 0 at least, and so is the interval of one.
    """
    if len(parts) < 2:
        return Estimate(value, None, None, n)
    error = NORMAL * np.sqrt((len(parts) - 1) * np.var(parts))
    low = max(value - error, 0.0) if value >= 0 else value - error  # KID's value, free of bias, may be negative
    return Estimate(value, float(low), float(value + error), n)
