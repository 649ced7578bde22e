"""Image-text retrieval: recall at 1, 5, 10 and the median rank, both ways, in a pool whose size the metric names.

Two readings. Merged: the captions are pooled without repetitions, and whatever shares the query's caption or group
(one case's images and captions) is right. Strict: one caption an image, and only the query's own partner is right;
identical captions then stand in each other's way. The rank is that of the best right item; equal similarities rank by
index, so that a model that tells nothing apart scores like chance. Cosines are summed in float64 and rounded to
float32, so that equal items tie exactly, wherever they stand in the product, and ranks do not depend on the chunk.
"""

import numpy as np
from scipy.sparse import csc_array

from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult
from mmkd_jax.evals.features import unit

CUTS = (1, 5, 10)
SHOWN = 10  # how many best items a query's prediction lists


def applies(one: EvalSet) -> bool:
    """Whether the set has captions."""
    return one.captions


def search(queries, pool, right, *, expand=None, chunk: int = 512) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks a pool for each query.

    Args:
      queries: features `[q, embed]`.
      pool: features `[p, embed]`.
      right: function from query numbers `[c]` to bool `[c, items]`, at least one True a row.
      expand: int `[items]`, pool number of each item; the pool itself when None.
      chunk: queries at a time, which bounds the memory to a few `[chunk, items]`.

    Returns:
      rank of the best right item, int64 `[q]` from 1; the best items, int64 `[q, min(SHOWN, items)]`; their cosines.
    """
    queries, pool = unit(queries).astype(np.float64), unit(pool).astype(np.float64)
    expand = np.arange(len(pool)) if expand is None else np.asarray(expand)
    ranks, best, cosines = [], [], []
    for start in range(0, len(queries), chunk):
        rows = np.arange(start, min(start + chunk, len(queries)))
        similar = (queries[rows] @ pool.T).astype(np.float32)[:, expand]
        wanted = right(rows)
        if not wanted.any(axis=1).all():
            raise InputError("a retrieval query has no right answer in the pool")
        item = np.where(wanted, similar, -np.inf).argmax(axis=1)[:, None]
        level = np.take_along_axis(similar, item, axis=1)
        before = (similar > level) | ((similar == level) & (np.arange(len(expand)) < item))
        ranks.append(1 + before.sum(axis=1))
        order = np.argsort(-similar, axis=1, kind="stable")[:, :SHOWN]
        best.append(order)
        cosines.append(np.take_along_axis(similar, order, axis=1))
    return np.concatenate(ranks), np.concatenate(best), np.concatenate(cosines)


def evaluate(data: TaskData) -> TaskResult:
    """Both directions and both readings, the first caption of each row, with intervals over queries."""
    rows = np.array([row for row in data.set.rows if data.features.captions(row)], np.int64)
    if len(rows) < 2:
        raise InputError(f"{data.set.name}: retrieval needs at least two rows with captions, got {len(rows)}")
    captions = [data.features.captions(row)[0] for row in rows]
    texts, first, caption_of = np.unique(captions, return_index=True, return_inverse=True)
    images, text_features = data.features.images(rows), data.features.texts(texts.tolist())
    groups = np.unique(data.groups(rows), return_inverse=True)[1]
    own, said = np.arange(len(rows)), _said(groups, caption_of)

    # name: queries, pool, right items, items' pool numbers, groups of the queries
    readings = {
        "i2t": (images, text_features, lambda q: said[groups[q]].toarray(), None, groups),
        "t2i": (text_features, images, lambda q: said[:, q].toarray().T[:, groups], None, groups[first]),
        "i2t_strict": (images, text_features, lambda q: own == q[:, None], caption_of, groups),
        "t2i_strict": (text_features[caption_of], images, lambda q: own == q[:, None], None, groups),
    }
    estimates, predictions = {}, {"ids": data.ids(rows), "rows": rows, "groups": groups}
    predictions |= {"texts": texts, "caption_of": caption_of}
    for name, (queries, pool, right, expand, units) in readings.items():
        ranks, best, cosines = search(queries, pool, right, expand=expand)
        estimates |= _estimates(name, ranks, len(pool) if expand is None else len(expand), units, data)
        predictions |= {f"{name}_rank": ranks, f"{name}_best": best, f"{name}_cosine": cosines}
    context = {
        "profile": "first_caption",
        "feature_layer": "embedding",
        "images": len(rows),
        "captions": len(texts),
        "groups": len(np.unique(groups)),
        "ties": "by index",
        "bootstrap": {"method": "percentile", "resamples": data.resamples, "unit": "group of the query"},
    }
    return TaskResult(estimates, predictions, context)


def _said(groups: np.ndarray, caption_of: np.ndarray) -> csc_array:
    """Bool `[groups, captions]`: some image of the group has the caption, which is then right for all its images."""
    pairs = np.unique(np.stack([groups, caption_of]), axis=1)
    shape = groups.max() + 1, caption_of.max() + 1
    return csc_array((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=shape)


def _estimates(name: str, ranks: np.ndarray, pool: int, units: np.ndarray, data: TaskData) -> dict:
    direction, _, strict = name.partition("_")
    tail = f"_of_{pool}" + (f"_{strict}" if strict else "")
    seed = bootstrap.seed_of(data.seed, data.set.name, name)
    weights = bootstrap.draw(len(ranks), data.resamples, seed, units=units)
    found = {}
    for cut in CUTS:
        hits = ranks <= cut
        estimate = bootstrap.Estimate(float(hits.mean()), bootstrap.mean(hits, weights))
        found[f"{direction}_R@{cut}{tail}"] = (estimate, len(ranks))
    middle = bootstrap.Estimate(float(np.median(ranks)), bootstrap.median(ranks, weights))
    found[f"{direction}_median_rank{tail}"] = (middle, len(ranks))
    return found
