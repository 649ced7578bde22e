"""Survival metrics, curves, log-rank and Cox regression against recorded numbers of scikit-survival and lifelines.

golden/survival.json was made by scikit-survival 0.28.0 and lifelines 0.30.3 from drawn times with no, some and many
ties. Beside them stand plain loops, and values that were worked out by hand.
"""

import json

import numpy as np
import pytest
from scipy import optimize

from mmkd_jax.errors import InputError
from mmkd_jax.evals import cox, survival_curves, survival_metrics
from mmkd_jax.evals.survival_curves import Outcomes

NAMES = ("continuous", "ties", "heavy ties", "small")


@pytest.fixture(scope="module")
def golden(repository):
    return json.loads((repository / "tests/golden/survival.json").read_text())["cases"]


@pytest.fixture(params=NAMES)
def case(request, golden):
    told = golden[request.param]
    return {k: np.array(v) if isinstance(v, list) and k != "km" else v for k, v in told.items()}


def sides(case) -> tuple[Outcomes, Outcomes]:
    return Outcomes(case["event"], case["time"]), Outcomes(case["test_event"], case["test_time"])


def equal(found, expected, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_kaplan_meier_and_its_limits(case):
    train, _ = sides(case)
    times, survival, limits = case["km"][0], case["km"][1], np.array(case["km"][2])
    curve = survival_curves.kaplan_meier(train)
    equal(curve.time, times)
    equal(curve.value, survival)
    inner = (curve.value > 0) & (curve.value < 1)
    equal(np.stack(survival_curves.greenwood(train))[:, inner], limits[:, inner])
    equal(survival_curves.censoring(train).value, case["km censoring"])
    naive = survival_curves.kaplan_meier(Outcomes(~train.event, train.time))  # events after ends of watching
    tied = len(np.unique(train.time)) < len(train)
    assert (np.abs(naive.value - case["km censoring"]).max() > 1e-3) == tied


def test_curves_count_patients_by_weights(case):
    train, _ = sides(case)
    weights = np.random.default_rng(0).integers(0, 4, len(train))
    repeated = train[np.repeat(np.arange(len(train)), weights)]
    expected = survival_curves.kaplan_meier(repeated)
    equal(survival_curves.kaplan_meier(train, weights)(expected.time), expected.value)


def test_log_rank(case):
    train, _ = sides(case)
    statistic, p = survival_curves.log_rank(train, case["groups"])
    equal([statistic, p] * 2, case["logrank"])


def test_concordance(case):
    train, test = sides(case)
    equal([survival_metrics.concordance(test, case["risk"])] * 2, case["c"])
    equal(survival_metrics.concordance_ipcw(train, test, case["risk"], case["tau"]), case["uno tau"])
    equal(survival_metrics.concordance_ipcw(train, test, case["risk"]), case["uno"])
    own = survival_metrics.concordance_ipcw(test, test, case["risk"], case["tau"])
    several = len(np.unique(test.time[test.event & (test.time < case["tau"])])) > 1
    assert (abs(own - case["uno tau"]) > 1e-6) == several  # whose censoring gives the weights matters


def test_auc_over_time(case):
    train, test = sides(case)
    values, mean = survival_metrics.dynamic_auc(train, test, case["risk"], case["times"])
    equal(values, case["auc"])
    equal(mean, case["auc mean"])


def test_brier(case):
    train, test = sides(case)
    equal(survival_metrics.brier(train, test, case["survival"], case["times"]), case["brier"])
    equal(survival_metrics.integrated_brier(train, test, case["survival"], case["times"]), case["ibs"])


def test_resampling_by_weights_is_resampling_by_rows(case):
    _, test = sides(case)
    rng = np.random.default_rng(1)
    rows = rng.integers(0, len(test), (20, len(test)))
    weights = np.stack([np.bincount(one, minlength=len(test)) for one in rows])
    expected = [survival_metrics.concordance(test[one], case["risk"][one]) for one in rows]
    equal(survival_metrics.concordance(test, case["risk"], weights), expected, 1e-12)


def test_all_metrics_resample_as_they_would_on_the_rows(case):
    """Uno's C, AUC and Brier score; resamples whose times end before those asked for cannot be told on the rows."""
    train, test = sides(case)
    rng, times, compared = np.random.default_rng(2), np.array(case["times"]), 0
    rows = rng.integers(0, len(test), (30, len(test)))
    weights = np.stack([np.bincount(one, minlength=len(test)) for one in rows])
    uno = survival_metrics.concordance_ipcw(train, test, case["risk"], case["tau"], weights)
    auc, mean = survival_metrics.dynamic_auc(train, test, case["risk"], times, weights)
    score = survival_metrics.brier(train, test, case["survival"], times, weights)
    area = survival_metrics.integrated_brier(train, test, case["survival"], times, weights)
    for k, one in enumerate(rows):
        part, risk, curve = test[one], case["risk"][one], case["survival"][one]
        try:
            expected = survival_metrics.dynamic_auc(train, part, risk, times)
            uno_here = survival_metrics.concordance_ipcw(train, part, risk, case["tau"])
        except InputError:
            continue
        equal(auc[k], expected[0])
        equal([mean[k], uno[k]], [expected[1], uno_here])
        equal(score[k], survival_metrics.brier(train, part, curve, times))
        equal(area[k], survival_metrics.integrated_brier(train, part, curve, times))
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize(
    ("time", "event", "risk", "expected"),
    [
        ([1, 2, 3], [1, 1, 1], [1, 1, 0], 2.5 / 3),
        ([1, 1, 3], [1, 0, 1], [1, 2, 0], 0.5),
        ([1, 1, 3], [1, 0, 1], [2, 1, 0], 1),
        ([2, 2, 2], [1, 1, 0], [1, 0, 0.5], 0.5),
        ([1, 2], [1, 0], [0, 1e-9], 0.5),
        ([5, 1, 2, 3], [0, 1, 0, 0], [0, 9, 1, 2], 1),
    ],
)
def test_concordance_by_hand(time, event, risk, expected):
    """Equal risks; an event and an end of watching at the same time; equal event times; one event."""
    equal(survival_metrics.concordance(Outcomes(event, time), risk), expected, 1e-12)


def test_many_patients_are_compared_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    outcomes, risk = Outcomes(rng.random(300) < 0.5, rng.integers(1, 30, 300)), rng.integers(0, 9, 300)
    whole = survival_metrics.concordance(outcomes, risk)
    monkeypatch.setattr(survival_metrics, "_ENTRIES", 1000)
    equal(survival_metrics.concordance(outcomes, risk), whole, 1e-12)


@pytest.mark.parametrize("ties", cox.TIES)
@pytest.mark.parametrize("alpha", [0.0, 2.0, 30.0])
def test_ridge(case, ties, alpha):
    train, _ = sides(case)
    found = cox.fit(case["x"], train, strength=alpha / len(train), ties=ties).coefficients
    equal(found, case["cox ridge"][f"{ties} {alpha}"], 1e-6)
    other = cox.fit(case["x"], train, strength=alpha / len(train), ties=next(t for t in cox.TIES if t != ties))
    tied = len(np.unique(train.time[train.event])) < train.event.sum()
    assert (np.abs(found - other.coefficients).max() > 1e-5) == tied


@pytest.mark.parametrize("l1_ratio", [0.5, 1.0])
@pytest.mark.parametrize("strength", [0.02, 0.1])
def test_elastic_net(case, l1_ratio, strength):
    train, _ = sides(case)
    found = cox.fit(case["x"], train, strength=strength, l1_ratio=l1_ratio, ties="breslow").coefficients
    equal(found, case["cox net"][f"{l1_ratio} {strength}"], 1e-6)


def test_errors_and_likelihood_of_lifelines(case):
    train, _ = sides(case)
    model = cox.fit(case["x"], train)
    equal(model.coefficients, case["lifelines"]["coef"], 1e-6)
    equal(np.sqrt(np.diag(model.covariance)), case["lifelines"]["se"], 1e-6)
    equal(-model.loss * len(train), case["lifelines"]["ll"], 1e-6)


def test_predicted_survival(case):
    train, _ = sides(case)
    model = cox.fit(case["x"], train, ties="breslow")
    equal(model.survival(case["test_x"], case["times"]), case["survival"], 1e-6)


def plain_loss(x, outcomes, b, ties) -> float:
    """-log(partial likelihood) / n, death by death."""
    eta, total = x @ b, 0.0
    for t in np.unique(outcomes.time[outcomes.event]):
        dead = np.flatnonzero(outcomes.event & (outcomes.time == t))
        whole, dying = np.exp(eta[outcomes.time >= t]).sum(), np.exp(eta[dead]).sum()
        for k in range(len(dead)):
            total += np.log(whole - (k / len(dead) * dying if ties == "efron" else 0)) - eta[dead[k]]
    return total / len(x)


@pytest.mark.parametrize("ties", cox.TIES)
def test_derivatives_of_the_likelihood(golden, ties):
    """Value by a plain loop, gradient and Hessian by differences, where most times are tied."""
    case = golden["heavy ties"]
    x, outcomes = np.array(case["x"]), Outcomes(case["event"], case["time"])
    b = np.array([0.4, -0.7, 0.2])
    likelihood = cox._Likelihood(x, outcomes, ties)
    loss, gradient, hessian = likelihood(b)
    equal([loss, likelihood.value(b)], [plain_loss(x, outcomes, b, ties)] * 2, 1e-12)
    equal(gradient, optimize.approx_fprime(b, lambda b: plain_loss(x, outcomes, b, ties), 1e-7), 1e-6)
    for k in range(3):
        step = np.eye(3)[k] * 1e-5
        equal(hessian[k], (likelihood(b + step)[1] - likelihood(b - step)[1]) / 2e-5, 1e-8)


def test_more_covariates_than_patients_meet_the_conditions_of_an_optimum():
    """Subgradients of the elastic net at its solution: the only test of one where the design is degenerate."""
    rng = np.random.default_rng(0)
    x, outcomes = rng.normal(size=(60, 150)), Outcomes(rng.random(60) < 0.6, rng.integers(1, 25, 60))
    for l1_ratio in (0.0, 0.5):
        b = cox.fit(x, outcomes, strength=0.1, l1_ratio=l1_ratio).coefficients
        slope = cox._Likelihood(x, outcomes, "efron")(b)[1] + 0.1 * (1 - l1_ratio) * b
        equal(slope[b != 0], -0.1 * l1_ratio * np.sign(b[b != 0]), 1e-7)
        assert (np.abs(slope[b == 0]) <= 0.1 * l1_ratio + 1e-9).all()
        assert (b == 0).any() == (l1_ratio > 0)


def test_times_of_prediction_are_checked():
    train, test = Outcomes([1, 0, 1], [1, 2, 9]), Outcomes([1, 1, 0], [2, 3, 8])
    for times in ([1.0], [8.0], [3.0, 2.5]):
        with pytest.raises(InputError, match="times must ascend"):
            survival_metrics.brier(train, test, np.ones((3, len(times))), times)
    with pytest.raises(InputError, match=r"no patient has the event by 2\.5"):
        survival_metrics.dynamic_auc(train, Outcomes([0, 1, 0], [2, 3, 8]), np.arange(3), [2.5])
    with pytest.raises(InputError, match="known up to 4"):
        survival_metrics.concordance_ipcw(Outcomes([1, 0, 1], [1, 2, 4]), Outcomes([1, 1, 0], [2, 5, 8]), np.arange(3))
    with pytest.raises(InputError, match="all training patients are censored by 5"):
        survival_metrics.concordance_ipcw(Outcomes([1, 0], [1, 4]), Outcomes([1, 1, 0], [2, 5, 8]), np.arange(3))


@pytest.mark.parametrize(
    ("event", "time", "message"),
    [
        ([1, 0, 2], [1, 2, 3], "choose one event where several compete"),
        ([1, 0, np.nan], [1, 2, 3], "leave out patients whose event is missing"),
        ([1, 0, 1], [1, 0, 3], "row 1 has 0"),
        ([1, 0, 1], [1, 2, -3], "row 2 has -3"),
        ([1, 0, 1], [1, 2, np.nan], "row 2 has nan"),
        ([1, 0], [1, 2, 3], "two equal columns"),
        ([], [], "two equal columns"),
    ],
)
def test_wrong_outcomes(event, time, message):
    with pytest.raises(InputError, match=message):
        Outcomes(event, time)


def test_nothing_to_compare():
    censored = Outcomes([0, 0, 0], [1, 2, 3])
    with pytest.raises(InputError, match="no pair of patients is comparable"):
        survival_metrics.concordance(censored, [1, 2, 3])
    with pytest.raises(InputError, match="no patient has the event"):
        cox.fit(np.ones((3, 1)), censored)
    with pytest.raises(InputError, match="no patient has the event"):
        survival_curves.log_rank(censored, [0, 1, 1])
    with pytest.raises(InputError, match="two groups, not 1"):
        survival_curves.log_rank(Outcomes([1, 1], [1, 2]), [0, 0])
    assert np.isnan(survival_metrics.concordance(Outcomes([1, 0], [1, 2]), [1, 0], [[0, 2], [1, 1]])[0])


def test_fits_without_a_solution():
    outcomes = Outcomes([1, 1, 1, 1], [1, 2, 3, 4])
    ordered = -np.arange(4.0)[:, None]
    with pytest.raises(InputError, match="use a"):
        cox.fit(ordered, outcomes)
    assert np.isfinite(cox.fit(ordered, outcomes, strength=0.01).coefficients).all()
    with pytest.raises(InputError, match="covariate 1 is constant"):
        cox.fit(np.stack([[1.0, 2, 1, 2], np.ones(4)], axis=1), outcomes)
    with pytest.raises(InputError, match="covariate 0 has missing"):
        cox.fit(np.array([[1.0], [np.nan], [2], [3]]), outcomes)
