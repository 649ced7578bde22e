"""Feature sets: what one teacher says about every row of a set of pairs, stored once.

<features>/features.tfrecord-00000-of-00004 (+ .idx)   a record is a block of rows, in the order of the pairs
<features>/statistics.npz                              count, mean, covariance of image and text features
<features>/manifest.json                               written last
"""

import functools
import itertools
import os
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import npz, tfrecord
from mmkd_jax.data.feature_codec import DTYPES, SCHEMA, TOWERS, Block, Moments
from mmkd_jax.data.feature_writer import FeatureWriter
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError

__all__ = ["FeatureSet", "FeatureWriter"]

_OPEN_SHARDS = 64  # of one teacher; together well below the usual limit of open files


class FeatureSet:
    """Stored features of one teacher; safe to share between threads.

    Attributes:
      path: its folder.
      manifest: its manifest.
      policy: how the views were cut.
    """

    def __init__(self, path, manifest: dict[str, Any], pairs: PairsSet | None, cache_bytes: int):
        self.path, self.manifest, self._pairs = path, manifest, pairs
        self.policy = ViewPolicy.from_dict(manifest["policy"])
        if self.policy.hash != manifest["policy_hash"]:
            raise InputError(f"{path} states a view policy that does not have the hash beside it; emit again")
        self._dtype = DTYPES[manifest["dtype"]]
        self._edges = np.asarray(manifest["edges"], np.int64)
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._open_shard)
        self._cache: OrderedDict[int, tuple[Block, np.ndarray]] = OrderedDict()
        self._room, self._lock = cache_bytes, threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        pairs: PairsSet | None,
        *,
        policy: ViewPolicy | None = None,
        cache_bytes: int = 256 << 20,
    ) -> "FeatureSet":
        """Opens the features of `pairs`. What lies in the records is checked when they are read.

        Args:
          path: the folder.
          pairs: the set to join; None only to look at the features by themselves.
          policy: the view policy that they must have.
          cache_bytes: decoded features to keep in memory.

        Raises:
          InputError: they are of another set or policy, not finished, or not whole.
        """
        path = io.as_path(path)
        if not (path / "manifest.json").exists():
            raise InputError(f"{path} holds no finished features (no manifest.json); run `mmkd emit` (again)")
        manifest = io.read_json(path / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("kind") != "features":
            raise InputError(f"{path}/manifest.json is not the manifest of a feature set")
        if manifest["schema"] != SCHEMA:
            raise InputError(f"{path} has schema {manifest['schema']}, this version reads {SCHEMA}; emit again")
        if io.hash_of({k: v for k, v in manifest.items() if k != "hash"}) != manifest["hash"]:
            raise InputError(f"{path}/manifest.json was changed: it does not have its own hash; copy it or emit again")
        _check_files(path, manifest)
        if pairs is not None:
            _check_join(path, manifest, pairs)
        if policy is not None and policy.hash != manifest["policy_hash"]:
            raise InputError(
                f"{path} has the view policy {manifest['policy']}, {policy.to_dict()} is asked for; use its policy or "
                "emit again"
            )
        return cls(path, manifest, pairs, cache_bytes)

    @property
    def hash(self) -> str:
        """Identity of the features and of all that they were made from."""
        return self.manifest["hash"]

    @property
    def teacher(self) -> str:
        """The name that the features go under."""
        return self.manifest["teacher"]

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return self.manifest["width"]

    @property
    def views(self) -> int:
        """Views of each picture."""
        return self.manifest["views"]

    @property
    def space(self) -> str:
        """`native` or `projected`."""
        return self.manifest["space"]

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """For `image` and `text`: `count` int, `mean` float64 `[width]`, `covariance` float64 `[width, width]`.

        Of the features as stored, over all views or captions of present rows; the covariance divides by the count.
        """
        arrays = npz.read(self.path / "statistics.npz", "statistics of the features")
        return {
            tower: {
                "count": int(arrays[f"{tower}_count"]),
                "mean": arrays[f"{tower}_mean"],
                "covariance": arrays[f"{tower}_covariance"],
            }
            for tower in TOWERS
        }

    def read(self, rows: np.ndarray, views: np.ndarray, captions: np.ndarray | None) -> dict[str, np.ndarray]:
        """Features of some rows.

        Args:
          rows: int `[n]`.
          views: int `[n]`, which view of each.
          captions: int `[n]`, which caption of each; None for pictures alone, whose rows may have no captions.

        Returns:
          `image` and, with captions, `text`, float32 `[n, width]`, zeros where absent; `present` bool `[n]`.

        Raises:
          InputError: a row, view or caption does not exist, or a record is damaged or not usable.
        """
        rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        count = self.manifest["pairs"]["rows"]
        if rows.size and not (rows.min() >= 0 and rows.max() < count):
            raise InputError(f"{self.path} has {count} rows; rows {rows.min()} to {rows.max()} were asked for")
        if views.size and not (views.min() >= 0 and views.max() < self.views):
            raise InputError(f"{self.path} has {self.views} views; view {views.max()} was asked for")
        asked = None if captions is None else np.asarray(captions, np.int64)
        block = self.manifest["block"]
        order = np.argsort(rows // block, kind="stable")  # what is of one block, in one go
        inside = (rows % block)[order]
        numbers = (rows // block)[order]
        bounds = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), len(order)]
        entries = [(*self._block(int(numbers[a])), a, b) for a, b in itertools.pairwise(bounds)]
        places = np.empty((len(order), 3), np.int64)
        for _, of_rows, a, b in entries:
            of_rows.take(inside[a:b], 0, places[a:b], "clip")
        present, wanted = places[:, 0] >= 0, {"image": places[:, 0] * self.views + views[order]}
        if asked is not None:
            wanted["text"] = places[:, 1] + asked[order]
            if np.any(present & ((asked[order] < 0) | (asked[order] >= places[:, 2]))):
                raise InputError(f"{self.path}: a caption was asked for that a row does not have")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        found = {tower: self._gather(tower, entries, chosen).take(back, 0) for tower, chosen in wanted.items()}
        result = {tower: x.view(self._dtype).astype(np.float32) for tower, x in found.items()}
        present = present[back]
        if not present.all():
            for x in result.values():
                x[~present] = 0
        return {**result, "present": present}

    def _gather(self, tower: str, entries: list, chosen: np.ndarray) -> np.ndarray:
        """Vectors of some places of blocks as bytes `[n, bytes]`; anything at places that do not exist."""
        found = np.empty((len(chosen), self.width * self._dtype.itemsize), np.uint8)
        for block, _, start, stop in entries:
            if len(vectors := getattr(block, tower)):
                raw = vectors.reshape(-1, self.width).view(np.uint8)
                raw.take(chosen[start:stop], 0, found[start:stop], "clip")
        return found

    def verify(self) -> None:
        """Reads everything: SHA-256, checksums, ids, sizes, values, and the statistics made again.

        Raises:
          InputError: something differs; the message says what.
        """
        merged = {tower: Moments.of(np.zeros((0, self.width))) for tower in TOWERS}
        present = 0
        for shard, entry in enumerate(self.manifest["shards"]):
            size = self.manifest["block"]
            blocks = [
                self._read_block(n) for n in range(self._edges[shard] // size, -(-self._edges[shard + 1] // size))
            ]
            present += sum(int(block.present.sum()) for block in blocks)
            for tower in TOWERS:
                vectors = np.concatenate([getattr(block, tower).reshape(-1, self.width) for block in blocks])
                merged[tower] = merged[tower].merge(Moments.of(vectors))
            if io.sha256_file(self.path / entry["file"]) != entry["sha256"]:  # records above say where, this only that
                raise InputError(
                    f"{self.path / entry['file']} does not have the manifest's SHA-256; copy or emit again"
                )
        if io.sha256_file(self.path / "statistics.npz") != self.manifest["statistics_sha256"]:
            raise InputError(f"{self.path}/statistics.npz does not have the manifest's SHA-256; copy or emit again")
        if present != self.manifest["present"]:
            raise InputError(f"{self.path} has {present} present rows, the manifest says {self.manifest['present']}")
        for tower, stored in self.statistics.items():
            if stored["count"] != merged[tower].count or not (
                np.allclose(stored["mean"], merged[tower].mean, atol=1e-9)
                and np.allclose(stored["covariance"], merged[tower].covariance, atol=1e-9)
            ):
                raise InputError(f"{self.path}: the {tower} statistics are not those of the features; emit again")

    def _block(self, number: int) -> tuple[Block, np.ndarray]:
        """A block and, int64 `[rows, 3]`, for each row: place of its picture or -1, of its first caption, captions."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        block = self._read_block(number)
        pictures = np.where(block.present, np.cumsum(block.present) - 1, -1)
        entry = block, np.stack([pictures, np.cumsum(block.counts) - block.counts, block.counts], axis=1)
        with self._lock:
            if number not in self._cache:
                self._room -= block.size
            self._cache[number] = entry
            while self._room < 0 and len(self._cache) > 1:
                self._room += self._cache.popitem(last=False)[1][0].size
        return entry

    def _read_block(self, number: int) -> Block:
        first = number * self.manifest["block"]
        shard = int(np.searchsorted(self._edges, first, side="right")) - 1
        record = number - int(self._edges[shard]) // self.manifest["block"]
        reader = self._shard(shard)
        try:
            block = Block.decode(reader.view(record), self._dtype)
            block.check(self.width, self.views)
        except InputError as error:
            message = str(error)
            raise InputError(
                message if str(reader.path) in message else f"{reader.path}: record {record}: {message}; emit again"
            ) from error
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(f"{reader.path}: record {record} is no block of features ({error}); emit again") from error
        stop = min(first + self.manifest["block"], self.manifest["pairs"]["rows"])
        if block.first != first or len(block.present) != stop - first:
            raise InputError(f"{reader.path}: record {record} does not hold rows {first} to {stop}; emit again")
        if self._pairs is not None and block.ids != self._pairs.id_bytes(first, stop):
            raise InputError(f"{reader.path}: record {record} has other ids than the pairs of rows {first} to {stop}")
        return block

    def _open_shard(self, shard: int) -> tfrecord.RecordReader:
        reader = tfrecord.RecordReader(self.path / self.manifest["shards"][shard]["file"])
        wanted = -(-(int(self._edges[shard + 1]) - int(self._edges[shard])) // self.manifest["block"])
        if len(reader) != wanted:
            raise InputError(f"{reader.path} has {len(reader)} records, not {wanted}; copy it or emit again")
        return reader


def _check_files(path, manifest: dict[str, Any]) -> None:
    for shard in manifest["shards"]:
        file = path / shard["file"]
        if not file.exists():
            raise InputError(f"{file} is missing; copy the features again or emit again")
        if (size := file.stat().length) != shard["bytes"]:
            how = "is truncated: it " if size < shard["bytes"] else ""
            raise InputError(f"{file} {how}has {size} bytes, the manifest says {shard['bytes']}; copy or emit again")
    arrays = npz.read(path / "statistics.npz", "statistics of the features")
    for tower in TOWERS:
        if arrays[f"{tower}_mean"].shape != (manifest["width"],):
            raise InputError(
                f"{path}: the manifest says width {manifest['width']}, the {tower} statistics are "
                f"{arrays[f'{tower}_mean'].shape}; emit again"
            )


def _check_join(path, manifest: dict[str, Any], pairs: PairsSet) -> None:
    stated = manifest["pairs"]
    if stated["hash"] != pairs.hash:
        raise InputError(
            f"{path} are features of another set of pairs ({stated['hash'][:12]}), {pairs.path} is {pairs.hash[:12]}; "
            "open the set that they were made from or emit again"
        )
    if stated["rows"] != len(pairs) or sum(s["rows"] for s in manifest["shards"]) != len(pairs):
        raise InputError(f"{path} has features of {stated['rows']} rows, {pairs.path} has {len(pairs)}; emit again")
    if stated["captions_hash"] != pairs.manifest["captions_hash"]:
        raise InputError(f"{path} was made with other captions than those of {pairs.path}; emit again")
