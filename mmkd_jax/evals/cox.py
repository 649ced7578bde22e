"""Cox regression with ridge and elastic-net penalties, in float64.

Minimised is -log(partial likelihood) / n + strength * (l1_ratio * |b|_1 + (1 - l1_ratio) / 2 * |b|_2^2), as in
scikit-survival's Coxnet, whose `alpha` is `strength`. Equal event times by Efron's or Breslow's likelihood
(Therneau and Grambsch, Modeling Survival Data, 2000, chapter 3). Newton steps; with an L1 part the quadratic model of
each step is minimised by coordinate descent (Simon et al., J. Stat. Software 39(5), 2011).
"""

import dataclasses

import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.evals.survival_curves import Outcomes

TIES = ("efron", "breslow")
TOLERANCE = 1e-9  # of the largest step, in units of a covariate's standard deviation
_STEPS, _SWEEPS, _HALVINGS = 100, 10000, 40
_RUNAWAY = 30.0  # a linear predictor that spreads this far means that the likelihood has no maximum


@dataclasses.dataclass(frozen=True, eq=False)
class Cox:
    """A fitted model.

    Attributes:
      coefficients: float64 `[width]`, of the covariates as given.
      centre: float64 `[width]`, their training means.
      covariance: float64 `[width, width]` of the coefficients; of an unpenalised fit.
      times, hazard: float64 `[k]`, training event times and the cumulative hazard (Breslow) at `centre` from each on.
      loss: value of what is minimised.
    """

    coefficients: np.ndarray
    centre: np.ndarray
    covariance: np.ndarray
    times: np.ndarray
    hazard: np.ndarray
    loss: float

    def risk(self, x) -> np.ndarray:
        """Log hazard against a patient at the training means: float64 `[n]` of covariates `[n, width]`."""
        return (np.asarray(x, np.float64) - self.centre) @ self.coefficients

    def survival(self, x, times) -> np.ndarray:
        """Probability of no event by each of `times` `[k]`: float64 `[n, k]`."""
        baseline = np.concatenate([[0.0], self.hazard])[np.searchsorted(self.times, times, side="right")]
        return np.exp(-np.exp(self.risk(x))[:, None] * baseline)


def fit(x, outcomes: Outcomes, *, strength: float = 0.0, l1_ratio: float = 0.0, ties: str = "efron") -> Cox:
    """Fits a model.

    Args:
      x: float `[n, width]` covariates; standardise them if they are penalised.
      outcomes: of n patients.
      strength: of the penalty, 0 for none.
      l1_ratio: 0 for ridge, 1 for lasso.
      ties: `efron` or `breslow`.

    Raises:
      InputError: shapes that do not fit, a value that is missing, no event, a constant covariate without penalty, or a
        likelihood without maximum.
    """
    x = np.asarray(x, np.float64)
    _check(x, outcomes, strength, l1_ratio, ties)
    centre, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-300)
    likelihood = _Likelihood(x - centre, outcomes, ties)
    ridge, lasso = strength * (1 - l1_ratio), strength * l1_ratio
    b = np.zeros(x.shape[1])
    loss, gradient, hessian = likelihood(b)
    for _ in range(_STEPS):
        step = _direction(b, gradient + ridge * b, hessian + ridge * np.eye(len(b)), lasso)
        b, previous = _search(likelihood, b, step, ridge, lasso), b
        loss, gradient, hessian = likelihood(b)
        if np.ptp(likelihood.x @ b) > _RUNAWAY and not strength:
            raise InputError("the Cox likelihood has no maximum: covariates order all events; use a penalty (strength)")
        if (np.abs(b - previous) * scale).max(initial=0) < TOLERANCE:
            break
    else:
        raise InputError(f"Cox regression did not settle in {_STEPS} steps; use a larger penalty (strength)")
    times, hazard = likelihood.baseline(b)
    covariance = np.linalg.pinv(hessian, hermitian=True) / len(x)
    return Cox(b, centre, covariance, times, hazard, loss + 0.5 * ridge * b @ b + lasso * np.abs(b).sum())


def _check(x: np.ndarray, outcomes: Outcomes, strength: float, l1_ratio: float, ties: str) -> None:
    if x.ndim != 2 or len(x) != len(outcomes) or not x.shape[1]:
        raise InputError(f"covariates of shape {x.shape} do not fit {len(outcomes)} patients [patients, covariates]")
    if not np.isfinite(x).all():
        raise InputError(
            f"covariate {int(np.flatnonzero(~np.isfinite(x).all(axis=0))[0])} has missing or infinite values"
        )
    if not outcomes.event.any():
        raise InputError("no patient has the event: Cox regression has nothing to fit")
    if strength < 0 or not 0 <= l1_ratio <= 1:
        raise InputError(f"a penalty of strength {strength} and l1_ratio {l1_ratio} is none: use >= 0, and 0 to 1")
    if ties not in TIES:
        raise InputError(f"ties {ties!r} are not one of {', '.join(TIES)}")
    if not strength and (flat := np.flatnonzero(x.std(axis=0) < 1e-12)).size:
        raise InputError(f"covariate {int(flat[0])} is constant; leave it out or use a penalty (strength)")


