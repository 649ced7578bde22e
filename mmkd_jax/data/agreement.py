"""What stored features look like: lengths, spread, how well pictures find their captions, how far teachers agree.

Everything is computed on a sample of rows, first views and captions, in float64. Cosines between teachers say something
where both are of one width only; how far any two agree is the correlation of what they hold alike and unlike.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mmkd_jax.data.feature_codec import TOWERS
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet

SAMPLE = 2048  # rows, at most: pairwise numbers are of about two million pairs

Vectors = Mapping[str, np.ndarray]  # `image`, `text` [rows, width] and `present` [rows]


def measure(pairs: PairsSet, features: Mapping[str, FeatureSet], *, sample: int = SAMPLE, seed: int = 0) -> dict:
    """All numbers of some feature sets of one set of pairs.

    Args:
      pairs: the set.
      features: by any name; two sets of one teacher (in two spaces) are compared with each other too.
      sample: rows to look at, at most.
      seed: of the sample.

    Returns:
      JSON record: `rows`, `modalities`; `sets` {name: see `of_set`}; `pairs`, a list of `between` for every two sets;
      `mean` of those sets that share a width, see `of_mean`.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:sample])
    modality = np.asarray(pairs.modalities)[np.asarray(pairs.table["modality"])[rows]]
    vectors = {name: _read(one, rows) for name, one in features.items()}
    names = list(features)
    two = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {
        "rows": len(rows),
        "modalities": sorted(set(modality.tolist())),
        "sets": {name: of_set(features[name], vectors[name], modality) for name in names},
        "pairs": [
            {"sets": [a, b], **between(vectors[a], vectors[b], modality, _one_teacher(features[a], features[b]))}
            for a, b in two
        ],
        "mean": _means(features, vectors),
    }


def of_set(one: FeatureSet, vectors: Vectors, modality: np.ndarray) -> dict[str, Any]:
    """Teacher, licence, hash, width; lengths, spread, mean cosine of different rows; matched cosine, R@1 by modality.

    R@1 is the share of pictures that are nearest to their own caption among those of their modality in the sample;
    captions of equal features count as one.
    """
    present = vectors["present"]
    found: dict[str, Any] = {
        "teacher": one.teacher,
        "space": one.space,
        "license": one.manifest["license"],
        "hash": one.hash,
        "width": one.width,
        "views": one.views,
        "present": one.manifest["present"],
        "sampled": int(present.sum()),
        "effective_rank": {tower: effective_rank(x["covariance"]) for tower, x in one.statistics.items()},
    }
    for tower in TOWERS:
        x = vectors[tower][present]
        found[f"{tower}_norm"] = _mean(np.linalg.norm(x, axis=1))
        found[f"{tower}_within"] = _mean(_apart(cosines(x, x)))
    image, text = (vectors[tower][present] for tower in TOWERS)
    matched, here = np.diagonal(cosines(image, text)), modality[present]
    found["matched"] = _mean(matched)
    found["by_modality"] = {
        name: {"rows": int((here == name).sum()), "matched": _mean(matched[here == name]),
               "r_at_1": first_share(image[here == name], text[here == name])}
        for name in sorted(set(here.tolist()))
    }  # fmt: skip
    return found


def between(a: Vectors, b: Vectors, modality: np.ndarray, distances: bool = False) -> dict[str, Any]:
    """How two sets go together on the rows that both have.

    Args:
      a, b: vectors of the same rows.
      modality: of the rows.
      distances: also the correlation of pairwise distances (for one teacher in two spaces).

    Returns:
      `rows`; `agreement`, the correlation of the two image-to-caption cosine matrices, with `by_modality`; where widths
      are the same, `same` and `different` {tower: [low, mean, high]}: cosines of a row's two features and of different
      rows' features, and `crossed`: one's picture against the other's caption of the same row.
    """
    both = a["present"] & b["present"]
    x, y = ({tower: v[tower][both] for tower in TOWERS} for v in (a, b))
    here = modality[both]
    found: dict[str, Any] = {"rows": int(both.sum()), "agreement": alike(x, y)}
    found["by_modality"] = {
        name: alike(*({tower: v[tower][here == name] for tower in TOWERS} for v in (x, y)))
        for name in sorted(set(here.tolist()))
    }
    if x["image"].shape == y["image"].shape:
        same = {tower: cosines(x[tower], y[tower]) for tower in TOWERS}
        found["same"] = {tower: _range(np.diagonal(matrix)) for tower, matrix in same.items()}
        found["different"] = {tower: _range(_apart(matrix)) for tower, matrix in same.items()}
        crossed = [np.diagonal(cosines(x["image"], y["text"])), np.diagonal(cosines(y["image"], x["text"]))]
        found["crossed"] = _range(np.concatenate(crossed))
    if distances:
        found["distances"] = {tower: _correlation(_distances(x[tower]), _distances(y[tower])) for tower in TOWERS}
    return found


