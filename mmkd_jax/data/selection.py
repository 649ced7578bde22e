"""Selections: which teachers a pair keeps, as a file of its own beside features that hold them all."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import npz
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.errors import InputError, near


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """A bit for each pair and teacher.

    Attributes:
      kept: bool `[rows of the set, teachers]`.
      teachers: names, in the order of the columns.
      pairs_hash: of the set.
      made: how: scorer, thresholds, hashes of the features, JSON-like.
    """

    kept: np.ndarray
    teachers: tuple[str, ...]
    pairs_hash: str
    made: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Identity of the bits, not of how they were made."""
        told = json.dumps([self.pairs_hash, list(self.teachers), list(self.kept.shape)])
        return io.sha256(told.encode() + np.packbits(self.kept).tobytes())

    def of(self, teacher: str) -> np.ndarray:
        """Bool `[rows of the set]`.

        Raises:
          InputError: the selection does not know this teacher.
        """
        if teacher not in self.teachers:
            raise InputError(f"the selection does not know teacher {teacher!r}; {near(teacher, self.teachers)}")
        return self.kept[:, self.teachers.index(teacher)]

    def check(self, pairs: PairsSet, teachers: Sequence[str]) -> "Selection":
        """Itself, if it belongs to this set and knows these teachers.

        Raises:
          InputError: it does not.
        """
        if self.pairs_hash != pairs.hash or len(self.kept) != len(pairs):
            raise InputError(f"the selection was made for another set than {pairs.path}; select again")
        for name in teachers:
            self.of(name)
        return self

    def counts(self, pairs: PairsSet) -> dict[str, dict[str, int]]:
        """Kept pairs by modality and teacher."""
        modality = np.asarray(pairs.table["modality"])
        return {
            name: dict(zip(self.teachers, self.kept[modality == index].sum(axis=0).tolist(), strict=True))
            for index, name in enumerate(pairs.modalities)
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes one `.npz`, atomically."""
        meta = {"teachers": list(self.teachers), "pairs": self.pairs_hash, "rows": len(self.kept), "made": self.made}
        npz.save_artefact(path, self.hash, meta, kept=np.packbits(self.kept))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Selection":
        """Reads a saved selection.

        Raises:
          InputError: there is none, or it is damaged.
        """

        def make(arrays, meta):
            shape = meta["rows"], len(meta["teachers"])
            bits = np.unpackbits(arrays["kept"], count=shape[0] * shape[1]).astype(bool)
            return cls(bits.reshape(shape), tuple(meta["teachers"]), meta["pairs"], meta["made"])

        return npz.load_artefact(path, "selection", make, "select again")
