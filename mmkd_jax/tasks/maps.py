"""Target maps: from a teacher's stored features to what the student regresses to, each an artefact with a hash.

A map is affine by tower, fitted once from the statistics that lie beside the features (or trained, see
`autoencoder`), and applied inside the training step. Widths, variances and common directions differ between teachers
by accident of their training; a map decides what of it counts.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from mmkd_jax import io
from mmkd_jax.data import npz
from mmkd_jax.data.feature_codec import TOWERS
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.errors import InputError, near
from mmkd_jax.losses.contrastive import normalise
from mmkd_jax.tasks.hadamard import hadamard

FLOOR = 1e-6  # of the mean variance: directions in which a teacher says nothing are not blown up
PARTS = ("shift", "matrix", "offset")


@dataclasses.dataclass(frozen=True, eq=False)
class TargetMap:
    """`(x - shift) matrix + offset` by tower, then scaled to unit length if `unit`.

    Attributes:
      kind: of `KINDS`, or `autoencoder`.
      teacher: whose features it maps.
      features: hash of the feature set that it was fitted to.
      unit: whether targets have unit length.
      shift: float32 `[width]` by tower.
      matrix: float32 `[width, out]` by tower.
      offset: float32 `[out]` by tower.
      made: how, JSON-like.
    """

    kind: str
    teacher: str
    features: str
    unit: bool
    shift: Mapping[str, np.ndarray]
    matrix: Mapping[str, np.ndarray]
    offset: Mapping[str, np.ndarray]
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def width(self) -> int:
        """Of the features it takes."""
        return self.matrix["image"].shape[0]

    @property
    def out(self) -> int:
        """Of the targets it gives."""
        return self.matrix["image"].shape[1]

    @property
    def hash(self) -> str:
        """Identity of what it does, not of how it was made."""
        digests = {name: io.sha256(np.asarray(x, "<f4").tobytes()) for name, x in self._arrays().items()}
        return io.hash_of({"kind": self.kind, "teacher": self.teacher, "unit": self.unit, **digests})

    def apply(self, tower: str, features: jax.Array) -> jax.Array:
        """Targets float32 `[n, out]` from features `[n, width]` of the `image` or `text` tower."""
        product = jnp.matmul(features - self.shift[tower], self.matrix[tower], precision=jax.lax.Precision.HIGHEST)
        mapped = product + self.offset[tower]
        return normalise(mapped) if self.unit else mapped

    def save(self, path: str | os.PathLike) -> None:
        """Writes one `.npz`, atomically."""
        meta = {k: getattr(self, k) for k in ("kind", "teacher", "features", "unit")} | {"made": {**self.made}}
        npz.save_artefact(path, self.hash, meta, **self._arrays())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TargetMap":
        """Reads a saved map.

        Raises:
          InputError: there is none, or it is damaged.
        """

        def make(arrays, meta):
            parts = {part: {tower: arrays[f"{part}_{tower}"] for tower in TOWERS} for part in PARTS}
            return cls(meta["kind"], meta["teacher"], meta["features"], meta["unit"], **parts, made=meta["made"])

        return npz.load_artefact(path, "target map", make, "fit it again")

    def _arrays(self) -> dict[str, np.ndarray]:
        return {f"{part}_{tower}": getattr(self, part)[tower] for part in PARTS for tower in TOWERS}


def fit(kind: str, features: FeatureSet) -> TargetMap:
    """The map of a kind for one teacher, from the statistics of its stored features.

    Kinds: `identity`; `unit` (unit length); `centre` (minus the tower's mean, then unit length); `standardise` (mean 0
    and variance 1 in each dimension); `phi_s` (PHI-S, arXiv 2410.01680: minus the mean, rotated so that every dimension
    has the same variance, one scale that makes it 1; distances keep their ratios); `whiten` (ZCA: covariance 1).

    Raises:
      InputError: an unknown kind, no present row, or a width without a Hadamard matrix (`phi_s`).
    """
    if kind not in KINDS:
        raise InputError(f"unknown target map {kind!r}; {near(kind, KINDS)}")
    shift, matrix = {}, {}
    for tower, statistics in features.statistics.items():
        if not statistics["count"]:
            raise InputError(f"{features.path} has no {tower} features to fit a target map to; emit some")
        centred, make = KINDS[kind]
        mean = np.asarray(statistics["mean"], np.float64)
        shift[tower] = (mean if centred else np.zeros_like(mean)).astype(np.float32)
        with threadpool_limits(1):  # the same bits on any number of cores, and quick on a busy machine
            matrix[tower] = make(np.asarray(statistics["covariance"], np.float64)).astype(np.float32)
    offset = {tower: np.zeros(features.width, np.float32) for tower in TOWERS}
    return TargetMap(kind, features.teacher, features.hash, kind in ("unit", "centre"), shift, matrix, offset)


def load(folder: str | os.PathLike, features: Mapping[str, FeatureSet]) -> dict[str, TargetMap]:
    """The maps `folder/TEACHER.npz` of these teachers.

    Raises:
      InputError: one is missing, damaged, or of another teacher or width.
    """
    found = {name: TargetMap.load(io.as_path(folder) / f"{name}.npz") for name in features}
    for name, one in found.items():
        if (one.teacher, one.width) != (features[name].teacher, features[name].width):
            raise InputError(
                f"{io.as_path(folder) / f'{name}.npz'} maps {one.width}-wide features of {one.teacher}, those of "
                f"{name} are {features[name].width} wide; fit it again"
            )
    return found


def _same(covariance: np.ndarray) -> np.ndarray:
    return np.eye(len(covariance))


def _standardise(covariance: np.ndarray) -> np.ndarray:
    variances = np.diagonal(covariance)
    return np.diag(1.0 / np.sqrt(np.maximum(variances, FLOOR * variances.mean())))


def _phi_s(covariance: np.ndarray) -> np.ndarray:
    eigenvalues, basis = np.linalg.eigh(covariance)
    return basis @ hadamard(len(covariance)).T / np.sqrt(eigenvalues.mean())


def _whiten(covariance: np.ndarray) -> np.ndarray:
    eigenvalues, basis = np.linalg.eigh(covariance)
    return basis / np.sqrt(np.maximum(eigenvalues, FLOOR * eigenvalues.mean())) @ basis.T


# kind: whether the mean is taken off, and the matrix from the covariance
KINDS = {
    "identity": (False, _same),
    "unit": (False, _same),
    "centre": (True, _same),
    "standardise": (True, _standardise),
    "phi_s": (True, _phi_s),
    "whiten": (True, _whiten),
}
