"""MedMNIST's npz files: SPLIT_images `[n, side, side]` or `[n, side, side, 3]` and SPLIT_labels `[n, 1 or findings]`.

Layout: https://github.com/MedMNIST/MedMNIST (medmnist/dataset.py). The arrays are read a picture at a time, so that
a file of any size takes little memory, and no pickle is ever loaded.
"""

import io as std_io
import math
import zipfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmkd_jax import io
from mmkd_jax.data.sources import SourceRecord
from mmkd_jax.errors import InputError

SPLITS = ("train", "val", "test")


class Stream(NamedTuple):
    """An array in an open archive: its rows' shape and type, their number, and the file at the first."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int
    file: object

    def read(self) -> Iterator[np.ndarray]:
        """The rows one after the other.

        Raises:
          ValueError: the file ends early.
        """
        size = self.dtype.itemsize * math.prod(self.shape)
        for row in range(self.rows):
            data = self.file.read(size)
            if len(data) != size:
                raise ValueError(f"it ends at row {row} of {self.rows}")
            yield np.frombuffer(data, self.dtype).reshape(self.shape)


def records(inputs: Sequence[str], *, name: str = "") -> Iterator[SourceRecord]:
    """Pictures in the order train, val, test, stored without loss; labels are numbers, to be named by a class list.

    Args:
      inputs: npz files (`pathmnist.npz`, `pathmnist_224.npz`).
      name: of the set; by default the file's, without the size.

    Raises:
      InputError: a file is missing, damaged, or holds something else (volumes, say).
    """
    if not inputs:
        raise InputError("medmnist needs --input: an npz file")
    for path in map(io.as_path, inputs):
        if not path.exists() or path.is_dir():
            raise InputError(f"{path} is not a file; give an npz file of MedMNIST")
        source = name or path.name.split(".")[0].split("_")[0]
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                for split in SPLITS:
                    yield from _split(archive, split, source)
        except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
            raise InputError(f"{path} is not a whole npz file of MedMNIST ({error}); get it again") from error


def _split(archive: zipfile.ZipFile, split: str, source: str) -> Iterator[SourceRecord]:
    if f"{split}_images.npy" not in archive.namelist():
        raise ValueError(f"it has no {split}_images")
    with archive.open(f"{split}_images.npy") as one, archive.open(f"{split}_labels.npy") as other:
        images, labels = _array(one), _array(other)
        if images.dtype != np.uint8 or len(images.shape) not in (2, 3) or images.shape[2:] not in ((), (3,), (1,)):
            raise ValueError(f"{split}_images holds {images.dtype} {list(images.shape)}, not pictures of 8 bits")
        if len(labels.shape) != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.rows != images.rows:
            raise ValueError(f"{split}_labels holds {labels.rows} x {list(labels.shape)} of {labels.dtype}")
        for row, (pixels, label) in enumerate(zip(images.read(), labels.read(), strict=True)):
            several = {str(number): int(there) for number, there in enumerate(label)} if len(label) > 1 else None
            yield SourceRecord(
                key=f"{split}-{row:06d}", image=_png(pixels), captions=(), source=source, split=split,
                label="" if several else str(label[0]), findings=several,
            )  # fmt: skip


def _array(file) -> Stream:
    """What the header of an array says.

    Raises:
      ValueError: not an array of plain numbers in C order.
    """
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"an array of version {version}")
    shape, fortran, dtype = header(file)
    if dtype.hasobject or fortran or not shape:
        raise ValueError("an array of objects or in Fortran's order")
    return Stream(shape[1:], dtype, shape[0], file)


def _png(pixels: np.ndarray) -> bytes:
    file = std_io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(file, "PNG")
    return file.getvalue()
