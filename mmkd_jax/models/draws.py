"""Random bits of samples, the same whether a batch is encoded at once or in parts.

Modules ask here for bits whose first dimension is the sample. While a part of a batch is encoded, `part` says which,
and they get that part of what the whole batch would get. Every sample has a key of its own, by its place in the whole
batch, so that a part makes its own bits and no others: those of the whole batch would not fit beside it.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_PART: contextvars.ContextVar = contextvars.ContextVar("part", default=None)


@contextlib.contextmanager
def part(number: jax.Array, shape: tuple[int, int, int]) -> Iterator[None]:
    """While traced within, `bits` are those of part `number` of a batch of samples `(groups, parts, samples)`."""
    token = _PART.set((number, shape))
    try:
        yield
    finally:
        _PART.reset(token)


def bits(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Random bits of `shape`, samples first."""
    if _PART.get() is None:
        place = jnp.arange(shape[0])
    else:
        number, (groups, parts, samples) = _PART.get()
        if shape[0] != groups * samples:
            raise ValueError(f"bits of {shape[0]} rows in a part of {groups * samples} samples")
        first = (jnp.arange(groups) * parts + number) * samples
        place = (first[:, None] + jnp.arange(samples)).reshape(-1)
    return jax.vmap(lambda one: jax.random.bits(jax.random.fold_in(key, one), shape[1:], dtype))(place)
