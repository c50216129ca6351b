"""Intervals and tests: means over cases, proportions, areas under a curve, and the paired comparison of a bench."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
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
    """A mean paired difference, its 95 % interval mean +- half, and the two-sided p of no difference.

    half: infinite where there is nothing to say it from.
    """

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


def subject_means(values: Mapping[str, float], subjects: Mapping[str, str]) -> list[float]:
    """The mean over the cases of each subject, in the order of their first: scans of one subject are alike.

    Args:
        values: by case.
        subjects: by case; a case that is not there is a subject of its own.
    """
    groups: dict[str, list[float]] = {}
    for case, value in values.items():
        groups.setdefault(subjects.get(case, case), []).append(value)
    return [float(np.mean(group)) for group in groups.values()]


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
    """The paired comparison of two arms over seeds and test subjects, all of them random.

    Args:
        differences: score of one arm minus that of the other, (seeds, subjects), at least two seeds; or any number of
            factors, an axis each: pre-training seeds before these, or for an area under a curve the subjects of either
            class instead of all.

    The factors are crossed, as readers and cases are in a reader study: the variance of the mean has a part of each and
    of their interactions, estimated from the mean squares of the table, with Satterthwaite's degrees of freedom
    (Dorfman, Berbaum & Metz 1992; Hillis 2007). With three seeds that alone is somewhat narrow, so the widest interval
    over all sets of factors counts, of a single factor Student's.

    One subject says nothing about others, and the same difference everywhere no more than that n subjects have one
    sign: p is then that of the sign test, 2^(1 - n), and half infinite unless that is below 5 %.
    """
    mean, subjects = float(differences.mean()), differences.shape[-1]
    factors = [axis for axis, size in enumerate(differences.shape) if size > 1]
    squares = {part: _mean_square(differences, part) for part in _parts(factors)}
    errors = []  # of the mean, and their degrees of freedom
    for some in squares:
        parts = [(-((-1) ** len(part)), *squares[part]) for part in _parts(some)]
        total = sum(sign * square for sign, square, _ in parts)
        if len(some) == 1 or total > max(squares[(factor,)][0] for factor in some):  # else one alone is the wider
            spread = sum(square**2 / degrees for _, square, degrees in parts)
            errors.append((math.sqrt(total / differences.size), total**2 / spread if spread else 1.0))
    if subjects == 1 or max(errors)[0] <= 1e-9 * max(1.0, abs(mean)):
        p = 2.0 ** (1 - subjects)
        return Comparison(mean, 0.0 if p < 1 - CONFIDENCE else math.inf, p if mean else 1.0)
    halves = [_t_quantile(degrees) * error for error, degrees in errors]
    tails = [_t_tail(abs(mean) / error, degrees) if error else 0.0 for error, degrees in errors]
    return Comparison(mean, max(halves), max(tails))


def _parts(factors: Sequence[int]) -> list[tuple[int, ...]]:
    """All sets of one or more of the factors."""
    return [part for count in range(1, len(factors) + 1) for part in itertools.combinations(factors, count)]


def _mean_square(values: np.ndarray, part: tuple[int, ...]) -> tuple[float, float]:
    """Mean square of the interaction of some factors (of one: its main effect), and its degrees of freedom."""
    effect, degrees = values, 1.0
    for axis, size in enumerate(values.shape):
        mean = effect.mean(axis, keepdims=True)
        effect = effect - mean if axis in part else mean
        degrees *= size - 1 if axis in part else 1
    return values.size / effect.size * float((effect * effect).sum()) / degrees, degrees


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
