"""Means and quantiles with 95 % bootstrap intervals.

Results on one base image are not independent (KontextBench has 1,026 prompts on 108 images), so what is drawn again are
base images with all that belongs to them: a cluster bootstrap (Field & Welsh 2007). The draws are the same each time.

Legend: C clusters; R draws.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWS = 2000
LEVELS = (2.5, 97.5)  # percent
NORMAL = 1.96  # standard errors, to the same levels


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, the interval it is known to, and how many images it is of. One cluster gives no interval."""

    value: float
    low: float | None
    high: float | None
    n: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def mean(values: Iterable[tuple[Hashable, float]], draws: int = DRAWS) -> Estimate | None:
    """The mean of (cluster, value) pairs; None of nothing."""
    sums: dict[Hashable, list[float]] = {}
    for cluster, value in values:
        total = sums.setdefault(cluster, [0.0, 0.0])
        total[0] += value
        total[1] += 1
    if not sums:
        return None
    sum_C, count_C = np.array(list(sums.values())).T
    value, n = sum_C.sum() / count_C.sum(), int(count_C.sum())
    if len(sums) == 1:
        return Estimate(float(value), None, None, n)
    times_RC = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    means_R = (times_RC @ sum_C) / (times_RC @ count_C)
    low, high = np.percentile(means_R, LEVELS)
    return Estimate(float(value), float(low), float(high), n)


def of_sample(values: Sequence[float], statistic: Callable[..., np.ndarray], draws: int = DRAWS) -> Estimate | None:
    """A statistic of independent values. statistic: takes `axis`, as numpy's do. None of nothing."""
    if not values:
        return None
    sample = np.asarray(values)
    drawn = np.random.default_rng(0).choice(sample, (draws, len(sample)))
    low, high = np.percentile(statistic(drawn, axis=1), LEVELS)
    return Estimate(float(statistic(sample, axis=0)), float(low), float(high), len(sample))


def jackknife(value: float, parts: Sequence[float], n: int) -> Estimate:
    """value +- 1.96 standard errors of what is found with each group left out (Efron & Stein 1981), n: images.

    For distances between sets, whose value over a bootstrap's repeated images is of another size: its interval would
    not hold the value.
    """
    if len(parts) < 2:
        return Estimate(value, None, None, n)
    error = NORMAL * np.sqrt((len(parts) - 1) * np.var(parts))
    return Estimate(value, float(value - error), float(value + error), n)
