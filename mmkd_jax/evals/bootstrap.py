"""Percentile bootstrap with resamples written as integer weights.

A resample with replacement is fully described by how often it contains each row. With these counts, every metric of
every resample is a matrix product or one sort, and equals, number for number, what drawing indices would give
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 8 for grouped data).
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.evals import draws, metrics, tallies

SMALL_CLASS = 20  # a class of m rows misses a plain resample with chance about exp(-m): 2e-9 at 20


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its values under resampling, float64 `[resamples]`."""

    value: float
    replicates: np.ndarray

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval; resamples in which the metric does not exist are left out.

        Raises:
          InputError: it exists in none.
        """
        if np.isnan(self.replicates).all():
            raise InputError(
                f"none of {len(self.replicates)} resamples has this number, so that there is no interval; there are "
                "too few cases or events: use more resamples (--bootstrap), or more cases"
            )
        tail = 50 * (1 - level)
        low, high = np.nanpercentile(self.replicates, [tail, 100 - tail])
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a set is resampled: `weights` int32 `[resamples, n]`, `unit` row or group, `strata` class or none."""

    weights: np.ndarray
    unit: str
    strata: str

    def to_dict(self) -> dict:
        """What a result row's context says about its interval."""
        return {"method": "percentile", "resamples": len(self.weights), "unit": self.unit, "strata": self.strata}


def seed_of(seed: int, *names: str) -> int:
    """A seed for one named set: the same for every model (so they can be paired), independent between sets."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def draw(n: int, resamples: int, seed: int, *, units=None, strata=None) -> np.ndarray:
    """Multinomial counts, int32 `[resamples, n]`.

    Args:
      n: rows of the set.
      resamples: number of resamples.
      seed: non-negative; equal arguments give equal counts.
      units: `[n]` ids of what is drawn as a whole (patients, cases); each row by itself when None.
      strata: `[n]` ids within which is drawn, so that the size of each stays as it is; equal within a unit.

    Raises:
      InputError: nothing to draw from, or units that are divided between strata.
    """
    if n < 1 or resamples < 1:
        raise InputError(f"a bootstrap needs rows and resamples, got {n} and {resamples}")
    _, first, unit_of = np.unique(np.arange(n) if units is None else units, return_index=True, return_inverse=True)
    stratum_of = np.zeros(n, np.int64) if strata is None else np.unique(strata, return_inverse=True)[1]
    if not np.array_equal(stratum_of[first][unit_of], stratum_of):
        raise InputError("a resampling unit is divided between strata; resample without strata")
    return draws.counts(stratum_of[first], resamples, seed)[:, unit_of].astype(np.int32)


def draw_forced(labels, resamples: int, seed: int) -> np.ndarray:
    """Counts as `draw`, by a common but biased way of stratifying: one row of each class, the others from all rows.

    A rare class is drawn too often: of 10 rows in 1000 a resample has 10.98 on average. For parity with numbers that
    were made so; `draw` with strata keeps each class as it is.
    """
    labels = np.asarray(labels)
    rng, counts = np.random.default_rng(seed), np.zeros((resamples, len(labels)), np.int32)
    classes = np.unique(labels)
    for c in classes:
        members = np.flatnonzero(labels == c)
        np.add.at(counts, (np.arange(resamples), rng.choice(members, resamples)), 1)
    others = len(labels) - len(classes)
    return counts + rng.multinomial(others, np.full(len(labels), 1 / len(labels)), size=resamples).astype(np.int32)


def plan(labels, groups, resamples: int, seed: int) -> Plan:
    """Resampling for a labelled set: whole groups where rows share one, and within classes where one could vanish.

    A class could vanish when it has fewer than `SMALL_CLASS` rows. Groups that hold several classes cannot be kept
    within classes; they are drawn without strata, and resamples average over the classes that are left.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    number = len(np.unique(groups))
    grouped = number < len(groups)
    pure = number == len(set(zip(groups.tolist(), labels.tolist())))
    stratify = np.unique(labels, return_counts=True)[1].min() < SMALL_CLASS and pure
    weights = draw(len(labels), resamples, seed, units=groups if grouped else None, strata=labels if stratify else None)
    return Plan(weights, "group" if grouped else "row", "class" if stratify else "none")


def classification(labels, scores, weights: np.ndarray) -> dict[str, Estimate]:
    """The metrics of `metrics.CLASSIFICATION` with their values under each resample.

    Args:
      labels: int `[n]`.
      scores: float `[n, classes]`.
      weights: counts `[resamples, n]`.
    """
    labels, scores = metrics.check(labels, scores)
    predictions = scores.argmax(axis=1)
    hits, truth, predicted = _tallied(labels, predictions, weights)
    replicates = {
        "accuracy": hits.sum(axis=1) / truth.sum(axis=1),
        "balanced_accuracy": _mean_where(hits, truth),
        "macro_f1": _mean_where(2 * hits, truth + predicted),
        "macro_auc": macro_auc(labels, scores, weights),
    }
    return {name: Estimate(value, replicates[name]) for name, value in metrics.classification(labels, scores).items()}


