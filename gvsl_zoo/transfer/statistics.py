"""Intervals and tests: means over cases, proportions, areas under a curve, and the paired comparison of a bench."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
Z = 1.959963984540054  # the normal quantile of 0.975


class Interval(NamedTuple):
    """An estimate from `n` values and its 95 % interval; None where there is nothing to say it from."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


class Comparison(NamedTuple):
    """A mean paired difference, its 95 % interval mean +- half, and the two-sided p of no difference."""

    mean: float
    half: float
    p: float


def mean_interval(values: Sequence[float], limits: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The mean and its t interval, cut to `limits`; no interval from fewer than two values.

    Student's t and not the percentile bootstrap, which is much too narrow for a handful of cases.
    """
    n = len(values)
    mean = float(np.mean(values)) if n else None
    if mean is None or n < 2:
        return Interval(mean, None, None, n)
    half = _t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, max(limits[0], mean - half), min(limits[1], mean + half), n)


def proportion_interval(successes: int, n: int) -> Interval:
    """A proportion and its score interval, which holds for few cases and at 0 and 1 (Wilson 1927)."""
    if not n:
        return Interval(None, None, None, 0)
    share, z2 = successes / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n)


def auc_interval(auc: float, positives: int, negatives: int) -> Interval:
    """An area under the ROC curve and its score interval, which holds for few cases and at 1.

    Source: Newcombe 2006, Statistics in Medicine 25:559, method 5.
    """
    middle = (positives + negatives) / 2 - 1

    def deviation(area: float) -> float:
        spread = 1 + middle * ((1 - area) / (2 - area) + area / (1 + area))
        return abs(auc - area) - Z * math.sqrt(area * (1 - area) * spread / (positives * negatives))

    low, high = (_root(deviation, auc, end) for end in (0.0, 1.0))
    return Interval(auc, low, high, positives + negatives)


def compare(differences: np.ndarray) -> Comparison:
    """The paired comparison of two arms over seeds and test cases, both of them random.

    Args:
        differences: score of one arm minus that of the other, (seeds, cases), at least two seeds.

    Seeds and cases are crossed, as readers and cases are in a reader study: the variance of the mean has a part of each
    and of their interaction, estimated from the mean squares of a two-way table, with Satterthwaite's degrees of
    freedom (Dorfman, Berbaum & Metz 1992; Hillis 2007). With three seeds that alone is somewhat narrow, so the widest
    of three intervals counts: this one, and Student's over the seeds and over the cases.
    """
    seeds, cases = differences.shape
    mean = float(differences.mean())
    of_seeds, of_cases = differences.mean(1) - mean, differences.mean(0) - mean
    by_seed = cases * float(of_seeds @ of_seeds) / (seeds - 1)
    squares = [(by_seed, seeds - 1.0)]  # each estimates seeds * cases * variance of the mean; degrees of freedom
    if cases > 1:
        rest = differences - mean - of_seeds[:, None] - of_cases
        by_case = seeds * float(of_cases @ of_cases) / (cases - 1)
        both, count = float((rest * rest).sum()) / ((seeds - 1) * (cases - 1)), (seeds - 1) * (cases - 1)
        squares.append((by_case, cases - 1.0))
        total = by_seed + by_case - both
        if total > max(by_seed, by_case):  # otherwise one of the two alone is the wider estimate
            parts = by_seed**2 / (seeds - 1) + by_case**2 / (cases - 1) + both**2 / count
            squares.append((total, total**2 / parts))
    errors = [(math.sqrt(square / (seeds * cases)), degrees) for square, degrees in squares]
    if max(errors)[0] <= 1e-9 * max(1.0, abs(mean)):  # the same difference everywhere
        return Comparison(mean, 0.0, float(mean == 0))
    halves = [_t_quantile(degrees) * error for error, degrees in errors]
    tails = [_t_tail(abs(mean) / error, degrees) if error else 0.0 for error, degrees in errors]
    return Comparison(mean, max(halves), max(tails))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for how many they are: that one of several comparisons is wrongly called stays a 5 % risk.

    Source: Holm 1979.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def _t_quantile(degrees: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees))


def _t_tail(statistic: float, degrees: float) -> float:
    from scipy.stats import t

    return float(2 * t.sf(statistic, degrees))


def _root(function: Callable[[float], float], inside: float, outside: float) -> float:
    """Where `function`, negative at `inside`, becomes positive on the way to `outside`, by bisection."""
    if function(outside) <= 0:
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if function(middle) <= 0 else (inside, middle)
    return (inside + outside) / 2
