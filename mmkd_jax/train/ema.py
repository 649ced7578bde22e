"""The running mean of the parameters, which is evaluated, exported and started from in their place.

Weights late in training lie around a better place than any of them is (Polyak and Juditsky 1992; of weights of deep
networks: arXiv 1803.05407, section 3.1). The updates themselves do not look at the mean: a run with it makes the same
steps as one without.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mmkd_jax.errors import InputError


def check(decay: float) -> float:
    """`decay`, 0 (no mean is kept) or the share of the mean that each update leaves.

    Raises:
      InputError: it is not within [0, 1).
    """
    if not 0.0 <= decay < 1.0:
        raise InputError(f"config.ema is {decay}; it must be 0 (no running mean) or a share below 1, such as 0.999")
    return decay


def update(mean: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """`m + (1 - d) (p - m)` for each leaf, d = min(decay, (1 + t) / (10 + t)).

    The smaller share of early updates keeps the start, which is far from everything later, from staying in the mean of
    a short run (as num_updates does in TensorFlow's ExponentialMovingAverage).

    Args:
      mean: the mean so far.
      params: after update `step`, the leaves float32.
      step: t, updates before this one, an int32 scalar.
      decay: see `check`.
    """
    t = step.astype(jnp.float32)
    share = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    return jax.tree.map(lambda m, p: m + (1.0 - share) * (p - m), mean, params)
