"""What feature sets are made of: blocks of rows as records, and statistics that merge exactly."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from scipy.linalg.blas import dsyrk
from threadpoolctl import ThreadpoolController

from mmkd_jax.data import example
from mmkd_jax.errors import InputError

SCHEMA = 1
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
TOWERS = ("image", "text")
PIECE = 1024  # vectors whose moments are taken at a time
_INFINITE = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype("<f2"): 0x7C00, np.dtype("<f4"): 0x7F800000}  # its bits


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
      places: of a block that was read: where in its record `image` and `text` begin, bytes.
    """

    first: int
    ids: bytes
    present: np.ndarray
    counts: np.ndarray
    image: np.ndarray
    text: np.ndarray
    places: tuple[int, int] = (0, 0)

    def encode(self) -> list[bytes | memoryview]:
        """The block as a `tf.train.Example` in pieces; the features are not copied."""
        return example.pieces(
            {
                "first": self.first,
                "ids": self.ids,
                "present": self.present.astype(np.uint8).tobytes(),
                "counts": np.asarray(self.counts, np.int64),
                "shape": np.asarray(self.image.shape, np.int64),
                "image": _bytes(self.image),
                "text": _bytes(self.text),
            }
        )

    @classmethod
    def decode(cls, data: bytes | memoryview, dtype: np.dtype) -> "Block":
        """The block of a record, whose features are read where they lie, whether aligned or not.

        Raises:
          ValueError, KeyError, IndexError: the bytes are no block of that type.
        """
        data = memoryview(data)
        entries = example.entries(data)
        f = {name: example.value(data[start:stop]) for name, (start, stop) in entries.items()}
        image, text, shape = f["image"][0], f["text"][0], tuple(f["shape"])
        return cls(
            first=f["first"][0],
            ids=bytes(f["ids"][0]),
            present=np.frombuffer(f["present"][0], np.uint8).astype(bool),
            counts=np.asarray(f["counts"], np.int64),
            image=np.frombuffer(image, dtype).reshape(shape),
            text=np.frombuffer(text, dtype).reshape(-1, shape[-1]),
            places=(entries["image"][1] - len(image), entries["text"][1] - len(text)),
        )

    def check(self, width: int, views: int) -> None:
        """Refuses a block whose sizes contradict each other; `check_values` looks at the rest.

        Raises:
          InputError: they do.
        """
        present = np.count_nonzero(self.present)
        if self.image.shape != (present, views, width):
            wanted = (present, views, width)
            raise InputError(f"image features are {self.image.shape}, not (rows, views, width) = {wanted}")
        if len(self.counts) != len(self.present) or len(self.text) != self.counts.sum():
            raise InputError(f"there are {len(self.text)} text features for {int(self.counts.sum())} captions")
        if len(self.ids) != 32 * len(self.present):
            raise InputError(f"there are {len(self.ids) // 32} ids for {len(self.present)} rows")

    def check_values(self) -> None:
        """Refuses features that nobody can train on.

        Raises:
          InputError: a present row is not finite or all zeros.
        """
        for tower in TOWERS:
            if what := unusable(getattr(self, tower)):
                raise InputError(f"{tower} features of a present row {what}")


def unusable(x: np.ndarray) -> str:
    """Why nobody can train on some of these vectors in a stored type, `[..., width]`; empty if nothing is wrong."""
    if _any_large(x) and _any_infinite(_aligned(x)):
        return "are NaN or infinite"
    return "are all zeros" if _any_zero(x) else ""


def _any_large(x: np.ndarray) -> bool:
    """Whether some number is 2 or more, infinite or NaN: all those have the highest bit of their exponent set.

    One look at all bits together tells, in whole words from the first aligned one on; and there are none among unit
    vectors, where nothing else need be looked at.
    """
    raw, size = x.reshape(-1).view(np.uint8), x.dtype.itemsize
    skip = -raw.__array_interface__["data"][0] % 8
    words = raw[skip : len(raw) - (len(raw) - skip) % 8].view("<u8")
    bit = 0x4000400040004000 if size == 2 else 0x4000000040000000
    ends = int.from_bytes(raw[:8].tobytes(), "little") | int.from_bytes(raw[-8:].tobytes(), "little")
    return bool(int(np.bitwise_or.reduce(words)) & bit >> 8 * (skip % size) or ends & bit)


