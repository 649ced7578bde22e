"""Metrics of predicted classes from weighted confusion counts, for many resamples at once; conventions of scikit-learn.

A class that occurs neither among the labels nor among the predictions of a resample does not count there; 0 / 0 is 0.
"""

import numpy as np
from scipy import sparse

AVERAGES = ("macro", "weighted", "binary")


def counts(labels, predictions, classes: int, weights: np.ndarray) -> np.ndarray:
    """How often each class is taken for each, float64 `[resamples, true, predicted]`.

    Args:
      labels: int `[n]`.
      predictions: int `[n]`.
      classes: how many.
      weights: counts `[resamples, n]`.
    """
    n = len(labels)
    cells = np.asarray(labels) * classes + np.asarray(predictions)
    placed = sparse.csr_array((np.ones(n), (cells, np.arange(n))), shape=(classes * classes, n))
    return np.asarray(placed @ np.asarray(weights, np.float64).T).T.reshape(-1, classes, classes)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Share of right predictions, float64 `[resamples]`."""
    return np.trace(confusion, axis1=1, axis2=2) / confusion.sum(axis=(1, 2))


def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Mean recall over the classes among the labels."""
    true = confusion.sum(axis=2)
    return (_ratio(_hits(confusion), true) * (true > 0)).sum(axis=1) / (true > 0).sum(axis=1)


def recall(confusion: np.ndarray, average: str) -> np.ndarray:
    """Recall; `average` of `AVERAGES`, binary being that of class 1."""
    return _averaged(_ratio(_hits(confusion), confusion.sum(axis=2)), confusion, average)


def precision(confusion: np.ndarray, average: str) -> np.ndarray:
    """Precision, as `recall`."""
    return _averaged(_ratio(_hits(confusion), confusion.sum(axis=1)), confusion, average)


def f1(confusion: np.ndarray, average: str) -> np.ndarray:
    """F1, as `recall`."""
    of_class = _ratio(2 * _hits(confusion), confusion.sum(axis=1) + confusion.sum(axis=2))
    return _averaged(of_class, confusion, average)


def kappa(confusion: np.ndarray, quadratic: bool = False) -> np.ndarray:
    """Cohen's kappa; with squared distances between classes in their order if `quadratic`. NaN where nothing varies."""
    true, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    expected = true[:, :, None] * predicted[:, None, :] / confusion.sum(axis=(1, 2))[:, None, None]
    if quadratic:  # classes that do not occur leave no gap in the order
        place = np.cumsum(true + predicted > 0, axis=1).astype(np.float64)
        cost = (place[:, :, None] - place[:, None, :]) ** 2
    else:
        cost = 1 - np.eye(confusion.shape[1])[None]
    seen, chance = (confusion * cost).sum(axis=(1, 2)), (expected * cost).sum(axis=(1, 2))
    return 1 - np.divide(seen, chance, out=np.full(len(seen), np.nan), where=chance > 0)


def _hits(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=1, axis2=2)


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    return np.divide(numerators, denominators, out=np.zeros(numerators.shape), where=denominators > 0)


def _averaged(of_class: np.ndarray, confusion: np.ndarray, average: str) -> np.ndarray:
    if average == "binary":
        return of_class[:, 1]
    true, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    weights = true if average == "weighted" else (true + predicted > 0).astype(np.float64)
    return (of_class * weights).sum(axis=1) / weights.sum(axis=1)
