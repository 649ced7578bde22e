"""TFRecord files with a sidecar index: sequential writing, random reading, every checksum looked at.

The framing is TensorFlow's (tensorflow/core/lib/io/record_writer.h): for each record
    uint64 length | uint32 masked CRC32C of length | data | uint32 masked CRC32C of data
in little endian, the mask being `rotate_right(crc, 15) + 0xa282ead8`. The index lies beside the file as `NAME.idx`: a
header, the byte offset of every record and the file's end as uint64, and a CRC32C of all that.
"""

import io as std_io
import os
import struct
import threading
import weakref

import google_crc32c
import numpy as np

from mmkd_jax import io
from mmkd_jax.errors import InputError

INDEX_SUFFIX = ".idx"
_HEAD = struct.Struct("<QI")
_FOOT = struct.Struct("<I")
_INDEX_MAGIC = b"TFRIDX01"
_COMPILED = google_crc32c.implementation == "c"  # it takes arrays too; the one in Python does not
OVERHEAD = _HEAD.size + _FOOT.size  # bytes of framing a record


def masked_crc(data: bytes | np.ndarray) -> int:
    """TensorFlow's masked CRC32C of `data`, as an unsigned 32-bit integer."""
    crc = google_crc32c.value(data if _COMPILED else bytes(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """One record as it lies in the file."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc(length)), data, struct.pack("<I", masked_crc(data))))


def index_bytes(sizes) -> bytes:
    """Content of the sidecar index for records with these data sizes in bytes."""
    offsets = np.concatenate([[0], np.cumsum(np.asarray(list(sizes), np.int64) + OVERHEAD)]).astype("<u8")
    body = _INDEX_MAGIC + struct.pack("<Q", len(offsets) - 1) + offsets.tobytes()
    return body + struct.pack("<I", google_crc32c.value(body))


def write(path: str | os.PathLike, records: list[bytes]) -> None:
    """Writes a whole TFRecord file and its index, each atomically, the index first."""
    path = io.as_path(path)
    io.write_bytes(f"{path}{INDEX_SUFFIX}", index_bytes(map(len, records)))
    io.write_bytes(path, b"".join(map(frame, records)))


class RecordWriter:
    """Writes records to an open binary file and remembers their sizes for the index.

    Attributes:
      sizes: data size of every record so far, bytes.
    """

    def __init__(self, file: std_io.BufferedIOBase):
        self._file = file
        self.sizes: list[int] = []

    def write(self, data: bytes) -> int:
        """Appends a record; returns the number of bytes that it takes in the file."""
        self._file.write(frame(data))
        self.sizes.append(len(data))
        return len(data) + OVERHEAD

    def index(self) -> bytes:
        """Content of the sidecar index."""
        return index_bytes(self.sizes)


class RecordReader:
    """Reads any record of a TFRecord file; safe to share between threads.

    A file without an index is walked once instead. Local files are read with `pread`.

    Raises:
      InputError: the file is missing, truncated or damaged; the message names file and record.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = io.as_path(path)
        if not self.path.exists():
            raise InputError(f"{self.path} does not exist; copy the set again or write it again")
        self._lock = threading.Lock()
        self._local = "://" not in os.fspath(self.path)
        self._descriptor = os.open(os.fspath(self.path), os.O_RDONLY) if self._local else None
        self._file = None if self._local else self.path.open("rb")
        release = (os.close, self._descriptor) if self._local else (self._file.close,)
        self._close = weakref.finalize(self, *release)
        self.size = os.fstat(self._descriptor).st_size if self._local else self.path.stat().length
        index = io.as_path(f"{self.path}{INDEX_SUFFIX}")
        self._offsets = self._parse_index(index) if index.exists() else self._walk()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, record: int) -> bytes:
        """Data of one record.

        Raises:
          InputError: its checksum is wrong.
        """
        return bytes(self.view(record))

    def view(self, record: int) -> memoryview:
        """As `read`, without a copy."""
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)} in {self.path}")
        start, stop = int(self._offsets[record]), int(self._offsets[record + 1])
        raw = self._read(start, stop - start)
        if len(raw) < OVERHEAD:
            raise self._damaged(record, "is cut off")
        length = self._length(raw, record)
        if length != stop - start - OVERHEAD or len(raw) != stop - start:
            raise self._damaged(record, "has another length than the index says")
        data = np.frombuffer(raw, np.uint8, length, _HEAD.size)  # the checksum takes no memoryview
        if _FOOT.unpack_from(raw, _HEAD.size + length)[0] != masked_crc(data):
            raise self._damaged(record, "fails its checksum")
        return memoryview(data)

    def close(self) -> None:
        """Closes the file; reading is over."""
        self._close()

    def _read(self, offset: int, count: int) -> bytes:
        if self._local:
            return os.pread(self._descriptor, count, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.read(count)

    def _length(self, raw: bytes, record: int) -> int:
        length, check = _HEAD.unpack_from(raw)
        if check != masked_crc(raw[:8]):
            raise self._damaged(record, "fails the checksum of its length")
        return length

    def _parse_index(self, path) -> np.ndarray:
        raw = path.read_bytes()
        count = struct.unpack_from("<Q", raw, 8)[0] if len(raw) >= 16 else 0
        whole = raw[:8] == _INDEX_MAGIC and len(raw) == 28 + 8 * count
        if not whole or struct.unpack("<I", raw[-4:])[0] != google_crc32c.value(raw[:-4]):
            raise InputError(f"{path} is damaged; delete it (it is then worked out from the file) or copy it again")
        offsets = np.frombuffer(raw, "<u8", count + 1, offset=16)
        if int(offsets[-1]) != self.size:
            last = int(np.searchsorted(offsets, self.size, side="right")) - 1
            raise InputError(
                f"{self.path} has {self.size} bytes, its index says {int(offsets[-1])}: it is damaged from record "
                f"{min(last, count)} on; copy it again or write the set again"
            )
        return offsets

    def _walk(self) -> np.ndarray:
        offsets = [0]
        while offsets[-1] < self.size:
            head = self._read(offsets[-1], _HEAD.size)
            if len(head) < _HEAD.size:
                raise self._damaged(len(offsets) - 1, "is cut off")
            offsets.append(offsets[-1] + self._length(head, len(offsets) - 1) + OVERHEAD)
        if offsets[-1] != self.size:
            raise self._damaged(len(offsets) - 2, "is cut off")
        return np.asarray(offsets, np.uint64)

    def _damaged(self, record: int, how: str) -> InputError:
        return InputError(f"{self.path}: record {record} {how}; copy the file again or write the set again")
