"""TFRecord files with a sidecar index: sequential writing, random reading, every checksum looked at.

The framing is TensorFlow's (tensorflow/core/lib/io/record_writer.h): for each record
    uint64 length | uint32 masked CRC32C of length | data | uint32 masked CRC32C of data
in little endian, the mask being `rotate_right(crc, 15) + 0xa282ead8`. The index lies beside the file as `NAME.idx`: a
header, the byte offset of every record and the file's end as uint64, and a CRC32C of all that.
"""

import io as std_io
import itertools
import mmap
import os
import struct
import threading
from collections.abc import Sequence

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


def masked_crc(*data: bytes | memoryview | np.ndarray) -> int:
    """TensorFlow's masked CRC32C of `data`, one piece after the other, as an unsigned 32-bit integer."""
    crc = 0
    for piece in data:
        crc = google_crc32c.extend(crc, np.frombuffer(piece, np.uint8) if _COMPILED else bytes(piece))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """One record as it lies in the file."""
    return b"".join(framed([data]))


def framed(pieces: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """As `frame`, of a record in pieces, none of which is copied."""
    length = struct.pack("<Q", sum(map(len, pieces)))
    return [length, struct.pack("<I", masked_crc(length)), *pieces, struct.pack("<I", masked_crc(*pieces))]


def index_bytes(sizes) -> bytes:
    """Content of the sidecar index for records with these data sizes in bytes."""
    offsets = np.concatenate([[0], np.cumsum(np.asarray(list(sizes), np.int64) + OVERHEAD)]).astype("<u8")
    body = _INDEX_MAGIC + struct.pack("<Q", len(offsets) - 1) + offsets.tobytes()
    return body + struct.pack("<I", google_crc32c.value(body))


def write(path: str | os.PathLike, records: Sequence[bytes | Sequence[bytes | memoryview]]) -> None:
    """Writes a whole TFRecord file and its index, each atomically, the index first; records may be in pieces."""
    path = io.as_path(path)
    parts = [[record] if isinstance(record, bytes) else record for record in records]
    io.write_bytes(f"{path}{INDEX_SUFFIX}", index_bytes(sum(map(len, part)) for part in parts))
    io.write_parts(path, itertools.chain.from_iterable(map(framed, parts)))


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

    A file without an index is walked once instead. Local files are mapped into memory, so that a record is read from
    the disk in one go and copied nowhere; like all sets' files they must not be altered while they are open.

    Raises:
      InputError: the file is missing, truncated or damaged; the message names file and record.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self._lock = io.as_path(path), threading.Lock()
        self._map = self._bytes = None
        local = _is_local(self.path)
        if not _exists(self.path):
            raise InputError(f"{self.path} does not exist; copy the set again or write it again")
        self._file = _open(self.path)
        self.size = os.fstat(self._file.fileno()).st_size if local else self.path.stat().length
        if local and self.size:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)
            self._file.close()
            self._advise("MADV_RANDOM", 0, self.size)  # records are read whole and in any order
        index = self.path.parent / f"{self.path.name}{INDEX_SUFFIX}"
        self._offsets = self._parse_index(index) if _exists(index) else self._walk()

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
        data, start, stop = self.located(record)
        return memoryview(data[start:stop])

    def located(self, record: int) -> tuple[np.ndarray, int, int]:
        """Bytes, uint8, in which the data of a record lie between two places.

        Those of the file where it is local, the same array for all its records, else those of the record.

        Raises:
          InputError: its checksum is wrong.
        """
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)} in {self.path}")
        start, stop = int(self._offsets[record]), int(self._offsets[record + 1])
        raw, at = self._read(start, stop - start)
        if len(raw) - at < stop - start or stop - start < OVERHEAD:
            raise self._damaged(record, "is cut off")
        length = self._length(raw[at : at + _HEAD.size], record)
        if length != stop - start - OVERHEAD:
            raise self._damaged(record, "has another length than the index says")
        first, last = at + _HEAD.size, at + _HEAD.size + length
        if _FOOT.unpack_from(raw, last)[0] != masked_crc(raw[first:last]):
            raise self._damaged(record, "fails its checksum")
        return (raw if self._bytes is None else self._bytes), first, last

    def check_size(self) -> None:
        """Refuses a mapped file that has become shorter: to touch what it has lost would end the process.

        Raises:
          InputError: it has.
        """
        if self._map is not None and (now := self._map.size()) < self.size:
            raise InputError(f"{self.path} was cut from {self.size} to {now} bytes while it was open; copy it again")

    def close(self) -> None:
        """Closes the file; reading is over. Views that were given out stay valid."""
        self._file.close()
        self._map = self._bytes = None

    def _read(self, offset: int, count: int) -> tuple[np.ndarray, int]:
        """Bytes that hold `count` bytes of the file, or fewer at its end, and from which place on."""
        if self._bytes is not None:
            end = min(offset + count, self._map.size())  # of the file now: what lies beyond must not be touched
            self._advise("MADV_WILLNEED", offset, max(end - offset, 0))
            return self._bytes[:end], offset
        with self._lock:
            self._file.seek(offset)
            return np.frombuffer(self._file.read(count), np.uint8), 0

    def _advise(self, what: str, offset: int, count: int) -> None:
        if hasattr(mmap, what):  # not on every system
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(getattr(mmap, what), start, offset + count - start)

    def _length(self, head: np.ndarray, record: int) -> int:
        length, check = _HEAD.unpack_from(head)
        if check != masked_crc(head[:8]):
            raise self._damaged(record, "fails the checksum of its length")
        return length

    def _parse_index(self, path) -> np.ndarray:
        with _open(path) as file:
            raw = file.read()
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
            raw, at = self._read(offsets[-1], _HEAD.size)
            head = raw[at : at + _HEAD.size]
            if len(head) < _HEAD.size:
                raise self._damaged(len(offsets) - 1, "is cut off")
            offsets.append(offsets[-1] + self._length(head, len(offsets) - 1) + OVERHEAD)
        if offsets[-1] != self.size:
            raise self._damaged(len(offsets) - 2, "is cut off")
        return np.asarray(offsets, np.uint64)

    def _damaged(self, record: int, how: str) -> InputError:
        return InputError(f"{self.path}: record {record} {how}; copy the file again or write the set again")


def _is_local(path: os.PathLike) -> bool:
    """Whether the system's own calls will do, which take less time than those that know object stores too."""
    return "://" not in os.fspath(path)


def _exists(path) -> bool:
    return os.path.exists(path) if _is_local(path) else path.exists()


def _open(path) -> std_io.BufferedIOBase:
    return open(path, "rb") if _is_local(path) else path.open("rb")
