"""Heads from the student's embedding to each teacher's own feature space, one for each teacher and tower.

Initial values are keyed by the teacher's name, so that another teacher's presence does not change them.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmkd_jax.errors import InputError

TOWERS = ("image", "text")


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
    if kind not in ("linear", "mlp"):
        raise InputError(f"head kind {kind!r} is not one of linear, mlp")
    heads = {}
    for name, width in widths.items():
        own = jax.random.fold_in(key, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
        heads[name] = {
            tower: _head(tower_key, embed, width, kind)
            for tower, tower_key in zip(TOWERS, jax.random.split(own), strict=True)
        }
    return heads


def apply(head: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """float32 `[n, embed]` through one teacher's head of one tower to float32 `[n, width]`."""
    if "kernel" in head:
        return _linear(head, x)
    return _linear(head["down"], jax.nn.gelu(_linear(head["up"], x), approximate=False))


def _head(key: jax.Array, embed: int, width: int, kind: str) -> dict[str, Any]:
    if kind == "linear":
        return _random(key, embed, width)
    up, down = jax.random.split(key)
    return {"up": _random(up, embed, 2 * embed), "down": _random(down, 2 * embed, width)}


def _random(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    kernel = inputs**-0.5 * jax.random.truncated_normal(key, -2.0, 2.0, (inputs, outputs), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}


def _linear(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.matmul(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST) + layer["bias"]
