"""One number an array, by which a restored array is known to be the one that was saved.

Storage formats check their own records, not what lies in them: a flipped bit in a compressed chunk can come back as
another weight. The sums are of integers modulo 2^32, so they do not depend on mesh, processes or order, and they are
computed where the arrays lie.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SPREAD = np.uint32(0x9E3779B1)  # 2^32 over the golden ratio: neighbouring positions weigh very differently
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # of 8 bytes: two words


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each leaf of `tree` (arrays) by its path, such as `params/image/norm/scale`.

    Each word is weighed by an odd number that depends on its position, so that a change of one word, and nearly every
    exchange or change of several, changes the sum.
    """
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = jax.device_get([_sum(leaf) for _, leaf in named])
    return {path_of(path): int(value) for (path, _), value in zip(named, sums, strict=True)}


def differing(tree: Any, expected: Mapping[str, int]) -> list[str]:
    """Paths of the leaves of `tree` whose checksum is not the expected one; leaves without one are not looked at."""
    return [name for name, value in checksums(tree).items() if expected.get(name, value) != value]


def path_of(path: tuple) -> str:
    """A path in any pytree as text: keys, fields and positions joined by `/`."""
    names = [next(getattr(key, kind) for kind in ("key", "name", "idx") if hasattr(key, kind)) for key in path]
    return "/".join(str(name) for name in names)


@jax.jit  # leaf by leaf: many have one shape, which is compiled once
def _sum(x: jax.Array) -> jax.Array:
    words = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    position = jnp.uint32(0)  # in row-major order
    for axis, size in enumerate(words.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words.astype(jnp.uint32) * (position * _SPREAD | jnp.uint32(1)), dtype=jnp.uint32)
