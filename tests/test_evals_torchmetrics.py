"""Metrics against torchmetrics, which computes them in other ways: edge cases included."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torchmetrics needs torch; launch/test.sh says how to get it")
tm = pytest.importorskip("torchmetrics", reason="the reference is torchmetrics; launch/test.sh installs it with torch")

from torchmetrics.functional import classification as tmc  # noqa: E402
from torchmetrics.functional import retrieval as tmr  # noqa: E402

from mmkd_jax.evals import calibration, metrics, multilabel, ranking  # noqa: E402

NO_RESAMPLES = np.zeros((0, 300), np.int64)


@pytest.fixture(scope="module", params=["plain", "ties", "an absent class"])
def case(request):
    """Labels of four classes and probabilities, float64; rounded to tenths, or without the last class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3 if request.param == "an absent class" else 4, 300)
    logits = rng.normal(size=(300, 4)) + 1.2 * np.eye(4)[labels]
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if request.param == "ties":
        scores = np.round(scores, 1) + 0.02  # no score is 0
        scores = scores / scores.sum(1, keepdims=True)
    return labels, scores, len(np.unique(labels))


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]


@pytest.mark.filterwarnings("ignore:No positive samples in targets")
def test_classification(case):
    labels, scores, present = case
    ours, (target, given) = metrics.classification(labels, scores), tensors(labels, scores)
    options = {"num_classes": 4}
    by_class = tmc.multiclass_recall(given, target, average="none", **options)[:present]
    assert ours["accuracy"] == pytest.approx(
        float(tmc.multiclass_accuracy(given, target, average="micro", **options)), abs=1e-6
    )
    assert ours["balanced_accuracy"] == pytest.approx(float(by_class.double().mean()), abs=1e-6)
    aucs = tmc.multiclass_auroc(given, target, average="none", **options)[:present]
    if present == 4:  # which classes a mean is over differs where one is absent
        assert ours["macro_auc"] == pytest.approx(float(aucs.double().mean()), abs=1e-6)
        f1 = tmc.multiclass_f1_score(given, target, average="macro", **options)
        assert ours["macro_f1"] == pytest.approx(float(f1), abs=1e-6)


def test_calibration_error(case):
    labels, scores, _ = case
    target, given = tensors(labels, scores)
    wanted = tmc.multiclass_calibration_error(given, target, num_classes=4, n_bins=calibration.BINS, norm="l1")
    assert calibration.measure(labels, scores, NO_RESAMPLES)["ece"].value == pytest.approx(float(wanted), abs=1e-6)


def test_findings():
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, (300, 3))
    scores = np.round(rng.uniform(size=(300, 3)) + 0.3 * targets, 2) / 1.3  # with ties
    target, given = tensors(targets, scores)
    found = {name: one.value for name, (one, _) in multilabel.measure(targets, scores, "abc", NO_RESAMPLES).items()}
    options = {"num_labels": 3, "average": "none"}
    for metric, of_all in (("auc", tmc.multilabel_auroc), ("ap", tmc.multilabel_average_precision)):
        for name, wanted in zip("abc", of_all(given, target, **options)):
            assert found[f"{metric}:{name}"] == pytest.approx(float(wanted), abs=1e-6)
    assert found["map"] == pytest.approx(float(tmc.multilabel_average_precision(given, target, num_labels=3)), abs=1e-6)


def test_retrieval():
    rng = np.random.default_rng(2)
    queries, pool = rng.normal(size=(40, 16)), rng.normal(size=(90, 16))
    right = rng.uniform(size=(40, 90)) < 0.05
    right[np.arange(40), rng.integers(0, 90, 40)] = True
    found = ranking.search(queries, pool, right, chunk=7, block=11)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, pool)]
    for query, (cosines, answers) in enumerate(zip(unit[0] @ unit[1].T, right)):
        given, target = tensors((1 + cosines) / 2, answers)  # it takes no account of items at 0 or below
        assert found.precision[query] == pytest.approx(float(tmr.retrieval_average_precision(given, target)), abs=1e-6)
        assert 1 / found.ranks[query] == pytest.approx(float(tmr.retrieval_reciprocal_rank(given, target)), abs=1e-6)
        for k in (1, 5, 10):
            assert (found.ranks[query] <= k) == bool(tmr.retrieval_hit_rate(given, target, top_k=k))