def of_mean(vectors: Mapping[str, Vectors]) -> dict[str, Any]:
    """The mean over the teachers of a row, for sets of one width.

    Returns:
      `norm` {tower: [low, mean, high]} of the mean feature; `agreement`: the correlation, over all pictures and
      captions, of the cosine of mean features with the mean of the teachers' cosines (of those that have both rows).
    """
    present = np.stack([v["present"] for v in vectors.values()])
    some = present.any(axis=0)
    share = present[:, some] / present[:, some].sum(axis=0)
    mean = {
        tower: sum(w[:, None] * v[tower][some] for w, v in zip(share, vectors.values(), strict=True))
        for tower in TOWERS
    }
    total, count = np.zeros((some.sum(), some.sum())), np.zeros((some.sum(), some.sum()))
    for v in vectors.values():
        both = np.outer(v["present"][some], v["present"][some])
        total += np.where(both, cosines(v["image"][some], v["text"][some]), 0.0)
        count += both
    known = count > 0
    together = cosines(mean["image"], mean["text"])
    return {
        "rows": int(some.sum()),
        "norm": {tower: _range(np.linalg.norm(x, axis=1)) for tower, x in mean.items()},
        "agreement": _correlation(together[known], total[known] / count[known]),
    }


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of all rows with all rows, `[n, m]`; 0 for a row of zeros."""
    return _unit(x) @ _unit(y).T


def effective_rank(covariance: np.ndarray) -> float:
    """exp of the entropy of the normalised eigenvalues (Roy and Vetterli 2007): how many directions are in use."""
    with threadpool_limits(1):  # several threads are no faster here, and fifty times slower on a busy machine
        eigenvalues = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    share = eigenvalues / max(eigenvalues.sum(), 1e-300)
    return float(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))))


def alike(x: Vectors, y: Vectors) -> float | None:
    """Correlation of two sets' cosines of every picture with every caption; None with fewer than two rows."""
    return _correlation(*(cosines(v["image"], v["text"]).ravel() for v in (x, y)))


def first_share(image: np.ndarray, text: np.ndarray) -> float | None:
    """Share of pictures whose own caption is nearest, ties at a half; None without a choice of captions."""
    texts, own = np.unique(text, axis=0, return_inverse=True)
    if len(texts) < 2:
        return None
    scores = cosines(image, texts)
    level = scores[np.arange(len(image)), own.reshape(-1)][:, None]
    better, equal = (scores > level + 1e-12).sum(axis=1), (np.abs(scores - level) <= 1e-12).sum(axis=1)
    return float(np.mean((better == 0) / equal))


def _means(features: Mapping[str, FeatureSet], vectors: Mapping[str, Vectors]) -> dict[str, Any]:
    """`of_mean` for every space and width that several sets share."""
    groups: dict[str, list[str]] = {}
    for name, one in features.items():
        groups.setdefault(f"{one.space}, width {one.width}", []).append(name)
    return {group: of_mean({n: vectors[n] for n in names}) for group, names in groups.items() if len(names) > 1}


def _read(one: FeatureSet, rows: np.ndarray) -> dict[str, np.ndarray]:
    zeros = np.zeros_like(rows)
    found = one.read(rows, zeros, zeros)
    return {**{tower: found[tower].astype(np.float64) for tower in TOWERS}, "present": found["present"]}


def _one_teacher(a: FeatureSet, b: FeatureSet) -> bool:
    return a.teacher == b.teacher and a.space != b.space


def _distances(x: np.ndarray) -> np.ndarray:
    """Between all two different rows."""
    square = (x**2).sum(axis=1)
    matrix = square[:, None] + square - 2 * x @ x.T
    return np.sqrt(np.maximum(matrix[np.triu_indices(len(x), 1)], 0.0))


def _apart(matrix: np.ndarray) -> np.ndarray:
    """The entries beside the diagonal."""
    return matrix[~np.eye(len(matrix), dtype=bool)]


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's; None where one does not vary."""
    if len(a) < 2 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _range(x: np.ndarray) -> list[float] | None:
    return [float(x.min()), float(x.mean()), float(x.max())] if len(x) else None


def _mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if len(x) else None


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300)
