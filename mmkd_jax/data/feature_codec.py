"""What feature sets are made of: blocks of rows as records, and statistics that merge exactly."""

import dataclasses

import ml_dtypes
import numpy as np
from scipy.linalg.blas import dsyrk

from mmkd_jax.data import example
from mmkd_jax.errors import InputError

SCHEMA = 1
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
TOWERS = ("image", "text")
PIECE = 2048  # vectors whose moments are taken at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Features of consecutive rows; nothing is stored for absent ones.

    Attributes:
      first: number of the first row.
      ids: 32 hex digits a row, one after the other.
      present: bool `[rows]`.
      counts: int64 `[rows]` captions of each row, 0 where it is absent.
      image: `[present rows, views, width]` in the stored type.
      text: `[captions of present rows, width]` in the stored type.
    """

    first: int
    ids: bytes
    present: np.ndarray
    counts: np.ndarray
    image: np.ndarray
    text: np.ndarray

    @property
    def size(self) -> int:
        """Bytes of the features."""
        return self.image.nbytes + self.text.nbytes

    def encode(self) -> bytes:
        """The block as a `tf.train.Example`."""
        return example.encode(
            {
                "first": self.first,
                "ids": self.ids,
                "present": self.present.astype(np.uint8).tobytes(),
                "counts": np.asarray(self.counts, np.int64),
                "shape": np.asarray(self.image.shape, np.int64),
                "image": self.image.tobytes(),
                "text": self.text.tobytes(),
            }
        )

    @classmethod
    def decode(cls, data: bytes, dtype: np.dtype) -> "Block":
        """The block of a record.

        Raises:
          ValueError, KeyError, IndexError: the bytes are no block of that type.
        """
        f = example.decode(data)
        shape = tuple(f["shape"])
        return cls(
            first=f["first"][0],
            ids=f["ids"][0],
            present=np.frombuffer(f["present"][0], np.uint8).astype(bool),
            counts=np.asarray(f["counts"], np.int64),
            image=np.frombuffer(f["image"][0], dtype).reshape(shape),
            text=np.frombuffer(f["text"][0], dtype).reshape(-1, shape[-1]),
        )

    def check(self, width: int, views: int) -> None:
        """Refuses a block that nobody can train on.

        Raises:
          InputError: sizes contradict each other, or a present row is not finite or all zeros.
        """
        present = int(self.present.sum())
        if self.image.shape != (present, views, width):
            wanted = (present, views, width)
            raise InputError(f"image features are {self.image.shape}, not (rows, views, width) = {wanted}")
        if len(self.counts) != len(self.present) or len(self.text) != self.counts.sum():
            raise InputError(f"there are {len(self.text)} text features for {int(self.counts.sum())} captions")
        if len(self.ids) != 32 * len(self.present):
            raise InputError(f"there are {len(self.ids) // 32} ids for {len(self.present)} rows")
        for tower in TOWERS:
            values = getattr(self, tower).astype(np.float32)
            if not np.isfinite(values).all():
                raise InputError(f"{tower} features of a present row are NaN or infinite")
            if not np.any(values, axis=-1).all():
                raise InputError(f"{tower} features of a present row are all zeros")


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred second moment of vectors.

    Attributes:
      count: how many.
      mean: float64 `[width]`, zeros without any.
      scatter: float64 `[width, width]`, the sum of outer products of deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> "Moments":
        """Moments of the rows of `x`, `[n, width]`, worked through in pieces."""
        found = cls(0, np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1])))
        for start in range(0, len(x), PIECE):
            found = found.merge(cls._of_piece(x[start : start + PIECE]))
        return found

    @classmethod
    def _of_piece(cls, x: np.ndarray) -> "Moments":
        x = np.asarray(x, np.float64)
        mean = x.mean(0)
        half = dsyrk(1.0, np.asfortranarray((x - mean).T))  # the upper triangle alone, in half the time
        return cls(len(x), mean, half + np.triu(half, 1).T)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both together (Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm")."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Population covariance, float64 `[width, width]`."""
        return self.scatter / max(self.count, 1)
