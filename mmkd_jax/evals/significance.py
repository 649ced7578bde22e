"""Whether one model is better than another: on one set by its cases, over many sets by their differences.

The paired bootstrap serves any metric and rows that come in groups. McNemar's and DeLong's tests need no resampling but
rows that are independent of each other. Over sets, each set counts alike; p-values of several sets or models are
corrected by Holm's method, which controls the chance of one or more false findings whatever their dependence.

Sources: Efron and Tibshirani 1993 (An Introduction to the Bootstrap, 15.4 and 16); McNemar 1947; DeLong, DeLong and
Clarke-Pearson 1988 in the form of Sun and Xu 2014 (midranks); Wilcoxon 1945; Holm 1979; Davison and Hinkley 1997
(Bootstrap Methods and their Application, 3.8, hierarchical data).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap
from mmkd_jax.evals.bootstrap import Estimate


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference between two models with its 95 % interval and the two-sided p-value of there being none."""

    value: float
    low: float
    high: float
    p: float


def paired(a: Estimate, b: Estimate) -> Difference:
    """`a - b` from the same resamples of the same cases.

    The p-value inverts the percentile interval: it is below 0.05 about when the 95 % interval leaves 0 out. It is never
    below 2 / (resamples + 1). Resamples in which a metric does not exist are left out.

    Raises:
      InputError: the two were not resampled alike, or no resample has the metric.
    """
    difference = bootstrap.difference(a, b)
    known = difference.replicates[np.isfinite(difference.replicates)]
    if not len(known):
        raise InputError("no resample has this metric; there are too few rows to compare on")
    tail = 1 + min(int(np.sum(known <= 0)), int(np.sum(known >= 0)))
    low, high = difference.interval()
    return Difference(difference.value, low, high, min(1.0, 2 * tail / (len(known) + 1)))


def smallest_p(resamples: int) -> float:
    """The smallest p-value that `paired` can give."""
    return 2 / (resamples + 1)


def mcnemar(right_a, right_b) -> tuple[int, int, float]:
    """Exact test of equal accuracy on the same independent rows.

    Args:
      right_a: bool `[n]`, where the first model is right.
      right_b: bool `[n]`, where the second is.

    Returns:
      how many rows only the first has right, how many only the second, and the two-sided p-value.
    """
    right_a, right_b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    if right_a.shape != right_b.shape or right_a.ndim != 1:
        raise InputError(f"McNemar's test needs the same rows twice, got {right_a.shape} and {right_b.shape}")
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
    p = 2 * special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)
    return only_a, only_b, float(min(1.0, p))


def delong(positive, scores) -> tuple[np.ndarray, np.ndarray]:
    """ROC AUCs of several models on the same independent rows, ties counting half, and their covariance.

    Args:
      positive: bool `[n]`.
      scores: float `[models, n]`, the higher the likelier positive.

    Returns:
      AUCs float64 `[models]`, covariance float64 `[models, models]`.

    Raises:
      InputError: fewer than two positive or two negative rows, or scores that are not finite.
    """
    positive, scores = np.asarray(positive, bool), np.atleast_2d(np.asarray(scores, np.float64))
    m, n = int(positive.sum()), int((~positive).sum())
    if scores.shape[1:] != positive.shape or not np.isfinite(scores).all():
        raise InputError(f"DeLong's test needs finite scores [models, {len(positive)}], got {scores.shape}")
    if m < 2 or n < 2:
        raise InputError(f"DeLong's test needs two positive and two negative rows, got {m} and {n}")
    among_all = stats.rankdata(scores, axis=1)
    above = (among_all[:, positive] - stats.rankdata(scores[:, positive], axis=1)) / n  # share of negatives below
    below = 1 - (among_all[:, ~positive] - stats.rankdata(scores[:, ~positive], axis=1)) / m
    covariance = np.atleast_2d(np.cov(above)) / m + np.atleast_2d(np.cov(below)) / n
    return above.mean(axis=1), covariance


def delong_difference(positive, a, b) -> Difference:
    """DeLong's test of equal AUC: scores `a` and `b` float `[n]` of the same rows; see `delong`."""
    aucs, covariance = delong(positive, np.stack([a, b]))
    value = float(aucs[0] - aucs[1])
    deviation = float(np.sqrt(max(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])))
    reach = float(stats.norm.ppf(0.975)) * deviation
    if deviation == 0:
        return Difference(value, value, value, float(value == 0))
    return Difference(value, value - reach, value + reach, float(2 * stats.norm.sf(abs(value) / deviation)))


def wilcoxon(differences) -> tuple[float, int, float]:
    """Exact signed-rank test of differences (one a set) around 0: zeros are left out, ties share their mean rank.

    Returns:
      the sum of ranks of positive differences, how many differences are not 0, and the two-sided p-value (1 without
      any).
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 1 or not np.isfinite(differences).all():
        raise InputError("the signed-rank test needs one finite difference a set")
    differences = differences[differences != 0]
    doubled = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)  # whole numbers even with ties
    chances = np.ones(1)  # of each sum of ranks, when signs are coins
    for rank in doubled:
        grown = np.zeros(len(chances) + rank)
        grown[: len(chances)] = chances / 2
        grown[rank:] += chances / 2
        chances = grown
    positive = int(doubled[differences > 0].sum())
    tail = min(chances[: positive + 1].sum(), chances[positive:].sum())
    return positive / 2, len(differences), float(min(1.0, 2 * tail))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's corrected p-values, float64 `[m]`, in the order given: reject those below the level."""
    p_values = np.asarray(p_values, np.float64)
    if p_values.ndim != 1 or not ((p_values >= 0) & (p_values <= 1)).all():
        raise InputError("p-values must be numbers from 0 to 1")
    order = np.argsort(p_values, kind="stable")
    stepped = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return corrected


def over_sets(estimates: Sequence[Estimate], seed: int = 0) -> Estimate:
    """Mean over sets with an interval that covers the choice of sets as well as that of cases.

    Each replicate draws as many sets as there are, with replacement, and for each draw an independent resample of its
    cases. Equal seeds draw alike, so that two models' means can be paired. The sets' own doubt is part of what is seen
    between sets already, hence the interval is on the wide side.
    """
    if not estimates:
        raise InputError("there is no set to take the mean over")
    replicates = np.stack([e.replicates for e in estimates])
    rng, shape = np.random.default_rng(seed), replicates.shape[::-1]
    drawn = replicates[rng.integers(shape[1], size=shape), rng.integers(shape[0], size=shape)]
    return Estimate(float(np.mean([e.value for e in estimates])), drawn.mean(axis=1))


def mean_ranks(estimates: Sequence[Sequence[Estimate]]) -> list[Estimate]:
    """Each model's rank (1 is best, ties share the mean rank), averaged over sets, with its resamples.

    Args:
      estimates: of `[model][set]`; higher is better; a set's resamples are the same for all models.
    """
    values = np.array([[e.value for e in of_model] for of_model in estimates])
    replicates = np.array([[e.replicates for e in of_model] for of_model in estimates])
    if values.ndim != 2 or not values.size:
        raise InputError("ranks need the same sets, at least one, for every model")
    of_values = stats.rankdata(-values, axis=0).mean(axis=1)
    of_replicates = stats.rankdata(-replicates, axis=0).mean(axis=1)
    return [Estimate(float(value), resampled) for value, resampled in zip(of_values, of_replicates)]
