"""What a step changes, and the step itself."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mmkd_jax.tasks.base import Batch, Task
from mmkd_jax.train import accumulate, stability
from mmkd_jax.train import ema as running_mean


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

    @property
    def weights(self) -> Any:
        """What is evaluated and exported."""
        return self.params


@flax.struct.dataclass
class AveragedState(TrainState):
    """A state with `ema`, the running mean of `params` (see `mmkd_jax.train.ema`), which counts in their place."""

    ema: Any

    @property
    def weights(self) -> Any:
        """What is evaluated and exported."""
        return self.ema


def init_state(task: Task, transform: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first update; a pure function of `seed`."""
    params, extra = task.init(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params), extra)


def with_mean(state: TrainState) -> AveragedState:
    """`state` with a running mean that starts at its parameters, in memory of its own."""
    return AveragedState(state.step, state.params, state.opt_state, state.extra, jax.tree.map(jnp.copy, state.params))


def without_mean(state: TrainState) -> TrainState:
    """`state` with its parameters alone."""
    return TrainState(state.step, state.params, state.opt_state, state.extra)


def make_step(
    task: Task, transform: optax.GradientTransformation, seed: int, ema: float = 0.0
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The update as a pure function of state and batch; all its randomness is keyed by (`seed`, step).

    Its metrics are scalars, and under `not_finite` those of `stability.not_finite`. With `ema` the state's running mean
    is updated; a skipped step leaves it as it was.
    """
    transform = optax.with_extra_args_support(transform)

    def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        found = accumulate.value_and_grad(task, state.params, state.extra, batch, key, state.step)
        (loss, (reports, extra)), grads = found
        updates, opt_state = transform.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        changed = {"extra": extra}
        if ema:
            changed["ema"] = running_mean.update(state.ema, params, state.step, ema)
        parts = {f"grad_norm/{name}": optax.tree.norm(part) for name, part in grads.items() if isinstance(part, dict)}
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **parts, **reports}
        metrics["not_finite"] = stability.not_finite(grads, params)
        if isinstance(opt_state, stability.SpikeState):
            skipped = opt_state.in_a_row > 0
            before = {name: getattr(state, name) for name in changed}
            changed = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), before, changed)
            metrics |= {"skipped": opt_state.skipped, "skipped_in_a_row": opt_state.in_a_row}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, **changed), metrics

    return step_fn
