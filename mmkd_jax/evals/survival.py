"""Survival in nested folds: any model that predicts a tested fold from the others is scored in the same way.

For each fold in turn a model is fitted without it, chosen on the next fold, and scores the tested one. Numbers are
means over tested folds, so that only patients scored by the same model are compared; intervals resample patients
within folds, the same for all models of one set of patients. Here: penalised Cox regression on covariates or pooled
features; `survival_heads` has attention over bags.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mmkd_jax.errors import InputError
from mmkd_jax.evals import cox, survival_curves, survival_metrics
from mmkd_jax.evals.bootstrap import Estimate
from mmkd_jax.evals.survival_curves import Outcomes
from mmkd_jax.evals.survival_folds import Fold
from mmkd_jax.evals.survival_table import standardise

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
HORIZON = 0.8  # share of training times up to which AUC, Brier score and Uno's C are measured
_TIMES = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of a tested fold's n patients.

    Attributes:
      risk: float64 `[n]`, higher for earlier events.
      middle: the median risk of the patients that the model saw.
      survival: probability of no event by each of times `[k]`: float64 `[n, k]`.
      chosen: what the fold beside chose: the penalty's strength, the number of steps.
    """

    risk: np.ndarray
    middle: float
    survival: Callable[[np.ndarray], np.ndarray]
    chosen: float


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """What nested folds give.

    Attributes:
      risk: float64 `[n]`, of each patient by the model that did not see it, less the median risk of the patients that
        the model saw; NaN for patients in no fold.
      estimates: mean over folds by name, with resamples: `c_index`, `c_index_ipcw`, `auc`, `brier` (integrated), and
        `auc@T` for the times asked for.
      folds: by fold: name, what was chosen, n, events, C-index.
      log_rank: statistic and p of risks above against below zero, all folds together.
      incomplete: by name, in how many resamples a fold lacked the number, and the mean was over the others.
    """

    risk: np.ndarray
    estimates: dict[str, Estimate]
    folds: list[dict[str, Any]]
    log_rank: tuple[float, float]
    incomplete: dict[str, int]

    @property
    def c_index(self) -> Estimate:
        """With its resamples."""
        return self.estimates["c_index"]

    @property
    def metrics(self) -> dict[str, float]:
        """The values by name."""
        return {name: one.value for name, one in self.estimates.items()}


