"""Tests of the intervals and tests: closed forms, published numbers, and coverage of the truth in simulated benches."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gvsl_zoo.transfer.statistics import (
    auc_interval,
    compare,
    holm,
    mean_interval,
    proportion_interval,
    subject_means,
)


def test_the_interval_of_a_mean_is_students():
    values = [0.7, 0.8, 0.65, 0.9]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert mean_interval(values) == pytest.approx((np.mean(values), low, high, 4))


def test_an_interval_stays_within_what_the_metric_can_be():
    assert mean_interval([0.99, 1.0, 0.9], (0.0, 1.0)).high == 1.0


@pytest.mark.parametrize(("values", "mean"), [([], None), ([0.5], 0.5)])
def test_nothing_is_claimed_from_fewer_than_two_values(values, mean):
    assert mean_interval(values) == (mean, None, None, len(values))


@pytest.mark.parametrize("successes", [0, 3, 17, 20])
def test_the_interval_of_a_proportion_is_wilsons(successes):
    expected = stats.binomtest(successes, 20).proportion_ci(method="wilson")
    assert proportion_interval(successes, 20)[1:3] == pytest.approx((expected.low, expected.high))


def test_the_interval_of_an_auc_turns_over_with_the_classes_and_is_not_a_point_at_1():
    low, high = auc_interval(0.8, 12, 30)[1:3]
    assert auc_interval(0.2, 12, 30)[1:3] == pytest.approx((1 - high, 1 - low))
    perfect = auc_interval(1.0, 10, 10)
    assert perfect.high == 1 and 0.75 < perfect.low < 0.95


def test_the_interval_of_an_auc_covers_the_truth():
    random, truth, covered = np.random.default_rng(0), stats.norm.cdf(1.2 / np.sqrt(2)), 0
    for _ in range(400):
        positive, negative = random.normal(1.2, 1, 15), random.normal(0, 1, 20)
        auc = (positive[:, None] > negative).mean()
        _, low, high, _ = auc_interval(float(auc), 15, 20)
        covered += low <= truth <= high
    assert covered / 400 > 0.92


@pytest.mark.parametrize("spread", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.3), (0.3, 2.0, 1.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("shape", [(3, 20), (3, 3), (5, 10)])
def test_the_interval_of_a_comparison_covers_the_truth_wherever_the_spread_comes_from(shape, spread):
    random, covered, (seeds, cases), runs = np.random.default_rng(0), 0, shape, 400
    for _ in range(runs):
        of_seed, of_case = random.normal(size=(seeds, 1)), random.normal(size=(1, cases))
        rest = random.normal(size=shape)
        result = compare(5 + spread[0] * of_seed + spread[1] * of_case + spread[2] * rest)
        covered += abs(result.mean - 5) <= result.half
    assert covered / runs > 0.925


def test_p_is_below_5_percent_exactly_where_the_interval_leaves_out_0():
    random = np.random.default_rng(1)
    results = [compare(random.normal(1, 1, (3, 6))) for _ in range(200)]
    assert all((r.p < 0.05) == (abs(r.mean) > r.half) for r in results)
    assert 0 < sum(r.p < 0.05 for r in results) < 200


def test_one_test_subject_says_nothing_about_others_however_many_seeds_agree():
    differences = 10 + np.random.default_rng(0).normal(size=(30, 1))
    assert compare(differences) == (differences.mean(), np.inf, 1.0)


def test_the_mean_of_a_subject_is_that_of_its_cases_and_an_unknown_case_is_a_subject_of_its_own():
    values = {"a1": 1.0, "b1": 5.0, "a2": 2.0, "c": 7.0}
    assert subject_means(values, {"a1": "a", "a2": "a", "b1": "b"}) == [1.5, 5.0, 7.0]


def test_seeds_that_disagree_widen_the_interval_however_many_cases_agree():
    agreeing = np.tile(np.linspace(1, 2, 50), (3, 1))
    disagreeing = agreeing + np.array([[-3.0], [0.0], [3.0]])
    assert compare(disagreeing).half > 5 * compare(agreeing).half


def test_three_factors_cover_the_truth_wherever_the_spread_comes_from():
    random, covered, runs = np.random.default_rng(0), 0, 400
    for run in range(runs):
        spread = np.roll([1.0, 0.3, 0.1], run)
        parts = [random.normal(size=shape) for shape in ((3, 1, 1), (1, 3, 1), (1, 1, 8), (3, 3, 8))]
        result = compare(5 + sum(s * part for s, part in zip([*spread, 0.5], parts, strict=True)))
        covered += abs(result.mean - 5) <= result.half
    assert covered / runs > 0.925


def test_a_factor_that_changes_nothing_does_not_narrow_the_interval():
    differences = np.random.default_rng(0).normal(1, 1, (3, 6))
    assert compare(np.stack([differences] * 4)).half >= compare(differences).half - 1e-9


def test_over_films_of_both_classes_the_interval_is_delongs():
    random = np.random.default_rng(0)
    ordered = random.normal(1, 1, (400, 1)) > random.normal(size=(1, 500))
    by_class = [ordered.mean(axis).var(ddof=1) / ordered.shape[1 - axis] for axis in (0, 1)]
    assert compare(ordered[None].astype(float)).half == pytest.approx(1.96 * np.sqrt(sum(by_class)), rel=0.02)


@pytest.mark.parametrize("subjects", range(1, 9))
def test_the_same_difference_everywhere_is_as_sure_as_a_sign_test_over_the_subjects(subjects):
    mean, half, p = compare(np.full((3, subjects), 2.0))
    assert mean == 2 and p == pytest.approx(stats.binomtest(subjects, subjects).pvalue)
    assert half == (0 if p < 0.05 else np.inf)
    assert compare(np.zeros((3, subjects))) == (0.0, half, 1.0)


def test_holm_corrects_the_smallest_p_most_and_keeps_the_order():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
