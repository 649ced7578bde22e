"""Zero-shot classification as public harnesses do it, each with its habits, so that numbers can be set beside theirs.

A profile is a record of what a harness does after the encoders: logit scale, which AUC, which metrics, how intervals
are drawn. All of them normalise prompt features, average them by class and normalise again. Names are theirs. The task
`zeroshot` is what we recommend; these are for parity, and repeat errors where a harness has one: `mmkd` takes an AUC of
a softmax at scale 1, and an interval from resamples that hold rare classes too often (`bootstrap.draw_forced`).

Sources: MMKD-CLIP `src/clipeval/eval_zeroshot.py`, UniMed-CLIP `clipeval/eval_zeroshot.py`, LAION's
CLIP_benchmark `metrics/zeroshot_classification.py`, open_clip `src/open_clip_train/zero_shot.py`, CONCH
`conch/downstream/zeroshot_path.py`, MedMNIST `medmnist/evaluator.py`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, confusion, metrics, zeroshot
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult
from mmkd_jax.evals.bootstrap import Estimate


@dataclasses.dataclass(frozen=True)
class Answers:
    """Labels `[n]`, raw cosines and scores `[n, classes]` float64, and confusion counts: what metrics are made of."""

    labels: np.ndarray
    cosines: np.ndarray
    scores: np.ndarray
    confusion: np.ndarray
    weights: np.ndarray

    @property
    def average(self) -> str:
        """How precision, recall and F1 are averaged: of class 1 where there are two, else over classes."""
        return "binary" if self.scores.shape[1] == 2 else "macro"

    def every_class(self) -> None:
        """Refuses sets that lack a class, for which scikit-learn has no multi-class AUC either."""
        if len(np.unique(self.labels)) < self.scores.shape[1]:
            raise InputError("this profile's AUC needs test rows of every class; leave the empty classes out")


def top(answers: Answers, k: int) -> np.ndarray:
    """Share of rows whose class is among the k best; equal scores by index."""
    own = np.take_along_axis(answers.scores, answers.labels[:, None], axis=1)
    before = np.arange(answers.scores.shape[1]) < answers.labels[:, None]
    rank = np.sum((answers.scores > own) | ((answers.scores == own) & before), axis=1)
    return bootstrap.mean(rank < k, answers.weights)


def margin_or_rest_auc(answers: Answers) -> np.ndarray:
    """Of two classes the AUC of the difference of cosines, else the mean one-versus-rest AUC of the scores."""
    if answers.scores.shape[1] == 2:
        margin = answers.cosines[:, 1] - answers.cosines[:, 0]
        return bootstrap.binary_auc(answers.labels == 1, margin, answers.weights)
    answers.every_class()
    return bootstrap.macro_auc(answers.labels, answers.scores, answers.weights)


def one_versus_one_auc(answers: Answers) -> np.ndarray:
    """Of two classes the AUC of the second one's score, else the mean over pairs."""
    if answers.scores.shape[1] == 2:
        return bootstrap.binary_auc(answers.labels == 1, answers.scores[:, 1], answers.weights)
    answers.every_class()
    return bootstrap.one_versus_one_auc(answers.labels, answers.scores, answers.weights)


def column_auc(answers: Answers) -> np.ndarray:
    """Of two classes the AUC of the last column, else the plain mean of the columns' AUCs."""
    if answers.scores.shape[1] == 2:
        return bootstrap.binary_auc(answers.labels == 1, answers.scores[:, -1], answers.weights)
    answers.every_class()
    return bootstrap.macro_auc(answers.labels, answers.scores, answers.weights)


def threshold_accuracy(answers: Answers) -> np.ndarray:
    """Of two classes the accuracy of the last column above one half, else that of the highest column."""
    if answers.scores.shape[1] == 2:
        return bootstrap.mean((answers.scores[:, -1] > 0.5) == (answers.labels == 1), answers.weights)
    return confusion.accuracy(answers.confusion)


_ACCURACY = {"accuracy": lambda a: confusion.accuracy(a.confusion)}
_DETECTION = {
    "f1": lambda a: confusion.f1(a.confusion, a.average),
    "precision": lambda a: confusion.precision(a.confusion, a.average),
    "recall": lambda a: confusion.recall(a.confusion, a.average),
}
_TOP = {"acc1": lambda a: top(a, 1), "acc5": lambda a: top(a, 5)}


