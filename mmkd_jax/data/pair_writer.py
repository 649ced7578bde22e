"""Writing a set of pairs: a local spool that is cut into shards when the number of rows is known."""

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import npz, pair_codec, tfrecord
from mmkd_jax.data.pair_codec import Pair
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError

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
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by finish or __exit__
        self._writer = tfrecord.RecordWriter(self._spool)
        names = ("id", "modality", "label_id", "source", "group", "captions", "findings", "questions")
        self._columns: dict[str, list] = {name: [] for name in names}
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

    def add(self, pair: Pair, findings: Sequence[int] = ()) -> int:
        """Appends a pair and returns its row.

        Args:
          pair: the pair.
          findings: 1 (there), 0 (not there), -1 (unknown) for each class of its source, where several may be there.

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
        self._columns["findings"].append(findings)
        questions = pair.extra.get("qa", ())
        self._columns["questions"].append(len(questions) if isinstance(questions, list | tuple) else 1)
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
    ) -> "PairsSet":  # noqa: F821, of the reader, which imports this module
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
        from mmkd_jax.data.pairs import PairsSet

        return PairsSet.open(self._path)

    def _write_all(self, target, rows, classes, made) -> dict[str, Any]:
        content_hash = self._digest.hexdigest()
        shards = self._write_shards(target)
        pair_codec.write_tfds_metadata(target, self.name, shards, f"Image-text pairs, content hash {content_hash}.")
        table, names = _table(self._columns)
        table_bytes = npz.to_bytes(**table)
        io.write_bytes(target / "table.npz", table_bytes)
        indices = {}
        for name, numbers in sorted(rows.items()):
            index = RowIndex(np.asarray(numbers, np.int64), content_hash, name, {"by": "ingest"})
            index.check(len(self))
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
        for shard, (start, stop) in enumerate(itertools.pairwise(edges)):
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
    if any(columns["questions"]):
        table["questions"] = np.asarray(columns["questions"], np.int32)
    if width := max(map(len, columns["findings"])):
        table["findings"] = np.full((len(columns["id"]), width), -1, np.int8)
        for row, findings in enumerate(columns["findings"]):
            table["findings"][row, : len(findings)] = findings
    return table, {"modalities": modalities, "sources": sources}
