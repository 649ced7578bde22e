"""Sets of image-text pairs on disk: TFRecord shards, a table of small columns, row indices, and a manifest.

<set>/NAME-train.tfrecord-00000-of-00004 (+ .idx)   records, in row order
<set>/table.npz                                     small per-row columns, read without the pictures
<set>/rows/NAME.npz                                 row indices: splits, filters
<set>/features.json, dataset_info.json              for tensorflow_datasets
<set>/manifest.json                                 written last: without it there is no set
"""

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import pair_codec, tfrecord
from mmkd_jax.data.pair_codec import Pair, pair_id
from mmkd_jax.data.rows import RowIndex, npz_bytes, read_npz
from mmkd_jax.errors import InputError, near

__all__ = ["Pair", "PairsSet", "PairsWriter", "pair_id"]

SCHEMA = 1
SHARD_BYTES = 256 << 20


class PairsWriter:
    """Writes a set. Used as a context manager: leaving it without `finish` removes what was written.

    Rows keep the order of `add`. Records go to a local spool first and are cut into shards at the end, when their
    number is known; the set appears under its name only when it is complete (on an object store: with its manifest).

    Args:
      path: folder of the new set; must not exist yet, or be empty.
      name: lower-case name of the data set, for tensorflow_datasets; by default the folder's.
      shards: number of shards; by default one for every 256 MiB.

    Raises:
      InputError: `path` is in use or cannot be written to.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None, *, shards: int | None = None):
        self._path = io.as_path(path)
        self.name = re.sub(r"[^a-z0-9_]+", "_", (name or self._path.name).lower()).strip("_") or "pairs"
        if not self.name[0].isalpha():
            self.name = f"set_{self.name}"
        if shards is not None and shards < 1:
            raise InputError(f"a set needs at least one shard, not {shards}")
        if self._path.exists() and (not self._path.is_dir() or any(self._path.iterdir())):
            raise InputError(f"{self._path} exists already; remove it or choose another folder")
        self._shards = shards
        self._local = "://" not in os.fspath(self._path)
        folder = io.make_workdir(self._path.parent) if self._local else None
        self._spool = tempfile.TemporaryFile(dir=folder)
        self._writer = tfrecord.RecordWriter(self._spool)
        self._columns: dict[str, list] = {k: [] for k in ("id", "modality", "label_id", "source", "group", "captions")}
        self._licenses: Counter[str] = Counter()
        self._ids: set[str] = set()
        self._digest, self._text_digest = hashlib.sha256(), hashlib.sha256()

    def __enter__(self) -> "PairsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._spool.close()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: str) -> bool:
        return id in self._ids

    def labels(self) -> set[tuple[str, int]]:
        """Every (source, label_id) that occurs."""
        return set(zip(self._columns["source"], self._columns["label_id"]))

    def add(self, pair: Pair) -> int:
        """Appends a pair and returns its row.

        Raises:
          InputError: its id is malformed or in the set already.
        """
        if not re.fullmatch(r"[0-9a-f]{32}", pair.id):
            raise InputError(f"pair id {pair.id!r} is not 32 hex digits; make it with pair_id(source, key)")
        if pair.id in self._ids:
            raise InputError(f"pair {pair.id} of source {pair.source!r} comes twice; keys must be unique in a source")
        self._writer.write(pair_codec.to_record(pair))
        self._ids.add(pair.id)
        for name in ("id", "modality", "label_id", "source"):
            self._columns[name].append(getattr(pair, name))
        self._columns["group"].append((pair.source, pair.group) if pair.group else None)
        self._columns["captions"].append(len(pair.captions))
        self._licenses[pair.license or "not stated"] += 1
        self._digest.update(pair.id.encode() + hashlib.sha256(pair.image).digest())
        self._text_digest.update(json.dumps([pair.id, list(pair.captions)], separators=(",", ":")).encode())
        return len(self) - 1

    def finish(
        self,
        rows: dict[str, list[int]] | None = None,
        classes: dict[str, list[str]] | None = None,
        made: dict[str, Any] | None = None,
        files: dict[str, bytes] | None = None,
    ) -> "PairsSet":
        """Cuts the shards, writes everything else and the manifest last, and opens the set.

        Args:
          rows: row numbers of each row index by name.
          classes: class names by source.
          made: JSON-like record of how the set was made; part of the manifest's bytes.
          files: further small files to lay beside, content by name.
        """
        if not self._ids:
            raise InputError(f"no pairs for {self._path}; check the inputs")
        target = io.temporary_name(self._path) if self._local else self._path
        try:
            target.mkdir(parents=True, exist_ok=True)
            for file, content in (files or {}).items():
                io.write_bytes(target / file, content)
            manifest = self._write_all(target, rows or {}, classes or {}, made or {})
            io.write_json(target / "manifest.json", manifest)
            if self._local:
                target.rename(self._path)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error
        finally:
            self._spool.close()
            if self._local and target.exists():
                shutil.rmtree(target)
        return PairsSet.open(self._path)

    def _write_all(self, target, rows, classes, made) -> dict[str, Any]:
        content_hash = self._digest.hexdigest()
        shards = self._write_shards(target)
        pair_codec.write_tfds_metadata(target, self.name, shards, f"Image-text pairs, content hash {content_hash}.")
        table, names = _table(self._columns)
        table_bytes = npz_bytes(**table)
        io.write_bytes(target / "table.npz", table_bytes)
        indices = {}
        for name, numbers in sorted(rows.items()):
            index = RowIndex(np.asarray(numbers, np.int64), content_hash, name, {"by": "ingest"})
            _check_rows(index, len(self))
            index.save(target / "rows" / f"{name}.npz")
            indices[name] = {"rows": len(index), "hash": index.hash}
        counts = {k: Counter(self._columns[k]) for k in ("modality", "source")} | {"license": self._licenses}
        return {
            "kind": "pairs",
            "schema": SCHEMA,
            "name": self.name,
            "hash": content_hash,
            "captions_hash": self._text_digest.hexdigest(),
            "rows": len(self),
            "shards": shards,
            "table_sha256": io.sha256(table_bytes),
            "indices": indices,
            **names,
            "classes": dict(sorted(classes.items())),
            "counts": {k: dict(sorted(c.items())) for k, c in counts.items()},
            "made": made,
        }

    def _write_shards(self, target) -> list[dict[str, Any]]:
        sizes = np.asarray(self._writer.sizes, np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes + tfrecord.OVERHEAD)])
        count = min(self._shards or -(-int(offsets[-1]) // SHARD_BYTES), len(sizes))
        edges = np.linspace(0, len(sizes), count + 1).round().astype(int)
        entries = []
        for shard, (start, stop) in enumerate(zip(edges[:-1], edges[1:])):
            name = pair_codec.shard_name(self.name, shard, count)
            digest, left = hashlib.sha256(), int(offsets[stop] - offsets[start])
            self._spool.seek(int(offsets[start]))
            with (target / name).open("wb") as file:
                while left:
                    piece = self._spool.read(min(left, 1 << 22))
                    digest.update(piece)
                    file.write(piece)
                    left -= len(piece)
            (target / f"{name}{tfrecord.INDEX_SUFFIX}").write_bytes(tfrecord.index_bytes(sizes[start:stop]))
            size = int(offsets[stop] - offsets[start])
            entries.append({"file": name, "rows": int(stop - start), "bytes": size, "sha256": digest.hexdigest()})
        return entries


class PairsSet:
    """A set of pairs that is read at random; safe to share between threads.

    Attributes:
      path: its folder.
      manifest: its manifest.
      table: read-only columns `[rows]` without pictures: `id` (str), `modality` (int16, index into `modalities`),
        `label_id` (int32, -1 without), `source` (int16, index into `sources`), `group` (int64, equal within a group,
        -1 without), `captions` (int32, how many).
    """

    def __init__(self, path, manifest: dict[str, Any], table: dict[str, np.ndarray]):
        self.path, self.manifest, self._raw_table = path, manifest, table
        self._starts = np.concatenate([[0], np.cumsum([s["rows"] for s in manifest["shards"]])])
        self._readers: dict[int, tfrecord.RecordReader] = {}

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
        table = read_npz(path / "table.npz", "table of the set")
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
    def table(self) -> dict[str, np.ndarray]:
        """Columns without pictures, see the class."""
        columns = {**self._raw_table, "id": self._raw_table["id"].astype("U32")}
        for column in columns.values():
            column.flags.writeable = False
        return columns

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids of some rows."""
        return [i.decode() for i in self._raw_table["id"][rows].tolist()]

    def read(self, row: int) -> Pair:
        """One pair.

        Raises:
          InputError: its record is damaged.
        """
        if not 0 <= row < len(self):
            raise InputError(f"row {row} is not one of the {len(self)} rows of {self.path}")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        record = int(row - self._starts[shard])
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers.setdefault(shard, self._open_shard(shard))
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
        _check_rows(index, len(self))
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


def _table(columns: dict[str, list]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Columns as arrays, and the sorted names that the coded ones point to."""
    modalities, sources = sorted(set(columns["modality"])), sorted(set(columns["source"]))
    groups: dict[Any, int] = {None: -1}
    for group in columns["group"]:
        groups.setdefault(group, len(groups) - 1)
    modality_code, source_code = ({n: i for i, n in enumerate(names)} for names in (modalities, sources))
    table = {
        "id": np.asarray(columns["id"], "S32"),
        "modality": np.asarray([modality_code[m] for m in columns["modality"]], np.int16),
        "label_id": np.asarray(columns["label_id"], np.int32),
        "source": np.asarray([source_code[s] for s in columns["source"]], np.int16),
        "group": np.asarray([groups[g] for g in columns["group"]], np.int64),
        "captions": np.asarray(columns["captions"], np.int32),
    }
    return table, {"modalities": modalities, "sources": sources}


def _check_rows(index: RowIndex, count: int) -> None:
    if len(index) and index.rows.max() >= count:
        raise InputError(f"row index {index.name!r} reaches row {index.rows.max()}, the set has {count} rows")
