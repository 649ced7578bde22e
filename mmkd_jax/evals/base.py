"""Evaluation: encoders and a set in, result rows and per-sample predictions out.

Every row's image feature and every distinct text's feature is computed once per encoder, in micro-batches of one
fixed size, and shared by all tasks; with a cache it is computed once for good.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from mmkd_jax import config, registry
from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, results
from mmkd_jax.evals.cache import FeatureCache
from mmkd_jax.evals.features import Features
from mmkd_jax.evals.held import EvalSet, sets_of, unprompted  # noqa: F401, callers take them from here
from mmkd_jax.evals.stored import FeatureFolder
from mmkd_jax.specs import ModelSpec

# A task is a module or object with `applies(EvalSet) -> bool` and `evaluate(TaskData) -> TaskResult`.
TASKS = {
    "zeroshot": "mmkd_jax.evals.zeroshot",
    "retrieval": "mmkd_jax.evals.retrieval",
    "linear_probe": "mmkd_jax.evals.linear_probe",
    "multilabel": "mmkd_jax.evals.multilabel",
    "vqa": "mmkd_jax.evals.vqa.VQA",
    "vqa_zeroshot": "mmkd_jax.evals.vqa_zeroshot",
}
# These by name only.
MORE_TASKS = {
    "calibration": "mmkd_jax.evals.calibration",
    "knn": "mmkd_jax.evals.neighbours",
    "label_efficiency": "mmkd_jax.evals.label_efficiency",
    "retrieval_all": "mmkd_jax.evals.retrieval.EVERY_CAPTION",
    "vqa_fusion": "mmkd_jax.evals.vqa_fusion.FROZEN",
    "vqa_fusion_unfrozen": "mmkd_jax.evals.vqa_fusion.UNFROZEN",
    "vqa_pubmedclip": "mmkd_jax.evals.vqa.PUBMEDCLIP",
    "zeroshot_mmkd": "mmkd_jax.evals.profiles.MMKD",
    "zeroshot_unimed": "mmkd_jax.evals.profiles.UNIMED",
    "zeroshot_clip_benchmark": "mmkd_jax.evals.profiles.CLIP_BENCHMARK",
    "zeroshot_open_clip": "mmkd_jax.evals.profiles.OPEN_CLIP",
    "zeroshot_conch": "mmkd_jax.evals.profiles.CONCH",
    "zeroshot_medmnist": "mmkd_jax.evals.profiles.MEDMNIST",
}


class Encoder(Protocol):
    """What can be evaluated: a student, a teacher, any object with these members.

    Attributes:
      name: unique among the evaluated models; teachers are called `teacher:NAME`.
      checkpoint: where its weights come from.
      spec: its `ModelSpec`.
      logit_scale: factor on cosines, exponentiated (about 100 for a trained CLIP).
      identity: hash of weights, preprocessing and tokenizer; without it (or "") nothing is cached.
    """

    name: str
    checkpoint: str
    spec: ModelSpec
    logit_scale: float
    identity: str

    def encode_image(self, images: Sequence, projected: bool = True) -> np.ndarray:
        """Float32 `[n, embed]` of PIL images, of any length; the width before the projection if not `projected`."""

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 `[m, embed]`, of any length."""


