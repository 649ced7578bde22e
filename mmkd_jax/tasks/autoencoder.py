"""The authors' target maps: one affine map a teacher to a common width, trained inside an auto-encoder.

Every teacher has a map in (width to latent, with bias, shared by image and text) and a map out; all teachers share an
encoder and a decoder for images and another pair for texts. The loss is the mean square of what comes out against what
went in. Of all this only the map in is used afterwards (MMKD-CLIP, src/open_clip/models_ae.py). Hidden width, optimiser
and number of steps were not published: the defaults are ours.
"""

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmkd_jax.data.feature_codec import TOWERS
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.errors import InputError
from mmkd_jax.tasks.maps import TargetMap

DROPOUT, NOISE = 0.2, 0.01  # as released
SAMPLE = 65_536  # rows that are held in memory to train on, at most
Params = dict[str, Any]


def fit(
    features: Mapping[str, FeatureSet],
    *,
    latent: int = 512,
    hidden: int = 512,
    steps: int = 2000,
    batch: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, TargetMap]:
    """Trains the auto-encoder on stored features and returns each teacher's map to `latent`.

    Args:
      features: by teacher, of one set of pairs; rows that a teacher lacks are not drawn for it.
      latent: width of the targets.
      hidden: width of encoder and decoder.
      steps: updates.
      batch: rows a teacher and update; image and text of each.
      lr: of Adam, to zero along a cosine.
      seed: of weights, rows, noise and dropout.

    Raises:
      InputError: no teacher, or one without features; a size that is not positive.
    """
    if not features:
        raise InputError("an auto-encoder needs the features of at least one teacher")
    if min(latent, hidden, steps, batch) < 1:
        raise InputError(f"latent, hidden, steps and batch must be positive, not {latent}, {hidden}, {steps}, {batch}")
    stored = {name: _sample(features[name], seed) for name in sorted(features)}
    params = init(jax.random.key(seed), {name: x["image"].shape[1] for name, x in stored.items()}, latent, hidden)
    optimiser = optax.adam(optax.cosine_decay_schedule(lr, steps))
    state = optimiser.init(params)
    for step in range(steps):
        params, state, error = _update(optimiser, batch, params, state, stored, jax.random.key(seed + 1), step)
    made = {"latent": latent, "hidden": hidden, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
    made["loss"] = float(error)
    return {name: _map(features[name], params["teachers"][name]["in"], made) for name in stored}


def init(key: jax.Array, widths: Mapping[str, int], latent: int, hidden: int) -> Params:
    """Weights; what a teacher gets depends on its name and not on which others there are."""

    def dense(name: str, width: int, out: int) -> Params:
        return _dense(jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode()))), width, out)

    teachers = {
        name: {"in": dense(f"{name} in", width, latent), "out": dense(f"{name} out", latent, width)}
        for name, width in widths.items()
    }
    shared = {
        tower: {
            "encoder": [dense(f"{tower} encoder 0", latent, hidden), dense(f"{tower} encoder 1", hidden, hidden)],
            "decoder": [dense(f"{tower} decoder 0", hidden, hidden), dense(f"{tower} decoder 1", hidden, latent)],
        }
        for tower in TOWERS
    }
    return {"teachers": teachers, "shared": shared}


def loss(params: Params, inputs: Mapping[str, Mapping[str, jax.Array]], key: jax.Array | None) -> jax.Array:
    """Mean over teachers, towers and rows of the mean square error of the reconstruction.

    Args:
      params: of `init`.
      inputs: `{teacher: {"image", "text"}}`, float32 `[rows, width]`.
      key: of noise and dropout; None without them.
    """
    errors = []
    for number, (name, of_teacher) in enumerate(sorted(inputs.items())):
        for place, tower in enumerate(TOWERS):
            draws = None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), place)
            x = of_teacher[tower]
            rebuilt = _through(params["teachers"][name], params["shared"][tower], x, draws)
            errors.append(jnp.mean(jnp.square(rebuilt - x)))
    return jnp.mean(jnp.stack(errors))


def _through(teacher: Params, shared: Params, x: jax.Array, key: jax.Array | None) -> jax.Array:
    hidden = _apply(teacher["in"], x)
    keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
    if key is not None:
        hidden = hidden + NOISE * jax.random.normal(keys[2], hidden.shape)
    for layer, draw in zip(shared["encoder"], keys):
        hidden = jax.nn.relu(_apply(layer, hidden))
        if draw is not None:
            hidden = hidden * jax.random.bernoulli(draw, 1 - DROPOUT, hidden.shape) / (1 - DROPOUT)
    first, last = shared["decoder"]
    return _apply(teacher["out"], _apply(last, jax.nn.relu(_apply(first, hidden))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(optimiser, batch: int, params: Params, state, stored, key: jax.Array, step):
    rows_key, key = jax.random.split(jax.random.fold_in(key, step))

    def drawn(number: int, of_teacher: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        rows = jax.random.randint(jax.random.fold_in(rows_key, number), (batch,), 0, len(of_teacher["image"]))
        return {tower: x[rows] for tower, x in of_teacher.items()}

    inputs = {name: drawn(number, stored[name]) for number, name in enumerate(sorted(stored))}
    error, gradients = jax.value_and_grad(loss)(params, inputs, key)
    updates, state = optimiser.update(gradients, state)
    return optax.apply_updates(params, updates), state, error


def _sample(features: FeatureSet, seed: int) -> dict[str, jax.Array]:
    """First views and captions of up to `SAMPLE` rows, float32 `[rows, width]` a tower."""
    count = features.manifest["pairs"]["rows"]
    rows = np.sort(np.random.default_rng(seed).permutation(count)[:SAMPLE])
    found = features.read(rows, np.zeros_like(rows), np.zeros_like(rows))
    if not found["present"].any():
        raise InputError(f"{features.path} has no features to train a target map on; emit some")
    return {tower: jnp.asarray(found[tower][found["present"]]) for tower in TOWERS}


def _map(features: FeatureSet, dense: Params, made: Mapping[str, Any]) -> TargetMap:
    """The map in, the same for image and text."""
    both = {
        "shift": np.zeros(features.width, np.float32),
        "matrix": np.asarray(dense["kernel"]),
        "offset": np.asarray(dense["bias"]),
    }
    parts = {part: dict.fromkeys(TOWERS, value) for part, value in both.items()}
    return TargetMap("autoencoder", features.teacher, features.hash, False, **parts, made=made)


def _dense(key: jax.Array, width: int, out: int) -> Params:
    """Uniform in +-1 / sqrt(width), as torch's linear layers are, weights and bias."""
    bound = width**-0.5
    kernel, bias = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(kernel, (width, out), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias, (out,), minval=-bound, maxval=bound),
    }


def _apply(dense: Params, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, dense["kernel"], precision=jax.lax.Precision.HIGHEST) + dense["bias"]
