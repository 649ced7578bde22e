"""What a step changes, and the step itself."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mmkd_jax.tasks.base import Batch, Task
from mmkd_jax.train import accumulate, stability


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold to go on bit for bit.

    Attributes:
      step: number of updates made, int32 scalar.
      params: nested dict of float32 arrays with documented names.
      opt_state: of the optax transform.
      extra: the task's own.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any


def init_state(task: Task, transform: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first update; a pure function of `seed`."""
    params, extra = task.init(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params), extra)


def make_step(
    task: Task, transform: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The update as a pure function of state and batch; all its randomness is keyed by (`seed`, step).

    Its metrics are scalars, and under `not_finite` those of `stability.not_finite`.
    """
    transform = optax.with_extra_args_support(transform)

    def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        found = accumulate.value_and_grad(task, state.params, state.extra, batch, key, state.step)
        (loss, (reports, extra)), grads = found
        updates, opt_state = transform.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **reports}
        metrics["not_finite"] = stability.not_finite(grads, params)
        if isinstance(opt_state, stability.SpikeState):
            skipped = opt_state.in_a_row > 0
            extra = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), state.extra, extra)
            metrics |= {"skipped": opt_state.skipped, "skipped_in_a_row": opt_state.in_a_row}
        return TrainState(state.step + 1, params, opt_state, extra), metrics

    return step_fn
