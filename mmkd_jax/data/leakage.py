"""Leakage: which evaluated pictures, or close relatives of them, are among those that were trained on.

A picture leaks where the other side has its id, its bytes, its pixels, a near copy, another picture of its article,
or another of its group. Every picture counts under the first of these reasons, so that the counts add up.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmkd_jax import preprocess
from mmkd_jax.data import perceptual_hash
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError

REASONS = ("id", "bytes", "pixels", "near", "article", "group")
KEYS = tuple(reason for reason in REASONS if reason != "near")
CITED = 30  # pictures of one side from which on an article is taken for the citation of a whole set, not for an origin
_READERS = 8
_CHUNK = 1024  # pictures handed to the readers at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a set of pairs, as one side of the comparison has them.

    Attributes:
      pairs: the set.
      rows: which of its rows.
      label: how it is called in the report.
    """

    pairs: PairsSet
    rows: RowIndex
    label: str

    @classmethod
    def open(cls, address: str) -> "Part":
        """The part that `PAIRS` or `PAIRS:ROWS` names, ROWS being the name of a row index.

        Raises:
          InputError: there is no such set or row index, or the index is empty.
        """
        path, colon, name = address.rpartition(":")
        if not colon or "/" in name:
            path, name = address, ""
        pairs = PairsSet.open(path)
        rows = pairs.rows(name) if name else RowIndex(np.arange(len(pairs)), pairs.hash, "all")
        if not len(rows):
            raise InputError(f"row index {name!r} of {pairs.path} is empty; name another")
        return cls(pairs, rows, f"{pairs.path.name}:{name}" if name else pairs.path.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Prints:
    """What pictures are recognised by; n pictures, those of all parts of a side one after the other.

    Attributes:
      part: int64 `[n]` number of the part; row: int64 `[n]` row in its set.
      keys: bytes `[n]` (empty where unknown) by reason, see `KEYS`.
      thumbnails: uint8 `[n, 64, 64]`.
      citations: articles that more than `CITED` pictures name, and that therefore match nothing.
    """

    part: np.ndarray
    row: np.ndarray
    keys: dict[str, np.ndarray]
    thumbnails: np.ndarray
    citations: list[str]

    def __len__(self) -> int:
        return len(self.row)


@dataclasses.dataclass(frozen=True, eq=False)
class Matches:
    """What one reason finds.

    Attributes:
      train, evaluation: int64 `[k]` positions in the prints: all near copies, the closest first; for other reasons
        one partner for each leaking picture of either side.
      score: float32 `[k]`, `similarity` of near copies, else 1.
    """

    train: np.ndarray
    evaluation: np.ndarray
    score: np.ndarray


def prints(parts: Sequence[Part]) -> Prints:
    """Reads every picture of the parts once.

    Raises:
      InputError: a picture cannot be read; the message names its row.
    """
    read = [one for number, part in enumerate(parts) for one in _read(number, part)]
    keys = {reason: np.array([one[2][k] for one in read], "S16") for k, reason in enumerate(KEYS)}
    keys["article"], citations = _without_citations([one[4] for one in read])
    return Prints(
        np.array([one[0] for one in read], np.int64),
        np.array([one[1] for one in read], np.int64),
        keys,
        np.stack([one[3] for one in read]),
        citations,
    )


def find(
    train: Prints,
    evaluation: Prints,
    *,
    distance: int = perceptual_hash.DISTANCE,
    similarity: float = perceptual_hash.SIMILARITY,
) -> dict[str, Matches]:
    """Matches by reason.

    Args:
      train, evaluation: from `prints`.
      distance: bits in which the hashes of near copies may differ.
      similarity: least similarity of near copies.
    """
    found = {reason: _equal(train.keys[reason], evaluation.keys[reason]) for reason in KEYS}
    found["near"] = _near(train, evaluation, distance, similarity)
    return {reason: found[reason] for reason in REASONS}


def first_reasons(matches: dict[str, Matches], side: str, count: int) -> np.ndarray:
    """The first reason by which each picture of a side leaks: str `[count]`, empty where none does."""
    reasons = np.full(count, "", "U8")
    for reason in reversed(REASONS):
        reasons[getattr(matches[reason], side)] = reason
    return reasons


def clean(part: Part, number: int, side: Prints, reasons: np.ndarray) -> RowIndex:
    """The rows of a part that do not leak, in their order; `reasons` of `first_reasons`."""
    bad = side.row[(side.part == number) & (reasons != "")]
    kept = part.rows.rows[~np.isin(part.rows.rows, bad)]
    made = {"by": "mmkd leakage", "from": part.rows.name, "from_hash": part.rows.hash, "excluded": len(np.unique(bad))}
    return RowIndex(kept, part.pairs.hash, f"{part.rows.name}.clean", made)


def record(
    sides: dict[str, Sequence[Part]], found: dict[str, Prints], matches: dict[str, Matches], settings: dict[str, Any]
) -> dict[str, Any]:
    """The findings as JSON: rows and leaks by reason of each part, and articles taken for citations of whole sets."""
    told: dict[str, Any] = {
        "settings": settings,
        "citations": sorted({c for side in found.values() for c in side.citations}),
    }
    for name, parts in sides.items():
        reasons = first_reasons(matches, name, len(found[name]))
        told[name] = [
            {
                "part": part.label,
                "set_hash": part.pairs.hash,
                "rows_hash": part.rows.hash,
                "rows": len(part.rows),
                "leaks": {r: int(((found[name].part == k) & (reasons == r)).sum()) for r in REASONS},
            }
            for k, part in enumerate(parts)
        ]
    return told


def _read(number: int, part: Part) -> Iterator[tuple]:
    """Part, row, keys, thumbnail and article of each picture."""

    def one(row: int) -> tuple:
        pair = part.pairs.read(row)
        try:
            image = preprocess.decode(pair.image)
        except InputError as error:
            raise InputError(f"{part.pairs.path}: row {row} (id {pair.id}): {error}") from error
        rgb = image.convert("RGB")
        pixels = b"%d %d " % rgb.size + rgb.tobytes()
        group = f"{pair.source}\0{pair.group}" if pair.group else ""
        article = pair.article.strip()
        told = (pair.id.encode(), pair.image, pixels, article.encode(), group.encode())
        return number, row, [_digest(value) for value in told], perceptual_hash.thumbnail(image), article

    rows = np.unique(part.rows.rows).tolist()
    with ThreadPoolExecutor(_READERS) as readers:
        for start in range(0, len(rows), _CHUNK):
            yield from readers.map(one, rows[start : start + _CHUNK])


def _digest(data: bytes) -> bytes:
    """16 bytes that stand for `data`, none for none; never ending in a zero, which arrays of bytes would drop."""
    return hashlib.sha256(data).digest()[:15] + b"." if data else b""


def _without_citations(articles: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Digests of articles, those that too many pictures share left out, and the names of these."""
    common = [text for text, count in Counter(articles).items() if text and count > CITED]
    return np.array([b"" if text in common else _digest(text.encode()) for text in articles], "S16"), sorted(common)


def _equal(train: np.ndarray, evaluation: np.ndarray) -> Matches:
    """One partner for each picture whose key the other side has."""
    pairs = [_partners(train, evaluation), _partners(evaluation, train)[:, ::-1]]
    found = np.unique(np.concatenate(pairs), axis=0)
    return Matches(found[:, 0], found[:, 1], np.ones(len(found), np.float32))


def _partners(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """int64 `[k, 2]`: each of `own` whose key is known and among `others`, with the first that has it."""
    values, first = np.unique(others, return_index=True)
    rows = np.flatnonzero((own != b"") & np.isin(own, values))
    return np.stack([rows, first[np.searchsorted(values, own[rows])]], axis=1)


def _near(train: Prints, evaluation: Prints, distance: int, similarity: float) -> Matches:
    """Near copies, plain surfaces apart: every pair whose hashes are close and whose thumbnails agree."""
    mine, theirs = (np.flatnonzero(~perceptual_hash.is_plain(side.thumbnails)) for side in (train, evaluation))
    hashes = (perceptual_hash.hashes(side.thumbnails[rows]) for side, rows in ((train, mine), (evaluation, theirs)))
    pairs = perceptual_hash.near_pairs(*hashes, distance)
    t, e = mine[pairs[:, 0]], theirs[pairs[:, 1]]
    score = perceptual_hash.similarity(train.thumbnails, evaluation.thumbnails, t, e)
    order = np.argsort(-score, kind="stable")[: int((score >= similarity).sum())]
    return Matches(t[order], e[order], score[order])
