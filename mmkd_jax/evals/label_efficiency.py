"""How few labels a linear probe needs: fits on 1 %, 10 % and all training rows, and on k rows a class.

Subsets are drawn by seed, stratified, whole rows, with at least one of each class; their rows are stored with the
predictions. C is chosen inside a subset, as the linear probe does it, where each class has rows of `ENOUGH` groups to
hold some out; smaller subsets take C = `FIXED`, since choosing it on other labelled rows would use more labels than the
number says. Each metric is the mean over the seeds of subsets; its interval covers both the cases and the subsets.
"""

import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, linear_probe, metrics
from mmkd_jax.evals.base import TaskData, TaskResult
from mmkd_jax.evals.linear_probe import applies

__all__ = ["applies", "draw", "evaluate"]

FRACTIONS, SHOTS, SEEDS = (0.01, 0.1, 1.0), (1, 5, 10), 5
ENOUGH, FIXED = 5, 1.0


def draw(labels, seed: int, *, fraction: float | None = None, shots: int | None = None) -> np.ndarray:
    """A stratified subset: ascending positions in `labels`, int64.

    Args:
      labels: int `[n]`.
      seed: equal seeds give equal subsets, and larger fractions or shots contain the smaller ones of the same seed.
      fraction: share of each class, rounded, at least one row; or
      shots: rows a class; all rows of a class that has fewer.
    """
    labels = np.asarray(labels)
    right = shots is None and 0 < fraction <= 1 if fraction is not None else shots is not None and shots >= 1
    if not right:
        raise InputError("a subset is drawn by a fraction from above 0 to 1, or by 1 or more shots a class")
    order, kept = np.random.default_rng(seed).permutation(len(labels)), []
    for c in np.unique(labels):
        members = order[labels[order] == c]
        kept.append(members[: max(1, round(fraction * len(members))) if shots is None else shots])
    return np.sort(np.concatenate(kept))


def evaluate(data: TaskData) -> TaskResult:
    """Every metric of classification for every size, named `accuracy_at_1%` or `macro_auc_at_5_shots`."""
    rows, test, layer = data.set.train_rows, data.set.rows, data.probe_layer
    data.features.add_rows([rows, test], layer)
    train, tested = data.features.images(rows, layer), data.features.images(test, layer)
    labels, groups, classes = data.labels(rows), data.groups(rows), len(data.set.class_names)
    truth, units = data.labels(test), data.groups(test)
    plan = data.plan(truth, units)
    sizes = {f"{100 * f:g}%": {"fraction": f} for f in FRACTIONS}
    sizes |= {f"{k}_shots": {"shots": k} for k in SHOTS if np.bincount(labels).max() > k}
    estimates, stored, strengths = {}, {"labels": truth, "groups": units}, {}
    for name, size in sizes.items():
        seeds = range(SEEDS if size.get("fraction") != 1 else 1)  # there is one subset of everything
        of_seeds = []
        for seed in (data.seed + number for number in seeds):
            kept = draw(labels, seed, **size)
            scores, strength = _fit(train[kept], labels[kept], groups[kept], tested, classes, seed)
            strengths.setdefault(name, []).append(strength)
            stored |= {f"rows_{name}_{seed}": rows[kept], f"scores_{name}_{seed}": scores.astype(np.float32)}
            of_seeds.append(bootstrap.classification(truth, scores, plan.weights))
        drawn = bootstrap.seed_of(data.seed, data.set.name, name)
        for metric in metrics.CLASSIFICATION:
            estimate = bootstrap.mean_over_seeds([one[metric] for one in of_seeds], drawn)
            estimates[f"{metric}_at_{name}"] = (estimate, len(test))
    context = {
        "profile": "logistic_regression",
        "train_hash": data.set.train_hash,
        "train_rows": len(rows),
        "feature_layer": layer,
        "strengths": strengths,
        "bootstrap": plan.to_dict(),
    }
    return TaskResult(estimates, stored, {"classes": classes, **context})


def _fit(train, labels, groups, test, classes: int, seed: int) -> tuple[np.ndarray, float]:
    """Probabilities of the test rows, and the C that they come from."""
    least = min(len(np.unique(groups[labels == c])) for c in np.unique(labels))
    if least >= ENOUGH:
        probe = linear_probe.fit(train, labels, groups, test, classes, seed)
        return probe.scores, probe.strength
    if len(np.unique(labels)) < 2:
        raise InputError("a linear probe needs training rows of at least two classes")
    return linear_probe.scores(train, labels, test, classes, FIXED), FIXED
