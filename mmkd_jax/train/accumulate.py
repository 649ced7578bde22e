"""The gradient of a step whose encoding runs in micro-batches, exact for losses that compare all samples.

Two passes (gradient caching: Gao et al. 2021, arXiv 2101.06983). The first encodes every micro-batch without keeping
anything for a backward pass; the objective of all features gives their gradient; the second encodes each micro-batch
again and pulls its part of that gradient back. Dropout draws what a single pass would have drawn
(`mmkd_jax.models.draws`), so both passes, and any number of micro-batches, are the same step.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmkd_jax.errors import InputError
from mmkd_jax.models import constraints, draws
from mmkd_jax.tasks.base import Batch, Params, Task


def value_and_grad(
    task: Task, params: Params, extra: Any, batch: Batch, key: jax.Array, step: jax.Array
) -> tuple[tuple[jax.Array, tuple[dict[str, jax.Array], Any]], Params]:
    """`((loss, (reports, extra)), gradients)` of a step in `task.micro_batches` parts.

    Raises:
      InputError: the batch cannot be divided over the devices and the micro-batches.
    """

    def objective(params, features):
        loss, reports, changed = task.objective(params, features, batch, step)
        return loss, (reports, changed)

    if task.micro_batches == 1:

        def whole(params):
            return objective(params, task.encode(params, extra, batch, key, step))

        return jax.value_and_grad(whole, has_aux=True)(params)

    split, join, encode = _parts(task, extra, batch, key, step)
    parts = split(batch)
    features = join(jax.lax.map(lambda part: encode(params, *part), parts))
    value, (direct, of_features) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, features)

    def pull(total, one):
        part, bar = one
        gradients = jax.vjp(lambda params: encode(params, *part), params)[1](bar)[0]
        return jax.tree.map(jnp.add, total, gradients), None

    return value, jax.lax.scan(pull, direct, (parts, split(of_features)[1]))[0]


def _parts(task: Task, extra: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[Callable, ...]:
    """How `[n, ...]` becomes `(number, [micro-batches, ...])`, the way back for features, and a part's encoding.

    Each device cuts its own samples, so that a micro-batch is divided over the mesh as the batch is.
    """
    count = task.micro_batches
    n = len(jax.tree.leaves(batch)[0])
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(dict(mesh.shape).get(axis, 1) for axis in constraints.BATCH_AXES)
    if n % (ways * count):
        raise InputError(
            f"a global batch of {n} on {ways} devices cannot be cut into {count} micro-batches; "
            f"make it a multiple of {ways * count}"
        )
    shape = (ways, count, n // ways // count)

    def split(tree):
        cut = lambda x: jnp.moveaxis(x.reshape(*shape, *x.shape[1:]), 1, 0).reshape(count, n // count, *x.shape[1:])  # noqa: E731
        return jnp.arange(count), jax.tree.map(lambda x: constraints.divide(cut(x), {1: constraints.BATCH_AXES}), tree)

    def join(tree):
        def one(x):
            x = x.reshape(count, ways, -1, *x.shape[2:])
            return constraints.samples(jnp.moveaxis(x, 0, 1).reshape(n, *x.shape[3:]))

        return jax.tree.map(one, tree)

    def encode(params, number, part):
        with draws.part(number, shape):
            return task.encode(params, extra, part, key, step)

    return split, join, encode
