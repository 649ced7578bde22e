"""How well risks and survival curves predict right-censored times; numbers equal scikit-survival's.

A higher risk means an earlier event. Weights of censoring come from the training patients, and are 1 / G(t) with G
counting ends of watching at t itself, as scikit-survival has it.
"""

import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.evals.survival_curves import Outcomes, censoring, resampled

TIED = 1e-8  # risks that differ by no more are equal
NO_PAIR = "no pair of patients is comparable (too few events): there is no C-index; take fewer folds, or more patients"
_ENTRIES = 1 << 24  # of pairs looked at at a time


def concordance(outcomes: Outcomes, risk, weights=None) -> np.ndarray | float:
    """Harrell's C: share of comparable pairs of patients of which the one with the earlier event has the higher risk.

    A pair is comparable where the earlier time is an event; of equal times, where one is an event and the other not,
    which counts as later. Equal risks count half (Harrell, Lee, Mark: Stat. Med. 1996).

    Args:
      outcomes: of n patients.
      risk: float `[n]`.
      weights: how often each patient counts in each resample, `[resamples, n]`, or None.

    Returns:
      The index, or float64 `[resamples]`, NaN where a resample has no comparable pair.

    Raises:
      InputError: no pair is comparable, as without events, or a risk is not finite.
    """
    risk = _finite(risk, len(outcomes))
    counts = np.ones((1, len(outcomes))) if weights is None else np.asarray(weights, np.float64)
    right, pairs = _pairs(outcomes, risk, counts, np.ones(len(outcomes)))
    if weights is None and not pairs[0]:
        raise InputError(NO_PAIR)
    index = np.divide(right, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return float(index[0]) if weights is None else index


def concordance_ipcw(train: Outcomes, outcomes: Outcomes, risk, tau: float | None = None, weights=None):
    """Uno's C: Harrell's, each pair weighted by the inverse squared probability of not being censored before.

    Uno et al., Statistics in Medicine 30(10), 2011. Events at `tau` or later do not count. With `weights` (as of
    `concordance`) float64 `[resamples]`, NaN where a resample has no comparable pair.

    Raises:
      InputError: no comparable pair; an event after the last training time; or one where no training patient is left.
    """
    risk = _finite(risk, len(outcomes))
    counted = outcomes.event if tau is None else outcomes.event & (outcomes.time < tau)
    inverse = np.zeros(len(outcomes))
    inverse[counted] = _inverse(train, outcomes.time[counted])
    counts = np.ones((1, len(outcomes))) if weights is None else np.asarray(weights, np.float64)
    right, pairs = _pairs(outcomes, risk, counts, inverse**2)
    if weights is None and not pairs[0]:
        raise InputError(NO_PAIR)
    index = np.divide(right, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return float(index[0]) if weights is None else index


def dynamic_auc(train: Outcomes, outcomes: Outcomes, risk, times, weights=None):
    """Cumulative and dynamic AUC: of those with the event by t against those without it after t.

    Hung and Chiang 2010; the mean weighs times by how far the survival curve falls between them (Lambert and Chevret
    2014).

    Args:
      train: the patients whose censoring gives the weights.
      outcomes: of n patients.
      risk: float `[n]`.
      times: `[k]`, ascending, within the times of `outcomes`, before the last.
      weights: how often each patient counts in each resample, `[resamples, n]`, or None.

    Returns:
      float64 `[k]` and the mean; with `weights` `[resamples, k]` and `[resamples]`, NaN where a resample has no case or
      no control. The mean is over the times that have both.

    Raises:
      InputError: times outside that range, or before the first event.
    """
    risk, times = _finite(risk, len(outcomes)), _times(outcomes, times)
    counts = np.ones((1, len(outcomes))) if weights is None else np.asarray(weights, np.float64)
    inverse = np.zeros(len(outcomes))
    inverse[outcomes.event] = _inverse(train, outcomes.time[outcomes.event])
    ordered = np.where(np.abs(risk[:, None] - risk) <= TIED, 0.5, risk[:, None] > risk)
    found = np.full((len(counts), len(times)), np.nan)
    for k, t in enumerate(times):
        case, control = outcomes.event & (outcomes.time <= t), outcomes.time > t
        if not case.any():
            raise InputError(f"no patient has the event by {t:g}: there is no AUC; evaluate at later times")
        cases, controls = counts[:, case] * inverse[case], counts[:, control]
        right, every = ((cases @ ordered[case][:, control]) * controls).sum(1), cases.sum(1) * controls.sum(1)
        np.divide(right, every, out=found[:, k], where=every > 0)
    fall = -np.diff(resampled(outcomes, counts, times), prepend=1.0, axis=1)
    fall = np.where(np.isfinite(found), fall, 0)  # before a resample's first event it has not fallen
    whole = fall.sum(axis=1)
    total = (np.nan_to_num(found) * fall).sum(axis=1)
    mean = np.divide(total, whole, out=np.full(len(counts), np.nan), where=whole > 0)
    return (found[0], float(mean[0])) if weights is None else (found, mean)


def brier(train: Outcomes, outcomes: Outcomes, survival, times, weights=None) -> np.ndarray:
    """Brier score at each time, weighted for censoring (Graf et al., Statistics in Medicine 18, 1999): float64 `[k]`.

    With `weights` (as of `concordance`) `[resamples, k]`.

    Args:
      train: the patients whose censoring gives the weights.
      outcomes: of n patients.
      survival: float `[n, k]`, predicted probability of no event by each time.
      times: `[k]`, ascending, within the times of `outcomes`, before the last.

    Raises:
      InputError: shapes that do not fit, or times outside that range.
    """
    times, survival = _times(outcomes, times), np.asarray(survival, np.float64)
    if survival.shape != (len(outcomes), len(times)) or not np.isfinite(survival).all():
        raise InputError(f"survival of shape {survival.shape} must be finite [{len(outcomes)} patients, {len(times)}]")
    watched = censoring(train)
    at_event, at_time = (np.where(g > 0, g, np.inf) for g in (watched(outcomes.time), watched(times)))
    case = (outcomes.time[:, None] <= times) & outcomes.event[:, None]
    control = outcomes.time[:, None] > times
    errors = survival**2 * case / at_event[:, None] + (1 - survival) ** 2 * control / at_time
    if weights is None:
        return errors.mean(axis=0)
    return (np.asarray(weights, np.float64) @ errors) / np.sum(weights, axis=1, keepdims=True)


def integrated_brier(train: Outcomes, outcomes: Outcomes, survival, times, weights=None):
    """Mean of `brier` over the range of `times` by trapezoids: a number, or with `weights` `[resamples]`.

    Raises:
      InputError: fewer than two times, or as `brier`.
    """
    scores, times = brier(train, outcomes, survival, times, weights), np.asarray(times, np.float64)
    if len(times) < 2:
        raise InputError("an integrated Brier score needs at least two times")
    found = np.trapezoid(scores, times) / (times[-1] - times[0])
    return float(found) if weights is None else found


def _pairs(outcomes: Outcomes, risk, counts, inverse) -> tuple[np.ndarray, np.ndarray]:
    """Weight of well ordered and of all comparable pairs in each row of `counts`."""
    rows = np.flatnonzero(outcomes.event & (inverse > 0))
    right, every = np.zeros(len(counts)), np.zeros(len(counts))
    step = max(1, _ENTRIES // len(outcomes))
    for start in range(0, len(rows), step):
        here = rows[start : start + step]
        time, own = outcomes.time[here, None], risk[here, None]
        later = (outcomes.time > time) | ((outcomes.time == time) & ~outcomes.event)
        ordered = np.where(np.abs(own - risk) <= TIED, 0.5, own > risk) * later
        first = counts[:, here] * inverse[here]
        right += ((first @ ordered) * counts).sum(axis=1)
        every += ((first @ later.astype(np.float64)) * counts).sum(axis=1)
    return right, every


def _inverse(train: Outcomes, times: np.ndarray) -> np.ndarray:
    watched = censoring(train)(times)
    if (watched <= 0).any():
        raise InputError(
            f"all training patients are censored by {times[watched <= 0].min():g}, so later events have no weight; "
            "evaluate up to an earlier time (tau)"
        )
    return 1 / watched


def _finite(risk, n: int) -> np.ndarray:
    risk = np.asarray(risk, np.float64)
    if risk.shape != (n,) or not np.isfinite(risk).all():
        raise InputError(f"risks of shape {risk.shape} must be {n} finite numbers")
    return risk


def _times(outcomes: Outcomes, times) -> np.ndarray:
    times = np.atleast_1d(np.asarray(times, np.float64))
    low, high = outcomes.time.min(), outcomes.time.max()
    if (np.diff(times) <= 0).any() or times[0] < low or times[-1] >= high:
        raise InputError(f"times must ascend within the evaluated ones, from {low:g} and below {high:g}")
    return times