def _aligned(x: np.ndarray) -> np.ndarray:
    return x if x.flags.aligned else np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)


def _bytes(x: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8))


def _any_infinite(x: np.ndarray) -> bool:
    """Whether some number is infinite or NaN; no copy is made, as every block that is read is looked at.

    Without their sign, the bits of those are the largest. With it they are the largest unsigned integers, and without
    it the largest signed ones.
    """
    size = x.dtype.itemsize
    least = _INFINITE[x.dtype]
    positive, negative = (x.view(f"<{kind}{size}").max(initial=0) for kind in "iu")
    return bool(positive >= least or negative >= least | 1 << 8 * size - 1)


def _any_zero(x: np.ndarray) -> bool:
    """Whether a vector is all zeros; only those that begin with one are looked at."""
    first = x.view(f"<u{x.dtype.itemsize}")[..., 0] << 1  # without its sign
    return np.count_nonzero(first) < first.size and not _aligned(x)[first == 0].any(axis=-1).all()


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred second moment of vectors.

    Attributes:
      count: how many.
      mean: float64 `[width]`, zeros without any.
      lower: float64 `[width * (width + 1) / 2]`, the sum of outer products of deviations from the mean: the rows of its
        lower triangle, one after the other.
    """

    count: int
    mean: np.ndarray
    lower: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> "Moments":
        """Moments of the rows of `x`, `[n, width]`, worked through in pieces on one core.

        Deviations are first taken from the mean of the first piece, so that all pieces add to one matrix in place.
        """
        count, width = x.shape
        if not count:
            return cls(0, np.zeros(width), np.zeros(width * (width + 1) // 2))
        total, upper = np.zeros(width), np.zeros((width, width), order="F")
        room = np.empty((min(PIECE, count), width))
        with _libraries().limit(limits=1):  # more threads wait for each other, and their number changes the last bits
            for start in range(0, count, PIECE):
                values = x[start : start + PIECE]
                piece = room[: len(values)]
                piece[...] = _wide(values)
                if not start:
                    around = piece.mean(0)
                piece -= around
                total += piece.sum(0)
                upper = dsyrk(1.0, piece.T, beta=1.0, c=upper, overwrite_c=True)
        beyond = total / count
        lower, outer = upper.T[_triangle(width)], _outer(beyond)
        outer *= count
        lower -= outer
        return cls(count, around + beyond, lower)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both together (Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm")."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        delta = other.mean - self.mean
        lower = _outer(delta)
        lower *= self.count * other.count / count
        lower += self.lower
        lower += other.lower
        return Moments(count, self.mean + delta * (other.count / count), lower)

    @property
    def covariance(self) -> np.ndarray:
        """Population covariance, float64 `[width, width]`."""
        width = len(self.mean)
        half = np.zeros((width, width))
        half[_triangle(width)] = self.lower
        full = half + half.T
        full.reshape(-1)[:: width + 1] = half.diagonal()
        full /= max(self.count, 1)
        return full

    def fields(self, tower: str) -> dict[str, int | memoryview]:
        """The numbers under names that begin with `tower`, as `example` takes them."""
        return {
            f"{tower}_count": self.count,
            f"{tower}_mean": _bytes(self.mean),
            f"{tower}_lower": _bytes(self.lower),
        }

    @classmethod
    def from_fields(cls, tower: str, fields: Mapping[str, Sequence]) -> "Moments":
        """Inverts `fields`, once `example` has read them."""
        mean, lower = (np.frombuffer(bytes(fields[f"{tower}_{name}"][0]), "<f8") for name in ("mean", "lower"))
        return cls(fields[f"{tower}_count"][0], mean, lower)


def _outer(x: np.ndarray) -> np.ndarray:
    """Lower triangle of the product of a vector with itself, row after row."""
    return np.outer(x, x)[_triangle(len(x))]


@functools.lru_cache(8)
def _triangle(width: int) -> np.ndarray:
    """Which places of a square matrix its lower triangle has, bool."""
    return np.tri(width, dtype=bool)


def _wide(x: np.ndarray) -> np.ndarray:
    """Values for sums in float64: float32 will do where it holds them, as NumPy widens it in no time."""
    return x if x.dtype == np.float64 else x.astype(np.float32)


@functools.cache
def _libraries() -> ThreadpoolController:
    """The libraries whose threads can be limited; finding them takes milliseconds."""
    return ThreadpoolController()
