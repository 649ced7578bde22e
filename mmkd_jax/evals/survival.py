"""Survival from covariates or pooled features by penalised Cox regression, in nested folds.

For each fold in turn: the penalty is chosen by the C-index on the next fold, the model fitted anew on all but the
tested fold, and the tested fold scored. Numbers are means over tested folds, so that only patients scored by the same
model are compared; intervals resample patients within folds, the same for all models of one set of patients.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmkd_jax.evals import cox, survival_curves, survival_metrics
from mmkd_jax.evals.bootstrap import Estimate
from mmkd_jax.evals.survival_curves import Outcomes
from mmkd_jax.evals.survival_folds import Fold
from mmkd_jax.evals.survival_table import standardise

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
HORIZON = 0.8  # share of training times up to which AUC, Brier score and Uno's C are measured
_TIMES = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """What nested folds give.

    Attributes:
      risk: float64 `[n]`, of each patient by the model that did not see it, less the median risk of the patients that
        the model saw; NaN for patients in no fold.
      metrics: mean over folds by name: `c_index`, `c_index_ipcw`, `auc`, `brier` (integrated).
      c_index: with its resamples.
      folds: by fold: name, strength, n, events, C-index.
      log_rank: statistic and p of risks above against below zero, all folds together.
    """

    risk: np.ndarray
    metrics: dict[str, float]
    c_index: Estimate
    folds: list[dict[str, Any]]
    log_rank: tuple[float, float]


def run(
    covariates: np.ndarray,
    outcomes: Outcomes,
    folds: list[Fold],
    *,
    l1_ratio: float = 0.0,
    strengths: tuple[float, ...] = STRENGTHS,
    resamples: int = 1000,
    seed: int = 0,
) -> Scored:
    """Fits, chooses and scores.

    Args:
      covariates: float `[n, k]`, NaN where missing.
      outcomes: of n patients.
      folds: of `survival_folds.nested`.
      l1_ratio: 0 for ridge, up to 1 for lasso.
      strengths: of the penalty, to choose from.
      resamples: of the interval.
      seed: of the resamples.

    Raises:
      InputError: a fold cannot be fitted or scored.
    """
    risk, told, sums = np.full(len(outcomes), np.nan), [], []
    replicates = np.zeros(resamples)
    rng = np.random.default_rng(seed)
    for fold in folds:
        strength = _chosen(covariates, outcomes, fold, l1_ratio, strengths)
        seen = np.concatenate([fold.train, fold.val])
        x = standardise(covariates, seen)
        model = cox.fit(x[seen], outcomes[seen], strength=strength, l1_ratio=l1_ratio)
        own = model.risk(x[fold.test])
        risk[fold.test] = own - np.median(model.risk(x[seen]))
        test = outcomes[fold.test]
        weights = rng.multinomial(len(test), np.full(len(test), 1 / len(test)), resamples)
        replicates += survival_metrics.concordance(test, own, weights) / len(folds)
        sums.append(_metrics(model, x[fold.test], own, outcomes[seen], test))
        counts = {"n": len(test), "events": int(test.event.sum())}
        told.append({"fold": fold.name, "strength": strength, **counts, "c_index": sums[-1]["c_index"]})
    means = {name: float(np.mean([one[name] for one in sums])) for name in sums[0]}
    scored = np.isfinite(risk)
    return Scored(risk, means, Estimate(means["c_index"], replicates), told, _log_rank(outcomes[scored], risk[scored]))


def difference(first: Scored, second: Scored) -> Estimate:
    """C-index of the first less that of the second, paired by patient: both of the same folds, resamples and seed."""
    values = (first.c_index.value - second.c_index.value, first.c_index.replicates - second.c_index.replicates)
    return Estimate(*values)


def curves(outcomes: Outcomes, risk: np.ndarray) -> Mapping[str, dict[str, Any]]:
    """Kaplan-Meier curves with 95 % limits of patients with risks above zero (`high`) and the others (`low`)."""
    found = {}
    for name, inside in (("low", risk <= 0), ("high", risk > 0)):
        if not inside.any():
            continue
        curve = survival_curves.kaplan_meier(outcomes[inside])
        low, high = survival_curves.greenwood(outcomes[inside])
        found[name] = {"n": int(inside.sum()), "events": int(outcomes.event[inside].sum()), "time": curve.time,
                       "survival": curve.value, "low": low, "high": high}  # fmt: skip
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


def _metrics(model: cox.Cox, x: np.ndarray, risk: np.ndarray, train: Outcomes, test: Outcomes) -> dict[str, float]:
    """All numbers of a tested fold; NaN where the fold's times are too few for one."""
    horizon = float(np.quantile(train.time, HORIZON))
    found = {
        "c_index": survival_metrics.concordance(test, risk),
        "c_index_ipcw": survival_metrics.concordance_ipcw(train, _until(test, horizon), risk, horizon),
    }
    times = np.linspace(test.time[test.event].min(), min(horizon, np.max(test.time) * 0.99), _TIMES)
    if not (np.diff(times) > 0).all():
        return found | {"auc": np.nan, "brier": np.nan}
    cut = _until(test, horizon)
    found["auc"] = survival_metrics.dynamic_auc(train, cut, risk, times[:-1])[1]
    survival = model.survival(x, times[:-1])
    return found | {"brier": survival_metrics.integrated_brier(train, cut, survival, times[:-1])}


def _until(outcomes: Outcomes, horizon: float) -> Outcomes:
    """Watched up to the horizon only: what comes later is not known, and needs no weight."""
    late = outcomes.time > horizon
    return Outcomes(outcomes.event & ~late, np.where(late, horizon, outcomes.time))


def _log_rank(outcomes: Outcomes, risk: np.ndarray) -> tuple[float, float]:
    high = risk > 0
    return survival_curves.log_rank(outcomes, high) if 0 < high.sum() < len(high) else (0.0, 1.0)
