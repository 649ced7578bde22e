"""Image-text retrieval: recall at 1, 5, 10, median rank and mean average precision, both ways, pool size in the name.

Two readings. Merged: the captions are pooled without repetitions, and whatever shares the query's caption or group
(one case's images and captions) is right. Strict: every caption stands for itself, and only an image's own captions and
a caption's own image are right; identical captions then stand in each other's way. A rank is that of the best right
item, the convention of CLIP; average precision is over all right items. Ties go by index, see `ranking`.

The task `retrieval` takes the first caption of each image, `retrieval_all` every caption.
"""

import dataclasses

import numpy as np
from scipy.sparse import csr_array

from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, ranking
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult

CUTS = (1, 5, 10)


def applies(one: EvalSet) -> bool:
    """Whether the set has captions."""
    return one.captions


def evaluate(data: TaskData) -> TaskResult:
    """Both directions and both readings, the first caption of each row, with intervals over queries."""
    return _evaluate(data, 1)


@dataclasses.dataclass(frozen=True)
class _EveryCaption:
    """The same with every caption of each row."""

    def applies(self, one: EvalSet) -> bool:
        """Whether the set has captions."""
        return applies(one)

    def evaluate(self, data: TaskData) -> TaskResult:
        """As `evaluate`."""
        return _evaluate(data, None)


EVERY_CAPTION = _EveryCaption()


def _evaluate(data: TaskData, most: int | None) -> TaskResult:
    """Retrieval with at most `most` captions a row, all of them if None."""
    rows = np.array([row for row in data.set.rows if data.features.captions(row)], np.int64)
    if len(rows) < 2:
        raise InputError(f"{data.set.name}: retrieval needs at least two rows with captions, got {len(rows)}")
    of_rows = [list(data.features.captions(row))[:most] for row in rows]
    owner = np.repeat(np.arange(len(rows)), [len(captions) for captions in of_rows])
    captions = [caption for captions in of_rows for caption in captions]
    texts, first, caption_of = np.unique(captions, return_index=True, return_inverse=True)
    images, words = data.features.images(rows), data.features.texts(texts.tolist())
    groups = np.unique(data.groups(rows), return_inverse=True)[1]
    said = _table(groups[owner], caption_of, groups.max() + 1, len(texts))  # a caption of some image of the group
    member = _table(groups, np.arange(len(rows)), groups.max() + 1, len(rows))
    own = _table(np.arange(len(owner)), owner, len(owner), len(rows))

    # name: queries, pool, right items, items' pool numbers, groups of the queries
    readings = {
        "i2t": (images, words, said[groups], None, groups),
        "t2i": (words, images, said.T @ member, None, groups[owner[first]]),
        "i2t_strict": (images, words, own.T, caption_of, groups),
        "t2i_strict": (words[caption_of], images, own, None, groups[owner]),
    }
    estimates, predictions = {}, {"ids": data.ids(rows), "rows": rows, "groups": groups}
    predictions |= {"texts": texts, "caption_of": caption_of, "owner": owner}
    for name, (queries, pool, right, expand, units) in readings.items():
        found = ranking.search(queries, pool, right, expand=expand)
        estimates |= _estimates(name, found, len(pool) if expand is None else len(expand), units, data)
        predictions |= {f"{name}_rank": found.ranks, f"{name}_precision": found.precision}
        predictions |= {f"{name}_best": found.best, f"{name}_cosine": found.cosines}
    context = {
        "profile": "first_caption" if most == 1 else "every_caption",
        "feature_layer": "embedding",
        "images": len(rows),
        "captions": len(texts),
        "groups": len(np.unique(groups)),
        "ties": "by index",
        "bootstrap": {"method": "percentile", "resamples": data.resamples, "unit": "group of the query"},
    }
    return TaskResult(estimates, predictions, context)


def _table(rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> csr_array:
    """Bool `[height, width]`, True at these places."""
    return csr_array((np.ones(len(rows), bool), (rows, columns)), shape=(height, width))


def _estimates(name: str, found: ranking.Ranking, pool: int, units: np.ndarray, data: TaskData) -> dict:
    direction, _, strict = name.partition("_")
    tail = f"_of_{pool}" + (f"_{strict}" if strict else "")
    n = len(found.ranks)
    weights = bootstrap.draw(n, data.resamples, bootstrap.seed_of(data.seed, data.set.name, name), units=units)

    def mean(values) -> tuple[bootstrap.Estimate, int]:
        return bootstrap.Estimate(float(values.mean()), bootstrap.mean(values, weights)), n

    estimates = {f"{direction}_R@{cut}{tail}": mean(found.ranks <= cut) for cut in CUTS}
    middle = bootstrap.Estimate(float(np.median(found.ranks)), bootstrap.median(found.ranks, weights))
    estimates[f"{direction}_median_rank{tail}"] = (middle, n)
    estimates[f"{direction}_mAP{tail}"] = mean(found.precision)
    return estimates
