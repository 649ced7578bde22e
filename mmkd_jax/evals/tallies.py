"""Weighted counts of rows under many resamples at once: sparse tables of rows times the resamples' weights.

A product with a sparse table adds whole rows of weights, a resample beside the other, and touches each row only where
it counts. Counts are whole numbers, so that no order of adding them matters.
"""

import numpy as np
from scipy import sparse


def cells(number: int, cell, weights: np.ndarray) -> np.ndarray:
    """How many drawn rows lie in each cell, int64 `[resamples, number]`.

    Args:
      number: of cells.
      cell: int `[n]`, each row's; negative for none.
      weights: counts `[resamples, n]`.
    """
    cell, columns = np.asarray(cell), _columns(weights)
    rows = np.flatnonzero(cell >= 0)
    table = _table(cell[rows], rows, np.ones(len(rows)), (number, len(cell)), columns.dtype)
    return np.ascontiguousarray((table @ columns).T, np.int64)


def won(positive, scores, weights: np.ndarray) -> np.ndarray:
    """Twice the drawn pairs of a positive and a negative row that are ranked right, ties half: int64 `[resamples]`.

    Args:
      positive: bool `[n]`.
      scores: float `[n]`.
      weights: counts `[resamples, n]`.
    """
    positive, scores, columns = np.asarray(positive, bool), np.asarray(scores), _columns(weights)
    levels, hits = _positives(positive, scores, columns)
    rows = np.flatnonzero(~positive)
    above = np.searchsorted(levels, scores[rows])  # the lowest score of a positive that is not below the negative's
    rows, above = rows[above < len(levels)], above[above < len(levels)]
    # twice the negatives below, and once those at the same height: from level to level a negative between them adds 2,
    # one at the height of a level adds 1 there and 1 at the next
    tied = levels[above] == scores[rows]
    later = tied & (above + 1 < len(levels))
    table = _table(
        np.concatenate([above, above[later] + 1]),
        np.concatenate([rows, rows[later]]),
        np.concatenate([2 - tied.astype(np.int64), np.ones(later.sum(), np.int64)]),
        (len(levels), len(positive)),
        columns.dtype,
    )
    below = table @ columns
    np.cumsum(below, axis=0, out=below)
    return np.einsum("ij,ij->j", below, hits, dtype=np.float64).astype(np.int64)  # exact below 2 ** 53


def precision(positive, scores, weights: np.ndarray) -> np.ndarray:
    """Sum over the drawn positives of the precision at their score, float64 `[resamples]`; arguments as of `won`."""
    positive, columns = np.asarray(positive, bool), _columns(weights)
    scores = -np.asarray(scores)
    levels, hits = _positives(positive, scores, columns)
    step = np.searchsorted(levels, scores)
    rows = np.flatnonzero(step < len(levels))
    shape = (len(levels), len(positive))
    reached = _table(step[rows], rows, np.ones(len(rows)), shape, columns.dtype) @ columns
    reached = np.cumsum(reached, axis=0, dtype=np.float64)
    found = np.cumsum(hits, axis=0, dtype=np.float64)
    np.divide(found, reached, out=found, where=reached > 0)
    return np.einsum("ij,ij->j", found, hits, dtype=np.float64)


def _columns(weights: np.ndarray) -> np.ndarray:
    """Weights `[n, resamples]`, wide enough for their sums; as they are where they were drawn."""
    weights = np.asarray(weights)
    return np.ascontiguousarray(weights.T, np.result_type(weights.dtype, np.int32))


def _positives(positive, scores, columns) -> tuple[np.ndarray, np.ndarray]:
    """Different scores of the positives, ascending, and how many are drawn at each, `[levels, resamples]`."""
    levels, level = np.unique(scores[positive], return_inverse=True)
    rows = np.flatnonzero(positive)
    table = _table(level, rows, np.ones(len(rows)), (len(levels), len(positive)), columns.dtype)
    return levels, table @ columns


def _table(rows, columns, values, shape: tuple[int, int], dtype) -> sparse.csr_array:
    return sparse.csr_array((np.asarray(values, dtype), (rows, columns)), shape=shape)
