"""The order of a run: a block shuffle in closed form.

An epoch permutes blocks of consecutive rows, takes them in windows, and permutes the rows of a window. Every epoch is
a permutation of all rows; the rows of a stretch of `block * window` positions lie in `window` blocks, so that reading
stays local; and the row at any position of any epoch is computed from (n, seed, position) alone, at a cost that does
not grow with the position.

Permutations sort the raw 64-bit stream of Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
whose values NumPy keeps fixed across versions, unlike those of `Generator.permutation`.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from mmkd_jax.errors import InputError


def permutation(count: int, *key: int | str) -> np.ndarray:
    """A permutation of `range(count)`, int64, that depends on `count` and `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    stream = np.random.Philox(key=np.frombuffer(digest, np.uint64)).random_raw(count)
    return np.argsort(stream, kind="stable")


@functools.lru_cache(maxsize=8)
def _blocks(seed: int, epoch: int, count: int) -> np.ndarray:
    return permutation(count, "blocks", seed, epoch)


@functools.lru_cache(maxsize=32)
def _window(seed: int, epoch: int, window: int, count: int) -> np.ndarray:
    return permutation(count, "rows", seed, epoch, window)


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of `n` rows under `seed`, in blocks of `block` rows and windows of `window` blocks."""

    n: int
    seed: int
    block: int = 256
    window: int = 16

    def __post_init__(self):
        if min(self.n, self.block, self.window) < 1:
            raise InputError(
                f"an order needs at least one row, block and window, not n={self.n}, block={self.block}, "
                f"window={self.window}"
            )

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and visits at positions of the endless sequence of epochs.

        Args:
          positions: int64 `[m]`, from 0.

        Returns:
          int64 `[m]` row numbers below n, and int64 `[m]` visits: how often the row was seen before (the epoch).
        """
        positions = np.asarray(positions, np.int64)
        epochs, places = np.divmod(positions, self.n)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._rows(int(epoch), places[here])
        return rows, epochs

    def _rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Rows at `places` (below n) of one epoch. Only the last block may be shorter, so that starts are products."""
        count = -(-self.n // self.block)
        missing = count * self.block - self.n
        blocks = _blocks(self.seed, epoch, count)
        span = self.block * self.window
        short = int(np.flatnonzero(blocks == count - 1)[0]) // self.window  # the window that holds the short block
        shifted = (places + missing) // span
        windows = np.where(shifted > short, shifted, places // span)
        rows = np.empty_like(places)
        for window in np.unique(windows):
            here = windows == window
            members = blocks[window * self.window : (window + 1) * self.window]
            size = len(members) * self.block - (missing if window == short else 0)
            start = int(window) * span - (missing if window > short else 0)
            inside = _window(self.seed, epoch, int(window), size)[places[here] - start]
            rows[here] = self._row_of(members, inside, count, missing)
        return rows

    def _row_of(self, members: np.ndarray, inside: np.ndarray, count: int, missing: int) -> np.ndarray:
        """Row of each place within a window's blocks, one after the other."""
        sizes = np.where(members == count - 1, self.block - missing, self.block)
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, inside, side="right")
        return members[which] * self.block + inside - (ends - sizes)[which]


def rows_at(
    step: int, batch: int, n: int, seed: int, block: int = 256, window: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and visits of the global batch of `step`, int64 `[batch]` each; batches run across epoch borders."""
    return Order(n, seed, block, window).at(np.arange(step * batch, (step + 1) * batch, dtype=np.int64))
