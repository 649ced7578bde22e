"""k-nearest-neighbour classification by cosine: needs no tuning, and shows what a linear map cannot mend.

The score of a class is its share of the k nearest training rows. Equally near rows count by index, and the first class
wins a drawn vote, so that equal features never depend on chance.
"""

import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.evals.base import TaskData, TaskResult
from mmkd_jax.evals.features import unit
from mmkd_jax.evals.linear_probe import applies
from mmkd_jax.evals.zeroshot import classified

__all__ = ["K", "applies", "evaluate", "votes"]

K = 20
_CHUNK = 1024


def votes(train, labels, test, classes: int, k: int = K) -> np.ndarray:
    """Shares of classes among neighbours, float64 `[m, classes]`.

    Args:
      train: features `[n, width]`; with fewer than `k` rows all are neighbours.
      labels: int `[n]`, below `classes`.
      test: features `[m, width]`.
      classes: how many.
      k: number of neighbours.
    """
    labels = np.asarray(labels)
    if k < 1 or not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"neighbours need k >= 1 and training labels from 0 to {classes - 1}")
    train, test, k = unit(train).astype(np.float64), unit(test).astype(np.float64), min(k, len(labels))
    found = np.zeros((len(test), classes))
    for start in range(0, len(test), _CHUNK):
        similar = (test[start : start + _CHUNK] @ train.T).astype(np.float32)  # equal rows tie, wherever they stand
        nearest = np.argsort(-similar, axis=1, kind="stable")[:, :k]
        rows = np.arange(len(nearest))[:, None]
        np.add.at(found[start : start + _CHUNK], (rows, labels[nearest]), 1 / k)
    return found


def evaluate(data: TaskData) -> TaskResult:
    """The metrics of zero-shot, on the same test rows and resamples, by the nearest training rows."""
    rows, test, layer = data.set.train_rows, data.set.rows, data.probe_layer
    data.features.add_rows([rows, test], layer)
    classes, images = len(data.set.class_names), data.features.images
    scores = votes(images(rows, layer), data.labels(rows), images(test, layer), classes)
    context = {
        "profile": "nearest_neighbours",
        "k": K,
        "train_hash": data.set.train_hash,
        "train_rows": len(rows),
        "feature_layer": layer,
    }
    return classified(data, scores, context)
