"""Discrete-time hazards: time in bins, a logit for each, and the likelihood of what was seen.

Zadeh and Schmid, "Bias in cross-entropy-based training of deep survival networks", IEEE TPAMI 43(9), 2021. The hazard
of bin k is sigmoid(logit k), given no event before it; survival past k is the product of one minus the hazards up to k.
"""

import jax
import jax.numpy as jnp


def survival(logits: jax.Array) -> jax.Array:
    """Probability of no event up to the end of each bin: float `[..., bins]` of logits `[..., bins]`."""
    return jnp.exp(jnp.cumsum(jax.nn.log_sigmoid(-logits), axis=-1))


def risk(logits: jax.Array) -> jax.Array:
    """Higher for earlier events: minus the sum of `survival`, `[...]`, between -bins and 0."""
    return -survival(logits).sum(axis=-1)


def negative_log_likelihood(logits: jax.Array, bins: jax.Array, event: jax.Array, alpha: float = 0.0) -> jax.Array:
    """Loss of each patient, float `[...]`.

    With an event in bin k: -log(survival past k - 1) - log(hazard k). Censored in bin k: -(1 - alpha) log(survival past
    k). Computed from logits, so that no probability is clipped.

    Args:
      logits: float `[..., bins]`.
      bins: int `[...]`, of the event or of the end of watching.
      event: bool `[...]`.
      alpha: 0 to 1, how much less the censored count.
    """
    number = jnp.arange(logits.shape[-1])
    outlived = jax.nn.log_sigmoid(-logits)
    before = jnp.where(number < bins[..., None], outlived, 0).sum(axis=-1)
    own = jnp.take_along_axis(jnp.where(event[..., None], jax.nn.log_sigmoid(logits), outlived), bins[..., None], -1)
    return -(before + own[..., 0]) * jnp.where(event, 1.0, 1.0 - alpha)
