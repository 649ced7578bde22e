"""How good answers are: exact, by words in common, closed and open questions apart, pictures resampled as a whole."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mmkd_jax.evals import bootstrap
from mmkd_jax.evals.base import TaskData, TaskResult
from mmkd_jax.evals.bootstrap import Estimate
from mmkd_jax.evals.vqa_answers import bleu1, token_f1
from mmkd_jax.evals.vqa_questions import Questions

POLAR = ("yes", "no")


@dataclasses.dataclass(frozen=True, eq=False)
class Said:
    """What a model answered.

    Attributes:
      answers: normalised text `[q]`, "" for none.
      yes: float `[q]`, the higher the more it is yes; NaN where that was not asked.
      closed: bool `[q]`, which questions count as closed ones: their true type, but in profiles that guess it.
      asked: bool `[q]`, which it was asked at all.
    """

    answers: np.ndarray
    yes: np.ndarray
    closed: np.ndarray
    asked: np.ndarray


def weights(data: TaskData, questions: Questions) -> np.ndarray:
    """Resamples of the questions by group, int32 `[resamples, q]`: the same for every model."""
    seed = bootstrap.seed_of(data.seed, data.set.name, *questions.ids.tolist())
    return bootstrap.draw(len(questions), data.resamples, seed, units=questions.groups)


def measure(questions: Questions, said: Said, drawn: np.ndarray) -> dict[str, tuple[Estimate, int]]:
    """Estimates with the number of questions each is of; what has no questions is left out.

    `accuracy`, `closed_accuracy`, `open_accuracy`: share of answers that are the truth word for word. `yes_no_accuracy`
    and `yes_no_auc`: of questions whose truth is yes or no; `open_token_f1` and `open_bleu1`: see `vqa_answers`.
    """
    right = said.answers == questions.answers
    closed, asked = said.closed & said.asked, said.asked
    opened = ~said.closed & asked
    found = {
        "accuracy": share(right, asked, drawn),
        "closed_accuracy": share(right, closed, drawn),
        "open_accuracy": share(right, opened, drawn),
        "open_token_f1": share(each(token_f1, said.answers, questions.answers), opened, drawn),
        "open_bleu1": share(each(bleu1, said.answers, questions.answers), opened, drawn),
    }
    polar = asked & questions.closed & np.isin(questions.answers, POLAR) & np.isfinite(said.yes)
    found["yes_no_accuracy"] = share(right, polar, drawn)
    positive = questions.answers[polar] == "yes"
    if 0 < positive.sum() < len(positive):
        whole = np.ones((1, len(positive)), np.int32)
        value = bootstrap.binary_auc(positive, said.yes[polar], whole)[0]
        resampled = bootstrap.binary_auc(positive, said.yes[polar], drawn[:, polar])
        found["yes_no_auc"] = Estimate(float(value), resampled), int(polar.sum())
    return {name: (estimate, n) for name, (estimate, n) in found.items() if n}


def share(values: np.ndarray, among: np.ndarray, drawn: np.ndarray) -> tuple[Estimate, int]:
    """Mean of `values` `[q]` among some of the questions, with its resamples, and how many those are."""
    chosen = np.asarray(values, np.float64)[among]
    if not len(chosen):
        return Estimate(0.0, np.zeros(len(drawn))), 0
    total = drawn[:, among].sum(axis=1)
    sums = drawn[:, among] @ chosen
    resampled = np.divide(sums, total, out=np.full(len(drawn), np.nan), where=total > 0)
    return Estimate(float(chosen.mean()), resampled), len(chosen)


def each(measured, said: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A measure of two answers for every question, float64 `[q]`."""
    return np.array([measured(str(a), str(b)) for a, b in zip(said, truth)], np.float64)


def result(
    data: TaskData,
    questions: Questions,
    said: Sequence[Said],
    context: Mapping,
    blind: Sequence[Said] = (),
) -> TaskResult:
    """The result of a task: of several training seeds the means, whose intervals cover questions and seeds.

    Args:
      data: of the task.
      questions: that were tested.
      said: the answers, of each training seed.
      context: of the rows.
      blind: answers of the same method without the picture, of the same seeds; then there are `blind_accuracy` and the
        like, and `picture_gain`: accuracy less that without the picture, paired by question and seed.
    """
    drawn = weights(data, questions)
    seed = bootstrap.seed_of(data.seed, data.set.name, "seeds")
    each = [measure(questions, one, drawn) for one in said]
    estimates, more = _over_seeds(each, seed), {}
    if blind:
        without = [measure(questions, one, drawn) for one in blind]
        wanted = ("accuracy", "closed_accuracy", "open_accuracy")
        told = _over_seeds(without, seed)
        estimates |= {f"blind_{name}": told[name] for name in wanted if name in told}
        gains = [bootstrap.difference(a["accuracy"][0], b["accuracy"][0]) for a, b in zip(each, without)]
        estimates["picture_gain"] = bootstrap.mean_over_seeds(gains, seed), estimates["accuracy"][1]
        more["blind"] = blind[0].answers
    if len(said) > 1:
        more |= {f"{name}_of_seeds": np.stack([getattr(one, name) for one in said]) for name in ("answers", "yes")}
    predictions = {
        "ids": questions.ids, "groups": questions.groups, "rows": questions.rows, "questions": questions.texts,
        "truth": questions.answers, "answers": said[0].answers, "closed": said[0].closed, "asked": said[0].asked,
        "yes": said[0].yes, **more,
    }  # fmt: skip
    told = {"method": "percentile", "resamples": len(drawn), "unit": "group", "strata": "none"}
    told = {"bootstrap": told, "questions": len(questions), "pictures": len(np.unique(questions.rows))}
    return TaskResult(estimates, predictions, {**told, "seeds": len(said), "feature_layer": "embedding", **context})


def _over_seeds(each: Sequence[Mapping[str, tuple[Estimate, int]]], seed: int) -> dict[str, tuple[Estimate, int]]:
    return {
        name: (bootstrap.mean_over_seeds([one[name][0] for one in each], seed), n) for name, (_, n) in each[0].items()
    }
