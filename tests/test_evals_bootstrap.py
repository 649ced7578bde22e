"""Metrics against scikit-learn and hand-written loops; weights against index resampling, number for number."""

import numpy as np
import pytest
from sklearn import metrics as sk

from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, metrics


def problem(seed=0, n=60, classes=4, decimals=1):
    """Labels and coarsely rounded scores (many ties), better than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    scores = np.round(rng.random((n, classes)) + 0.3 * np.eye(classes)[labels], decimals)
    return labels, scores


def auc_by_hand(labels, scores, weights):
    """Mean over classes of P(positive above negative) + P(tie) / 2, pair by pair."""
    of_class = []
    for c in np.unique(labels[weights > 0]):
        won = total = 0.0
        for i in np.flatnonzero(labels == c):
            for j in np.flatnonzero(labels != c):
                weight = weights[i] * weights[j]
                total += weight
                won += weight * ((scores[i, c] > scores[j, c]) + 0.5 * (scores[i, c] == scores[j, c]))
        if total:
            of_class.append(won / total)
    return np.mean(of_class) if of_class else np.nan


def test_metrics_equal_scikit_learn():
    labels, scores = problem()
    found, predictions = metrics.classification(labels, scores), scores.argmax(1)
    assert found["accuracy"] == sk.accuracy_score(labels, predictions)
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, predictions), abs=1e-15)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, predictions, average="macro"), abs=1e-15)
    distribution = scores / scores.sum(1, keepdims=True)
    reference = sk.roc_auc_score(labels, distribution, multi_class="ovr", average="macro")
    assert metrics.classification(labels, distribution)["macro_auc"] == pytest.approx(reference, abs=1e-12)


def test_metrics_of_absent_classes():
    labels = np.array([0, 0, 1, 1])
    scores = np.array([[3, 1, 0], [0, 1, 3], [0, 3, 1], [3, 1, 0.0]])  # one row is taken for class 2, which is absent
    found = metrics.classification(labels, scores)
    assert found["balanced_accuracy"] == 0.5  # recalls 1/2 and 1/2; class 2 does not count
    assert found["macro_f1"] == pytest.approx((0.5 + 2 / 3 + 0) / 3)  # class 2 is predicted, hence counts
    assert found["macro_auc"] == pytest.approx((0.5 + 0.75) / 2)
    labels[2:] = 0
    with pytest.raises(InputError, match="at least two classes"):
        metrics.classification(labels, scores)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], np.ones((3, 2)), "do not fit"),
        ([0, 1], np.ones(2), "do not fit"),
        ([], np.ones((0, 2)), "no rows"),
        ([0, 2], np.ones((2, 2)), "whole numbers from 0 to 1"),
        ([0, -1], np.ones((2, 2)), "whole numbers"),
        ([0.0, 1.0], np.ones((2, 2)), "whole numbers"),
        ([0, 1], np.array([[1, np.nan], [0, 1]]), "finite"),
    ],
)
def test_metrics_refuse_wrong_input(labels, scores, message):
    with pytest.raises(InputError, match=message):
        metrics.classification(labels, scores)


@pytest.mark.parametrize(("n", "classes"), [(60, 4), (9, 5)])
def test_weights_equal_index_resampling(n, classes):
    """The defining property: a replicate is the metric of the rows repeated as often as they were drawn."""
    labels, scores = problem(1, n, classes)
    weights = bootstrap.draw(n, 25, seed=3)
    assert (weights.sum(1) == n).all()
    estimates = bootstrap.classification(labels, scores, weights)
    vanished = 0
    for k, weight in enumerate(weights):
        index = np.repeat(np.arange(n), weight)
        y, s = labels[index], scores[index]
        vanished += len(np.unique(y)) < classes
        resampled = metrics.classification(y, s)
        assert {name: e.replicates[k] for name, e in estimates.items()} == pytest.approx(resampled, abs=1e-12)
        assert metrics.classification(labels, scores, weight) == pytest.approx(resampled, abs=1e-12)
        assert bootstrap.median(scores[:, 0], weight[None])[0] == np.median(scores[index, 0])
    assert vanished > 0 or n == 60  # the small problem does lose classes, which is the hard case


def test_replicates_of_ones_are_the_value():
    labels, scores = problem(2)
    for estimate in bootstrap.classification(labels, scores, np.ones((1, len(labels)), int)).values():
        assert estimate.replicates[0] == pytest.approx(estimate.value, abs=1e-12)


def test_auc_by_hand():
    labels, scores = problem(4, n=20, classes=3)
    weights = bootstrap.draw(20, 5, seed=0)
    by_hand = [auc_by_hand(labels, scores, w) for w in weights]
    np.testing.assert_allclose(bootstrap.macro_auc(labels, scores, weights), by_hand, atol=1e-12)
    one_class = np.where(np.arange(20) == np.flatnonzero(labels == 0)[0], 20, 0)[None]
    assert np.isnan(bootstrap.macro_auc(labels, scores, one_class)[0])


def test_draw_is_multinomial_and_seeded():
    a, b, c = (bootstrap.draw(40, 3000, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    np.testing.assert_allclose(a.mean(0), 1, atol=0.1)
    np.testing.assert_allclose(a.var(0), 1 - 1 / 40, atol=0.15)


def test_draw_keeps_units_whole_and_strata_full():
    units = np.array(["a", "b", "a", "c", "b", "d"])
    weights = bootstrap.draw(6, 100, 0, units=units)
    for members in (units == "a", units == "b"):
        assert (weights[:, members] == weights[:, members][:, :1]).all()
    assert set(weights.sum(1)) != {6}  # the number of rows varies with the units drawn
    strata = np.array([0, 1, 0, 0, 1, 1])
    weights = bootstrap.draw(6, 100, 0, units=units, strata=strata)
    first = {"a": 0, "b": 1, "c": 3, "d": 5}
    assert (weights[:, [first["a"], first["c"]]].sum(1) == 2).all()
    assert (weights[:, [first["b"], first["d"]]].sum(1) == 2).all()
    with pytest.raises(InputError, match="divided between strata"):
        bootstrap.draw(6, 10, 0, units=units, strata=np.arange(6))
    with pytest.raises(InputError, match="needs rows"):
        bootstrap.draw(0, 10, 0)


def test_plan_says_how_it_resamples():
    labels = np.repeat([0, 1], [50, 3])
    alone = np.arange(53)
    plan = bootstrap.plan(labels, alone, 500, 0)
    assert plan.to_dict() == {"method": "percentile", "resamples": 500, "unit": "row", "strata": "class"}
    assert (plan.weights[:, 50:].sum(1) == 3).all()  # the rare class keeps its share; plain resampling loses it
    assert (bootstrap.draw(53, 500, 0)[:, 50:].sum(1) == 0).any()
    assert bootstrap.plan(np.repeat([0, 1], 30), np.arange(60), 5, 0).strata == "none"
    grouped = bootstrap.plan(labels, np.minimum(alone, 40), 5, 0)
    assert (grouped.unit, grouped.strata) == ("group", "none")  # group 40 holds both classes
    pure = bootstrap.plan(labels, np.minimum(alone, 40) + 100 * labels, 5, 0)
    assert (pure.unit, pure.strata) == ("group", "class")


def test_interval_covers_as_often_as_it_says():
    """95 % intervals of accuracy on fresh samples of 100 rows that are right with chance 0.7."""
    rng, covered = np.random.default_rng(0), 0
    for trial in range(300):
        right = rng.random(100) < 0.7
        estimate = bootstrap.Estimate(right.mean(), bootstrap.mean(right, bootstrap.draw(100, 400, trial)))
        low, high = estimate.interval()
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_intervals_are_over_the_resamples_that_have_the_number():
    some = bootstrap.Estimate(0.5, np.array([np.nan, 0.2, np.nan, 0.6]))
    assert some.interval(1.0) == (0.2, 0.6)
    none = bootstrap.Estimate(0.5, np.full(20, np.nan))
    with pytest.raises(InputError, match=r"none of 20 resamples has this number.*more resamples \(--bootstrap\)"):
        none.interval()
    assert bootstrap.undefined({"a": some, "b": none, "c": bootstrap.Estimate(1.0, np.ones(3))}) == {"a": 2, "b": 20}


def test_paired_difference_is_narrower_and_signed():
    rng = np.random.default_rng(0)
    a = rng.random(200) < 0.7
    b = np.where(rng.random(200) < 0.05, ~a, a) & (rng.random(200) < 0.95)  # nearly the same answers, a little worse
    paired_with = bootstrap.draw(200, 2000, 0)
    first, second = (bootstrap.Estimate(x.mean(), bootstrap.mean(x, paired_with)) for x in (a, b))
    unpaired = bootstrap.Estimate(b.mean(), bootstrap.mean(b, bootstrap.draw(200, 2000, 1)))
    difference = bootstrap.difference(first, second)
    assert difference.value == pytest.approx(a.mean() - b.mean())
    width = np.subtract(*difference.interval()[::-1])
    assert width < 0.6 * np.subtract(*bootstrap.difference(first, unpaired).interval()[::-1])
    assert bootstrap.difference(first, first).interval() == (0, 0)
    with pytest.raises(InputError, match="same resamples"):
        bootstrap.difference(first, bootstrap.Estimate(0.5, np.zeros(3)))


def test_seeds_of_sets_differ_but_not_by_model():
    assert bootstrap.seed_of(0, "busi", "hash") == bootstrap.seed_of(0, "busi", "hash")
    assert len({bootstrap.seed_of(s, n) for s in (0, 1) for n in ("busi", "odir", "")}) == 6


def test_mean_over_sets_and_seeds():
    rng = np.random.default_rng(0)
    sets = [bootstrap.Estimate(v, v + 0.1 * rng.standard_normal(4000)) for v in (0.4, 0.6)]
    mean = bootstrap.mean_over_sets(sets)
    assert mean.value == pytest.approx(0.5)
    assert mean.replicates.std() == pytest.approx(0.1 / np.sqrt(2), rel=0.05)

    assert bootstrap.mean_over_seeds(sets[:1]).interval() == sets[0].interval()
    exact = [bootstrap.Estimate(v, np.full(20000, v)) for v in (0.4, 0.5, 0.6)]  # no doubt about cases, only seeds
    over_seeds = bootstrap.mean_over_seeds(exact)
    assert over_seeds.value == pytest.approx(0.5)
    assert over_seeds.replicates.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.03)  # the standard error of the mean
    for empty in (bootstrap.mean_over_sets, bootstrap.mean_over_seeds):
        with pytest.raises(InputError, match="there is no"):
            empty([])
