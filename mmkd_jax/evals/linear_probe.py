"""Linear probe: multinomial logistic regression on frozen image features.

Features are standardised by the training rows. The inverse strength C of the L2 penalty is chosen by the log-loss,
averaged by class, on a held-out part of the training rows (whole groups, stratified by class): it tells strengths apart
where the accuracy of a few dozen rows does not. The model is then refitted on all training rows; the test rows are
used once. The objective is scikit-learn's, see `logistic`.
"""

import dataclasses
import warnings
from collections.abc import Iterator

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits

from mmkd_jax.errors import InputError
from mmkd_jax.evals import logistic
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult
from mmkd_jax.evals.zeroshot import classified

SMALL = 500_000  # numbers in the training rows; up to there scikit-learn fits
STRENGTHS = tuple(float(c) for c in np.logspace(-6, 2, 9))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe: `scores` of the asked rows, float64 `[n, classes]`, the chosen C, the held-out loss by C."""

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
    search = choose(train, labels, *hold_out(labels, groups, seed), classes)
    best = min(search, key=search.get)  # the first, most regularised, among equals
    return Probe(scores(train, labels, test, classes, best), best, search)


def choose(train, labels, fitted, held, classes: int) -> dict[float, float]:
    """Held-out losses by C, from the strongest penalty on until the loss has risen twice in a row."""
    search: dict[float, float] = {}
    known, held_out = standardise(train[fitted], train[held])
    for strength, probabilities in _path(known, labels[fitted], STRENGTHS, held_out, classes):
        search[strength] = loss(labels[held], probabilities)
        losses = list(search.values())
        if len(losses) > 2 and losses[-3] < losses[-2] < losses[-1]:
            break
    return search


def loss(labels, scores) -> float:
    """Log-loss of probabilities `[n, classes]`, the mean over the classes among the labels of their mean."""
    own = -np.log(np.maximum(scores[np.arange(len(labels)), labels], 1e-12))
    return float(np.mean([own[labels == c].mean() for c in np.unique(labels)]))


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


def standardise(train, test) -> tuple[np.ndarray, np.ndarray]:
    """Both less the mean of `train` `[n, width]` and over its deviation, float64; what is constant there becomes 0."""
    train, test = np.asarray(train, np.float64), np.asarray(test, np.float64)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation[deviation == 0] = 1.0
    return (train - mean) / deviation, (test - mean) / deviation


def scores(train, labels, test, classes: int, strength: float) -> np.ndarray:
    """Probabilities `[m, classes]` of the rows `test` by a fit on `train`; a class without training rows gets 0."""
    train, test = standardise(train, test)
    ((_, probabilities),) = _path(train, labels, [strength], test, classes)
    return probabilities


def _path(train, labels, strengths, test, classes: int) -> Iterator[tuple[float, np.ndarray]]:
    """Each C with the probabilities `[m, classes]` of a fit, by the same objective whatever fits it.

    Compiling takes longer than scikit-learn does on little data, and is done again for every shape.
    """
    if train.size > SMALL:
        for model in logistic.path(train, labels, strengths):
            yield model.strength, model.probabilities(test, classes)
        return
    model = LogisticRegression(max_iter=5000, tol=1e-7, warm_start=True)
    for strength in strengths:
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # separable rows at large C: as good as it gets
            model.set_params(C=strength).fit(train, labels)
        found = np.zeros((len(test), classes))
        found[:, model.classes_] = model.predict_proba(test)
        yield strength, found


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
