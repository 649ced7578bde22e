"""Sets of image-text pairs on disk: TFRecord shards, a table of small columns, row indices, and a manifest.

<set>/NAME-train.tfrecord-00000-of-00004 (+ .idx)   records, in row order
<set>/table.npz                                     small per-row columns, read without the pictures
<set>/rows/NAME.npz                                 row indices: splits, filters
<set>/features.json, dataset_info.json              for tensorflow_datasets
<set>/prompts.json                                  how the classes of its sources are asked for, where that is known
<set>/manifest.json                                 written last: without it there is no set
"""

import bisect
import functools
import hashlib
import itertools
import os
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import npz, pair_codec, tfrecord
from mmkd_jax.data.pair_codec import Pair, pair_id
from mmkd_jax.data.pair_writer import SCHEMA, PairsWriter
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError, near

__all__ = ["Pair", "PairsSet", "PairsWriter", "pair_id"]

_OPEN_SHARDS = 256  # well below the usual limit of open files


class PairsSet:
    """A set of pairs that is read at random; safe to share between threads.

    Attributes:
      path: its folder.
      manifest: its manifest.
      table: read-only columns `[rows]` without pictures: `id` (str), `modality` (int16, index into `modalities`),
        `label_id` (int32, -1 without), `source` (int16, index into `sources`), `group` (int64, equal within a group,
        -1 without), `captions` (int32, how many); where several classes may be there at once, `findings` (int8
        `[rows, classes]`: 1 there, 0 not there, -1 unknown or another source's); and where there are any, `questions`
        (int32, how many, see `mmkd_jax.evals.vqa_questions`).
    """

    def __init__(self, path, manifest: dict[str, Any], table: dict[str, np.ndarray]):
        self.path, self.manifest, self._raw_table = path, manifest, table
        self._starts = list(itertools.accumulate((s["rows"] for s in manifest["shards"]), initial=0))
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "PairsSet":
        """Opens a set and checks its manifest against the files that lie there (names, sizes, counts).

        Raises:
          InputError: there is no set, or it is not whole.
        """
        path = io.as_path(path)
        if not (path / "manifest.json").exists():
            raise InputError(f"{path} holds no finished set of pairs (no manifest.json); make one with `mmkd ingest`")
        manifest = io.read_json(path / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("kind") != "pairs":
            raise InputError(f"{path} is not a set of pairs but {manifest.get('kind', 'something else')!r}")
        if manifest["schema"] != SCHEMA:
            raise InputError(f"{path} has schema {manifest['schema']}, this version reads {SCHEMA}; ingest it again")
        for shard in manifest["shards"]:
            file = path / shard["file"]
            if not file.exists():
                raise InputError(f"{file} is missing; copy the set again or ingest it again")
            if (size := file.stat().length) != shard["bytes"]:
                raise InputError(f"{file} has {size} bytes, the manifest says {shard['bytes']}; copy the set again")
        table = npz.read(path / "table.npz", "table of the set")
        if any(len(column) != manifest["rows"] for column in table.values()):
            raise InputError(
                f"{path}/table.npz does not have the manifest's {manifest['rows']} rows; copy the set again"
            )
        if sum(shard["rows"] for shard in manifest["shards"]) != manifest["rows"]:
            raise InputError(f"{path}/manifest.json contradicts itself about the number of rows; ingest the set again")
        return cls(path, manifest, table)

    def __len__(self) -> int:
        return self.manifest["rows"]

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.manifest["name"]

    @property
    def hash(self) -> str:
        """Identity of ids and pictures, in row order; whatever is joined to the set names it."""
        return self.manifest["hash"]

    @property
    def modalities(self) -> list[str]:
        """Sorted names of the modalities."""
        return self.manifest["modalities"]

    @property
    def sources(self) -> list[str]:
        """Sorted names of the sources."""
        return self.manifest["sources"]

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names by source."""
        return self.manifest["classes"]

    @functools.cached_property
    def prompts(self) -> dict[str, Any]:
        """Wording of the classes by source, records of `mmkd_jax.evals.prompts.from_record`; of few sources or none."""
        path = self.path / "prompts.json"
        return io.read_json(path) if path.exists() else {}

    @functools.cached_property
    def table(self) -> dict[str, np.ndarray]:
        """Columns without pictures, see the class."""
        columns = {**self._raw_table, "id": self._raw_table["id"].astype("U32")}
        for column in columns.values():
            column.flags.writeable = False
        return columns

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids of some rows."""
        return [i.decode() for i in self._raw_table["id"][rows].tolist()]

    def id_bytes(self, start: int, stop: int) -> bytes:
        """Ids of consecutive rows, one after the other."""
        return self._raw_table["id"][start:stop].tobytes()

    def read(self, row: int) -> Pair:
        """One pair.

        Raises:
          InputError: its record is damaged.
        """
        if not 0 <= row < len(self):
            raise InputError(f"row {row} is not one of the {len(self)} rows of {self.path}")
        shard = bisect.bisect_right(self._starts, row) - 1
        record = row - self._starts[shard]
        reader = self._shard(shard)
        try:
            pair = pair_codec.from_record(reader.read(record))
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(f"{reader.path}: record {record} is not a pair ({error}); ingest the set again") from error
        if pair.id.encode() != self._raw_table["id"][row]:
            raise InputError(
                f"{reader.path}: record {record} is another pair than the table says; ingest the set again"
            )
        return pair

    def read_many(self, rows) -> list[Pair]:
        """Pairs of several rows, in the order asked for."""
        return [self.read(int(row)) for row in rows]

    def row_names(self) -> list[str]:
        """Names of the row indices that lie with the set."""
        folder = self.path / "rows"
        return sorted(f.name.removesuffix(".npz") for f in folder.glob("[!.]*.npz")) if folder.exists() else []

    def rows(self, name: str) -> RowIndex:
        """A row index of the set by name.

        Raises:
          InputError: there is none, or it belongs to another set.
        """
        if name not in self.row_names():
            raise InputError(f"{self.path} has no row index {name!r}; {near(name, self.row_names())}")
        return self.checked(RowIndex.load(self.path / "rows" / f"{name}.npz"))

    def checked(self, index: RowIndex) -> RowIndex:
        """`index`, if it is one of this set.

        Raises:
          InputError: it belongs to another set or reaches beyond this one.
        """
        if index.set_hash != self.hash:
            raise InputError(
                f"row index {index.name!r} is for the set {index.set_hash[:12]}, {self.path} is {self.hash[:12]}"
            )
        index.check(len(self))
        return index

    def verify(self) -> None:
        """Reads everything and compares it with the manifest: SHA-256, checksums, ids, content hash.

        Raises:
          InputError: something differs; the message says what.
        """
        for number, shard in enumerate(self.manifest["shards"]):
            reader = self._open_shard(number)
            for record in range(len(reader)):
                reader.read(record)
            if io.sha256_file(reader.path) != shard["sha256"]:
                raise InputError(f"{reader.path} does not have the manifest's SHA-256; copy the set again")
        if io.sha256_file(self.path / "table.npz") != self.manifest["table_sha256"]:
            raise InputError(f"{self.path}/table.npz does not have the manifest's SHA-256; copy the set again")
        for name, entry in self.manifest["indices"].items():
            if self.rows(name).hash != entry["hash"]:
                raise InputError(
                    f"row index {name!r} of {self.path} is not the one of the manifest; copy the set again"
                )
        digest = hashlib.sha256()
        for row in range(len(self)):
            pair = self.read(row)
            digest.update(pair.id.encode() + hashlib.sha256(pair.image).digest())
        if digest.hexdigest() != self.hash:
            raise InputError(f"the content of {self.path} does not have the manifest's hash; ingest the set again")

    def _open_shard(self, shard: int) -> tfrecord.RecordReader:
        entry = self.manifest["shards"][shard]
        reader = tfrecord.RecordReader(self.path / entry["file"])
        if len(reader) != entry["rows"]:
            raise InputError(
                f"{reader.path} has {len(reader)} records, the manifest says {entry['rows']}; copy it again"
            )
        return reader
