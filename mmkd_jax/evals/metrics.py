"""Classification metrics as scikit-learn has them, with checked input and a settled answer for absent classes."""

import warnings

import numpy as np
from sklearn import metrics as sk

from mmkd_jax.errors import InputError
from mmkd_jax.evals import tallies

CLASSIFICATION = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auc")


def check(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """`labels` as int64 `[n]` and `scores` as float64 `[n, classes]`, proven to fit each other.

    Raises:
      InputError: no rows, shapes that differ, a label that is not a class, or a score that is not finite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise InputError(f"labels of shape {labels.shape} do not fit scores of shape {scores.shape} [rows, classes]")
    if not len(labels):
        raise InputError("there is nothing to score: the set has no rows")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise InputError(
            f"labels must be whole numbers from 0 to {scores.shape[1] - 1}, "
            f"found {labels.min()} to {labels.max()}: class names and labels do not belong together"
        )
    if not np.isfinite(scores).all():
        raise InputError("a score is not a finite number: the model gave NaN or infinity")
    return labels.astype(np.int64), scores


def accuracy(labels, predictions, weights=None) -> float:
    """Share of right predictions, each row counted `weights` times."""
    return float(sk.accuracy_score(labels, predictions, sample_weight=weights))


def balanced_accuracy(labels, predictions, weights=None) -> float:
    """Mean recall over the classes that occur among the labels."""
    labels, predictions, weights = _present(labels, predictions, weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        warnings.filterwarnings("ignore", message="A single label was found")
        return float(sk.balanced_accuracy_score(labels, predictions, sample_weight=weights))


def macro_f1(labels, predictions, weights=None) -> float:
    """Mean F1 over the classes that occur among the labels or the predictions (never-right classes count 0)."""
    labels, predictions, weights = _present(labels, predictions, weights)
    return float(sk.f1_score(labels, predictions, average="macro", sample_weight=weights, zero_division=0))


def macro_auc(labels, scores, weights=None) -> float:
    """Mean one-versus-rest ROC AUC over the classes that occur among the labels; ties count half.

    Raises:
      InputError: the labels hold a single class, for which no AUC exists.
    """
    labels, scores, weights = _present(labels, scores, weights)
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError("an AUC needs rows of at least two classes; this set has rows of one")
    weights = np.ones(len(labels), np.int64) if weights is None else weights
    counted = [auc_counts(labels == c, scores[:, c], weights[None]) for c in present]
    return float(np.mean([won[0] / pairs[0] for won, pairs in counted]))


def auc_counts(positive, scores, weights) -> tuple[np.ndarray, np.ndarray]:
    """Twice the pairs of a positive and a negative row that are ranked right (ties half), and twice all such pairs.

    Args:
      positive: bool `[n]`.
      scores: float `[n]`.
      weights: counts `[resamples, n]`.

    Returns:
      int64 `[resamples]` each; their quotient is the ROC AUC.
    """
    drawn = tallies.cells(2, np.asarray(positive, np.int64), weights)
    return tallies.won(positive, scores, weights), 2 * drawn[:, 0] * drawn[:, 1]


def classification(labels, scores, weights=None) -> dict[str, float]:
    """The metrics named in `CLASSIFICATION`, predictions being the (first) highest score of each row.

    Args:
      labels: int `[n]`, index of the true class.
      scores: float `[n, classes]`, the higher the likelier.
      weights: whole numbers `[n]`, how often each row counts; once by default.
    """
    labels, scores = check(labels, scores)
    predictions = scores.argmax(axis=1)
    return {
        "accuracy": accuracy(labels, predictions, weights),
        "balanced_accuracy": balanced_accuracy(labels, predictions, weights),
        "macro_f1": macro_f1(labels, predictions, weights),
        "macro_auc": macro_auc(labels, scores, weights),
    }


def _present(labels, values, weights):
    """The rows that count at all: scikit-learn keeps the classes of rows of weight 0, resampling does not."""
    labels, values = np.asarray(labels), np.asarray(values)
    if weights is None:
        return labels, values, None
    weights = np.asarray(weights)
    if weights.shape != labels.shape:
        raise InputError(f"{weights.shape} weights do not fit {labels.shape} labels")
    kept = weights > 0
    return labels[kept], values[kept], weights[kept]
