"""Row indices: which rows of a set are used, in which order, without touching its shards.

Splits, filters, subsamples and exclusions are all this one thing: a small file with a hash.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import npz
from mmkd_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class RowIndex:
    """Rows of the set with hash `set_hash`.

    Attributes:
      rows: int64 `[n]` row numbers.
      set_hash: hash of the set that the numbers belong to.
      name: what the index is called (`busi.train`).
      made: JSON-like record of how it was made.
    """

    rows: np.ndarray
    set_hash: str
    name: str
    made: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        rows = np.asarray(self.rows)
        if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
            raise InputError(f"row index {self.name!r} holds {rows.dtype} {list(rows.shape)}, not whole numbers [n]")
        if rows.size and rows.min() < 0:
            raise InputError(f"row index {self.name!r} holds a negative row")
        object.__setattr__(self, "rows", rows.astype(np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hash(self) -> str:
        """Identity of the rows and of the set that they belong to, not of name or origin."""
        return io.sha256(self.set_hash.encode() + b"\0" + self.rows.astype("<i8").tobytes())

    def check(self, count: int) -> None:
        """Refuses rows that a set of `count` rows does not have.

        Raises:
          InputError: there are some.
        """
        if len(self) and self.rows.max() >= count:
            raise InputError(f"row index {self.name!r} reaches row {self.rows.max()}, the set has {count} rows")

    def save(self, path: str | os.PathLike) -> None:
        """Writes one `.npz` file, atomically, the same bytes every time."""
        meta = {"set_hash": self.set_hash, "name": self.name, "made": self.made}
        npz.save_artefact(path, self.hash, meta, rows=self.rows)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RowIndex":
        """Reads a saved index.

        Raises:
          InputError: there is none, or it is damaged.
        """

        def make(arrays, meta):
            return cls(arrays["rows"], meta["set_hash"], meta["name"], meta["made"])

        return npz.load_artefact(path, "row index", make, "make it again")
