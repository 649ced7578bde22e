"""Emission: teachers' features of a pairs set, once, as feature shards.

One pass over the pictures serves all teachers: each picture is decoded once and each view of it cut once, then every
teacher has its own preprocessing, tokenizer and fixed micro-batch. The unit of work is a shard; a shard that is
on disk is not made again.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmkd_jax import io, preprocess
from mmkd_jax.data.features import FeatureWriter
from mmkd_jax.data.pairs import Pair, PairsSet
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError


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

    Args:
      teachers: by the name that their features go under; see `teachers.load`.
      pairs: the set.
      out: folder of the feature sets.
      policy: how view k of a pair is cut.
      views: how many views of a picture.
      rows: the rows to encode; the others are marked as absent. All rows without it.
      dtype: of the stored features.

    Raises:
      InputError: a feature set is there already and is another one, or cannot be written.
    """
    if views < 1:
        raise InputError(f"views must be at least 1, not {views}")
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
    wanted = np.ones(len(pairs), bool)
    if rows is not None:
        wanted = np.zeros(len(pairs), bool)
        wanted[rows.rows] = True
    todo = sorted({shard for writer in writers.values() for shard in writer.pending()})
    begin, done = time.monotonic(), 0
    for shard in tqdm(todo, desc="emit", unit="shard", disable=not sys.stderr.isatty()):
        numbers = next(iter(writers.values())).rows(shard)
        chosen = [row for row in numbers if wanted[row]]
        batch = pairs.read_many(chosen)
        pictures = [preprocess.decode(pair.image) for pair in batch]
        for name, writer in writers.items():
            if shard in writer.pending():
                _write(writer, teachers[name], shard, numbers, wanted, batch, pictures, policy, views)
        done += len(chosen)
        if not sys.stderr.isatty():
            speed = f"{done / max(time.monotonic() - begin, 1e-9):.0f} pairs/s x {len(writers)} teachers"
            print(f"emit: shard {shard + 1} of {todo[-1] + 1}, {speed}", file=sys.stderr)
    for writer in writers.values():
        writer.finish()


def _write(
    writer: FeatureWriter,
    teacher: Any,
    shard: int,
    numbers: Sequence[int],
    wanted: np.ndarray,
    batch: Sequence[Pair],
    pictures: Sequence[Image.Image],
    policy: ViewPolicy,
    views: int,
) -> None:
    """One teacher's features of one shard."""
    width = teacher.spec.embed
    image = np.zeros((len(numbers), views, width), np.float32)
    text: list[np.ndarray] = [np.zeros((0, width), np.float32)] * len(numbers)
    present = np.asarray([wanted[row] for row in numbers], bool)
    if batch:
        image[present] = _image_features(teacher, batch, pictures, policy, views)
        for position, features in zip(np.flatnonzero(present), _text_features(teacher, batch), strict=True):
            text[position] = features
    writer.write_shard(shard, present, image, text)


def _image_features(
    teacher: Any, batch: Sequence[Pair], pictures: Sequence[Image.Image], policy: ViewPolicy, views: int
) -> np.ndarray:
    """Unit-norm features of all views, float32 `[n, views, width]`."""
    size = teacher.spec.preprocess.size
    inputs = np.stack(
        [
            teacher.preprocess(Image.fromarray(policy.render(picture, pair.id, k, size)))
            for pair, picture in zip(batch, pictures, strict=True)
            for k in range(views)
        ]
    )
    return _unit(teacher.encode_image(inputs)).reshape(len(batch), views, -1)


def _text_features(teacher: Any, batch: Sequence[Pair]) -> list[np.ndarray]:
    """Unit-norm features of every caption of each pair, float32 `[captions, width]` each; a text is encoded once."""
    distinct = sorted({caption for pair in batch for caption in pair.captions})
    features = _unit(teacher.encode_text(teacher.tokenize(distinct)))
    place = {caption: i for i, caption in enumerate(distinct)}
    return [features[[place[caption] for caption in pair.captions]] for pair in batch]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
