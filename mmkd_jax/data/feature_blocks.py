"""Blocks of stored features: found, looked at once, and their vectors gathered from where they lie."""

import bisect
import dataclasses
import functools
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from mmkd_jax.data import tfrecord
from mmkd_jax.data.feature_codec import DTYPES, TOWERS, Block, unusable
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.errors import InputError

_OPEN_SHARDS = 64  # of one teacher; together well below the usual limit of open files
_ABSENT = -(1 << 62)  # of a place: it stays below zero whatever is added


class Layout(NamedTuple):
    """What a record says beside its features, and where in it those of each row begin.

    Teachers of one width say the same: for most of them comparing bytes takes the place of taking a record apart.

    Attributes:
      around: the bytes before, between and after the features.
      image, text: where in the record these begin and end.
      first: int64 `[rows]`, for each row the place of its first view, far below zero where it is absent.
      texts: int64 `[rows]`, the place of its first caption's features.
      captions: int64 `[rows]`, how many it has.
    """

    around: tuple[bytes, bytes, bytes]
    image: tuple[int, int]
    text: tuple[int, int]
    first: np.ndarray
    texts: np.ndarray
    captions: np.ndarray

    @classmethod
    def of(cls, block: Block, record: np.ndarray) -> "Layout":
        """That of a block that was read from a record, uint8."""
        size = block.text.shape[1] * block.text.dtype.itemsize
        image, text = ((place, place + getattr(block, t).nbytes) for t, place in zip(TOWERS, block.places, strict=True))
        first = image[0] + (np.cumsum(block.present) - 1) * (block.image.shape[1] * size)
        texts = text[0] + (np.cumsum(block.counts) - block.counts) * size
        around = _around(record, image, text)
        return cls(around, image, text, np.where(block.present, first, _ABSENT), texts, block.counts)

    def fits(self, record: np.ndarray) -> bool:
        """Whether a record of the same length says the same."""
        return self.around == _around(record, self.image, self.text)


def _around(record: np.ndarray, image: tuple[int, int], text: tuple[int, int]) -> tuple[bytes, bytes, bytes]:
    return record[: image[0]].tobytes(), record[image[1] : text[0]].tobytes(), record[text[1] :].tobytes()


class Entry(NamedTuple):
    """A block that was looked at, its values too.

    Attributes:
      reader: of its file.
      data: uint8, the bytes that its record lies in: the whole file's where it is mapped.
      start: where in them the record begins.
      layout: of the record.
    """

    reader: tfrecord.RecordReader
    data: np.ndarray
    start: int
    layout: Layout


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """Rows by block, worked out once for all sets that have blocks of one size; not to be shared between threads.

    Attributes:
      blocks: numbers of the blocks, ascending.
      which: int `[n]`, for each row which of them.
      inside: int `[n]`, and which row of it.
      order: int `[n]`, the places of the rows from the least row on: memory is read best in its order.
      layouts: of blocks that were looked at for these rows, by what makes them alike.
    """

    blocks: list[int]
    which: np.ndarray
    inside: np.ndarray
    order: np.ndarray
    layouts: dict[tuple, Layout] = dataclasses.field(default_factory=dict)
    _known: dict[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, rows: np.ndarray, block: int) -> "Wanted":
        """Where `rows` lie in blocks of `block` rows."""
        numbers, inside = np.divmod(rows, block)
        blocks, which = np.unique(numbers, return_inverse=True)
        return cls(blocks.tolist(), which, inside, np.argsort(rows, kind="stable"))

    def by_source(self, sources: tuple[int, ...]) -> list[np.ndarray]:
        """Places among the `n` of each source, from 0 on, where `sources` says for each block which one it lies in."""
        if (key := ("source", *sources)) not in self._known:
            of_row = np.asarray(sources, np.int64)[self.which]
            bounds = np.cumsum(np.bincount(of_row))[:-1]
            self._known[key] = np.split(self.order[np.argsort(of_row[self.order], kind="stable")], bounds)
        return self._known[key]

    def in_records(self, layouts: list[Layout]) -> list[np.ndarray]:
        """`first`, `texts` and `captions`, int64 `[n]`, of each row in its record, where each block has its layout."""
        if (key := ("layout", *map(id, layouts))) not in self._known:
            starts = np.cumsum([0, *(len(layout.first) for layout in layouts)])[self.which] + self.inside
            tables = zip(*(layout[3:] for layout in layouts)) if layouts else [[np.zeros(0, np.int64)]] * 3
            self._known[key] = layouts, [np.concatenate(table)[starts] for table in tables]
        return self._known[key][1]


