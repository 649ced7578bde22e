"""When training goes wrong: where numbers first stop being finite, and steps that stand out from those before."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmkd_jax.errors import InputError, near
from mmkd_jax.train.optim import path_of

ACTIONS = ("", "skip", "rollback")
DECAY = 0.99  # of the running means, a step
ADVICE = "lower the learning rate, clip gradients, or look at the data of that step"


class NotFiniteError(InputError):
    """The loss or a gradient stopped being a number, or there were too many spikes."""


@dataclasses.dataclass(frozen=True)
class Spike:
    """A step that stood out or was not finite, with its loss and gradient norm."""

    step: int
    loss: float
    grad_norm: float


class SpikeState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      loss, grad_norm: running means over the steps that counted, float32 scalars.
      counted: number of those, int32 scalar.
      skipped: steps skipped in all, int32 scalar.
      in_a_row: of these, the ones since the last that counted, int32 scalar.
      inner: state of the transform that is guarded.
    """

    loss: jax.Array
    grad_norm: jax.Array
    counted: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    inner: Any


def guard(transform: optax.GradientTransformation, config: Any) -> optax.GradientTransformationExtraArgs:
    """`transform` as the fields `spikes` of a config ask for it.

    Raises:
      InputError: the action is unknown.
    """
    if config.action not in ACTIONS:
        raise InputError(f"config.spikes.action {config.action!r}: {near(config.action, ACTIONS)}")
    if not config.action:
        return optax.with_extra_args_support(transform)
    return skip_spikes(transform, loss=config.loss, grad_norm=config.grad_norm, after=config.after)


def skip_spikes(
    inner: optax.GradientTransformation, *, loss: float, grad_norm: float, after: int
) -> optax.GradientTransformationExtraArgs:
    """Leaves out the updates of steps whose loss or gradient norm stands out, or is not finite.

    A step stands out when its value is more than `loss` (`grad_norm`) times the running mean of the steps that
    counted, once `after` of them have; 0 does not look at it. A skipped step changes neither the parameters nor the
    state of `inner`, its learning-rate schedule included. The loss comes in as `update(..., value=loss)`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return SpikeState(zero, zero, none, none, none, inner.init(params))

    def update(grads, state, params=None, *, value, **others):
        norm = optax.tree.norm(grads)
        correction = 1 - DECAY ** state.counted.astype(jnp.float32)  # means that start at 0 are too small
        spike = ~(jnp.isfinite(value) & jnp.isfinite(norm))
        for now, mean, factor in ((value, state.loss, loss), (norm, state.grad_norm, grad_norm)):
            if factor:
                spike |= (state.counted >= after) & (now * correction > factor * mean)
        updates, new = inner.update(grads, state.inner, params, value=value, **others)
        kept = SpikeState(
            DECAY * state.loss + (1 - DECAY) * value,
            DECAY * state.grad_norm + (1 - DECAY) * norm,
            state.counted + 1,
            state.skipped,
            jnp.zeros_like(state.in_a_row),
            new,
        )
        left = state._replace(skipped=state.skipped + 1, in_a_row=state.in_a_row + 1)
        choose = lambda a, b: jnp.where(spike, a, b)  # noqa: E731
        return jax.tree.map(lambda x: choose(jnp.zeros_like(x), x), updates), jax.tree.map(choose, left, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def watch(
    watched: Sequence[tuple[int, dict[str, Any]]], paths: Sequence[str], config: Any, say: Callable[[str], None]
) -> tuple[dict[str, float], Spike | None]:
    """Looks at what some steps reported, before anything of them is saved.

    Args:
      watched: step and reports of each.
      paths: what `parameter_paths` gives.
      config: the fields `spikes`.
      say: told which steps were skipped.

    Returns:
      The last step's scalars; and the first spike, if it asks for a roll-back.

    Raises:
      NotFiniteError: a step is not finite, or more than `config.limit` in a row were skipped, which are no spike.
    """
    for step, reports in jax.device_get(list(watched)):
        place = where(reports.pop("not_finite"), paths)
        place = f", {place}" if place else ""
        bad = [name for name, value in reports.items() if not np.isfinite(value)]
        if in_a_row := reports.pop("skipped_in_a_row", 0):
            spike = Spike(step, float(reports["loss"]), float(reports["grad_norm"]))
            if config.action == "rollback":
                return {}, spike
            say(f"step {step} skipped: loss {spike.loss:.4g}, gradient norm {spike.grad_norm:.4g}{place}")
            if in_a_row > config.limit:
                raise NotFiniteError(f"{in_a_row} steps in a row were skipped, up to step {step}; {ADVICE}")
        elif bad or place:
            what = f"{', '.join(bad)} became {reports[bad[0]]}" if bad else "numbers became infinite"
            raise NotFiniteError(f"{what} at step {step}{place}; the last checkpoint is from before: {ADVICE}")
    return {name: float(value) for name, value in reports.items()}, None


def not_finite(grads: Any, params: Any) -> dict[str, jax.Array]:
    """Where numbers are not finite, as int32 scalars.

    Returns:
      `grads` and `params`: in how many leaves; `first_grad` and `first_param`: number of the first of these.
    """
    found = {}
    for name, tree in (("grad", grads), ("param", params)):
        bad = jnp.stack([~jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])
        found |= {f"{name}s": bad.sum(dtype=jnp.int32), f"first_{name}": jnp.argmax(bad).astype(jnp.int32)}
    return found


def parameter_paths(params: Any) -> list[str]:
    """Paths of the leaves of `params`, in the order of the numbers of `not_finite`."""
    return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def where(found: dict[str, Any], paths: Sequence[str]) -> str:
    """Words for what `not_finite` found: "in the gradients of 3 of 40 parameters, first text/norm/scale"."""
    places = [
        f"in the {what} of {found[f'{name}s']} of {len(paths)} parameters, first {paths[found[f'first_{name}']]}"
        for name, what in (("grad", "gradients"), ("param", "new values"))
        if found[f"{name}s"]
    ]
    return " and ".join(places)
