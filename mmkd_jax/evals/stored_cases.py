"""Stored answers to questions and stored risks of patients: any number of them resampled, to compare models by.

Questions are resampled by picture or patient, patients within tested folds, as the result rows are.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np

from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import bootstrap, survival, vqa_scores
from mmkd_jax.evals.bootstrap import Estimate
from mmkd_jax.evals.survival_curves import Outcomes
from mmkd_jax.evals.vqa_answers import bleu1, token_f1

# What is read of a file; with training seeds, `answers` and `yes` are of the first, and others end in `_of_seeds`.
QUESTIONS = ("ids", "groups", "truth", "closed", "asked", "answers", "yes")
RISKS = ("ids", "fold", "time", "event", "risk")
OF_QUESTIONS = ("accuracy", "closed_accuracy", "open_accuracy", "open_token_f1", "open_bleu1", "yes_no_accuracy",
                "yes_no_auc")  # fmt: skip
OF_RISKS = ("c_index", "c_index_ipcw", "auc", "auc@T")
_AT = re.compile(r"auc@(\d+(?:\.\d+)?)")
Values = tuple[float, Callable[[np.ndarray, int], np.ndarray]]  # the value; of weights and a seed, its replicates


def questions(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is compared: `QUESTIONS`, `answers` and `yes` as `[q, seeds]`."""
    found = {name: stored[name] for name in QUESTIONS}
    for name in ("answers", "yes"):
        found[name] = stored[f"{name}_of_seeds"].T if f"{name}_of_seeds" in stored else stored[name][:, None]
    return found


def risks(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is compared: `RISKS` of the patients that are in a fold."""
    inside = stored["fold"] != ""
    return {name: stored[name][inside] for name in RISKS}


def counted(arrays: Mapping[str, np.ndarray], metric: str) -> np.ndarray:
    """Which questions a number is of, bool `[q]`.

    Raises:
      InputError: there is no such number, or it is none to compare models by, or no question counts.
    """
    if metric == "picture_gain" or metric.startswith("blind_"):
        raise InputError(f"{metric} sets a model beside itself without the picture; compare models by accuracy")
    if metric not in OF_QUESTIONS:
        raise InputError(f"answers to questions have no metric {metric!r}; {near(metric, OF_QUESTIONS)}")
    found, closed = arrays["asked"], arrays["closed"]
    if metric.startswith("yes_no"):
        polar = np.isin(arrays["truth"], vqa_scores.POLAR) & np.isfinite(arrays["yes"]).all(axis=1)
        found = found & closed & polar
    elif metric != "accuracy":
        found = found & (closed if metric.startswith("closed") else ~closed)
    if not found.any():
        raise InputError(f"no question counts for {metric}; compare by accuracy")
    return found


def of_questions(arrays: Mapping[str, np.ndarray], metric: str) -> Values:
    """A number of `OF_QUESTIONS`: the mean over training seeds, resampled with the questions."""
    among = counted(arrays, metric)
    truth, answers, yes = (arrays[name][among] for name in ("truth", "answers", "yes"))
    positive = truth == "yes"
    if metric == "yes_no_auc" and not 0 < positive.sum() < len(positive):
        raise InputError("yes_no_auc needs questions whose answer is yes and others whose answer is no")
    words = {"open_token_f1": token_f1, "open_bleu1": bleu1}.get(metric, lambda said, true: said == true)

    def of_seed(k: int, weights: np.ndarray) -> np.ndarray:
        if metric == "yes_no_auc":
            return bootstrap.binary_auc(positive, yes[:, k], weights)
        total = weights.sum(axis=1)
        return np.divide(weights @ values[k], total, out=np.full(len(weights), np.nan), where=total > 0)

    seeds = range(answers.shape[1])
    values = [] if metric == "yes_no_auc" else [vqa_scores.each(words, answers[:, k], truth) for k in seeds]
    points = [float(of_seed(k, np.ones((1, len(truth)), np.int32))[0]) for k in seeds]

    def replicates(weights: np.ndarray, seed: int) -> np.ndarray:
        estimates = [Estimate(point, of_seed(k, weights[:, among])) for k, point in enumerate(points)]
        return bootstrap.mean_over_seeds(estimates, seed).replicates

    return float(np.mean(points)), replicates


def of_risks(arrays: Mapping[str, np.ndarray], metric: str) -> Values:
    """A number of `OF_RISKS`: the mean over tested folds.

    Raises:
      InputError: there is no such number, or no fold has it.
    """
    if metric == "brier":
        raise InputError(f"brier needs predicted curves, and risks are what is stored; compare by {OF_RISKS[0]}")
    time = _AT.fullmatch(metric)
    if metric not in OF_RISKS[:-1] and not time:
        raise InputError(f"risks have no metric {metric!r}; {near(metric, OF_RISKS)}")
    outcomes, measured = Outcomes(arrays["event"], arrays["time"]), []
    for inside in folds(arrays):
        asked = [float(time[1])] if time else []
        found = survival.by_risk(arrays["risk"][inside], outcomes[~inside], outcomes[inside], asked)
        if metric in found:
            measured.append((inside, found[metric]))
    if not measured:
        raise InputError(f"no fold has {metric}: its time lies outside those that were watched")

    def replicates(weights: np.ndarray, seed: int) -> np.ndarray:
        return survival.mean_of_known(np.stack([measure(weights[:, inside]) for inside, measure in measured]))

    return float(np.mean([measure(None) for _, measure in measured])), replicates


def folds(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Which patients are in each tested fold, bool `[n]`, in the order in which the study tested them."""
    names = np.unique(arrays["fold"]).tolist()
    names.sort(key=lambda name: (int(name), "") if name.isdecimal() else (len(names), name))
    return [arrays["fold"] == name for name in names]


def drawn_within_folds(arrays: Mapping[str, np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """How often each patient counts in each resample, `[resamples, n]`: those of `survival.scored`."""
    weights = np.zeros((resamples, len(arrays["ids"])), np.int32)
    rng = np.random.default_rng(seed)
    for inside in folds(arrays):
        count = int(inside.sum())
        weights[:, inside] = rng.multinomial(count, np.full(count, 1 / count), resamples)
    return weights