class Found(NamedTuple):
    """Where features of rows lie.

    Attributes:
      data: uint8, stretches of bytes: one a file where files are mapped, else one a block.
      of_data: for each of them its places among the `n` rows.
      first: int64 `[n]`, for each row the place of its first view in its stretch, below zero where it is absent.
      texts: int64 `[n]`, the place of its first caption's features.
      captions: int64 `[n]`, how many it has.
    """

    data: list[np.ndarray]
    of_data: list[np.ndarray]
    first: np.ndarray
    texts: np.ndarray
    captions: np.ndarray


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
        self._alike = (self._width, self._views, self._dtype, id(pairs), manifest["pairs"]["rows"])
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
        _, data, start, stop = self._record(number)
        block = self._parsed(number, data[start:stop])
        self._check_values(number, block.image, block.text)
        return block

    def places(self, wanted: Wanted) -> Found:
        """Where the features of these rows lie, once their blocks have been looked at."""
        entries = [self._entry(number, wanted.layouts) for number in wanted.blocks]
        sources = {id(entry.data): entry for entry in entries}
        for entry in sources.values():
            entry.reader.check_size()
        numbers = {key: number for number, key in enumerate(sources)}
        of_data = wanted.by_source(tuple(numbers[id(entry.data)] for entry in entries))
        first, texts, captions = wanted.in_records([entry.layout for entry in entries])
        records = np.asarray([entry.start for entry in entries], np.int64)[wanted.which]
        return Found([e.data for e in sources.values()], of_data, first + records, texts + records, captions)

    def gather(self, found: Found, places: np.ndarray, present: np.ndarray, out: np.ndarray) -> None:
        """Writes the vectors that begin at `places` of what was found to `out` `[n, width]`, zeros where absent."""
        item, whole = np.dtype(f"V{self._width * self._dtype.itemsize}"), present.all()
        target = out.reshape(-1).view(item)
        if not whole:
            out[~present] = 0
        for part, rows in zip(found.data, found.of_data):
            here = rows if whole else rows[present[rows]]
            if len(here):
                vectors = np.ndarray((len(part) - item.itemsize + 1,), item, part, strides=(1,))  # one from every byte
                target[here] = vectors[places[here]]

    def _entry(self, number: int, layouts: dict[tuple, Layout]) -> Entry:
        with self._lock:
            if number in self._known:
                self._known.move_to_end(number)
                return self._known[number]
        entry = self._looked_at(number, layouts)
        with self._lock:
            self._known[number] = entry
            while len(self._known) > self._keep:
                self._known.popitem(last=False)
        return entry

    def _looked_at(self, number: int, layouts: dict[tuple, Layout]) -> Entry:
        """A block all of whose bytes were looked at; one that has a layout that is known is not taken apart."""
        reader, data, start, stop = self._record(number)
        record, key = data[start:stop], (number, stop - start, *self._alike)
        layout = layouts.get(key)
        if layout is None or not layout.fits(record):
            layout = layouts[key] = Layout.of(self._parsed(number, record), record)
        vectors = (record[slice(*where)].view(self._dtype) for where in (layout.image, layout.text))
        self._check_values(number, *(x.reshape(-1, self._width) for x in vectors))
        return Entry(reader, data, start, layout)

    def _record(self, number: int) -> tuple[tfrecord.RecordReader, np.ndarray, int, int]:
        """The file of a block, and the bytes, uint8, in which its record lies between two places."""
        reader, record = self._where(number)
        try:
            return reader, *reader.located(record)
        except IndexError as error:
            raise InputError(f"{reader.path}: record {record} is no block of features ({error}); emit again") from error

    def _parsed(self, number: int, raw: np.ndarray) -> Block:
        """The block of a record, uint8; its values are not looked at."""
        reader, record = self._where(number)
        try:
            block = Block.decode(memoryview(raw), self._dtype)
            block.check(self._width, self._views)
        except InputError as error:
            raise self._refused(number, str(error)) from error
        except (KeyError, ValueError, IndexError) as error:
            message = f"{reader.path}: record {record} is no block of features ({error}); emit again"
            raise InputError(message) from error
        first = number * self._manifest["block"]
        stop = min(first + self._manifest["block"], self._manifest["pairs"]["rows"])
        if block.first != first or len(block.present) != stop - first:
            raise InputError(f"{reader.path}: record {record} does not hold rows {first} to {stop}; emit again")
        if self._pairs is not None and block.ids != self._pairs.id_bytes(first, stop):
            raise InputError(f"{reader.path}: record {record} has other ids than the pairs of rows {first} to {stop}")
        return block

    def _check_values(self, number: int, *vectors: np.ndarray) -> None:
        """At once: what was just summed up is still in the processor's caches."""
        for tower, x in zip(TOWERS, vectors, strict=True):
            if what := unusable(x):
                raise self._refused(number, f"{tower} features of a present row {what}")

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
