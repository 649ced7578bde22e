"""Stored per-sample outputs of models on one set, checked to be of the same cases, and any metric of them resampled.

Classification tasks (diagnosis is one) store labels and scores, retrieval stores ranks, visual questions store answers,
survival stores risks. The first 1000 resamples are those of the result
rows of the same seed, so that intervals agree with `results.json`.
"""

import dataclasses
import re
import urllib.parse
from collections.abc import Mapping, Sequence

import numpy as np

from mmkd_jax import io
from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import bootstrap, metrics, results, stored_cases
from mmkd_jax.evals.bootstrap import Estimate

CHUNK = 1000  # resamples at a time: their weights take 4 bytes a row each
_RETRIEVAL = re.compile(r"(i2t|t2i)_(R@(\d+)|mAP)(_strict)?")
# What must be equal for outputs to be comparable.
_SAME = ("ids", "labels", "groups", "texts", "caption_of", "owner", "truth", "fold", "time", "event")


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What one model gave on one set: `arrays` as stored."""

    model: str
    arrays: Mapping[str, np.ndarray]

    @property
    def classified(self) -> bool:
        """Whether these are scores of classes."""
        return {"labels", "scores"} <= set(self.arrays)

    @property
    def asked(self) -> bool:
        """Whether these are answers to questions."""
        return {"truth", "answers"} <= set(self.arrays)

    @property
    def followed(self) -> bool:
        """Whether these are risks of patients; what is none of the three are ranks of a retrieval."""
        return {"risk", "time", "event"} <= set(self.arrays)

    @property
    def independent(self) -> bool:
        """Whether no two rows share a group."""
        return len(np.unique(self.arrays["groups"])) == len(self.arrays["groups"])


def datasets(folder, model: str, task: str) -> list[str]:
    """Names of the sets on which a folder holds outputs of the model, sorted."""
    place = io.as_path(folder) / "predictions" / results.file_name(model)
    tail = f".{results.file_name(task)}.npz"
    found = [path.name.removesuffix(tail) for path in place.iterdir()] if place.exists() else []
    return sorted(urllib.parse.unquote(name) for name in found if not name.endswith(".npz"))


def models(folder) -> list[str]:
    """Names of the models with outputs in a folder, sorted."""
    place = io.as_path(folder) / "predictions"
    return (
        sorted(urllib.parse.unquote(path.name) for path in place.iterdir() if path.is_dir()) if place.exists() else []
    )


def read(folder, model: str, dataset: str, task: str, label: str) -> Outputs:
    """The stored outputs.

    Raises:
      InputError: there are none, the file is damaged, or it holds nothing that models are compared by.
    """
    stored = results.load_predictions(folder, model, dataset, task)
    found = Outputs(label, stored)
    if not ({"ids"} if found.followed else {"ids", "groups"}) <= set(stored):
        raise InputError(f"the outputs of {label} on {dataset} ({task}) have no ids and groups; evaluate again")
    if found.asked:
        return Outputs(label, stored_cases.questions(stored))
    if found.followed:
        return Outputs(label, stored_cases.risks(stored))
    if not found.classified and "i2t_rank" not in stored:
        raise InputError(f"task {task!r} stores neither scores of classes nor ranks, answers or risks; compare another")
    if found.classified:
        found = Outputs(label, {name: stored[name] for name in ("ids", "labels", "groups", "scores")})
        metrics.check(found.arrays["labels"], found.arrays["scores"])
    return found


def joined(dataset: str, outputs: Sequence[Outputs]) -> list[Outputs]:
    """The outputs with the rows of classifications in the first one's order, proven to be of the same cases and truth.

    Raises:
      InputError: they were not; it says in what they differ.
    """
    first = outputs[0]
    outputs = [first, *(_ordered(other, first) for other in outputs[1:])]
    for other in outputs[1:]:
        for name in _SAME:
            a, b = first.arrays.get(name), other.arrays.get(name)
            if (a is None) != (b is None) or (a is not None and not np.array_equal(a, b)):
                counts = f"{len(first.arrays['ids'])} and {len(other.arrays['ids'])} rows"
                raise InputError(
                    f"{dataset}: {first.model} and {other.model} differ in {name} ({counts}); they were not tested on "
                    "the same cases, evaluate both on the same set"
                )
        if first.classified and first.arrays["scores"].shape != other.arrays["scores"].shape:
            raise InputError(f"{dataset}: {first.model} and {other.model} were asked for different numbers of classes")
    return outputs


def _ordered(other: Outputs, first: Outputs) -> Outputs:
    """`other` with its rows where the same ids are in `first`, if it has the same ids."""
    ids, wanted = other.arrays["ids"], first.arrays["ids"]
    order, places = np.argsort(ids, kind="stable"), np.argsort(wanted, kind="stable")
    if not (other.classified or other.asked or other.followed) or not np.array_equal(ids[order], wanted[places]):
        return other
    moved = np.empty(len(ids), np.int64)
    moved[places] = order
    return Outputs(other.model, {name: array[moved] for name, array in other.arrays.items()})


def resample(dataset: str, outputs: Sequence[Outputs], metric: str, resamples: int, seed: int) -> list[Estimate]:
    """A metric of every model on the same resamples of the same cases.

    Args:
      dataset: name of the set.
      outputs: of `joined`.
      metric: of `metrics.CLASSIFICATION`; `i2t_R@1`, `t2i_R@10_strict` and so on for retrieval; of
        `stored_cases.OF_QUESTIONS` or `stored_cases.OF_RISKS`.
      resamples: how many, at least 1.
      seed: as of `mmkd eval`.
    """
    first = outputs[0]
    _same_questions(dataset, outputs, metric)
    values = [_values(one, metric) for one in outputs]
    parts: list[list[np.ndarray]] = [[] for _ in outputs]
    for number, start in enumerate(range(0, resamples, CHUNK)):
        weights = _weights(dataset, first, metric, min(CHUNK, resamples - start), seed, number)
        for one, part in zip(values, parts):
            part.append(one[1](weights, bootstrap.seed_of(seed, dataset, "seeds") + number))
    return [Estimate(value, np.concatenate(part)) for (value, _), part in zip(values, parts)]


def _same_questions(dataset: str, outputs: Sequence[Outputs], metric: str) -> None:
    if not outputs[0].asked:
        return
    first, *rest = (stored_cases.counted(one.arrays, metric) for one in outputs)
    for other, one in zip(outputs[1:], rest):
        if not np.array_equal(first, one):
            raise InputError(
                f"{dataset}: {metric} of {outputs[0].model} and {other.model} is of different questions, since a model "
                "guessed their types or left some without an answer; compare by accuracy"
            )


def count(outputs: Outputs, metric: str) -> int:
    """How many cases the metric is of."""
    return int(stored_cases.counted(outputs.arrays, metric).sum()) if outputs.asked else len(outputs.arrays["ids"])


def _values(outputs: Outputs, metric: str):
    """The metric's value, and a function from weights and a seed (of training seeds' draws) to its replicates."""
    if outputs.asked:
        return stored_cases.of_questions(outputs.arrays, metric)
    if outputs.followed:
        return stored_cases.of_risks(outputs.arrays, metric)
    if not outputs.classified:
        hits = _hits(outputs, metric)
        return float(hits.mean()), lambda weights, _: bootstrap.mean(hits, weights)
    if metric not in metrics.CLASSIFICATION:
        raise InputError(f"a classification has no metric {metric!r}; {near(metric, metrics.CLASSIFICATION)}")
    labels, scores = outputs.arrays["labels"], outputs.arrays["scores"]
    predicted = scores.argmax(axis=1)
    if metric == "accuracy":
        return metrics.accuracy(labels, predicted), lambda weights, _: bootstrap.mean(labels == predicted, weights)
    if metric == "macro_auc":
        return metrics.macro_auc(labels, scores), lambda weights, _: bootstrap.macro_auc(labels, scores, weights)
    resampled = getattr(bootstrap, metric)
    return getattr(metrics, metric)(labels, predicted), lambda weights, _: resampled(labels, predicted, weights)


def _hits(outputs: Outputs, metric: str) -> np.ndarray:
    found = _RETRIEVAL.fullmatch(metric)
    if not found:
        raise InputError(f"a retrieval is compared by i2t_R@1, t2i_mAP_strict or the like, not by {metric!r}")
    if not found[3]:
        return outputs.arrays[_reading(metric) + "_precision"]
    return outputs.arrays[_reading(metric) + "_rank"] <= int(found[3])


def _reading(metric: str) -> str:
    return metric.partition("_")[0] + ("_strict" if metric.endswith("_strict") else "")


def _weights(dataset: str, outputs: Outputs, metric: str, resamples: int, seed: int, number: int) -> np.ndarray:
    arrays = outputs.arrays
    if outputs.followed:
        return stored_cases.drawn_within_folds(arrays, resamples, bootstrap.seed_of(seed, dataset) + number)
    if outputs.asked:
        drawn = bootstrap.seed_of(seed, dataset, *arrays["ids"].tolist()) + number
        return bootstrap.draw(len(arrays["ids"]), resamples, drawn, units=arrays["groups"])
    if outputs.classified:
        drawn = bootstrap.seed_of(seed, dataset, *arrays["ids"].tolist()) + number
        return bootstrap.plan(arrays["labels"], arrays["groups"], resamples, drawn).weights
    reading, groups = _reading(metric), arrays["groups"]
    if reading.startswith("t2i"):  # the queries are captions: the different ones, or every one
        groups = groups[arrays["owner"]]
    if reading == "t2i":
        groups = groups[np.unique(arrays["caption_of"], return_index=True)[1]]
    drawn = bootstrap.seed_of(seed, dataset, reading) + number
    return bootstrap.draw(len(groups), resamples, drawn, units=groups)
