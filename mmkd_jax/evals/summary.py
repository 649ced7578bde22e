"""One number for many sets, and its difference between models, from the per-sample outputs of a run.

A summary is the mean over data sets that count alike (images are not pooled: the biggest set would decide). Models
are compared on the same resamples of the same cases.
"""

from collections.abc import Sequence

import numpy as np

from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import bootstrap, results

MEAN = "mean"  # name of the data set in a summary's row


def estimates(out, model: str, dataset: str, task: str, seed: int = 0, resamples: int = 1000) -> tuple[dict, int]:
    """The metrics of one model on one classified set as `bootstrap.Estimate`s by name, and the number of rows.

    Values, resamples and hence intervals are those of the result rows of the same seed.
    """
    stored = results.load_predictions(out, model, dataset, task)
    if not {"labels", "scores", "groups", "ids"} <= set(stored):
        raise InputError(f"the predictions of task {task!r} on {dataset} are no classification; name another task")
    seed = bootstrap.seed_of(seed, dataset, *stored["ids"].tolist())
    plan = bootstrap.plan(stored["labels"], stored["groups"], resamples, seed)
    return bootstrap.classification(stored["labels"], stored["scores"], plan.weights), len(stored["ids"])


def mean(
    out,
    models: Sequence[str] | str,
    datasets: Sequence[str],
    *,
    task: str = "zeroshot",
    metric: str = "balanced_accuracy",
    seed: int = 0,
    resamples: int = 1000,
) -> bootstrap.Estimate:
    """Mean of a metric over `datasets`.

    Args:
      out: the folder that holds `predictions/`.
      models: one model, or the training seeds of one recipe; then the mean over seeds, whose interval covers both the
        choice of cases and that of seeds.
      datasets: names of the sets; those that are too easy or too small to tell are best left out beforehand.
      task: `zeroshot` or `linear_probe`.
      metric: one of `metrics.CLASSIFICATION`.
      seed: of the resamples.
      resamples: how many.

    Raises:
      InputError: predictions are missing, or there is no such metric.
    """
    models = [models] if isinstance(models, str) else list(models)
    of_models = []
    for model in models:
        found = [estimates(out, model, dataset, task, seed, resamples)[0] for dataset in datasets]
        if found and metric not in found[0]:
            raise InputError(f"task {task!r} has no metric {metric!r}; {near(metric, found[0])}")
        of_models.append(bootstrap.mean_over_sets([of_set[metric] for of_set in found]))
    return bootstrap.mean_over_seeds(of_models, bootstrap.seed_of(seed, *models))


def difference(
    out, models: Sequence[str] | str, others: Sequence[str] | str, datasets: Sequence[str], **options
) -> bootstrap.Estimate:
    """`mean(models) - mean(others)`, paired by case; `options` are those of `mean`."""
    return bootstrap.difference(mean(out, models, datasets, **options), mean(out, others, datasets, **options))


def row(
    out,
    models: Sequence[str] | str,
    datasets: Sequence[str],
    *,
    name: str | None = None,
    task: str = "zeroshot",
    metric: str = "balanced_accuracy",
    seed: int = 0,
    resamples: int = 1000,
) -> dict:
    """A result row of `mean` with the data set named "mean" and the model `name` (the first of `models` by default)."""
    models = [models] if isinstance(models, str) else list(models)
    estimate = mean(out, models, datasets, task=task, metric=metric, seed=seed, resamples=resamples)
    low, high = estimate.interval()
    n = sum(len(results.load_predictions(out, models[0], dataset, task)["ids"]) for dataset in datasets)
    context = {"profile": "mean_over_sets", "datasets": list(datasets), "models": models}
    return {
        **{"model": name or models[0], "checkpoint": "", "dataset": MEAN, "task": task, "metric": metric},
        **{"value": estimate.value, "low": low, "high": high, "n": n, "seed": seed, "context": context},
    }


def best(rows: Sequence[dict], models: Sequence[str], dataset: str, task: str, metric: str) -> dict | None:
    """The row with the highest value among `models` on one set, the first among equals; None without any."""
    keys = {"dataset": dataset, "task": task, "metric": metric}
    found = [r for r in rows if r["model"] in models and all(r[k] == v for k, v in keys.items())]
    return found[int(np.argmax([r["value"] for r in found]))] if found else None
