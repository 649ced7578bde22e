"""Slide-level classification from bags of features: a probe on the mean, and gated attention trained by the loop.

Numbers are those of any classification, resampled by patient. Where the tiles that a diagnosis rests on are known, the
attention is judged as their detector: the AUC over a slide's tiles, of positive slides, as a mean over slides.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath
from scipy.special import log_softmax, softmax

from mmkd_jax.data.bags import Bags
from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, linear_probe, metrics
from mmkd_jax.evals.bootstrap import Estimate
from mmkd_jax.tasks import mil
from mmkd_jax.train import heads


@dataclasses.dataclass(frozen=True, eq=False)
class Slides:
    """n slides.

    Attributes:
      names: str `[n]`.
      patients: str `[n]`.
      labels: int64 `[n]`, of `classes`.
      splits: str `[n]`: `train`, `val`, `test`.
      classes: names.
    """

    names: np.ndarray
    patients: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self):
        for name in ("train", "test"):
            if not (self.splits == name).any():
                raise InputError(f"no slide has the split {name!r}; a table of slides needs train and test")
        pairs = np.unique(np.stack([self.patients, self.splits]), axis=1)
        twice = pairs[0, 1:][pairs[0, 1:] == pairs[0, :-1]]
        if len(twice):
            raise InputError(f"patient {str(twice[0])!r} is in two splits; all slides of a patient belong in one")
        if len(np.unique(self.labels[self.splits == "train"])) < 2:
            raise InputError("the training slides have one class; there is nothing to tell apart")

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, int64."""
        return np.flatnonzero(self.splits == split)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How attention is trained: see `survival_heads.Settings`."""

    steps: int = 300
    batch: int = 16
    lr: float = 2e-3
    checkpoints: int = 3
    hidden: int = 64
    attention: int = 32
    dropout: float = 0.25
    decay: float = 1e-2


def probe(slides: Slides, bags: Bags, seed: int) -> np.ndarray:
    """Probabilities of the tested slides, float64 `[tests, classes]`, by logistic regression on mean features."""
    fitted = np.flatnonzero(slides.splits != "test")
    means = np.stack([bags.mean(row) for row in range(len(bags))])
    groups = np.unique(slides.patients, return_inverse=True)[1]
    test = slides.rows("test")
    return linear_probe.fit(
        means[fitted], slides.labels[fitted], groups[fitted], means[test], len(slides.classes), seed
    ).scores


def attention(
    slides: Slides, bags: Bags, settings: Settings, workdir: epath.Path, seed: int
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """Gated attention: probabilities of the tested slides, the attention on their tiles, and the steps chosen.

    Of the checkpoints the one with the lowest loss on the split `val` is taken; without one, on a part of the training
    slides that is held out by patient.
    """
    fitted, held = slides.rows("train"), slides.rows("val")
    if not len(held):
        groups = np.unique(slides.patients[fitted], return_inverse=True)[1]
        first, second = linear_probe.hold_out(slides.labels[fitted], groups, seed)
        fitted, held = fitted[first], fitted[second]
    counts = np.bincount(slides.labels[fitted], minlength=len(slides.classes))
    weight = len(fitted) / (len(slides.classes) * np.maximum(counts, 1))  # each class counts alike
    targets = {"label": slides.labels.astype(np.int32), "weight": weight[slides.labels].astype(np.float32)}
    s = settings
    spec = mil.MilSpec("classes", bags.width, len(slides.classes), s.hidden, s.attention, s.dropout)
    every = -(-s.steps // s.checkpoints)
    config = heads.config(
        "attention", batch=s.batch, steps=s.steps, lr=s.lr, seed=seed, decay=s.decay, save_every=every,
        keep=s.checkpoints + 1,
    )  # fmt: skip
    trained = mil.train(bags, fitted, targets, spec, config, workdir)
    losses = []
    for params in trained:
        logits = log_softmax(np.asarray(mil.predict(params, bags, held)[0], np.float64), axis=1)
        losses.append(linear_probe.loss(slides.labels[held], np.exp(logits)))
    best = int(np.argmin(losses))
    logits, weights = mil.predict(trained[best], bags, slides.rows("test"))
    return softmax(np.asarray(logits, np.float64), axis=1), weights, min((best + 1) * every, s.steps)


def estimates(name: str, slides: Slides, scores: np.ndarray, resamples: int, seed: int) -> dict[str, Estimate]:
    """The metrics of a classification of the tested slides of the set `name`, resampled by patient."""
    test = slides.rows("test")
    labels, groups = slides.labels[test], np.unique(slides.patients[test], return_inverse=True)[1]
    metrics.check(labels, scores)
    plan = bootstrap.plan(labels, groups, resamples, bootstrap.seed_of(seed, name, *slides.names[test].tolist()))
    return bootstrap.classification(labels, scores, plan.weights)


def finds(weights: Sequence[np.ndarray], truth: Sequence[np.ndarray], resamples: int, seed: int) -> Estimate:
    """AUC of the attention for the tiles that are known to matter, the mean over slides; slides are resampled.

    Args:
      weights: of each slide, float `[tiles]`.
      truth: bool `[tiles]` of each; slides without both kinds of tiles take no part.
      resamples: of the interval.
      seed: of the resamples.

    Raises:
      InputError: no slide has both kinds of tiles.
    """
    values = []
    for one, known in zip(weights, truth):
        if 0 < known.sum() < len(known):
            won, pairs = metrics.auc_counts(known, one, np.ones((1, len(one)), np.int64))
            values.append(won[0] / pairs[0])
    if not values:
        raise InputError("no tested slide has tiles that are known to matter and others; see config.truth")
    drawn = bootstrap.draw(len(values), resamples, seed)
    return Estimate(float(np.mean(values)), bootstrap.mean(values, drawn))