@dataclasses.dataclass(frozen=True)
class Profile:
    """A harness as a task of `mmkd eval`.

    Attributes:
      name: of the harness.
      metrics: its numbers by its names, each from `Answers` to values `[resamples]`.
      binary_only: those that it gives for two classes only.
      scale: factor on cosines before the softmax; None for the model's own.
      forced: whether intervals come from `bootstrap.draw_forced` with seed 42.
      percent: whether its numbers are times 100.
    """

    name: str
    metrics: dict[str, Callable[[Answers], np.ndarray]]
    binary_only: tuple[str, ...] = ()
    scale: float | None = None
    forced: bool = False
    percent: bool = False

    def applies(self, one: EvalSet) -> bool:
        """Whether the set has classes and prompts for them."""
        return zeroshot.applies(one)

    def evaluate(self, data: TaskData) -> TaskResult:
        """The harness's metrics with intervals."""
        cosines, scale = (
            zeroshot.cosines(data, data.set.prompts),
            data.logit_scale if self.scale is None else self.scale,
        )
        labels, groups = data.labels(data.set.rows), data.groups(data.set.rows)
        scores = zeroshot.probabilities(cosines, scale)
        metrics.check(labels, scores)
        plan = data.plan(labels, groups)
        if self.forced:
            plan = bootstrap.Plan(bootstrap.draw_forced(labels, data.resamples, 42), "row", "one row a class forced")
        estimates = self.measure(labels, cosines, scores, plan.weights)
        prompts = data.set.prompts
        context = {
            "profile": self.name if prompts.profile == "ensemble" else f"{self.name}:{prompts.profile}",
            "prompt_hash": prompts.hash,
            "prompts": list(prompts.sentences[0]),
            "feature_layer": "embedding",
            "logit_scale": scale,
            "unit": "percent" if self.percent else "share",
            "classes": len(data.set.class_names),
            "bootstrap": plan.to_dict(),
        }
        stored = {"labels": labels, "scores": scores, "predictions": scores.argmax(axis=1), "groups": groups}
        return TaskResult({name: (one, len(labels)) for name, one in estimates.items()}, stored, context)

    def measure(self, labels, cosines, scores, weights: np.ndarray) -> dict[str, Estimate]:
        """The harness's numbers from cosines and scores `[n, classes]`, under resamples `weights` `[resamples, n]`."""
        labels, classes = np.asarray(labels), np.shape(scores)[1]
        both = np.concatenate([np.ones((1, len(labels)), np.int64), weights])  # the first is the value itself
        counted = confusion.counts(labels, np.argmax(scores, axis=1), classes, both)
        answers = Answers(labels, np.asarray(cosines, np.float64), np.asarray(scores, np.float64), counted, both)
        found = {}
        for name, metric in self.metrics.items():
            if (name == "acc5" and classes < 5) or (name in self.binary_only and classes != 2):
                continue
            values = metric(answers) * (100 if self.percent else 1)
            if not np.isfinite(values[0]):
                raise InputError(f"{self.name}'s {name} does not exist where labels or predictions are of one class")
            found[name] = Estimate(float(values[0]), values[1:])
        return found


MMKD = Profile(
    "mmkd", {**_ACCURACY, "auc": margin_or_rest_auc, **_DETECTION}, scale=1.0, forced=True, percent=True
)  # fmt: skip
UNIMED = Profile(
    "unimed", {**_ACCURACY, "auc": margin_or_rest_auc, **_DETECTION}, ("auc", *_DETECTION), scale=1.0
)  # fmt: skip
CLIP_BENCHMARK = Profile(
    "clip_benchmark",
    {**_TOP, "mean_per_class_recall": lambda a: confusion.balanced_accuracy(a.confusion)},
    scale=100.0,
)
OPEN_CLIP = Profile("open_clip", _TOP, scale=100.0)
CONCH = Profile(
    "conch",
    {
        **_ACCURACY,
        "bacc": lambda a: confusion.balanced_accuracy(a.confusion),
        "kappa": lambda a: confusion.kappa(a.confusion),
        "quad_kappa": lambda a: confusion.kappa(a.confusion, quadratic=True),
        "roc_auc": one_versus_one_auc,
        "weighted_f1": lambda a: confusion.f1(a.confusion, "weighted"),
    },
)
MEDMNIST = Profile("medmnist", {"AUC": column_auc, "ACC": threshold_accuracy})
