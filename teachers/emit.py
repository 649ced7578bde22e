"""Emission: teachers' features of a pairs set, once, as feature shards.

One pass over the pictures serves all teachers: each picture is decoded once, and each view of it is cut once for each
size that a teacher asks for. Then every teacher has its own preprocessing, tokenizer and fixed micro-batch. The unit
of work is a shard; a shard that is on disk is not made again. A shard is worked through in pieces, so that memory does
not grow with it; as teachers encode in micro-batches of a fixed size, the features of a row do not depend on its piece.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from PIL import Image

from mmkd_jax import io, preprocess
from mmkd_jax.data.features import FeatureWriter
from mmkd_jax.data.pairs import Pair, PairsSet
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError
from teachers.progress import Meter, Progress

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
    meter: Meter | None = None,
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
      meter: what counts the seconds; its own without one.

    Raises:
      InputError: a feature set is there already and is another one, or cannot be written; a picture is damaged.
    """
    if views < 1:
        raise InputError(f"views must be at least 1, not {views}")
    if not teachers:
        raise InputError("no teacher is given; name at least one")
    stored = {"policy": policy, "views": views, "rows": rows, "dtype": dtype}
    writers = {
        name: _writer(io.as_path(out) / name, pairs, name, teacher, stored) for name, teacher in teachers.items()
    }
    wanted = _wanted(pairs, rows)
    pending = {name: set(writer.pending()) for name, writer in writers.items()}
    mine = range(jax.process_index(), len(next(iter(writers.values()))), jax.process_count())
    todo = [shard for shard in mine if any(shard in of_one for of_one in pending.values())]
    work = _Work(teachers, pairs, wanted, policy, views, meter or Meter())
    progress = Progress(work.meter, len(todo), sum(int(wanted[_slice(writers, shard)].sum()) for shard in todo))
    try:
        for shard in todo:
            unfinished = {name: writer for name, writer in writers.items() if shard in pending[name]}
            _write_shard(unfinished, shard, work, progress)
            progress.add(shards=1)
    finally:
        progress.close()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("features are emitted")
    if jax.process_index() == 0:
        for writer in writers.values():
            writer.finish()


def _writer(path: epath.Path, pairs: PairsSet, name: str, teacher: Any, stored: Mapping[str, Any]) -> FeatureWriter:
    """What writes a teacher's features, and says whose they are."""
    return FeatureWriter(
        path,
        pairs,
        teacher=name,
        width=teacher.spec.embed,
        license=teacher.spec.license,
        weights_hash=teacher.weights_hash,
        preprocess_hash=teacher.preprocess_hash,
        backend=teacher.backend,
        logit_scale=teacher.logit_scale,
        **stored,
    )


def _wanted(pairs: PairsSet, rows: RowIndex | None) -> np.ndarray:
    """Which rows of the set are encoded, bool `[rows]`."""
    if rows is None:
        return np.ones(len(pairs), bool)
    wanted = np.zeros(len(pairs), bool)
    wanted[rows.rows] = True
    return wanted


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is the same for every shard: see `emit`; `wanted` bool `[rows]`."""

    teachers: Mapping[str, Any]
    pairs: PairsSet
    wanted: np.ndarray
    policy: ViewPolicy
    views: int
    meter: Meter


def _slice(writers: Mapping[str, FeatureWriter], shard: int) -> slice:
    """Rows of a shard, which are the same for all teachers."""
    rows = next(iter(writers.values())).rows(shard)
    return slice(rows.start, rows.stop)


def _write_shard(writers: Mapping[str, FeatureWriter], shard: int, work: _Work, progress: Progress) -> None:
    """All these teachers' features of one shard."""
    here, views, meter = _slice(writers, shard), work.views, work.meter
    present = work.wanted[here]
    chosen, step = here.start + np.flatnonzero(present), max(1, PIECE // views)
    captions: list[list[str]] = []
    image = {name: np.zeros((len(present), views, writer.width), np.float32) for name, writer in writers.items()}
    for start in range(0, len(chosen), step):
        numbers = chosen[start : start + step]
        with meter.part("read"):
            piece = work.pairs.read_many(numbers)
        captions += [pair.captions for pair in piece]
        rendered = _render(piece, work, {work.teachers[name].spec.preprocess.size for name in writers})
        for name in writers:
            pictures = rendered[work.teachers[name].spec.preprocess.size]
            found = _image_features(work.teachers[name], name, pictures, meter)
            image[name][numbers - here.start] = found.reshape(len(piece), views, -1)
            meter.pairs[name] += len(piece)
        progress.add(pairs=len(piece))
    distinct = sorted({caption for texts in captions for caption in texts})
    for name, writer in writers.items():
        found = _text_features(work.teachers[name], name, distinct, captions, meter)
        with meter.part("store", name):
            text: list[np.ndarray] = [np.zeros((0, writer.width), np.float32)] * len(present)
            for row, features in zip(np.flatnonzero(present).tolist(), found, strict=True):
                text[row] = features
            writer.write_shard(shard, present, image.pop(name), text)


def _render(piece: Sequence[Pair], work: _Work, sizes: Iterable[int]) -> dict[int, list[Image.Image]]:
    """The views of each picture at each size, in order of row and view."""
    rendered: dict[int, list[Image.Image]] = {size: [] for size in sizes}
    for pair in piece:
        try:
            with work.meter.part("decode"):
                picture = preprocess.decode(pair.image)
        except InputError as error:
            raise InputError(f"pair {pair.id} of {work.pairs.path}: {error}") from error
        with work.meter.part("preprocess"):
            for size, pictures in rendered.items():
                views = (work.policy.render(picture, pair.id, k, size) for k in range(work.views))
                pictures += [Image.fromarray(view) for view in views]
    return rendered


def _image_features(teacher: Any, name: str, pictures: Sequence[Image.Image], meter: Meter) -> np.ndarray:
    """Unit-norm features of pictures, float32 `[n, width]`."""
    with meter.part("preprocess", name):
        ready = np.stack([teacher.preprocess(picture) for picture in pictures])
    with meter.part("encode", name):
        features = teacher.encode_image(ready)
    return _unit(features)


def _text_features(
    teacher: Any, name: str, distinct: Sequence[str], captions: Sequence[Sequence[str]], meter: Meter
) -> list[np.ndarray]:
    """Unit-norm features of every caption of each pair, float32 `[captions, width]` each; equal ones encoded once."""
    if not distinct:
        return [np.zeros((0, teacher.spec.embed), np.float32)] * len(captions)
    with meter.part("preprocess", name):
        tokens = teacher.tokenize(distinct)
    with meter.part("encode", name):
        features = teacher.encode_text(tokens)
    place = {caption: i for i, caption in enumerate(distinct)}
    found = _unit(features)[[place[caption] for texts in captions for caption in texts]]
    ends = np.cumsum([0, *map(len, captions)]).tolist()
    return [found[start:stop] for start, stop in itertools.pairwise(ends)]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
