"""Logistic regression against scikit-learn's optimum of the same objective, in float64, on easy and hard problems."""

import functools
import time
import warnings

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mmkd_jax.evals import linear_probe, logistic


def problem(n=200, width=16, classes=4, seed=0, noise=1.0, decay=1.5):
    """Correlated features whose spectrum falls, standardised; `noise` 0 can be separated."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    axes = np.linalg.qr(rng.standard_normal((width, width)))[0] * (1.0 + np.arange(width))[:, None] ** -decay
    features = (noise * rng.standard_normal((n, width)) + 2 * rng.standard_normal((classes, width))[labels]) @ axes
    return linear_probe.standardise(features, features)[0], labels


PROBLEMS = {
    "overlapping": lambda: problem(noise=2.0),
    "separable": lambda: problem(noise=0.1),
    "two classes": lambda: problem(classes=2, noise=1.5),
    "fewer rows than features": lambda: problem(n=30, width=80, classes=3),
    "a class of one row": lambda: lone(*problem(n=90, classes=3)),
    "a constant and a doubled feature": lambda: doubled(*problem()),
}


def lone(features, labels):
    return features, np.where(
        labels == 2, np.where(np.arange(len(labels)) == np.flatnonzero(labels == 2)[0], 2, 0), labels
    )


def doubled(features, labels):
    return np.hstack([features, features[:, :1], np.zeros((len(features), 1))]), labels


def objective(weights, intercept, strength, features, labels):
    """scikit-learn's, for columns of any number of classes."""
    logits = features @ weights + intercept
    top = logits.max(1)
    losses = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(labels)), labels]
    penalty = 0.5 * (weights**2).sum() * (2 if weights.shape[1] == 2 else 1)
    return penalty + strength * losses.sum()


