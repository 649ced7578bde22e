"""Emission: teachers' features of a pairs set, once, as feature shards.

One pass over the pictures serves all teachers: each picture is decoded once, and each view of it is cut once for each
size that a teacher asks for. Then every teacher has its own preprocessing, tokenizer and fixed micro-batch. The unit
of work is a shard; a shard that is on disk is not made again. A shard is worked through in pieces, so that memory does
not grow with it; as teachers encode in micro-batches of a fixed size, the features of a row do not depend on its piece.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image
from tqdm import tqdm

from mmkd_jax import io, preprocess
from mmkd_jax.data.features import FeatureWriter
from mmkd_jax.data.pairs import Pair, PairsSet
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError

PIECE = 256  # pictures, counting views, that are held as pixels at a time


def emit(
    teachers: Mapping[str, Any],
    pairs: PairsSet,
    out: str | os.PathLike,
    *,
    policy: ViewPolicy,
    views: int = 1,
    rows: RowIndex | None = None,
    dtype: str = "bfloat16",
) -> None:
    """Writes `out/TEACHER` for every teacher: unit-norm features of the views' pictures and of every caption.

    Of several processes (`jax.process_count`) each takes every so many-th shard, and the first writes the manifests.

    Args:
      teachers: by the name that their features go under; see `teachers.load`.
      pairs: the set.
      out: folder of the feature sets.
      policy: how view k of a pair is cut.
      views: how many views of a picture.
      rows: the rows to encode; the others are marked as absent. All rows without it.
      dtype: of the stored features.

    Raises:
      InputError: a feature set is there already and is another one, or cannot be written; a picture is damaged.
    """
    if views < 1:
        raise InputError(f"views must be at least 1, not {views}")
    if not teachers:
        raise InputError("no teacher is given; name at least one")
    writers = {
        name: FeatureWriter(
            io.as_path(out) / name,
            pairs,
            teacher=name,
            width=teacher.spec.embed,
            views=views,
            policy=policy,
            license=teacher.spec.license,
            weights_hash=teacher.weights_hash,
            preprocess_hash=teacher.preprocess_hash,
            logit_scale=teacher.logit_scale,
            rows=rows,
            dtype=dtype,
        )
        for name, teacher in teachers.items()
    }
    wanted = _wanted(pairs, rows)
    pending = {name: set(writer.pending()) for name, writer in writers.items()}
    mine = range(jax.process_index(), len(next(iter(writers.values()))), jax.process_count())
    for shard in _watched([shard for shard in mine if any(shard in of_one for of_one in pending.values())]):
        unfinished = {name: writer for name, writer in writers.items() if shard in pending[name]}
        _write_shard(unfinished, teachers, pairs, shard, wanted, policy, views)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("features are emitted")
    if jax.process_index() == 0:
        for writer in writers.values():
            writer.finish()


def _wanted(pairs: PairsSet, rows: RowIndex | None) -> np.ndarray:
    """Which rows of the set are encoded, bool `[rows]`."""
    if rows is None:
        return np.ones(len(pairs), bool)
    wanted = np.zeros(len(pairs), bool)
    wanted[rows.rows] = True
    return wanted


def _write_shard(
    writers: Mapping[str, FeatureWriter],
    teachers: Mapping[str, Any],
    pairs: PairsSet,
    shard: int,
    wanted: np.ndarray,
    policy: ViewPolicy,
    views: int,
) -> None:
    """All these teachers' features of one shard, whose rows are the same for all of them."""
    numbers = np.asarray(next(iter(writers.values())).rows(shard))
    present = wanted[numbers]
    chosen, step = numbers[present], max(1, PIECE // views)
    captions: list[list[str]] = []
    parts: dict[str, list[np.ndarray]] = {
        name: [np.zeros((0, views, writer.width), np.float32)] for name, writer in writers.items()
    }
    for start in range(0, len(chosen), step):
        piece = pairs.read_many(chosen[start : start + step])
        captions += [pair.captions for pair in piece]
        sizes = {teachers[name].spec.preprocess.size for name in writers}
        rendered = _render(piece, pairs, policy, views, sizes)
        for name in writers:
            pictures = rendered[teachers[name].spec.preprocess.size]
            parts[name].append(_image_features(teachers[name], pictures).reshape(len(piece), views, -1))
    for name, writer in writers.items():
        image = np.zeros((len(numbers), views, writer.width), np.float32)
        image[present] = np.concatenate(parts.pop(name))
        text: list[np.ndarray] = [np.zeros((0, writer.width), np.float32)] * len(numbers)
        for row, features in zip(np.flatnonzero(present), _text_features(teachers[name], captions), strict=True):
            text[row] = features
        writer.write_shard(shard, present, image, text)


def _render(
    piece: Sequence[Pair], pairs: PairsSet, policy: ViewPolicy, views: int, sizes: Iterable[int]
) -> dict[int, list[Image.Image]]:
    """The views of each picture at each size, in order of row and view."""
    rendered: dict[int, list[Image.Image]] = {size: [] for size in sizes}
    for pair in piece:
        try:
            picture = preprocess.decode(pair.image)
        except InputError as error:
            raise InputError(f"pair {pair.id} of {pairs.path}: {error}") from error
        for size, pictures in rendered.items():
            pictures += [Image.fromarray(policy.render(picture, pair.id, k, size)) for k in range(views)]
    return rendered


def _image_features(teacher: Any, pictures: Sequence[Image.Image]) -> np.ndarray:
    """Unit-norm features of pictures, float32 `[n, width]`."""
    return _unit(teacher.encode_image(np.stack([teacher.preprocess(picture) for picture in pictures])))


def _text_features(teacher: Any, captions: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Unit-norm features of every caption of each pair, float32 `[captions, width]` each; equal ones encoded once."""
    distinct = sorted({caption for texts in captions for caption in texts})
    if not distinct:
        return [np.zeros((0, teacher.spec.embed), np.float32)] * len(captions)
    features = _unit(teacher.encode_text(teacher.tokenize(distinct)))
    place = {caption: i for i, caption in enumerate(distinct)}
    found = features[[place[caption] for texts in captions for caption in texts]]
    return np.split(found, np.cumsum([len(texts) for texts in captions])[:-1])


def _watched(shards: Sequence[int]) -> Iterator[int]:
    """The shards to do, with a bar on a terminal and a line a shard elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(shards, desc="emit", unit="shard")
        return
    begin = time.monotonic()
    for done, shard in enumerate(shards, 1):
        yield shard
        print(f"emit: {done} of {len(shards)} shards, {time.monotonic() - begin:.1f} s", file=sys.stderr)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
