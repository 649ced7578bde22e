"""Tests between models against definitions written out, SciPy, and published examples; with ties and absent classes."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, significance
from mmkd_jax.evals.bootstrap import Estimate


def scored(seed=0, n=40, decimals=1):
    """Labels and two models' coarse scores, which tie and go together."""
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    shared = rng.standard_normal(n) + positive
    return positive, *(np.round(shared + rng.standard_normal(n), decimals) for _ in range(2))


# ---------------------------------------------------------------- paired bootstrap


def test_paired_bootstrap_by_drawing_indices():
    rng = np.random.default_rng(0)
    a, b = rng.random(50) < 0.8, rng.random(50) < 0.6
    weights = bootstrap.draw(50, 2000, 1)
    found = significance.paired(*(Estimate(x.mean(), bootstrap.mean(x, weights)) for x in (a, b)))
    drawn = np.array([a[i].mean() - b[i].mean() for i in (np.repeat(np.arange(50), w) for w in weights)])
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    tails = np.sum(drawn <= 1e-12), np.sum(drawn >= -1e-12)
    assert found.p == pytest.approx(2 * (min(tails) + 1) / 2001)
    mirrored = significance.paired(*(Estimate(x.mean(), bootstrap.mean(x, weights)) for x in (b, a)))
    assert (mirrored.value, mirrored.p) == pytest.approx((-found.value, found.p))


def test_paired_bootstrap_of_equal_and_of_certain_models():
    weights = bootstrap.draw(30, 999, 0)
    right, wrong = np.ones(30), np.zeros(30)
    same = significance.paired(*[Estimate(1.0, bootstrap.mean(right, weights))] * 2)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    certain = significance.paired(*(Estimate(x.mean(), bootstrap.mean(x, weights)) for x in (right, wrong)))
    assert certain.p == significance.smallest_p(999) == 0.002
    for resamples, message in ((np.full(999, np.nan), "no resample"), (np.zeros(5), "same resamples")):
        with pytest.raises(InputError, match=message):
            significance.paired(Estimate(1.0, np.ones(999)), Estimate(0.0, resamples))


def test_paired_bootstrap_rejects_equal_models_as_often_as_it_says():
    rng, rejected = np.random.default_rng(3), 0
    for trial in range(300):
        a, b = rng.random((2, 120)) < 0.7
        weights = bootstrap.draw(120, 400, trial)
        rejected += significance.paired(*(Estimate(x.mean(), bootstrap.mean(x, weights)) for x in (a, b))).p < 0.05
    assert 0.02 <= rejected / 300 <= 0.09


# ---------------------------------------------------------------- McNemar


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (3, 9), (12, 12), (86, 150)])
def test_mcnemar_by_counting_coins(b, c):
    right = np.array([[1, 0]] * b + [[0, 1]] * c + [[1, 1]] * 20 + [[0, 0]] * 7, bool)
    only_a, only_b, p = significance.mcnemar(*right.T)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert (only_a, only_b) == (b, c)
    assert p == pytest.approx(min(1, 2 * tail), rel=1e-12)
    assert p == pytest.approx(stats.binomtest(b, b + c).pvalue if b + c else 1, rel=1e-9)


def test_mcnemar_refuses_other_rows():
    with pytest.raises(InputError, match="same rows twice"):
        significance.mcnemar(np.ones(3, bool), np.ones(4, bool))


# ---------------------------------------------------------------- DeLong


