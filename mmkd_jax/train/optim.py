"""AdamW as CLIP is trained: decay by rule, warm-up and cosine, clipping, and constraints as the last step."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = dict[str, Any]

# No decay for what has one dimension in the published layouts (biases, norms, the class token) and for scales. Here
# layers are stacked, so the number of dimensions would not tell: the name does. BatchNorm's statistics (`mean`,
# `variance`), which get no gradient either, stay as they are.
NO_DECAY = r"(^|/)(bias|scale|mean|variance|class_token|logit_scale|icl_scale)$"
# Scales are logarithms; CLIP keeps them within [0, ln 100] after every step.
BOUNDS = {r"(^|/)(logit_scale|icl_scale)$": (0.0, math.log(100.0))}


def path_of(key_path: tuple) -> str:
    """Documented name of a parameter: `image/layers/mlp/up/kernel`."""
    return "/".join(str(getattr(key, "key", key)) for key in key_path)


def schedule(peak: float, *, steps: int, warmup: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate at each step: linear to `peak` over `warmup` steps, then half a cosine to 0 at `steps`.

    As in open_clip (src/open_clip_train/scheduler.py): the first step already has `peak / warmup`.
    """
    warmup = max(0, min(warmup, steps - 1))

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) * peak
        return jnp.where(step < warmup, peak * (step + 1) / max(warmup, 1), cosine)

    return rate


def optimizer(config: Any, steps: int, lr_scale: Callable[[str], Any]) -> optax.GradientTransformation:
    """The update rule of `config` (fields `lr`, `warmup`, `beta1`, `beta2`, `epsilon`, `decay`, `clip`).

    Decoupled decay (Loshchilov and Hutter 2019, arXiv 1711.05101) scaled by the learning rate, as in torch's AdamW.
    `lr_scale(path)` multiplies a parameter's whole update, decay included; 0 freezes it.
    """
    rate = schedule(config.lr, steps=steps, warmup=config.warmup)
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.decay, mask=decayed),
        optax.scale_by_schedule(lambda step: -rate(step)),
        scale_by_path(lr_scale),
        keep_within_bounds(),
    )


def decayed(params: Params) -> Params:
    """True for each parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not re.search(NO_DECAY, path_of(path)), params)


def scale_by_path(lr_scale: Callable[[str], Any]) -> optax.GradientTransformation:
    """Multiplies each update by `lr_scale(path)`: a number, or one number a layer for stacked parameters."""

    def scale(path, update):
        factor = jnp.asarray(lr_scale(path_of(path)), update.dtype)
        return update * factor.reshape(factor.shape + (1,) * (update.ndim - factor.ndim))

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))


def keep_within_bounds() -> optax.GradientTransformation:
    """Shortens updates so that bounded parameters stay within their bounds."""

    def bound(path, update, value):
        for pattern, (low, high) in BOUNDS.items():
            if re.search(pattern, path_of(path)):
                return jnp.clip(value + update, low, high) - value
        return update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(bound, updates, params))
