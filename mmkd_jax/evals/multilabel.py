"""Zero-shot classification where a picture may show several findings: each is asked as there or not there.

The score of a finding is the softmax over the two of logit scale times cosine, of an ensemble of prompts each. Findings
are judged one by one, by ROC AUC and average precision, and averaged; rows of which a finding is not known take no part
in it. An arg-max over findings is not taken: it answers another question.
"""

import numpy as np
from scipy.special import expit

from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, prompts
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult
from mmkd_jax.evals.bootstrap import Estimate
from mmkd_jax.evals.zeroshot import cosines


def applies(one: EvalSet) -> bool:
    """Whether the set has findings and prompts for them."""
    return one.targets is not None and one.prompts is not None


def probabilities(present, absent, logit_scale: float) -> np.ndarray:
    """Float32 `[n, findings]` from cosines with the prompts of presence and of absence, `[n, findings]` each."""
    return expit(np.float32(logit_scale) * (np.asarray(present, np.float32) - np.asarray(absent, np.float32)))


def measure(targets, scores, names, weights: np.ndarray) -> dict[str, tuple[Estimate, int]]:
    """AUC and average precision of each finding, and their means over findings, with the number of known rows.

    Args:
      targets: `[n, findings]`, 1 there, 0 not there, anything negative unknown.
      scores: float `[n, findings]`.
      names: of the findings.
      weights: counts `[resamples, n]`.

    Raises:
      InputError: shapes that differ, targets or scores off their range, or a finding that no row or every row has.
    """
    targets, scores = np.asarray(targets), np.asarray(scores, np.float64)
    if targets.shape != scores.shape or targets.shape[1:] != (len(names),) or not len(targets):
        raise InputError(f"targets {targets.shape} and scores {scores.shape} are not [rows, {len(names)} findings]")
    if not np.isfinite(scores).all() or targets.max() > 1 or (targets != np.rint(targets)).any():
        raise InputError("scores must be finite, and targets 1 (there), 0 (not there) or negative (unknown)")
    found, both = {}, np.concatenate([np.ones((1, len(targets)), np.int64), weights])
    for number, name in enumerate(names):
        known = targets[:, number] >= 0
        there = targets[known, number] == 1
        if there.all() or not there.any():
            raise InputError(f"{name}: no AUC exists where rows are all with it or all without; leave this finding out")
        for metric, resampled in (("auc", bootstrap.binary_auc), ("ap", bootstrap.average_precision)):
            values = resampled(there, scores[known, number], both[:, known])
            found[f"{metric}:{name}"] = (Estimate(float(values[0]), values[1:]), int(known.sum()))
    for metric, mean in (("auc", "macro_auc"), ("ap", "map")):
        of_findings = [estimate for name, (estimate, _) in found.items() if name.startswith(f"{metric}:")]
        replicates = np.stack([one.replicates for one in of_findings])
        value = float(np.mean([one.value for one in of_findings]))
        found[mean] = (Estimate(value, _mean_of_known(replicates)), len(targets))
    return found


def _mean_of_known(replicates: np.ndarray) -> np.ndarray:
    known = np.isfinite(replicates)
    number = known.sum(axis=0)
    total = np.where(known, replicates, 0).sum(axis=0)
    return np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)


def evaluate(data: TaskData) -> TaskResult:
    """Scores every finding with the set's prompts, and with its `absent` prompts or the general ones."""
    one = data.set
    against = one.absent or prompts.absent(one.class_names)
    scores = probabilities(cosines(data, one.prompts), cosines(data, against), data.logit_scale)
    groups = data.groups(one.rows)
    plan = data.plan(np.zeros(len(groups), np.int64), groups)
    context = {
        "profile": one.prompts.profile,
        "prompt_hash": one.prompts.hash,
        "absent_hash": against.hash,
        "prompts": [*one.prompts.sentences[0], *against.sentences[0]],
        "feature_layer": "embedding",
        "logit_scale": data.logit_scale,
        "findings": len(one.class_names),
        "bootstrap": plan.to_dict(),
    }
    stored = {"targets": one.targets, "scores": scores, "groups": groups, "names": np.array(one.class_names)}
    return TaskResult(measure(one.targets, scores, one.class_names, plan.weights), stored, context)