def delong_by_pairs(positive, scores):
    """DeLong's structural components, pair by pair."""
    kernels = [
        (s[positive][:, None] > s[~positive]) + 0.5 * (s[positive][:, None] == s[~positive]) for s in np.array(scores)
    ]
    v10, v01 = [k.mean(1) for k in kernels], [k.mean(0) for k in kernels]
    covariance = np.empty((len(kernels), len(kernels)))
    for i, j in np.ndindex(*covariance.shape):
        s10 = np.sum((v10[i] - v10[i].mean()) * (v10[j] - v10[j].mean())) / (len(v10[i]) - 1)
        s01 = np.sum((v01[i] - v01[i].mean()) * (v01[j] - v01[j].mean())) / (len(v01[i]) - 1)
        covariance[i, j] = s10 / len(v10[i]) + s01 / len(v01[i])
    return np.array([k.mean() for k in kernels]), covariance


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_delong_equals_its_definition(decimals):
    positive, a, b = scored(decimals=decimals)
    aucs, covariance = significance.delong(positive, [a, b])
    expected, by_pairs = delong_by_pairs(positive, [a, b])
    np.testing.assert_allclose(aucs, expected, atol=1e-12)
    np.testing.assert_allclose(covariance, by_pairs, atol=1e-12)
    found = significance.delong_difference(positive, a, b)
    z = (expected[0] - expected[1]) / math.sqrt(by_pairs[0, 0] + by_pairs[1, 1] - 2 * by_pairs[0, 1])
    assert found.p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=1e-9)
    unpaired = (expected[0] - expected[1]) / math.sqrt(by_pairs[0, 0] + by_pairs[1, 1])
    assert found.p != pytest.approx(math.erfc(abs(unpaired) / math.sqrt(2)), rel=1e-3)  # the pairing is noticed


def test_delong_auc_equals_scikit_learn_and_scales_do_not_matter():
    from sklearn.metrics import roc_auc_score

    positive, a, b = scored(1, 200)
    aucs, covariance = significance.delong(positive, [a, b])
    assert aucs == pytest.approx([roc_auc_score(positive, a), roc_auc_score(positive, b)], abs=1e-12)
    again = significance.delong(positive, [np.exp(a), 5 * b - 3])
    np.testing.assert_allclose(again[1], covariance, atol=1e-15)


def test_delong_agrees_with_the_paired_bootstrap():
    positive, a, b = scored(2, 400, 3)
    weights = bootstrap.draw(400, 2000, 0)
    a_, b_ = (
        Estimate(significance.delong(positive, s)[0][0], bootstrap.macro_auc(positive.astype(int), np.stack([-s, s], 1),
                                                                             weights))
        for s in (a, b)
    )  # fmt: skip
    test, resampled = significance.delong_difference(positive, a, b), significance.paired(a_, b_)
    assert test.value == pytest.approx(resampled.value)
    assert (test.low, test.high) == pytest.approx((resampled.low, resampled.high), abs=0.01)


def test_delong_of_identical_perfect_and_single_class_scores():
    positive = np.array([0, 0, 0, 1, 1], bool)
    same = significance.delong_difference(positive, np.arange(5), np.arange(5))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    opposite = significance.delong_difference(positive, np.arange(5), -np.arange(5))
    assert (opposite.value, opposite.p) == (1, 0)
    for wrong, scores in ((positive & False, np.arange(5)), (positive, np.full(5, np.nan)), (positive, np.ones(4))):
        with pytest.raises(InputError, match="DeLong's test needs"):
            significance.delong(wrong, scores)
    with pytest.raises(InputError, match="two positive"):
        significance.delong(np.arange(5) == 0, np.arange(5))


# ---------------------------------------------------------------- over sets


def wilcoxon_by_all_signs(differences):
    differences = np.array([d for d in differences if d])
    ranks = stats.rankdata(np.abs(differences))
    sums = np.array([np.dot(ranks, signs) for signs in itertools.product((0, 1), repeat=len(ranks))])
    own = ranks[differences > 0].sum()
    return min(1, 2 * min(np.mean(sums <= own + 1e-9), np.mean(sums >= own - 1e-9)))


@pytest.mark.parametrize(
    "differences",
    [[0.1, 0.2, -0.05, 0.4, 0.3], [1, 1, -1, 2, 2, 2, -3, 0, 0], [0.5], [-1, 1], list(np.linspace(-0.3, 1, 12))],
)
def test_wilcoxon_by_all_signs(differences):
    assert significance.wilcoxon(differences)[2] == pytest.approx(wilcoxon_by_all_signs(differences), abs=1e-12)


