"""Which teachers to keep for a pair: scores from stored features, and thresholds on them.

Which rule MMKD-CLIP used was not published; its samples keep 6.6 of nine teachers on average, for each sample by
itself and not by modality. `outline` reproduces that number with a rule of ours.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.selection import Selection
from mmkd_jax.errors import InputError, near

PIECE = 4096  # rows read at a time
POOL = 64  # pairs among which a true caption is ranked
PUBLISHED_SHARE = 6.6 / 9  # of the teachers that a pair of MMKD-CLIP keeps (19.2 M features of 2.9 M pairs)
POOLS = tuple(2**k for k in range(1, 13))  # that `outline` chooses among


def select(
    pairs: PairsSet,
    features: Mapping[str, FeatureSet],
    by: str,
    *,
    threshold: float = 0.0,
    pool: int = POOL,
    seed: int = 0,
) -> Selection:
    """Keeps teachers whose stored features (first view, first caption) of a pair pass a test; absent ones never do.

    Tests (`by`): `all`; `cosine` of picture and caption at least `threshold`; `quantile`: that cosine is not among the
    lowest share `threshold` of the teacher's own; `rank` of the true caption among `pool` pairs at most `threshold`
    (1 if 0; captions of equal features share a rank); `modality`: the picture is nearest to the mean caption of its own
    modality; `outline`: ranked first in a pool whose size brings the kept share nearest to the published 6.6 of 9.

    Raises:
      InputError: no features, an unknown test, or a threshold out of range.
    """
    if by not in TESTS:
        raise InputError(f"unknown test {by!r} for teachers; {near(by, TESTS)}")
    if not features:
        raise InputError("there are no features to select from; emit some")
    if pool < 2:
        raise InputError(f"a pool of {pool} ranks nothing; give at least 2")
    names, made = sorted(features), {"by": by, "threshold": threshold, "pool": pool, "seed": seed}
    stored = {name: _Stored(pairs, features[name]) for name in names}
    kept = TESTS[by](pairs, stored, made)
    return Selection(
        np.stack([kept[name] & stored[name].present for name in names], axis=1),
        tuple(names),
        pairs.hash,
        {**made, "features": {name: features[name].hash for name in names}},
    )


class _Stored:
    """One teacher's features, read in pieces: pictures and first captions of rows that are present."""

    def __init__(self, pairs: PairsSet, features: FeatureSet):
        self._features, self._rows = features, len(pairs)
        self.present = np.concatenate([self.read(rows)["present"] for rows in self.pieces()])

    def pieces(self) -> list[np.ndarray]:
        """All rows, in order."""
        return [np.arange(start, min(start + PIECE, self._rows)) for start in range(0, self._rows, PIECE)]

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        zeros = np.zeros_like(rows)
        return self._features.read(rows, zeros, zeros)

    def cosines(self) -> np.ndarray:
        """Of picture and caption, float32 `[rows]`; -inf where absent."""
        parts = [self.read(rows) for rows in self.pieces()]
        found = np.concatenate([(_unit(part["image"]) * _unit(part["text"])).sum(axis=1) for part in parts])
        return np.where(self.present, found, -np.inf)


def _all(pairs: PairsSet, stored: Mapping[str, _Stored], made: dict) -> dict[str, np.ndarray]:
    return {name: one.present for name, one in stored.items()}


def _cosine(pairs: PairsSet, stored: Mapping[str, _Stored], made: dict) -> dict[str, np.ndarray]:
    return {name: one.cosines() >= made["threshold"] for name, one in stored.items()}


def _quantile(pairs: PairsSet, stored: Mapping[str, _Stored], made: dict) -> dict[str, np.ndarray]:
    if not 0 <= made["threshold"] < 1:
        raise InputError(f"a quantile of {made['threshold']} is not in [0, 1)")
    kept, made["cosines"] = {}, {}
    for name, one in stored.items():
        cosines = one.cosines()
        made["cosines"][name] = (
            float(np.quantile(cosines[one.present], made["threshold"], method="lower")) if one.present.any() else 0
        )
        kept[name] = cosines >= made["cosines"][name]
    return kept


def _rank(pairs: PairsSet, stored: Mapping[str, _Stored], made: dict) -> dict[str, np.ndarray]:
    limit = made["threshold"] or 1
    return {name: _ranks(one, made["pool"], made["seed"]) <= limit for name, one in stored.items()}


def _outline(pairs: PairsSet, stored: Mapping[str, _Stored], made: dict) -> dict[str, np.ndarray]:
    there = max(1, sum(int(one.present.sum()) for one in stored.values()))
    best, distance = {}, np.inf
    for pool in (p for p in POOLS if p <= max(2, len(pairs))):
        found = {name: (_ranks(one, pool, made["seed"]) <= 1) & one.present for name, one in stored.items()}
        share = sum(int(kept.sum()) for kept in found.values()) / there
        if abs(share - PUBLISHED_SHARE) < distance:
            best, distance = found, abs(share - PUBLISHED_SHARE)
            made |= {"pool": pool, "share": share}
    return best


def _modality(pairs: PairsSet, stored: Mapping[str, _Stored], made: dict) -> dict[str, np.ndarray]:
    modality = np.asarray(pairs.table["modality"]).astype(np.int64)
    kept = {}
    for name, one in stored.items():
        sums = 0.0
        for rows in one.pieces():
            text = _unit(one.read(rows)["text"]) * one.present[rows, None]
            sums = sums + np.eye(len(pairs.modalities), dtype=np.float32)[modality[rows]].T @ text
        means = _unit(sums)
        known = np.linalg.norm(means, axis=1) > 0
        scores = [_unit(one.read(rows)["image"]) @ means.T for rows in one.pieces()]
        kept[name] = np.where(known, np.concatenate(scores), -np.inf).argmax(axis=1) == modality
    return kept


TESTS: dict[str, Callable[[PairsSet, Mapping[str, _Stored], dict[str, Any]], dict[str, np.ndarray]]] = {
    "all": _all,
    "cosine": _cosine,
    "quantile": _quantile,
    "rank": _rank,
    "modality": _modality,
    "outline": _outline,
}


def _ranks(one: _Stored, pool: int, seed: int) -> np.ndarray:
    """Rank of each picture's own caption among those of its pool, from 1; ties count half, copies do not compete.

    Pools are drawn by the seed from neighbouring rows, so that the features are read once and in order.
    """
    ranks = np.full(len(one.present), np.inf)
    for piece in one.pieces():
        found, here = one.read(piece), np.flatnonzero(one.present[piece])
        rows = np.random.default_rng([seed, int(piece[0])]).permutation(here)
        for part in np.array_split(rows, max(1, -(-len(rows) // pool))):
            texts, own = np.unique(found["text"][part], axis=0, return_inverse=True)
            scores = _unit(found["image"][part]) @ _unit(texts).T
            level = scores[np.arange(len(part)), own.reshape(-1)][:, None]
            ranks[piece[part]] = 0.5 + (scores > level).sum(axis=1) + 0.5 * (scores == level).sum(axis=1)
    return ranks


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
