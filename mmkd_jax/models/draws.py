"""Random bits of samples, the same whether a batch is encoded at once or in parts.

Modules ask here for bits whose first dimension is the sample. While a part of a batch is encoded, `part` says which,
and they get that part of what the whole batch would get. (JAX's generator is a function of key and place in the array:
no more bits are made than are used where the compiler fuses the choice into their making.)
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

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
        return jax.random.bits(key, shape, dtype)
    number, (groups, parts, samples) = _PART.get()
    if shape[0] != groups * samples:
        raise ValueError(f"bits of {shape[0]} rows in a part of {groups * samples} samples")
    whole = jax.random.bits(key, (groups, parts, samples, *shape[1:]), dtype)
    return jax.lax.dynamic_index_in_dim(whole, number, 1, keepdims=False).reshape(shape)
