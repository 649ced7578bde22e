"""A folder of emitted features as a model to evaluate: what stage 2 learns from, judged before anything is trained.

It knows the pictures of its pairs set (view 0, cut as its view policy says, in the precision that it was stored in) and
their captions, and nothing else. So it serves the tasks that need no prompts: retrieval, linear probe, neighbours.
"""

import os
from collections.abc import Iterable, Sequence

import numpy as np

from mmkd_jax.data.features import FeatureSet
from mmkd_jax.errors import InputError


class FeatureFolder:
    """Emitted features of one teacher, in the place of an encoder.

    Args:
      path: the folder, of `mmkd emit`.
      name: what to call it in results; `features:` and the teacher's name by default.

    Raises:
      InputError: there are no finished features.
    """

    def __init__(self, path: str | os.PathLike, name: str = ""):
        found = FeatureSet.open(path, None)
        self.name, self.checkpoint = name or f"features:{found.teacher}", os.fspath(found.path)
        self.identity, self.logit_scale, self.spec = found.hash, float(found.manifest["logit_scale"]), None

    def open(self, pairs) -> "StoredFeatures":
        """The features of `pairs`, from which they must have been made."""
        return StoredFeatures(self.name, FeatureSet.open(self.checkpoint, pairs), pairs)


class StoredFeatures:
    """The form of `features.Features`, with what is stored in place of what an encoder gives."""

    def __init__(self, name: str, stored: FeatureSet, pairs):
        self._name, self._stored, self.pairs = name, stored, pairs
        self._captions: dict[int, list[str]] = {}
        self._places: dict[str, tuple[int, int]] = {}  # of texts: row and number of the caption

    def add_rows(self, rows: Iterable[np.ndarray], layer: str = "embedding") -> None:
        """Proves that these rows are there."""
        if layer != "embedding":
            raise InputError(f"{self._name} are projected features only; leave the probe layer at embedding")
        for one in rows:
            self._read(one)

    def images(self, rows: np.ndarray, layer: str = "embedding") -> np.ndarray:
        """View 0 of `rows`, float32 `[n, width]`."""
        self.add_rows((), layer)
        return self._read(rows)["image"]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Features of captions that `captions` has given, float32 `[m, width]`."""
        for text in texts:
            if text not in self._places:
                raise InputError(f"{self._name} has no feature of the text {text[:60]!r}, only of its pairs' captions")
        places = np.array([self._places[text] for text in texts], np.int64).reshape(-1, 2)
        return self._read(places[:, 0], places[:, 1])["text"]

    def captions(self, row: int) -> list[str]:
        """The captions of a row."""
        row = int(row)
        if row not in self._captions:
            self._captions[row] = list(self.pairs.read(row).captions)
            for number, text in enumerate(self._captions[row]):
                self._places.setdefault(text, (row, number))
        return self._captions[row]

    def _read(self, rows, captions=None) -> dict[str, np.ndarray]:
        rows = np.asarray(rows, np.int64)
        found = self._stored.read(rows, np.zeros_like(rows), captions)
        if not found["present"].all():
            first = rows[int(np.argmin(found["present"]))]
            raise InputError(
                f"{self._name} lacks {int((~found['present']).sum())} of {len(rows)} rows, first row {first} (id "
                f"{self.pairs.table['id'][first]}); emit the features of these rows too"
            )
        return found