def run(
    covariates: np.ndarray,
    outcomes: Outcomes,
    folds: list[Fold],
    *,
    l1_ratio: float = 0.0,
    strengths: tuple[float, ...] = STRENGTHS,
    times: Sequence[float] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Scored:
    """Cox regression: fits, chooses and scores.

    Args:
      covariates: float `[n, k]`, NaN where missing.
      outcomes: of n patients.
      folds: of `survival_folds.nested`.
      l1_ratio: 0 for ridge, up to 1 for lasso.
      strengths: of the penalty, to choose from.
      times: at which the AUC is told too.
      resamples: of the interval.
      seed: of the resamples.

    Raises:
      InputError: a fold cannot be fitted or scored.
    """

    def predict(fold: Fold) -> Prediction:
        strength = _chosen(covariates, outcomes, fold, l1_ratio, strengths)
        seen = np.concatenate([fold.train, fold.val])
        x = standardise(covariates, seen)
        model = cox.fit(x[seen], outcomes[seen], strength=strength, l1_ratio=l1_ratio)
        tested = x[fold.test]
        middle = float(np.median(model.risk(x[seen])))
        return Prediction(model.risk(tested), middle, lambda at: model.survival(tested, at), strength)

    return scored(predict, outcomes, folds, times=times, resamples=resamples, seed=seed)


def scored(
    predict: Callable[[Fold], Prediction],
    outcomes: Outcomes,
    folds: Sequence[Fold],
    *,
    times: Sequence[float] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Scored:
    """Scores a model that is made anew for each fold; see `run`.

    Raises:
      InputError: a fold cannot be fitted or scored.
    """
    risk, told, found = np.full(len(outcomes), np.nan), [], []
    rng = np.random.default_rng(seed)
    for fold in folds:
        test, seen = outcomes[fold.test], outcomes[np.concatenate([fold.train, fold.val])]
        weights = rng.multinomial(len(test), np.full(len(test), 1 / len(test)), resamples)
        with threadpool_limits(1), _named(f"fold {fold.name}"):  # small matrices: threads would wait for each other
            said = predict(fold)
            risk[fold.test] = said.risk - said.middle
            found.append(_estimates(said, seen, test, times, weights))
        counts = {"n": len(test), "events": int(test.event.sum())}
        told.append({"fold": fold.name, "chosen": said.chosen, **counts, "c_index": found[-1]["c_index"].value})
    means, incomplete = {}, {}
    for name in dict.fromkeys(name for one in found for name in one):
        having = [one[name] for one in found if name in one]
        replicates = np.stack([one.replicates for one in having])
        means[name] = Estimate(float(np.mean([one.value for one in having])), mean_of_known(replicates))
        incomplete[name] = int(np.isnan(replicates).any(axis=0).sum())
        with _named(name):
            means[name].interval()  # refused where no resample of any fold has it
    inside = np.isfinite(risk)
    return Scored(risk, means, told, _log_rank(outcomes[inside], risk[inside]), incomplete)


def mean_of_known(replicates: np.ndarray) -> np.ndarray:
    """Mean of `[folds, resamples]` over the folds that have a number in a resample; NaN where none has it."""
    known = np.isfinite(replicates)
    total, count = np.where(known, replicates, 0).sum(axis=0), known.sum(axis=0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def difference(first: Scored, second: Scored, metric: str = "c_index") -> Estimate:
    """A metric of the first less that of the second, paired by patient: both of the same folds, resamples and seed."""
    one, other = first.estimates[metric], second.estimates[metric]
    return Estimate(one.value - other.value, one.replicates - other.replicates)


def curves(outcomes: Outcomes, risk: np.ndarray) -> Mapping[str, dict[str, Any]]:
    """Kaplan-Meier curves with 95 % limits of patients with risks above zero (`high`) and the others (`low`).

    `watched` are the times of all the group's patients, in order: who is at risk when.
    """
    found = {}
    for name, inside in (("low", risk <= 0), ("high", risk > 0)):
        if not inside.any():
            continue
        curve = survival_curves.kaplan_meier(outcomes[inside])
        low, high = survival_curves.greenwood(outcomes[inside])
        found[name] = {"n": int(inside.sum()), "events": int(outcomes.event[inside].sum()), "time": curve.time,
                       "survival": curve.value, "low": low, "high": high,
                       "watched": np.sort(outcomes.time[inside])}  # fmt: skip
    return found


def _chosen(covariates, outcomes, fold: Fold, l1_ratio: float, strengths) -> float:
    """The strength with the highest C-index on the fold that chooses; of equals the largest."""
    if len(strengths) == 1:
        return strengths[0]
    x = standardise(covariates, fold.train)
    scores = []
    for strength in sorted(strengths, reverse=True):
        model = cox.fit(x[fold.train], outcomes[fold.train], strength=strength, l1_ratio=l1_ratio)
        scores.append((survival_metrics.concordance(outcomes[fold.val], model.risk(x[fold.val])), strength))
    return max(scores, key=lambda one: one[0])[1]


def _estimates(
    said: Prediction, train: Outcomes, test: Outcomes, asked: Sequence[float], weights
) -> dict[str, Estimate]:
    """All numbers of a tested fold; those that its times are too few for are left out."""
    found = {
        name: Estimate(float(one(None)), one(weights)) for name, one in by_risk(said.risk, train, test, asked).items()
    }
    cut, times = _times(train, test)
    if len(times):
        curve = said.survival(times)
        values = (survival_metrics.integrated_brier(train, cut, curve, times, w) for w in (None, weights))
        found["brier"] = Estimate(*values)
    return found


def by_risk(
    risk: np.ndarray, train: Outcomes, test: Outcomes, asked: Sequence[float] = ()
) -> dict[str, Callable[[np.ndarray | None], Any]]:
    """The numbers of a tested fold that need risks only, all but `brier`: of weights `[resamples, n]`, or of None.

    Args:
      risk: float `[n]` of the tested patients; a constant on all of them changes nothing.
      train: all others of the folds.
      test: the n tested ones.
      asked: times at which the AUC is told too.
    """
    measure, horizon = survival_metrics, float(np.quantile(train.time, HORIZON))
    cut, times = _times(train, test)
    found: dict[str, Callable] = {
        "c_index": lambda w: measure.concordance(test, risk, w),
        "c_index_ipcw": lambda w: measure.concordance_ipcw(train, cut, risk, horizon, w),
    }
    if len(times):
        found["auc"] = lambda w: measure.dynamic_auc(train, cut, risk, times, w)[1]
    for time in asked:
        if test.time[test.event].min() <= time < min(test.time.max(), train.time.max()):
            end = _until(test, np.nextafter(time, np.inf))
            at = functools.partial(measure.dynamic_auc, train, end, risk, [time])
            found[f"auc@{time:g}"] = lambda w, at=at: at(w)[0][..., 0]
    return found


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Says where something was wrong."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _times(train: Outcomes, test: Outcomes) -> tuple[Outcomes, np.ndarray]:
    """The tested outcomes up to the horizon, and times from their first event to it; none where that lies behind."""
    horizon = float(np.quantile(train.time, HORIZON))
    first, last = test.time[test.event].min(), min(horizon, np.max(test.time) * 0.99)
    times = np.linspace(first, last, _TIMES)[:-1] if last > first else np.zeros(0)
    return _until(test, horizon), times


def _until(outcomes: Outcomes, horizon: float) -> Outcomes:
    """Watched up to the horizon only: what comes later is not known, and needs no weight."""
    late = outcomes.time > horizon
    return Outcomes(outcomes.event & ~late, np.where(late, horizon, outcomes.time))


def _log_rank(outcomes: Outcomes, risk: np.ndarray) -> tuple[float, float]:
    high = risk > 0
    return survival_curves.log_rank(outcomes, high) if 0 < high.sum() < len(high) else (0.0, 1.0)
