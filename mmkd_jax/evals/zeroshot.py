"""Zero-shot classification: images against an ensemble of prompts a class (Radford et al., arXiv 2103.00020, 3.1.4).

Prompt features are normalised, averaged by class and normalised again; the score of a class is the softmax over
classes of logit scale times cosine. All of it in float32. The one-versus-rest AUC is taken on these probabilities:
it depends on the logit scale, since they share one denominator an image.
"""

import numpy as np
from scipy.special import softmax

from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, metrics
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult
from mmkd_jax.evals.features import unit
from mmkd_jax.evals.prompts import Prompts


def class_embeddings(features, counts) -> np.ndarray:
    """One unit vector a class, float32 `[classes, embed]`.

    Args:
      features: prompt features `[sum of counts, embed]`, class after class.
      counts: how many prompts each class has.
    """
    features, counts = unit(features), list(counts)
    if sum(counts) != len(features) or min(counts) < 1:
        raise InputError(f"{len(features)} prompt features do not divide into classes of {counts} prompts")
    parts = np.split(features, np.cumsum(counts)[:-1])
    return unit(np.stack([part.mean(axis=0) for part in parts]))


def cosines(data: TaskData, prompts: Prompts) -> np.ndarray:
    """Cosines of the test rows and the prompts' classes, float32 `[n, classes]`.

    Raises:
      InputError: the prompts are not those of the set's classes.
    """
    if len(prompts.sentences) != len(data.set.class_names):
        raise InputError(f"{data.set.name}: {len(prompts.sentences)} classes have prompts, not all of the set's")
    texts = data.features.texts([text for of_class in prompts.sentences for text in of_class])
    classes = class_embeddings(texts, map(len, prompts.sentences))
    return unit(data.features.images(data.set.rows)) @ unit(classes).T


def probabilities(cosines, logit_scale: float) -> np.ndarray:
    """Softmax over classes of scaled cosines `[n, classes]`, float32."""
    return softmax(np.float32(logit_scale) * np.asarray(cosines, np.float32), axis=1)


def applies(one: EvalSet) -> bool:
    """Whether the set has classes, of which each row has one, and prompts for them."""
    return bool(one.class_names) and one.prompts is not None and one.targets is None


def evaluate(data: TaskData) -> TaskResult:
    """Accuracy, balanced accuracy, macro F1 and macro one-versus-rest AUC with intervals."""
    prompts = data.set.prompts
    scores = probabilities(cosines(data, prompts), data.logit_scale)
    context = {
        "profile": prompts.profile,
        "prompt_hash": prompts.hash,
        "prompts": list(prompts.sentences[0]),
        "feature_layer": "embedding",
        "logit_scale": data.logit_scale,
        "auc": "macro one-versus-rest of softmax(logit scale * cosine)",
    }
    return classified(data, scores, context)


def classified(data: TaskData, scores: np.ndarray, context: dict) -> TaskResult:
    """The result of any classification of the set's test rows with `scores` `[n, classes]`."""
    labels, groups = data.labels(data.set.rows), data.groups(data.set.rows)
    metrics.check(labels, scores)
    plan = data.plan(labels, groups)
    estimates = bootstrap.classification(labels, scores, plan.weights)
    return TaskResult(
        {name: (estimate, len(scores)) for name, estimate in estimates.items()},
        {"labels": labels, "scores": scores, "predictions": scores.argmax(axis=1), "groups": groups},
        {"classes": len(data.set.class_names), "bootstrap": plan.to_dict(), **context},
    )
