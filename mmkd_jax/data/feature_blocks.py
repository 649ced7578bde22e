"""Blocks of stored features: found, looked at once, and their vectors gathered from where they lie."""

import bisect
import functools
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from mmkd_jax.data import tfrecord
from mmkd_jax.data.feature_codec import DTYPES, Block, unusable
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.errors import InputError

_OPEN_SHARDS = 64  # of one teacher; together well below the usual limit of open files


class Entry(NamedTuple):
    """A block that was looked at.

    Attributes:
      data: uint8, the bytes that its features lie in: the whole file's where it is mapped.
      first: int64 `[rows]`, for each row the place of its first view in `data`, -1 where it is absent.
      text: int64 `[rows]`, the place of its first caption's features.
      captions: int64 `[rows]`, how many it has.
    """

    data: np.ndarray
    first: np.ndarray
    text: np.ndarray
    captions: np.ndarray


class Wanted(NamedTuple):
    """Rows by block, worked out once for all sets that have blocks of one size.

    Attributes:
      blocks: numbers of the blocks, ascending.
      which: int `[n]`, for each row which of them.
      inside: int `[n]`, and which row of it.
      of_block: for each block its places among the `n`.
    """

    blocks: list[int]
    which: np.ndarray
    inside: np.ndarray
    of_block: list[np.ndarray]

    @classmethod
    def of(cls, rows: np.ndarray, block: int) -> "Wanted":
        """Where `rows` lie in blocks of `block` rows."""
        numbers, inside = np.divmod(rows, block)
        blocks, which = np.unique(numbers, return_inverse=True)
        bounds = np.cumsum(np.bincount(which, minlength=len(blocks)))[:-1]
        return cls(blocks.tolist(), which, inside, np.split(np.argsort(which, kind="stable"), bounds))


class Blocks:
    """The blocks of one teacher's features; safe to share between threads.

    Args:
      path: folder of the features.
      manifest: their manifest.
      pairs: the pairs that they belong to, if their ids are to be compared.
      keep: blocks that are not looked at again when they are wanted again.
    """

    def __init__(self, path, manifest: dict[str, Any], pairs: PairsSet | None, keep: int):
        self._path, self._manifest, self._pairs, self._keep = path, manifest, pairs, keep
        self._width, self._views = manifest["width"], manifest["views"]
        self._dtype = DTYPES[manifest["dtype"]]
        self._edges = [int(edge) for edge in manifest["edges"]]
        self._reader = functools.lru_cache(_OPEN_SHARDS)(self._open_reader)
        self._known: OrderedDict[int, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def numbers(self, shard: int) -> range:
        """Numbers of the blocks of a shard."""
        size = self._manifest["block"]
        return range(self._edges[shard] // size, -(-self._edges[shard + 1] // size))

    def read(self, number: int) -> Block:
        """A block, every value looked at.

        Raises:
          InputError: it is damaged, not of these pairs, or nobody could train on it.
        """
        block = self._located(number)[0]
        try:
            block.check_values()
        except InputError as error:
            raise self._refused(number, str(error)) from error
        return block

    def places(self, wanted: Wanted) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """`data` of each block that is wanted; `first`, `text` and `captions` of each row, as `Entry` has them."""
        entries = [self._entry(number) for number in wanted.blocks]
        starts = np.cumsum([0, *(len(entry.first) for entry in entries)])[wanted.which] + wanted.inside
        tables = zip(*(entry[1:] for entry in entries)) if entries else [[np.zeros(0, np.int64)]] * 3
        return [entry.data for entry in entries], *(np.concatenate(table)[starts] for table in tables)

    def gather(
        self,
        tower: str,
        wanted: Wanted,
        data: list[np.ndarray],
        places: np.ndarray,
        present: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Writes the vectors that begin at `places` of `data` to `out` `[n, width]`, zeros where not present.

        Raises:
          InputError: one is not finite or all zeros.
        """
        item, whole = np.dtype(f"V{self._width * self._dtype.itemsize}"), present.all()
        target = out.reshape(-1).view(item)
        if not whole:
            out[~present] = 0
        for part, rows in zip(data, wanted.of_block, strict=True):
            here = rows if whole else rows[present[rows]]
            if len(here):
                vectors = np.ndarray((len(part) - item.itemsize + 1,), item, part, strides=(1,))  # one from every byte
                target[here] = vectors[places[here]]
        seen = out if whole else out[present]
        if unusable(seen):
            rows = np.flatnonzero(present)
            row = next(row for row, vector in zip(rows, seen) if unusable(vector[None]))
            what = f"{tower} features of a present row {unusable(out[row][None])}"
            raise self._refused(wanted.blocks[wanted.which[row]], what)

    def _entry(self, number: int) -> Entry:
        with self._lock:
            if number in self._known:
                self._known.move_to_end(number)
                return self._known[number]
        block, data, start = self._located(number)
        size = self._width * self._dtype.itemsize
        image, text = (start + place for place in block.places)
        first = np.where(block.present, image + (np.cumsum(block.present) - 1) * (self._views * size), -1)
        entry = Entry(data, first, text + (np.cumsum(block.counts) - block.counts) * size, block.counts)
        with self._lock:
            self._known[number] = entry
            while len(self._known) > self._keep:
                self._known.popitem(last=False)
        return entry

    def _located(self, number: int) -> tuple[Block, np.ndarray, int]:
        """A block, the bytes that its record lies in and from where on; its features are not looked at."""
        reader, record = self._where(number)
        try:
            data, start, end = reader.located(record)
            block = Block.decode(memoryview(data[start:end]), self._dtype)
            block.check(self._width, self._views)
        except InputError as error:
            message = str(error)
            raise (error if str(reader.path) in message else self._refused(number, message)) from error
        except (KeyError, ValueError, IndexError) as error:
            message = f"{reader.path}: record {record} is no block of features ({error}); emit again"
            raise InputError(message) from error
        first = number * self._manifest["block"]
        stop = min(first + self._manifest["block"], self._manifest["pairs"]["rows"])
        if block.first != first or len(block.present) != stop - first:
            raise InputError(f"{reader.path}: record {record} does not hold rows {first} to {stop}; emit again")
        if self._pairs is not None and block.ids != self._pairs.id_bytes(first, stop):
            raise InputError(f"{reader.path}: record {record} has other ids than the pairs of rows {first} to {stop}")
        return block, data, start

    def _where(self, number: int) -> tuple[tfrecord.RecordReader, int]:
        """The file of a block and which record it is there."""
        size = self._manifest["block"]
        shard = bisect.bisect_right(self._edges, number * size) - 1
        return self._reader(shard), number - self._edges[shard] // size

    def _refused(self, number: int, what: str) -> InputError:
        reader, record = self._where(number)
        return InputError(f"{reader.path}: record {record}: {what}; emit again")

    def _open_reader(self, shard: int) -> tfrecord.RecordReader:
        reader = tfrecord.RecordReader(self._path / self._manifest["shards"][shard]["file"])
        if len(reader) != (wanted := len(self.numbers(shard))):
            raise InputError(f"{reader.path} has {len(reader)} records, not {wanted}; copy it or emit again")
        return reader