class _Likelihood:
    """-log(partial likelihood) / n with its gradient and Hessian; patients in order of falling time."""

    def __init__(self, x: np.ndarray, outcomes: Outcomes, ties: str):
        order = np.argsort(-outcomes.time, kind="stable")
        self.x, time, event = x[order], outcomes.time[order], outcomes.event[order]
        self.deaths = np.flatnonzero(event)
        self.times, self.place, tied = np.unique(time[event], return_inverse=True, return_counts=True)
        # The risk set of a time is all patients before this position.
        self.ends = np.searchsorted(-time, -self.times, side="right")
        # What of the tied deaths' own weight no longer counts for the first, second, ... of them.
        turn = np.arange(len(self.deaths)) - np.searchsorted(-time[event], -time[event], side="left")
        self.gone = turn / tied[self.place] if ties == "efron" else np.zeros(len(self.deaths))
        # First position, in ascending distinct times, that a patient outlives: risk sets that hold the patient.
        self.held = np.searchsorted(self.times, time, side="right")

    def value(self, b: np.ndarray) -> float:
        """The function alone."""
        eta = self.x @ b
        top = eta.max()
        return float((np.log(self._denominators(np.exp(eta - top))) + top - eta[self.deaths]).sum() / len(eta))

    def __call__(self, b: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        eta = self.x @ b
        top = eta.max()
        r = np.exp(eta - top)
        below = self._denominators(r)
        weighted = r[:, None] * self.x
        s1 = np.cumsum(weighted, axis=0)[self.ends - 1][self.place]
        d1 = np.stack([np.bincount(self.place, column, len(self.times)) for column in weighted[self.deaths].T], axis=1)
        means = (s1 - self.gone[:, None] * d1[self.place]) / below[:, None]
        upto = np.concatenate([[0.0], np.cumsum(np.bincount(self.place, 1 / below, len(self.times)))])
        share = r * upto[self.held]
        share[self.deaths] -= r[self.deaths] * np.bincount(self.place, self.gone / below, len(self.times))[self.place]
        n = len(eta)
        loss = (np.log(below) + top - eta[self.deaths]).sum() / n
        gradient = (means - self.x[self.deaths]).sum(axis=0) / n
        return float(loss), gradient, ((self.x * share[:, None]).T @ self.x - means.T @ means) / n

    def baseline(self, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Event times and Breslow's cumulative hazard of a patient whose covariates are zero."""
        below = np.cumsum(np.exp(self.x @ b))[self.ends - 1]
        return self.times, np.cumsum(np.bincount(self.place, minlength=len(self.times)) / below)

    def _denominators(self, r: np.ndarray) -> np.ndarray:
        """For each death the weight of its risk set, less what is gone of the tied."""
        dying = np.bincount(self.place, r[self.deaths], len(self.times))[self.place]
        return np.cumsum(r)[self.ends - 1][self.place] - self.gone * dying


def _direction(b: np.ndarray, gradient: np.ndarray, hessian: np.ndarray, lasso: float) -> np.ndarray:
    """The step to the minimum of the quadratic model, with |b|_1 in it where `lasso` is not zero."""
    if not lasso:
        return -np.linalg.lstsq(hessian, gradient, rcond=None)[0]
    step, slope = np.zeros(len(b)), gradient.copy()
    curve = np.maximum(np.diag(hessian), 1e-12)
    for _ in range(_SWEEPS):
        largest = 0.0
        for j in range(len(b)):
            free = b[j] + step[j] - slope[j] / curve[j]
            move = np.sign(free) * max(abs(free) - lasso / curve[j], 0.0) - b[j] - step[j]
            if move:
                step[j] += move
                slope += move * hessian[j]
                largest = max(largest, abs(move) * curve[j] ** 0.5)
        if largest < 1e-12:
            break
    return step


def _search(likelihood: _Likelihood, b: np.ndarray, step: np.ndarray, ridge: float, lasso: float) -> np.ndarray:
    """The longest of the halved steps that does not make the objective larger."""

    def objective(at: np.ndarray) -> float:
        return likelihood.value(at) + 0.5 * ridge * at @ at + lasso * np.abs(at).sum()

    before = objective(b)
    for _ in range(_HALVINGS):
        if objective(b + step) <= before + 1e-14 * abs(before):
            return b + step
        step = step / 2
    return b
