"""One number an array, by which a restored array is known to be the one that was saved.

Storage formats check their own records, not what lies in them: a flipped bit in a compressed chunk can come back as
another weight. The sums are of integers modulo 2^32, so they do not depend on mesh, processes or order. Every device
sums what it holds and the host adds up: many small programs are in flight at once here, and if devices waited for each
other in them, a host with fewer threads than that would wait for ever.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SPREAD = np.uint32(0x9E3779B1)  # 2^32 over the golden ratio: neighbouring positions weigh very differently
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # of 8 bytes: two words


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each leaf of `tree` (arrays) by its path, such as `params/image/norm/scale`.

    Each word is weighed by an odd number that depends on its position, so that a change of one word, and nearly every
    exchange or change of several, changes the sum. Where leaves lie over several processes all of them must call.
    """
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    parts = [[part.data for part in _parts(leaf).addressable_shards] for _, leaf in named]
    sums = np.array([np.sum(part, dtype=np.uint32) for part in jax.device_get(parts)], np.uint32)
    spread = np.array([not getattr(leaf, "is_fully_addressable", True) for _, leaf in named], bool)
    if spread.any():  # what a process has for itself alone is whole already
        sums = np.where(spread, multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32), sums)
    return {path_of(path): int(value) for (path, _), value in zip(named, sums, strict=True)}


def differing(tree: Any, expected: Mapping[str, int]) -> list[str]:
    """Paths of the leaves of `tree` whose checksum is not the expected one; leaves without one are not looked at."""
    return [name for name, value in checksums(tree).items() if expected.get(name, value) != value]


def path_of(path: tuple) -> str:
    """A path in any pytree as text: keys, fields and positions joined by `/`."""
    names = [next(getattr(key, kind) for kind in ("key", "name", "idx") if hasattr(key, kind)) for key in path]
    return "/".join(str(name) for name in names)


def _parts(leaf: jax.Array) -> jax.Array:
    """The sum of each device's share of `leaf`, one number a device of its mesh; nothing from further copies."""
    placement = getattr(leaf, "sharding", None)
    if isinstance(placement, NamedSharding):
        return _sum_of_shares(placement.mesh, placement.spec)(leaf)
    return _sum_of_one(leaf)


@functools.cache
def _sum_of_shares(mesh: Mesh, spec: PartitionSpec):
    """The compiled function; leaves of one shape and placement share its programs."""
    names = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    others = tuple(axis for axis in mesh.axis_names if not any(axis in entry for entry in names))

    def share(x: jax.Array) -> jax.Array:
        entries = [*names, *[()] * (x.ndim - len(names))]
        starts = [jax.lax.axis_index(entry) * size if entry else 0 for entry, size in zip(entries, x.shape)]
        sizes = [jax.lax.axis_size(entry) * size if entry else size for entry, size in zip(entries, x.shape)]
        found = _sum(x, starts, sizes)
        first = jax.lax.axis_index(others) == 0 if others else True
        return jnp.where(first, found, 0)[None]

    placed = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(share, mesh=mesh, in_specs=spec, out_specs=placed, check_vma=False))


@jax.jit
def _sum_of_one(x: jax.Array) -> jax.Array:
    return _sum(x, [0] * x.ndim, x.shape)


def _sum(x: jax.Array, starts: list, sizes: list) -> jax.Array:
    """The sum of a block of an array of the given sizes, the block's first element at `starts`; uint32 scalar."""
    words = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    starts, sizes = [*starts, 0][: words.ndim], [*sizes, *words.shape[x.ndim :]]
    position = jnp.uint32(0)  # in row-major order
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        here = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + jnp.asarray(start, jnp.uint32)
        position = position * jnp.uint32(size) + here
    return jnp.sum(words.astype(jnp.uint32) * (position * _SPREAD | jnp.uint32(1)), dtype=jnp.uint32)
