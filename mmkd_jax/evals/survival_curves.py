"""Right-censored times: their checks, Kaplan-Meier curves, the censoring distribution, and the log-rank test.

All in float64; numbers equal those of scikit-survival and lifelines. Times have any one unit.
"""

import dataclasses

import numpy as np
from scipy import stats

from mmkd_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """What happened to n patients.

    Attributes:
      event: bool `[n]`, true where the event was seen, false where watching ended before.
      time: float64 `[n]`, when the event or the end of watching was; above zero.
    """

    event: np.ndarray
    time: np.ndarray

    def __post_init__(self):
        event, time = np.asarray(self.event), np.asarray(self.time, np.float64)
        if event.ndim != 1 or event.shape != time.shape or not len(event):
            raise InputError(f"events of shape {event.shape} and times of shape {time.shape} must be two equal columns")
        if event.dtype != bool:
            numbers = event.astype(np.float64)
            if not np.isin(numbers, (0, 1)).all():
                other = sorted({str(v) for v in numbers[~np.isin(numbers, (0, 1))]})[:3]
                raise InputError(
                    f"events must be 1 (seen) or 0 (censored), found {', '.join(other)}: leave out patients whose "
                    "event is missing, and choose one event where several compete"
                )
        if not np.isfinite(time).all() or (time <= 0).any():
            row = int(np.flatnonzero(~(np.isfinite(time) & (time > 0)))[0])
            raise InputError(
                f"times must be finite and above zero, row {row} has {time[row]:g}; leave such patients out"
            )
        object.__setattr__(self, "event", event.astype(bool))
        object.__setattr__(self, "time", time)

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, rows) -> "Outcomes":
        return Outcomes(self.event[rows], self.time[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """A step function of time that is 1 at first: `value` float64 `[k]` from each of `time` float64 `[k]` on."""

    time: np.ndarray
    value: np.ndarray

    def __call__(self, times) -> np.ndarray:
        """Values at `times`.

        Raises:
          InputError: a time lies after the last one seen and the curve has not come down to zero.
        """
        times = np.asarray(times, np.float64)
        if self.value[-1] > 0 and (times > self.time[-1]).any():
            raise InputError(
                f"the curve is known up to {self.time[-1]:g}, not at {times.max():g}; evaluate at earlier times"
            )
        return np.concatenate([[1.0], self.value])[np.searchsorted(self.time, times, side="right")]


def kaplan_meier(outcomes: Outcomes, weights=None) -> Curve:
    """Share of patients without the event by time (Kaplan and Meier 1958), each patient counted `weights` times."""
    times, at_risk, events, _ = _table(outcomes, weights)
    return Curve(times, np.cumprod(1 - _share(events, at_risk)))


def resampled(outcomes: Outcomes, weights, times) -> np.ndarray:
    """`kaplan_meier` at `times` `[k]` under each resample, float64 `[resamples, k]`.

    Args:
      outcomes: of n patients.
      weights: how often each counts, `[resamples, n]`.
      times: up to the last one seen; a resample's curve stays as it is after its own last.
    """
    distinct, place = np.unique(outcomes.time, return_inverse=True)
    counts = np.asarray(weights, np.float64)
    events = counts @ ((place[:, None] == np.arange(len(distinct))) & outcomes.event[:, None])
    at_risk = counts @ (place[:, None] >= np.arange(len(distinct)))
    left = 1 - np.divide(events, at_risk, out=np.zeros(events.shape), where=at_risk > 0)
    curve = np.concatenate([np.ones((len(counts), 1)), np.cumprod(left, axis=1)], axis=1)
    return curve[:, np.searchsorted(distinct, times, side="right")]


def censoring(outcomes: Outcomes) -> Curve:
    """Share of patients still watched by time: Kaplan-Meier with censoring as its event.

    Of patients with equal times, events come before the ends of watching, so that they are not at risk of these.
    """
    times, at_risk, events, ends = _table(outcomes, None)
    return Curve(times, np.cumprod(1 - _share(ends, at_risk - events)))


def greenwood(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """95 % limits of `kaplan_meier` at its times: float64 `[k]` low and high, on the log(-log) scale.

    Kalbfleisch and Prentice, The Statistical Analysis of Failure Time Data, 2002, section 1.4.
    """
    _, at_risk, events, _ = _table(outcomes, None)
    survival = kaplan_meier(outcomes).value
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt(np.cumsum(events / (at_risk * (at_risk - events)))) / np.log(survival)
        low, high = (survival ** np.exp(sign * stats.norm.ppf(0.975) * spread) for sign in (-1, 1))
    settled = (survival == 1) | (survival == 0)
    return np.where(settled, survival, low), np.where(settled, survival, high)


def log_rank(outcomes: Outcomes, groups) -> tuple[float, float]:
    """Chi-squared and p-value of equal hazards in all groups (Mantel 1966, for any number of groups).

    Args:
      outcomes: of n patients.
      groups: `[n]` labels.

    Raises:
      InputError: fewer than two groups, or no event.
    """
    groups = np.asarray(groups)
    names = np.unique(groups)
    if len(names) < 2 or groups.shape != outcomes.time.shape:
        raise InputError(f"a log-rank test needs a group for each patient and two groups, not {len(names)}")
    if not outcomes.event.any():
        raise InputError("no patient has the event, so that groups cannot be compared; there is no log-rank test")
    times = np.unique(outcomes.time[outcomes.event])
    inside = groups[:, None] == names
    at_risk = np.stack([(outcomes.time[inside[:, g], None] >= times).sum(0) for g in range(len(names))]).astype(float)
    seen = (outcomes.time[:, None] == times) & outcomes.event[:, None]
    events = np.stack([seen[inside[:, g]].sum(0) for g in range(len(names))])
    total, deaths = at_risk.sum(0), events.sum(0)
    difference = (events - at_risk * deaths / total).sum(1)[:-1]
    scale = deaths * _share(total - deaths, total - 1) / total**2
    shared = np.diag((at_risk * total * scale).sum(1)) - (at_risk * scale) @ at_risk.T
    statistic = float(difference @ np.linalg.pinv(shared[:-1, :-1]) @ difference)
    return statistic, float(stats.chi2.sf(statistic, len(names) - 1))


def _table(outcomes: Outcomes, weights) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct times and, at each, how many are at risk, have the event, and are seen for the last time."""
    weights = np.ones(len(outcomes)) if weights is None else np.asarray(weights, np.float64)
    times, place = np.unique(outcomes.time, return_inverse=True)
    events = np.bincount(place, weights * outcomes.event, len(times))
    ends = np.bincount(place, weights * ~outcomes.event, len(times))
    return times, np.cumsum((events + ends)[::-1])[::-1], events, ends


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
