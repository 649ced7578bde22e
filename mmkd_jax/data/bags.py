"""Bags of features: of a slide's tiles, a scan's slices, a patient's slides; read in pieces, so that any size will do.

On disk a slide is one `.npy` file, float16 or float32 `[patches, width]`. Files are read from their start to their end
through a small buffer: neither a slide nor a set of them must fit in memory.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np

from mmkd_jax import io
from mmkd_jax.errors import InputError

CHUNK = 4096  # patches read at a time
KINDS = (np.float16, np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Slide:
    """Features `[patches, width]` of `dtype`, in a file whose numbers start at byte `offset`, or in memory."""

    source: os.PathLike | np.ndarray
    patches: int
    width: int
    dtype: np.dtype
    offset: int = 0

    def chunks(self, size: int = CHUNK) -> Iterator[np.ndarray]:
        """The features in order, `[up to size, width]`.

        Raises:
          InputError: the file is shorter than it says, or a feature is not finite.
        """
        if isinstance(self.source, np.ndarray):
            yield from (self._finite(self.source[k : k + size]) for k in range(0, self.patches, size))
            return
        with self.source.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.patches, size):
                wanted = (min(size, self.patches - start), self.width)
                data = file.read(wanted[0] * wanted[1] * self.dtype.itemsize)
                if len(data) != wanted[0] * wanted[1] * self.dtype.itemsize:
                    raise InputError(f"{self.source} is cut short; make its features again")
                yield self._finite(np.frombuffer(data, self.dtype).reshape(wanted))

    def _finite(self, x: np.ndarray) -> np.ndarray:
        if not np.isfinite(x).all():
            where = self.source if not isinstance(self.source, np.ndarray) else "a bag"
            raise InputError(f"{where} has features that are not finite; make them again")
        return x


def open_slide(source: str | os.PathLike | np.ndarray) -> Slide:
    """A slide's features: a `.npy` file, of which only the head is read, or an array.

    Raises:
      InputError: no such file, it is no array of this form, or it has no patches.
    """
    if isinstance(source, np.ndarray):
        return _checked(source, source.shape, source.dtype, "a bag", 0)
    path = io.as_path(source)
    if not path.exists():
        raise InputError(f"there is no file of features {path}; make it, or leave the slide out of the table")
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except ValueError as error:
            raise InputError(f"{path} is no .npy file ({error}); features are stored as [patches, width]") from error
        if fortran:
            raise InputError(f"{path} is stored by columns; store it in C order")
        return _checked(path, shape, dtype, str(path), file.tell())


def _checked(source, shape: tuple[int, ...], dtype, where: str, offset: int) -> Slide:
    if len(shape) != 2 or dtype not in KINDS:
        raise InputError(f"{where} has shape {shape} of {dtype}, not float16 or float32 [patches, width]")
    if not shape[0]:
        raise InputError(f"{where} has no patches; leave the slide out")
    return Slide(source, shape[0], shape[1], np.dtype(dtype), offset)


class Bags:
    """n bags, each of the features of its slides, one after the other.

    Args:
      bags: of each its slides, as `open_slide` takes them.

    Raises:
      InputError: a slide cannot be opened, a bag has none, or widths differ.
    """

    def __init__(self, bags: Sequence[Sequence[str | os.PathLike | np.ndarray]]):
        self._bags = [[open_slide(source) for source in slides] for slides in bags]
        if not self._bags or not all(self._bags):
            raise InputError("a bag has no slides; leave it out")
        widths = sorted({slide.width for slides in self._bags for slide in slides})
        if len(widths) > 1:
            raise InputError(f"the slides' features have widths {widths}; they come from different encoders")
        self.width = widths[0]
        self.sizes = np.array([sum(slide.patches for slide in slides) for slides in self._bags], np.int64)
        kinds = {slide.dtype for slides in self._bags for slide in slides}
        self.dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self._bags)

    def chunks(self, bag: int, size: int = CHUNK) -> Iterator[np.ndarray]:
        """A bag's features in order, `[up to size, width]`, as they are stored."""
        for slide in self._bags[bag]:
            yield from slide.chunks(size)

    def fill(self, bag: int, out: np.ndarray) -> None:
        """Writes a bag's features to the first rows of `out` `[at least its size, width]`."""
        start = 0
        for piece in self.chunks(bag):
            out[start : start + len(piece)] = piece
            start += len(piece)

    def mean(self, bag: int) -> np.ndarray:
        """Mean over a bag's patches, float64 `[width]`."""
        return sum(piece.sum(axis=0, dtype=np.float64) for piece in self.chunks(bag)) / self.sizes[bag]

    def spread(self, rows: Sequence[int], most: int = 512) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance, float32 `[width]` each, over the first `most` patches of each of `rows`."""
        pieces = [next(self.chunks(row, most)).astype(np.float64) for row in rows]
        count = sum(map(len, pieces))
        mean = sum(piece.sum(axis=0) for piece in pieces) / count
        variance = sum(((piece - mean) ** 2).sum(axis=0) for piece in pieces) / count
        return mean.astype(np.float32), variance.astype(np.float32)

    @property
    def hash(self) -> str:
        """Identity, from the sizes and the first patches of every slide: a set may be too large to read for it."""
        told = []
        for slides in self._bags:
            for slide in slides:
                first = np.ascontiguousarray(next(slide.chunks(64)))
                told.append([slide.patches, slide.width, str(slide.dtype), io.sha256(first.tobytes())])
            told.append(len(slides))
        return io.hash_of(told)