def mean(values, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of `values` `[n]` under each resample, float64 `[resamples]`."""
    return (weights @ np.asarray(values, np.float64)) / weights.sum(axis=1)


def median(values, weights: np.ndarray) -> np.ndarray:
    """Weighted median of `values` `[n]` under each resample: the mean of the two middle values of an even number."""
    values = np.asarray(values, np.float64)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[:, order], axis=1)
    total = reached[:, -1:]
    lower = np.sum(reached <= (total - 1) // 2, axis=1)
    upper = np.sum(reached <= total // 2, axis=1)
    return (values[order][lower] + values[order][upper]) / 2


def balanced_accuracy(labels, predictions, weights: np.ndarray) -> np.ndarray:
    """Mean recall over the classes present in each resample, float64 `[resamples]`."""
    hits, truth, _ = _tallied(labels, predictions, weights)
    return _mean_where(hits, truth)


def macro_f1(labels, predictions, weights: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes present in each resample's labels or predictions, float64 `[resamples]`."""
    hits, truth, predicted = _tallied(labels, predictions, weights)
    return _mean_where(2 * hits, truth + predicted)


def macro_auc(labels, scores, weights: np.ndarray) -> np.ndarray:
    """Mean one-versus-rest AUC over the classes present in each resample, float64 `[resamples]`; NaN if only one is."""
    labels = np.asarray(labels)
    present = np.unique(labels)
    pairs = [metrics.auc_counts(labels == c, np.asarray(scores)[:, c], weights) for c in present]
    return _mean_where(np.stack([won for won, _ in pairs], 1), np.stack([all_ for _, all_ in pairs], 1))


def binary_auc(positive, scores, weights: np.ndarray) -> np.ndarray:
    """ROC AUC under each resample, ties counting half, float64 `[resamples]`; NaN where a class is missing."""
    won, pairs = metrics.auc_counts(np.asarray(positive, bool), np.asarray(scores), weights)
    return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)


def one_versus_one_auc(labels, scores, weights: np.ndarray) -> np.ndarray:
    """Mean AUC over ordered pairs of classes, each among the rows of its two classes (Hand and Till 2001).

    Float64 `[resamples]`; pairs with a class missing from a resample are left out there.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    parts = []
    for a in np.unique(labels):
        for b in np.unique(labels[labels != a]):
            rows = (labels == a) | (labels == b)
            parts.append(metrics.auc_counts(labels[rows] == a, scores[rows, a], weights[:, rows]))
    return _mean_where(np.stack([won for won, _ in parts], 1), np.stack([pairs for _, pairs in parts], 1))


def average_precision(positive, scores, weights: np.ndarray) -> np.ndarray:
    """Sum of precision times gain in recall over the different scores, float64 `[resamples]`; NaN without positives."""
    positive, scores = np.asarray(positive, bool), np.asarray(scores)
    total = tallies.cells(1, np.where(positive, 0, -1), weights)[:, 0]
    gained = tallies.precision(positive, scores, weights)
    return np.divide(gained, total, out=np.full(len(total), np.nan), where=total > 0)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """`a - b` on the same resamples: both must come from the same weights."""
    if a.replicates.shape != b.replicates.shape:
        raise InputError("a paired difference needs both models on the same resamples")
    return Estimate(a.value - b.value, a.replicates - b.replicates)


def mean_over_sets(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over data sets that count alike, whatever their sizes; their resamples must be independent of each other.

    The sets themselves are taken as given: the interval tells about the choice of cases, not about the choice of sets.
    """
    if not estimates:
        raise InputError("there is no set to take the mean over")
    return Estimate(float(np.mean([e.value for e in estimates])), np.mean([e.replicates for e in estimates], axis=0))


def mean_over_seeds(estimates: Sequence[Estimate], seed: int = 0) -> Estimate:
    """Mean over training seeds whose estimates share their resamples; the interval covers cases and seeds.

    Each replicate adds the spread of a redrawn sample of seeds, widened by sqrt(k / (k - 1)) since a resample of k
    values has only (k - 1) / k of their variance. One seed gives no information about seeds: its own interval.
    """
    if not estimates:
        raise InputError("there is no seed to take the mean over")
    values, k = np.array([e.value for e in estimates]), len(estimates)
    cases = np.mean([e.replicates for e in estimates], axis=0)
    drawn = np.random.default_rng(seed).integers(k, size=(len(cases), k))
    spread = (values[drawn].mean(axis=1) - values.mean()) * np.sqrt(k / max(k - 1, 1))
    return Estimate(float(values.mean()), cases + spread)


def undefined(estimates: Mapping[str, Estimate]) -> dict[str, int]:
    """By metric, in how many resamples it does not exist, so that its interval is over the others; where it is any."""
    found = {name: int(np.isnan(one.replicates).sum()) for name, one in estimates.items()}
    return {name: count for name, count in found.items() if count}


def _tallied(labels, predictions, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class that occurs: drawn rows that are right, of it, and taken for it, int64 `[resamples, classes]`."""
    classes = np.union1d(labels, predictions)
    truth, predicted = np.searchsorted(classes, labels), np.searchsorted(classes, predictions)
    right = np.where(truth == predicted, truth, -1)
    hits, of_class, taken = (tallies.cells(len(classes), cell, weights) for cell in (right, truth, predicted))
    return hits, of_class, taken


def _mean_where(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Row means of the quotients whose denominator is not 0; NaN for a row without any."""
    present = denominators > 0
    quotients = np.divide(numerators, denominators, out=np.zeros(numerators.shape), where=present)
    number = present.sum(axis=1)
    return np.divide(quotients.sum(axis=1), number, out=np.full(len(number), np.nan), where=number > 0)
