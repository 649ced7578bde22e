"""Row indices: which rows of a set are used, in which order, without touching its shards.

Splits, filters, subsamples and exclusions are all this one thing: a small file with a hash.
"""

import dataclasses
import io as std_io
import json
import os
import zipfile
from typing import Any

import numpy as np

from mmkd_jax import io
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
        meta = {"set_hash": self.set_hash, "name": self.name, "made": self.made, "hash": self.hash}
        io.write_bytes(path, npz_bytes(rows=self.rows, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RowIndex":
        """Reads a saved index.

        Raises:
          InputError: there is none, or it is damaged.
        """
        arrays = read_npz(path, "row index")
        try:
            meta = json.loads(arrays["meta"].tobytes())
            index = cls(arrays["rows"], meta["set_hash"], meta["name"], meta["made"])
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} is not a row index ({error}); make it again") from error
        if index.hash != meta["hash"]:
            raise InputError(f"{path} does not have the hash that it states; make it again")
        return index


def npz_bytes(**arrays: np.ndarray) -> bytes:
    """An uncompressed `.npz` whose bytes depend on the arrays alone."""
    buffer = std_io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_npz(path: str | os.PathLike, what: str) -> dict[str, np.ndarray]:
    """All arrays of an `.npz`.

    Raises:
      InputError: it is missing or damaged.
    """
    path = io.as_path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; it should hold the {what}")
    try:
        with np.load(std_io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} (the {what}) is damaged: {error}; copy or write it again") from error
