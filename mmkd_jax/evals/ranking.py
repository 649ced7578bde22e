"""Ranks of right items in a large pool, in memory that does not grow with queries times pool.

Cosines are summed in float64 and rounded to float32, so that equal items tie wherever they stand; equal similarities
rank by index, so that a model that tells nothing apart scores like chance. Similarity and index together are one whole
number, whose order is the ranking: the rank of an item is a count of larger numbers, block by block.
"""

import dataclasses

import numpy as np
from scipy.sparse import csr_array

from mmkd_jax.errors import InputError
from mmkd_jax.evals.features import unit

SHOWN = 10  # how many best items are listed
QUERIES, ITEMS = 512, 16384  # of a block: its numbers take 64 MiB


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What became of each query.

    Attributes:
      ranks: of its best right item, int64 `[q]` from 1.
      precision: average precision over its right items, float64 `[q]`.
      best: the best items, int64 `[q, min(SHOWN, items)]`.
      cosines: theirs, float32.
    """

    ranks: np.ndarray
    precision: np.ndarray
    best: np.ndarray
    cosines: np.ndarray


def search(queries, pool, right, *, expand=None, chunk: int = QUERIES, block: int = ITEMS) -> Ranking:
    """Ranks a pool for each query.

    Args:
      queries: features `[q, embed]`.
      pool: features `[p, embed]`.
      right: sparse or dense bool `[q, items]`, at least one True a row.
      expand: int `[items]`, pool number of each item; the pool itself when None.
      chunk: queries at a time.
      block: items at a time.

    Raises:
      InputError: a query without a right item, or shapes that do not fit.
    """
    queries, pool = unit(queries), unit(pool)
    expand = np.arange(len(pool)) if expand is None else np.asarray(expand)
    right = csr_array(right)
    if right.shape != (len(queries), len(expand)):
        raise InputError(
            f"right items of shape {right.shape} do not fit {len(queries)} queries and {len(expand)} items"
        )
    right.eliminate_zeros()
    if not np.diff(right.indptr).all():
        raise InputError("a retrieval query has no right answer in the pool")
    parts = []
    for start in range(0, len(queries), chunk):
        stop = min(start + chunk, len(queries))
        first, last = right.indptr[start], right.indptr[stop]
        owner = np.repeat(np.arange(stop - start), np.diff(right.indptr[start : stop + 1]))
        parts.append(_chunk(queries[start:stop], pool, expand, owner, right.indices[first:last], block))
    return Ranking(*(np.concatenate(part) for part in zip(*parts)))


def _chunk(queries, pool, expand, owner, items, block: int) -> tuple[np.ndarray, ...]:
    """`Ranking`'s fields for a few queries, whose right `items` `[m]` belong to the queries `owner` `[m]`."""
    exact = queries.astype(np.float64)
    levels = _keys(_paired(exact, pool, owner, expand[items]), items)
    ahead = np.zeros(len(items), np.int64)
    best = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(expand), block):
        numbers, place = np.unique(expand[start : start + block], return_inverse=True)
        similar = (exact @ pool[numbers].astype(np.float64).T).astype(np.float32)[:, place]
        keys = _keys(similar, np.arange(start, start + similar.shape[1]))
        for part in _slices(len(items), len(queries)):
            ahead[part] += np.sum(keys[owner[part]] > levels[part, None], axis=1)
        inside = np.flatnonzero((items >= start) & (items < start + block))  # an item is not ahead of itself
        ahead[inside] -= keys[owner[inside], items[inside] - start] > levels[inside]
        shown = min(SHOWN, keys.shape[1])
        found = np.concatenate([best, np.partition(keys, keys.shape[1] - shown, axis=1)[:, -shown:]], axis=1)
        best = np.sort(found, axis=1)[:, ::-1][:, :SHOWN]
    order = np.lexsort((ahead, owner))
    number = 1 + np.arange(len(items)) - np.searchsorted(owner, owner)  # of a query's right items in their order
    counts = np.bincount(owner)
    precision = np.bincount(owner, weights=number / (1 + ahead[order])) / counts
    ranks = 1 + ahead[order][np.cumsum(counts) - counts]
    return ranks, precision, *_unpacked(best)


def _paired(exact, pool, owner, numbers) -> np.ndarray:
    """Float32 cosines of pairs of a query and a pool row."""
    found = np.empty(len(owner), np.float32)
    for part in _slices(len(owner), 4096):
        found[part] = np.einsum("ij,ij->i", exact[owner[part]], pool[numbers[part]].astype(np.float64))
    return found


def _slices(n: int, size: int):
    return (slice(start, start + size) for start in range(0, n, size))


def _keys(similar: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Int64 that grows with similarity and, among equal ones, falls with the item's number."""
    bits = (similar + np.float32(0)).view(np.int32).astype(np.int64)  # + 0: both zeros are one
    ordered = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (ordered << 32) + (0x7FFFFFFF - items)


def _unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items and similarities of `_keys`."""
    ordered = keys >> 32
    bits = np.where(ordered < 0, -ordered | 0x80000000, ordered).astype(np.uint32)
    return 0x7FFFFFFF - (keys & 0xFFFFFFFF), bits.view(np.float32)
