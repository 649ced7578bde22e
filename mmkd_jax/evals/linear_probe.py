"""Linear probe: multinomial logistic regression on frozen image features.

Features are standardised by the training rows; the inverse strength C of the L2 penalty is chosen by balanced accuracy
on a held-out part of the training rows (whole groups, stratified by class) and the model is refitted on all of them.
The test rows are used once. The objective is scikit-learn's: 0.5 |W|^2 + C * sum of losses, intercept free.
"""

import dataclasses
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from mmkd_jax.errors import InputError
from mmkd_jax.evals import metrics
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult
from mmkd_jax.evals.zeroshot import classified

STRENGTHS = tuple(float(c) for c in np.logspace(-6, 2, 9))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe: `scores` of the asked rows, float64 `[n, classes]`, the chosen C and the score of every C."""

    scores: np.ndarray
    strength: float
    search: dict[float, float]


def fit(train, labels, groups, test, classes: int, seed: int = 0) -> Probe:
    """Fits on `train` `[n, width]` with `labels` int `[n]` and `groups` `[n]`, and scores `test` `[m, width]`.

    Raises:
      InputError: the training rows hold fewer than two classes, or too little to hold a part out.
    """
    train, test, labels = np.asarray(train, np.float64), np.asarray(test, np.float64), np.asarray(labels)
    if len(np.unique(labels)) < 2:
        raise InputError("a linear probe needs training rows of at least two classes")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"training labels run from {labels.min()} to {labels.max()}, there are {classes} classes")
    fitted, held = hold_out(labels, groups, seed)
    search = {}
    for strength in STRENGTHS:
        scores = _scores(train[fitted], labels[fitted], train[held], classes, strength)
        search[strength] = metrics.balanced_accuracy(labels[held], scores.argmax(axis=1))
    best = max(search, key=search.get)  # the first, most regularised, among equals
    return Probe(_scores(train, labels, test, classes, best), best, search)


def hold_out(labels, groups, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and about a fifth to choose with: groups undivided, classes in proportion."""
    labels, groups = np.asarray(labels), np.asarray(groups)
    folds = min(5, len(np.unique(groups)), np.bincount(labels).max())
    if folds < 2:
        raise InputError("a linear probe needs at least two groups of training rows; it must hold some out")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        splits = list(splitter.split(labels, labels, groups))
    usable = [split for split in splits if len(np.unique(labels[split[0]])) > 1]
    if not usable:
        raise InputError("a linear probe needs each class in several groups of training rows; it must hold some out")
    return usable[0]


def _scores(train, labels, test, classes: int, strength: float) -> np.ndarray:
    """Probabilities `[m, classes]`; a class without training rows gets 0."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation[deviation == 0] = 1.0
    # Newton steps reach the optimum of these small convex problems several times sooner than L-BFGS.
    model = LogisticRegression(C=strength, solver="newton-cg", max_iter=2000, tol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # separable rows at large C: as good as it gets
        model.fit((train - mean) / deviation, labels)
    scores = np.zeros((len(test), classes))
    scores[:, model.classes_] = model.predict_proba((test - mean) / deviation)
    return scores


def applies(one: EvalSet) -> bool:
    """Whether the set has classes and training rows."""
    return bool(one.class_names) and one.train_rows is not None and len(one.train_rows) > 0


def evaluate(data: TaskData) -> TaskResult:
    """The same metrics as zero-shot, on the same test rows and resamples."""
    rows, test, layer = data.set.train_rows, data.set.rows, data.probe_layer
    data.features.add_rows([rows, test], layer)
    classes, images = len(data.set.class_names), data.features.images
    probe = fit(images(rows, layer), data.labels(rows), data.groups(rows), images(test, layer), classes, data.seed)
    context = {
        "profile": "logistic_regression",
        "train_hash": data.set.train_hash,
        "train_rows": len(rows),
        "feature_layer": layer,
        "strength": probe.strength,
    }
    return classified(data, probe.scores.astype(np.float32), context)
