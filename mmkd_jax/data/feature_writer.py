"""Writing a feature set: shard by shard, resumable, the same bytes whatever was interrupted."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import example, npz, tfrecord
from mmkd_jax.data.feature_codec import DTYPES, SCHEMA, TOWERS, Block, Moments
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError, near

SPACES = ("native", "projected")
NORMS = ("unit", "none")
_UNIT_TOLERANCE = 1e-3


class FeatureWriter:
    """Writes the features of one teacher for a set of pairs. Opening it again goes on where it stopped.

    Args:
      path: folder of the feature set.
      pairs: the set that the features are of; they keep its order and name its hash.
      teacher: the name that the features go under.
      width: of a feature vector.
      views: views of each picture.
      policy: how views are cut.
      license, weights_hash, preprocess_hash: of the teacher, kept in the manifest.
      backend: what computed the features, with its version; None where nobody knows.
      logit_scale: the teacher's exponentiated logit scale.
      rows: the rows that get features; by default all.
      space: `native` (the teacher's own) or `projected` (mapped to the student's width).
      norm: `unit` (checked) or `none`.
      dtype: stored type: bfloat16, float16, float32.
      block: rows of a record.
      shards: number of shards; the default depends on the number of rows alone.

    Raises:
      InputError: the arguments contradict each other, or `path` holds another feature set.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        pairs: PairsSet,
        *,
        teacher: str,
        width: int,
        views: int,
        policy: ViewPolicy,
        license: str,
        weights_hash: str,
        preprocess_hash: str,
        backend: str | None = None,
        logit_scale: float = 1.0,
        rows: RowIndex | None = None,
        space: str = "native",
        norm: str = "unit",
        dtype: str = "bfloat16",
        block: int = 256,
        shards: int | None = None,
    ):
        for what, value, known in (("space", space, SPACES), ("norm", norm, NORMS), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise InputError(f"unknown {what} {value!r} for features; {near(value, known)}")
        if min(width, views, block) < 1:
            raise InputError(f"features need width, views and block of at least 1, not {width}, {views}, {block}")
        self.path, self.pairs, self.width, self.views = io.as_path(path), pairs, width, views
        blocks = -(-len(pairs) // block)
        shards = min(shards or -(-blocks // int(np.clip(blocks // 64, 8, 256))), blocks)
        edges = np.minimum(np.linspace(0, blocks, shards + 1).round().astype(int) * block, len(pairs))
        self._edges, self._block, self._dtype, self._norm = edges.tolist(), block, DTYPES[dtype], norm
        self._plan = {
            "kind": "features",
            "schema": SCHEMA,
            "teacher": teacher,
            "pairs": {"hash": pairs.hash, "captions_hash": pairs.manifest["captions_hash"], "rows": len(pairs)},
            "width": width,
            "views": views,
            "policy": policy.to_dict(),
            "policy_hash": policy.hash,
            "space": space,
            "norm": norm,
            "dtype": dtype,
            "block": block,
            "edges": self._edges,
            "selected": None if rows is None else pairs.checked(rows).hash,
            "license": license,
            "weights_hash": weights_hash,
            "preprocess_hash": preprocess_hash,
            "backend": backend,
            "logit_scale": float(logit_scale),
        }
        self._claim()

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._edges) - 1

    def pending(self) -> list[int]:
        """Numbers of the shards that are not on disk yet."""
        if (self.path / "manifest.json").exists():
            return []
        return [shard for shard in range(len(self)) if not self._statistics_file(shard).exists()]

    def rows(self, shard: int) -> range:
        """Rows of a shard."""
        return range(self._edges[shard], self._edges[shard + 1])

    def write_shard(self, shard: int, present: np.ndarray, image: np.ndarray, text: Sequence[np.ndarray]) -> None:
        """Writes the features of `rows(shard)`; the shard counts when its statistics are there, which come last.

        Args:
          shard: its number.
          present: bool `[rows]`; what is given for absent rows is not stored.
          image: float `[rows, views, width]`.
          text: float `[captions, width]` for each row.

        Raises:
          InputError: shapes are wrong, or features are not finite, all zeros or (norm `unit`) not of unit norm.
        """
        rows, present = self.rows(shard), np.asarray(present, bool)
        if (
            present.shape != (len(rows),)
            or image.shape != (len(rows), self.views, self.width)
            or len(text) != len(rows)
        ):
            raise InputError(
                f"shard {shard} of {self.path} takes {len(rows)} rows of {self.views} views x {self.width}, not "
                f"present {present.shape}, image {image.shape}, text of {len(text)}"
            )
        self._check_texts(rows, present, text)
        blocks = []
        for first in range(rows.start, rows.stop, self._block):
            here = slice(first - rows.start, min(first + self._block, rows.stop) - rows.start)
            blocks.append(self._make_block(first, present[here], image[here], text[here]))
        moments = {
            tower: Moments.of(np.concatenate([getattr(block, tower).reshape(-1, self.width) for block in blocks]))
            for tower in TOWERS
        }
        tfrecord.write(self.path / self._name(shard), [block.encode() for block in blocks])
        fields = {k: v for tower in TOWERS for k, v in moments[tower].fields(tower).items()}
        record = example.pieces({**fields, "present": int(present.sum())})
        io.write_parts(self._statistics_file(shard), tfrecord.framed(record))

    def finish(self) -> None:
        """Merges the statistics in the order of the shards and writes the manifest, last.

        Raises:
          InputError: shards are missing.
        """
        if not (self.path / "manifest.json").exists():
            if missing := self.pending():
                raise InputError(f"{self.path} lacks shards {missing}; run the emission again, it goes on from there")
            self._write_manifest()
        for shard in range(len(self)):  # the manifest is there: partial results are of no more use
            if self._statistics_file(shard).exists():
                self._statistics_file(shard).unlink()
        if (self.path / "plan.json").exists():
            (self.path / "plan.json").unlink()

    def _write_manifest(self) -> None:
        merged = {tower: Moments.of(np.zeros((0, self.width))) for tower in TOWERS}
        shards = []
        for shard in range(len(self)):
            part = self._statistics_of(shard)
            for tower in TOWERS:
                merged[tower] = merged[tower].merge(Moments.from_fields(tower, part))
            file = self.path / self._name(shard)
            shards.append(
                {
                    "file": file.name,
                    "rows": len(self.rows(shard)),
                    "present": part["present"][0],
                    "bytes": file.stat().length,
                    "sha256": io.sha256_file(file),
                }
            )
        statistics = npz.to_bytes(
            **{
                f"{tower}_{field}": np.asarray(getattr(merged[tower], field))
                for tower in TOWERS
                for field in ("count", "mean", "covariance")
            }
        )
        io.write_bytes(self.path / "statistics.npz", statistics)
        manifest = {
            **self._plan,
            "present": sum(s["present"] for s in shards),
            "shards": shards,
            "statistics_sha256": io.sha256(statistics),
        }
        io.write_json(self.path / "manifest.json", {**manifest, "hash": io.hash_of(manifest)})

    def _make_block(self, first: int, present: np.ndarray, image: np.ndarray, text: Sequence[np.ndarray]) -> Block:
        chosen = [np.asarray(t) for t, here in zip(text, present, strict=True) if here]
        values = {
            "image": image if present.all() else image[present],
            "text": np.concatenate([np.zeros((0, self.width), np.float32), *chosen]),
        }
        counts = np.zeros(len(present), np.int64)
        counts[present] = [len(t) for t in chosen]
        if self._norm == "unit":
            for tower, x in values.items():
                self._check_norms(tower, first, x)
        block = Block(
            first=first,
            ids=self.pairs.id_bytes(first, first + len(present)),
            present=present,
            counts=counts,
            **{tower: np.ascontiguousarray(x).astype(self._dtype) for tower, x in values.items()},
        )
        try:
            block.check(self.width, self.views)
            block.check_values()
        except InputError as error:
            raise InputError(f"rows from {first} on: {error}; the teacher gives no usable features") from error
        return block

    def _check_norms(self, tower: str, first: int, x: np.ndarray) -> None:
        norms = np.sqrt(np.einsum("...i,...i->...", x, x))
        wrong = ~(np.abs(norms - 1) <= _UNIT_TOLERANCE)  # NaN too
        if wrong.any():
            raise InputError(
                f"{tower} features of rows from {first} on have norm {norms[wrong].flat[0]:.4g}, not 1; normalise "
                "them or say norm='none'"
            )

    def _check_texts(self, rows: range, present: np.ndarray, text: Sequence[np.ndarray]) -> None:
        counts = self.pairs.table["captions"][rows.start : rows.stop].tolist()
        if [values.shape for values in text] == [(count, self.width) for count in counts]:
            return
        for row, here, count, values in zip(rows, present.tolist(), counts, text, strict=True):
            if here and values.shape != (count, self.width):
                raise InputError(
                    f"row {row} has {count} captions, its text features are {values.shape}, not ({count}, {self.width})"
                )

    def _claim(self) -> None:
        """Makes the folder ours, or makes sure that it is."""
        finished, plan = self.path / "manifest.json", self.path / "plan.json"
        found = io.read_json(finished) if finished.exists() else io.read_json(plan) if plan.exists() else None
        if found is None:
            io.make_workdir(self.path)
            io.write_json(plan, self._plan)
            return
        wanted: dict[str, Any] = self._plan
        for name, value in wanted.items():
            if found.get(name) != value:
                raise InputError(
                    f"{self.path} holds other features ({name} {_short(found.get(name))}, now {_short(value)}); "
                    "remove it or choose another folder"
                )

    def _name(self, shard: int) -> str:
        return f"features.tfrecord-{shard:05d}-of-{len(self):05d}"

    def _statistics_file(self, shard: int):
        return self.path / f"{self._name(shard)}.statistics"

    def _statistics_of(self, shard: int) -> dict[str, Sequence]:
        file = self._statistics_file(shard)
        try:
            return example.views(tfrecord.RecordReader(file).view(0))
        except (ValueError, IndexError) as error:
            raise InputError(f"{file} is damaged: {error}; delete it and run the emission again") from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."
