"""Heads from the student's embedding to each teacher's own feature space, one for each teacher and tower.

Initial values are keyed by the teacher's name, so that another teacher's presence does not change them.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmkd_jax.errors import InputError

TOWERS = ("image", "text")
KINDS = ("linear", "mlp")


def init(key: jax.Array, widths: Mapping[str, int], embed: int, kind: str = "linear") -> dict[str, Any]:
    """Fresh heads, float32.

    Args:
      key: of the run.
      widths: feature width of each teacher, by name.
      embed: width of the student's embedding.
      kind: `linear` (`kernel [embed, width]`, `bias`) or `mlp` (`up` to twice the embedding, exact GELU, `down`).

    Returns:
      `{teacher: {"image": {...}, "text": {...}}}`.

    Raises:
      InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"head kind {kind!r} is not one of {', '.join(KINDS)}")
    names = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") for name in widths}
    return {name: _pair(jax.random.fold_in(key, names[name]), embed, width, kind) for name, width in widths.items()}


def apply(head: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """float32 `[n, embed]` through one teacher's head of one tower to float32 `[n, width]`."""
    if "kernel" in head:
        return _linear(head, x)
    return _linear(head["down"], jax.nn.gelu(_linear(head["up"], x), approximate=False))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pair(key: jax.Array, embed: int, width: int, kind: str) -> dict[str, Any]:
    """Both towers' heads of one teacher, out of one draw (XLA compiles the generator once)."""
    shapes = {"": (embed, width)} if kind == "linear" else {"up": (embed, 2 * embed), "down": (2 * embed, width)}
    ends = np.cumsum([inputs * outputs for inputs, outputs in shapes.values()])
    draw = jax.random.truncated_normal(key, -2.0, 2.0, (len(TOWERS), int(ends[-1])), jnp.float32)
    heads = {}
    for tower, values in zip(TOWERS, draw, strict=True):
        layers = {
            name: {"kernel": inputs**-0.5 * part.reshape(inputs, outputs), "bias": jnp.zeros(outputs, jnp.float32)}
            for (name, (inputs, outputs)), part in zip(shapes.items(), jnp.split(values, ends[:-1]), strict=True)
        }
        heads[tower] = layers[""] if kind == "linear" else layers
    return heads


def _linear(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.matmul(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST) + layer["bias"]