@dataclasses.dataclass(frozen=True)
class TaskData:
    """One set with the features of one encoder: the input of a task's `evaluate`.

    `probe_layer` is the image features' layer for tasks that train on them, `logit_scale` the encoder's. `folder` is
    where a task keeps what it trains, None where nothing is kept.
    """

    set: EvalSet
    features: Features
    logit_scale: float
    seed: int
    resamples: int
    probe_layer: str
    folder: os.PathLike | None = None

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Ids of rows, unicode `[n]`."""
        return np.asarray(self.features.pairs.table["id"])[rows].astype(str)

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Class indices of rows, int64 `[n]`; -1 without a class."""
        return np.asarray(self.features.pairs.table["label_id"])[rows].astype(np.int64)

    def groups(self, rows: np.ndarray) -> np.ndarray:
        """What may not be divided (patient, case), int64 `[n]`; a row without a group is a group of its own."""
        groups, rows = np.asarray(self.features.pairs.table["group"])[rows].astype(np.int64), np.asarray(rows)
        return np.where(groups < 0, -1 - rows, groups)

    def plan(self, labels: np.ndarray, groups: np.ndarray) -> bootstrap.Plan:
        """How this set is resampled: the same way for every encoder, so that differences can be paired."""
        seed = bootstrap.seed_of(self.seed, self.set.name, *self.ids(self.set.rows).tolist())
        return bootstrap.plan(labels, groups, self.resamples, seed)


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a task gives.

    Attributes:
      estimates: (estimate, n) by metric name.
      predictions: per-sample arrays by name.
      context: of every row; `profile` and `feature_layer` belong to a row's identity.
    """

    estimates: Mapping[str, tuple[bootstrap.Estimate, int]]
    predictions: Mapping[str, np.ndarray]
    context: Mapping[str, Any]


def run(encoder: Encoder | FeatureFolder, pairs, sets: Sequence[EvalSet], out, **options) -> list[dict]:
    """Evaluates one encoder on every set and task that go together: all rows of `one_by_one`, which has the options.

    Returns:
      Result rows of `results.FIELDS`, ready for `results.update`.
    """
    return results.check(row for _, rows in one_by_one(encoder, pairs, sets, out, **options) for row in rows)


def one_by_one(
    encoder: Encoder | FeatureFolder,
    pairs,
    sets: Sequence[EvalSet],
    out,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    seed: int = 0,
    bootstrap: int = 1000,
    probe_layer: str = "embedding",
    micro_batch: int = 64,
    cache: str | os.PathLike | None = None,
) -> Iterator[tuple[EvalSet, list[dict]]]:
    """Evaluates one encoder set by set, each with its result rows once its predictions are stored.

    Args:
      encoder: see `Encoder`; or stored features, which serve the tasks that need no prompts. One that has `tasks` is
        evaluated on these alone.
      pairs: the pairs set that the sets' rows refer to.
      sets: what to evaluate on, with different names.
      out: folder that receives `predictions/<model>/<set>.<task>.npz`, and `heads/` that tasks train; None keeps none.
      tasks: names from `TASKS` and `MORE_TASKS`, or dotted paths of modules of the same form.
      seed: of the bootstrap and of the probe's held-out part.
      bootstrap: number of resamples of the intervals.
      probe_layer: `embedding` (projected) or `pooled` (before the projection).
      micro_batch: images or texts a call of the encoder.
      cache: folder that keeps features between runs, see `cache.FeatureCache`; none without.

    Raises:
      InputError: an unknown task, sets of one name, labels or features that cannot be evaluated.
    """
    modules = find(tasks)
    if served := getattr(encoder, "tasks", None):
        modules = {task: module for task, module in modules.items() if task in served}
        if not modules:
            raise InputError(f"{encoder.name} takes part in {', '.join(served)} only; ask for one of them with --tasks")
    if len({s.name for s in sets}) < len(sets):
        raise InputError("two evaluation sets have the same name; rename one")
    if isinstance(encoder, FeatureFolder):
        features, sets = encoder.open(pairs), unprompted(sets)
    else:
        kept = FeatureCache(cache, encoder.name, encoder.identity) if cache and _identity(encoder) else None
        features = Features(encoder, pairs, micro_batch, kept)
    for one in sets:
        applying = {task: module for task, module in modules.items() if module.applies(one)}
        if applying:
            features.add_rows([one.rows])
        rows = []
        kept = None if out is None else results.heads_path(out, encoder.name, one.name)
        data = TaskData(one, features, float(encoder.logit_scale), seed, bootstrap, probe_layer, kept)
        for task, module in applying.items():
            result = module.evaluate(data)
            if out is not None and jax.process_index() == 0:  # all have the same
                path = results.predictions_path(out, encoder.name, one.name, task)
                results.save_predictions(path, {"ids": data.ids(one.rows), **result.predictions})
            rows += _rows(encoder, one, task, result, seed)
        yield one, rows


def find(tasks: Sequence[str]) -> dict[str, Any]:
    """The tasks' modules by name; colon arguments set what a task has to be set (`vqa_fusion:seeds=5,epochs=40`).

    Raises:
      InputError: an unknown name or argument.
    """
    found = {}
    for task in tasks:
        name, colon, arg = task.partition(":")
        module = registry.resolve(name, TASKS | MORE_TASKS, "task")
        if colon and not dataclasses.is_dataclass(module):
            raise InputError(f"task {name} takes no arguments, but {arg!r} are given")
        found[name] = dataclasses.replace(module, **_arguments(module, arg)) if colon else module
    return found


def _arguments(task: Any, arg: str) -> dict[str, Any]:
    known = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    return dict(config.parse_arg(arg, **known))


def _identity(encoder) -> str:
    return getattr(encoder, "identity", "")


def _rows(encoder: Encoder, one: EvalSet, task: str, result: TaskResult, seed: int) -> list[dict]:
    context = {"split_hash": one.split_hash, "modality": one.modality, "model_hash": _identity(encoder)[:16]}
    context |= result.context
    if undefined := bootstrap.undefined({metric: estimate for metric, (estimate, _) in result.estimates.items()}):
        context["undefined_resamples"] = undefined
    rows = []
    for metric, (estimate, n) in result.estimates.items():
        try:
            low, high = estimate.interval()
        except InputError as error:
            raise InputError(f"{one.name}, {task}, {metric}: {error}") from error
        values = {"value": estimate.value, "low": low, "high": high, "n": int(n), "seed": seed}
        about = {"model": encoder.name, "checkpoint": str(encoder.checkpoint), "dataset": one.name, "task": task}
        rows.append({**about, "metric": metric, **values, "context": context})
    return rows
