"""Whether zero-shot probabilities mean what they say: calibration error, Brier score, log-loss.

The expected calibration error puts rows into 15 equally wide bins of the predicted class's probability and averages
how far each bin's share of right rows is from its mean probability (Guo et al., arXiv 1706.04599, section 2). Without
fitting anything: a model's own logit scale is part of what is judged.
"""

import numpy as np

from mmkd_jax.evals import bootstrap, metrics
from mmkd_jax.evals.base import TaskData, TaskResult
from mmkd_jax.evals.bootstrap import Estimate
from mmkd_jax.evals.zeroshot import applies, cosines, probabilities

__all__ = ["BINS", "applies", "evaluate", "expected_calibration_error", "measure"]

BINS = 15
_LEAST = 1e-12  # probability of a true class in the log-loss


def expected_calibration_error(confidence, right, weights: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Float64 `[resamples]` of confidences in (0, 1] `[n]` and bools `[n]`; a bin holds its upper edge."""
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = (place[:, None] == np.arange(bins)) * (confidence - right)[:, None]
    return np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)


def measure(labels, scores, weights: np.ndarray) -> dict[str, Estimate]:
    """`ece`, `brier` (summed over classes) and `log_loss` of probabilities `[n, classes]`, with their resamples."""
    labels, scores = metrics.check(labels, scores)
    own = scores[np.arange(len(labels)), labels]
    squares = (scores**2).sum(axis=1) - 2 * own + 1
    both = np.concatenate([np.ones((1, len(labels)), np.int64), weights])
    values = {
        "ece": expected_calibration_error(scores.max(axis=1), scores.argmax(axis=1) == labels, both),
        "brier": bootstrap.mean(squares, both),
        "log_loss": bootstrap.mean(-np.log(np.maximum(own, _LEAST)), both),
    }
    return {name: Estimate(float(value[0]), value[1:]) for name, value in values.items()}


def evaluate(data: TaskData) -> TaskResult:
    """Of the same probabilities as the task `zeroshot`."""
    prompts, rows = data.set.prompts, data.set.rows
    scores = probabilities(cosines(data, prompts), data.logit_scale)
    labels, groups = data.labels(rows), data.groups(rows)
    metrics.check(labels, scores)
    plan = data.plan(labels, groups)
    context = {
        "profile": prompts.profile,
        "prompt_hash": prompts.hash,
        "feature_layer": "embedding",
        "logit_scale": data.logit_scale,
        "bins": BINS,
        "classes": len(data.set.class_names),
        "bootstrap": plan.to_dict(),
    }
    estimates = {name: (one, len(labels)) for name, one in measure(labels, scores, plan.weights).items()}
    return TaskResult(estimates, {"labels": labels, "scores": scores, "groups": groups}, context)
