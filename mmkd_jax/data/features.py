"""Feature sets: what one teacher says about every row of a set of pairs, stored once.

<features>/features.tfrecord-00000-of-00004 (+ .idx)   a record is a block of rows, in the order of the pairs
<features>/statistics.npz                              count, mean, covariance of image and text features
<features>/manifest.json                               written last
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import npz
from mmkd_jax.data.feature_blocks import Blocks, Wanted
from mmkd_jax.data.feature_codec import DTYPES, SCHEMA, TOWERS, Moments
from mmkd_jax.data.feature_writer import FeatureWriter
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError

__all__ = ["FeatureSet", "FeatureWriter", "read_together"]

_ALIGNED = 64  # bytes; as jax wants arrays that it does not copy


class FeatureSet:
    """Stored features of one teacher; safe to share between threads.

    Attributes:
      path: its folder.
      manifest: its manifest.
      policy: how the views were cut.
      dtype: the stored type.
      blocks: what is stored.
    """

    def __init__(self, path, manifest: dict[str, Any], pairs: PairsSet | None, cache_blocks: int):
        self.path, self.manifest = path, manifest
        self.policy = ViewPolicy.from_dict(manifest["policy"])
        if self.policy.hash != manifest["policy_hash"]:
            raise InputError(f"{path} states a view policy that does not have the hash beside it; emit again")
        self.dtype = DTYPES[manifest["dtype"]]
        self.blocks = Blocks(path, manifest, pairs, cache_blocks)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        pairs: PairsSet | None,
        *,
        policy: ViewPolicy | None = None,
        cache_blocks: int = 64,
    ) -> "FeatureSet":
        """Opens the features of `pairs`. What lies in the records is checked when they are read.

        Args:
          path: the folder.
          pairs: the set to join; None only to look at the features by themselves.
          policy: the view policy that they must have.
          cache_blocks: blocks that are not looked at again when they are read again; their bytes, unless local, are
            kept in memory. A few windows of the block shuffle will do.

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
        return cls(path, manifest, pairs, cache_blocks)

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
        (found,) = read_together([self], rows, views, captions)
        return {name: x if name == "present" else x.astype(np.float32) for name, x in found.items()}

    def verify(self) -> None:
        """Reads everything: SHA-256, checksums, ids, sizes, values, and the statistics made again.

        Raises:
          InputError: something differs; the message says what.
        """
        merged = {tower: Moments.of(np.zeros((0, self.width))) for tower in TOWERS}
        present = 0
        for shard, entry in enumerate(self.manifest["shards"]):
            blocks = [self.blocks.read(number) for number in self.blocks.numbers(shard)]
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

    def _check_asked(self, rows: np.ndarray, views: np.ndarray) -> None:
        count = self.manifest["pairs"]["rows"]
        if rows.size and not (rows.min() >= 0 and rows.max() < count):
            raise InputError(f"{self.path} has {count} rows; rows {rows.min()} to {rows.max()} were asked for")
        if views.size and not (views.min() >= 0 and views.max() < self.views):
            raise InputError(f"{self.path} has {self.views} views; view {views.max()} was asked for")


def read_together(
    sets: Sequence[FeatureSet], rows: np.ndarray, views: np.ndarray, captions: np.ndarray | None
) -> list[dict[str, np.ndarray]]:
    """What several teachers say about the same rows, in the stored types.

    As `FeatureSet.read` of each, but nothing is made wider on the way to a device, where to look is worked out once,
    and all lies in one stretch of memory, which systems give out in larger pages than many small ones.
    """
    rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
    asked = None if captions is None else np.asarray(captions, np.int64)
    wanted: dict[int, Wanted] = {}
    for one in sets:
        one._check_asked(rows, views)
        block = one.manifest["block"]
        wanted[block] = wanted.get(block) or Wanted.of(rows, block)
    towers = TOWERS if captions is not None else TOWERS[:1]
    rooms = iter(_rooms([(len(rows), one.width, one.dtype) for one in sets for _ in towers]))
    return [_read(one, wanted[one.manifest["block"]], views, asked, {t: next(rooms) for t in towers}) for one in sets]


def _read(
    one: FeatureSet, wanted: Wanted, views: np.ndarray, asked: np.ndarray | None, out: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    found = one.blocks.places(wanted)
    present, size = found.first >= 0, one.width * one.dtype.itemsize
    places = {"image": found.first + views * size}
    if asked is not None:
        if np.any(present & ((asked < 0) | (asked >= found.captions))):
            raise InputError(f"{one.path}: a caption was asked for that a row does not have")
        places["text"] = found.texts + asked * size
    for tower, where in places.items():
        one.blocks.gather(found, where, present, out[tower])
    return {**out, "present": present}


def _rooms(shapes: list[tuple[int, int, np.dtype]]) -> list[np.ndarray]:
    """Arrays `[n, width]` of these sizes and types, one after the other in memory."""
    sizes = [n * width * dtype.itemsize for n, width, dtype in shapes]
    starts = np.cumsum([0, *(size + -size % _ALIGNED for size in sizes)]).tolist()
    memory = np.empty(starts[-1] + _ALIGNED, np.uint8)
    memory = memory[-memory.__array_interface__["data"][0] % _ALIGNED :]
    return [
        memory[start : start + size].view(dtype).reshape(n, width)
        for start, size, (n, width, dtype) in zip(starts, sizes, shapes)
    ]


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