def reference(strength, features, labels):
    """scikit-learn's weights `[width, classes]` and intercept; of two classes its one column is divided in two."""
    model = LogisticRegression(C=strength, tol=1e-9, max_iter=100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(features, labels)
    weights, intercept = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:
        return np.hstack([-weights / 2, weights / 2]), np.concatenate([-intercept / 2, intercept / 2])
    return weights, intercept


@functools.cache
def fitted(name):
    features, labels = PROBLEMS[name]()
    return features, labels, list(logistic.path(features, labels, np.logspace(-6, 6, 7)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_fits_equal_scikit_learn(name):
    """Weights to 1e-4 for C up to 10 and the objective to 1e-8 always; predictions wherever they are no coin's toss."""
    features, labels, models = fitted(name)
    others = problem(200, features.shape[1], seed=7)[0]
    for model in models:
        weights, intercept = reference(model.strength, features, labels)
        own, theirs = (
            objective(w, b, model.strength, features, labels)
            for w, b in ((model.weights, model.intercept), (weights, intercept))
        )
        assert own <= theirs * (1 + 1e-8)
        if own > theirs * (1 - 1e-8):  # else scikit-learn stopped short of its optimum
            logits = np.sort(others @ weights + intercept, 1)
            clear = logits[:, -1] - logits[:, -2] > 1e-6 * max(1, np.abs(logits).max())
            same = (others @ weights + intercept).argmax(1) == (others @ model.weights + model.intercept).argmax(1)
            assert same[clear].all()
        if model.strength <= 10:
            assert np.abs(model.weights - weights).max() <= 1e-4 * np.abs(weights).max()


@pytest.mark.parametrize("name", PROBLEMS)
def test_fits_are_at_their_optimum(name):
    """The gradient in the features' own coordinates, without scikit-learn; its gap to the optimum by convexity."""
    features, labels, models = fitted(name)
    for model in models:
        wrong = model.probabilities(features, len(model.classes)) - np.eye(len(model.classes))[labels]
        penalty = (2 if len(model.classes) == 2 else 1) / (model.strength * len(labels))
        gradient = features.T @ wrong / len(labels) + penalty * model.weights
        size = np.sqrt((gradient**2).sum() + (wrong.mean(0) ** 2).sum())
        value = (
            objective(model.weights, model.intercept, model.strength, features, labels) / model.strength / len(labels)
        )
        assert size <= 1.1e-9
        assert size**2 / (2 * penalty) <= 1.1e-9 * value + 1e-15
        assert np.abs(model.weights.sum(1)).max() < 1e-9 * max(1, np.abs(model.weights).max())


def test_a_shifted_fit_is_noticed():
    """The negative control: what the tests above ask for is not met a little beside the optimum."""
    features, labels, models = fitted("overlapping")
    model = models[3]
    value = objective(model.weights, model.intercept, 1.0, features, labels)
    beside = objective(model.weights * (1 + 1e-3), model.intercept, 1.0, features, labels)
    assert beside > value * (1 + 1e-8)
    unpenalised = objective(*reference(1e9, features, labels), 1.0, features, labels)
    assert unpenalised > value * (1 + 1e-4)


def test_the_preconditioner_saves_most_iterations():
    features, labels, _ = fitted("overlapping")
    plain = LogisticRegression(C=100.0, tol=1e-9, max_iter=100_000).fit(features, labels).n_iter_[0]
    (cold,) = logistic.path(features, labels, [100.0])
    assert cold.iterations < plain / 2


def test_starting_from_the_last_solution_changes_nothing_but_the_number_of_iterations():
    features, labels, models = fitted("overlapping")
    for warm in models[1::2]:
        (cold,) = logistic.path(features, labels, [warm.strength])
        np.testing.assert_allclose(warm.weights, cold.weights, rtol=0, atol=1e-5 * np.abs(cold.weights).max())


def test_filled_up_rows_and_other_scales_of_labels_change_nothing():
    """33 rows are computed as 64; classes may have any numbers; rows may come in any order."""
    features, labels = problem(33, 6, 3)
    (model,) = logistic.path(features, labels, [0.5])
    order = np.random.default_rng(0).permutation(33)
    (other,) = logistic.path(features[order], 10 * labels[order] + 3, [0.5])
    assert other.classes.tolist() == [3, 13, 23]
    np.testing.assert_allclose(model.weights, other.weights, atol=1e-8)
    scores = other.probabilities(features, 24)
    assert scores[:, other.classes].sum(1) == pytest.approx(1)
    assert scores.sum(1) == pytest.approx(1)
    (shifted,) = logistic.path(features + 7, labels, [0.5])  # the intercept takes a shift in
    np.testing.assert_allclose(shifted.probabilities(features + 7, 3), model.probabilities(features, 3), atol=1e-8)


def test_float64_stays_inside():
    features, labels = problem(33, 6, 3)
    next(logistic.path(features, labels, [0.5]))
    assert jax.numpy.ones(1).dtype == np.float32


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_faster_than_scikit_learn_at_equal_tolerance():
    """10,000 x 512, 13 values of C, 5 seeds of rows, side by side; scikit-learn starts warm as well."""
    side_by_side(12_500, 10_000, 512, 5, seeds=5)


def side_by_side(n, rows, width, classes, seeds):
    rng = np.random.default_rng(0)
    spectrum = (1.0 + np.arange(width)) ** -0.5
    every = rng.integers(classes, size=n)
    means = 0.1 * rng.standard_normal((classes, width))
    raw = (
        (rng.standard_normal((n, width)) + means[every])
        * spectrum
        @ np.linalg.qr(rng.standard_normal((width, width)))[0]
    )
    seconds = np.zeros(2)
    for seed in range(seeds):
        drawn = np.random.default_rng(seed).permutation(n)[:rows]
        features, labels = linear_probe.standardise(raw[drawn], raw[:1])[0], every[drawn]
        start = time.perf_counter()
        models = list(logistic.path(features, labels, np.logspace(-6, 6, 13)))
        seconds[0] += time.perf_counter() - start
        plain = LogisticRegression(tol=1e-9, max_iter=100_000, warm_start=True)
        for model in models:
            start = time.perf_counter()
            plain.set_params(C=model.strength).fit(features, labels)
            seconds[1] += time.perf_counter() - start
            own, theirs = (
                objective(w, b, model.strength, features, labels)
                for w, b in ((model.weights, model.intercept), (plain.coef_.T, plain.intercept_))
            )
            assert own <= theirs * (1 + 1e-8)
            assert (
                model.strength > 10 or np.abs(model.weights - plain.coef_.T).max() <= 1e-4 * np.abs(plain.coef_).max()
            )
    print(f"ours {seconds[0]:.1f} s, scikit-learn {seconds[1]:.1f} s")
    assert seconds[0] < seconds[1]