def test_wilcoxon_equals_scipy_and_a_published_table():
    differences = np.random.default_rng(0).standard_normal(58) + 0.3
    reference = stats.wilcoxon(differences, method="exact")
    statistic, n, p = significance.wilcoxon(differences)
    assert min(statistic, n * (n + 1) / 2 - statistic) == reference.statistic
    assert p == pytest.approx(reference.pvalue, rel=1e-9)
    # Darwin's 15 pairs of maize plants (The Effects of Cross and Self Fertilisation, 1876), in eighths of an inch
    darwin = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    statistic, n, p = significance.wilcoxon(darwin)
    assert (statistic, n) == (96, 15)
    assert p == pytest.approx(0.0413, abs=5e-5)


def test_wilcoxon_of_nothing_and_of_wrong_input():
    assert significance.wilcoxon([0.0, 0.0]) == (0, 0, 1)
    assert significance.wilcoxon([]) == (0, 0, 1)
    with pytest.raises(InputError, match="one finite difference"):
        significance.wilcoxon([0.1, np.nan])


def test_holm_by_its_definition():
    p = [0.01, 0.04, 0.03, 0.005]  # Holm's step-down: 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 held at 0.06
    assert significance.holm(p).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.6, 0.7]).tolist() == [1, 1]
    assert significance.holm([]).tolist() == []
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(7) ** 3
        for level in (0.01, 0.05, 0.3):
            rejected, left = set(), sorted(range(7), key=lambda i: p[i])
            while left and p[left[0]] <= level / len(left):
                rejected.add(left.pop(0))
            assert {i for i, q in enumerate(significance.holm(p)) if q <= level} == rejected
    for wrong in ([0.1, np.nan], [1.2], [[0.1]]):
        with pytest.raises(InputError, match="from 0 to 1"):
            significance.holm(wrong)


def test_hierarchical_bootstrap_covers_sets_and_cases():
    rng = np.random.default_rng(0)
    values, resamples = rng.normal(0.5, 0.2, 8), 20000
    sets = [Estimate(v, v + 0.1 * rng.standard_normal(resamples)) for v in values]
    found = significance.over_sets(sets, seed=1)
    assert found.value == pytest.approx(values.mean())
    assert found.replicates.var() == pytest.approx((values.var() + 0.1**2) / 8, rel=0.05)
    cases_only = bootstrap.mean_over_sets(sets)
    assert np.subtract(*found.interval()) < np.subtract(*cases_only.interval())  # low minus high: wider
    # one draw for all models: what goes up and down with the sets goes out of a difference
    better = [Estimate(e.value + 0.05, e.replicates + 0.05) for e in sets]
    gain = bootstrap.difference(significance.over_sets(better, 1), found)
    np.testing.assert_allclose(gain.replicates, 0.05)
    assert np.ptp(bootstrap.difference(significance.over_sets(better, 2), found).replicates) > 0.1
    with pytest.raises(InputError, match="no set"):
        significance.over_sets([])


def test_mean_ranks_by_hand_with_ties():
    values = [[0.9, 0.5, 0.7], [0.8, 0.5, 0.7], [0.1, 0.6, 0.7]]
    resampled = np.random.default_rng(0).integers(0, 4, (3, 3, 50)) / 4
    estimates = [[Estimate(v, r) for v, r in zip(*row)] for row in zip(values, resampled)]
    ranks = significance.mean_ranks(estimates)
    assert [r.value for r in ranks] == pytest.approx([(1 + 2.5 + 2) / 3, (2 + 2.5 + 2) / 3, (3 + 1 + 2) / 3])
    for k in range(50):
        by_hand = np.zeros(3)
        for s in range(3):
            column = resampled[:, s, k]
            by_hand += [1 + np.sum(column > own) + 0.5 * (np.sum(column == own) - 1) for own in column]
        assert [r.replicates[k] for r in ranks] == pytest.approx(by_hand / 3)
    with pytest.raises(InputError, match="at least one"):
        significance.mean_ranks([[], []])
