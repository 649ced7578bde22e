"""Hadamard matrices: orthogonal, with all entries of one size."""

import numpy as np

from mmkd_jax.errors import InputError


def hadamard(n: int) -> np.ndarray:
    """An orthogonal matrix float64 `[n, n]` whose entries are all +-1 / sqrt(n).

    Sylvester's doubling of Paley's first construction, which exists for q + 1 where q is a prime of the form 4k + 3:
    all powers of two, and the usual widths beside them (384, 640 and 768 are 12 x 32, 20 x 32 and 12 x 64).

    Raises:
      InputError: neither construction reaches `n`.
    """
    matrix, size = None, n
    while matrix is None and size >= 1:
        matrix = np.ones((1, 1)) if size == 1 else _paley(size)
        if matrix is None:
            if size % 2:
                raise InputError(f"no Hadamard matrix of width {n} is at hand; take another target map than phi_s")
            size //= 2
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(n)


def _paley(n: int) -> np.ndarray | None:
    """Entries +-1 `[n, n]` if n - 1 is a prime of the form 4k + 3, else None (Paley 1933, lemma 2)."""
    q = n - 1
    if q % 4 != 3 or any(q % d == 0 for d in range(2, int(q**0.5) + 1)):
        return None
    squares = set(np.arange(1, q) ** 2 % q)
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
    skew = np.zeros((n, n))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(np.arange(q)[:, None] - np.arange(q)) % q]
    return skew + np.eye(n)
