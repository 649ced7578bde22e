"""Perceptual hashes: which pictures are the same but for size, encoding, brightness or a cropped border.

Two steps. First 64-bit DCT hashes (pHash: C. Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010) of a picture and of its slightly cropped forms, all pairs within a Hamming distance found exactly by
multi-index hashing (Norouzi, Punjani, Fleet: "Fast search in Hamming space with multi-index hashing", CVPR 2012).
Then each pair is looked at: the correlation of saturated gradients of both thumbnails over small crops. Hashes alone
do not tell two chest films or two fundi from copies of one; gradients do, and saturating them keeps the bright rim of
a fundus, which all fundi share, from deciding.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image
from scipy import fft

SIDE = 64  # of a thumbnail, px
DISTANCE = 10  # of 64 bits
SIMILARITY = 0.85
_COARSE, _FINE = (0.0, 0.04), (0.0, 0.025, 0.05)  # what is cut off each edge, as shares of the side
_WORKED = 32  # side of what is hashed and compared, px
_LEVELS = 2.0  # standard deviation in grey levels below which a picture is a plain surface without features
_BANDS, _BITS = 4, 16
_PAIRS = 512  # compared at a time
_CANDIDATES = 1 << 22  # looked at at a time


def thumbnail(image: Image.Image) -> np.ndarray:
    """A PIL image as grey uint8 `[64, 64]`, whatever its shape."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.uint8)


def is_plain(thumbnails: np.ndarray) -> np.ndarray:
    """Bool `[n]`: thumbnails uint8 `[n, 64, 64]` of one tone, whose hashes mean nothing."""
    return thumbnails.reshape(len(thumbnails), -1).std(axis=1) < _LEVELS


def hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint64 `[n, 16]` of uint8 `[n, 64, 64]`: of the whole picture, then of it without 4 % of some of its edges."""
    found = np.empty((len(thumbnails), len(_COARSE) ** 4), np.uint64)
    for start in range(0, len(thumbnails), 4096):
        for k, cropped in enumerate(_crops(thumbnails[start : start + 4096], _COARSE)):
            found[start : start + 4096, k] = _dct_hash(cropped)
    return found


def near_pairs(first: np.ndarray, second: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """Pairs of pictures of which one, as a whole, is within `distance` bits of the other, whole or cropped.

    Args:
      first, second: from `hashes`, `[n, 16]` and `[m, 16]`.
      distance: largest Hamming distance.

    Returns:
      int64 `[pairs, 2]`: rows of `first` and of `second`, sorted, each pair once.
    """
    forms = first.shape[1]
    whole = within(first[:, 0], second.reshape(-1), distance) // np.array([1, forms])
    cropped = within(first.reshape(-1), second[:, 0], distance) // np.array([forms, 1])
    return np.unique(np.concatenate([whole, cropped]), axis=0)


def within(first: np.ndarray, second: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of 64-bit words within a Hamming distance: exact, without comparing all with all.

    Words that differ in at most d bits differ in at most d // 4 bits of one of their four 16-bit bands, so that only
    words in neighbouring buckets of a band are compared.

    Args:
      first, second: uint64 `[n]` and `[m]`.
      distance: largest number of different bits, 0 to 15.

    Returns:
      int64 `[pairs, 2]`: indices into `first` and `second`, sorted, each pair once.
    """
    if not 0 <= distance < _BITS:
        raise ValueError(f"a distance of {distance} bits is not in 0 to {_BITS - 1}")
    if len(first) > len(second):  # fewer words are looked up, each in 137 buckets of a band at the usual distance
        return np.unique(within(second, first, distance)[:, ::-1], axis=0)
    reach = range(distance // _BANDS + 1)
    flips = np.array(
        [sum(1 << bit for bit in bits) for r in reach for bits in itertools.combinations(range(_BITS), r)], np.uint16
    )
    found = [np.empty((0, 2), np.int64)]
    for band in range(_BANDS):
        keys, others = (((words >> np.uint64(_BITS * band)) & np.uint64(0xFFFF)) for words in (first, second))
        order = np.argsort(others, kind="stable")
        starts = np.searchsorted(others[order], np.arange((1 << _BITS) + 1, dtype=np.uint64))
        for i, j in _candidates(keys.astype(np.uint16), flips, order, starts):
            close = np.bitwise_count(first[i] ^ second[j]) <= distance
            found.append(np.stack([i[close], j[close]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _candidates(keys, flips, order, starts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of words that share a bucket up to `flips`, some millions at a time."""
    step = max(1, _CANDIDATES // (8 * len(flips)))
    for start in range(0, len(keys), step):
        probes = (keys[start : start + step, None] ^ flips).astype(np.int64)
        sizes = starts[probes + 1] - starts[probes]
        words, _ = np.nonzero(sizes)
        begin, size = starts[probes][sizes > 0], sizes[sizes > 0]
        ends = np.cumsum(size)
        cuts = np.searchsorted(ends, np.arange(_CANDIDATES, ends[-1], _CANDIDATES)) if len(ends) else []
        for part in np.split(np.arange(len(size)), cuts):
            total = size[part]
            inside = np.arange(total.sum()) - np.repeat(np.cumsum(total) - total, total)
            yield np.repeat(words[part] + start, total), order[np.repeat(begin[part], total) + inside]


def similarity(first: np.ndarray, second: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """How much pictures look like copies: float32 `[k]`, 1 for the same.

    The cosine of saturated gradients, the largest over crops of either picture by up to 5 % at each edge.

    Args:
      first, second: thumbnails uint8 `[n, 64, 64]` and `[m, 64, 64]`.
      i, j: int `[k]`, which of `first` is compared with which of `second`.
    """
    found = np.full(len(i), -1, np.float32)
    for start in range(0, len(i), _PAIRS):
        here = slice(start, start + _PAIRS)
        one, other = first[i[here]], second[j[here]]
        for whole, cropped in ((one, other), (other, one)):
            against = _gradients(next(_crops(whole, (0.0,))))
            for form in _crops(cropped, _FINE):
                found[here] = np.maximum(found[here], (_gradients(form) * against).sum(axis=1))
    return found


def _crops(thumbnails: np.ndarray, trims: tuple[float, ...]) -> Iterator[np.ndarray]:
    """float32 `[n, 32, 32]` for each choice of what is cut off top, bottom, left and right; the whole one first."""
    x = thumbnails.astype(np.float32)
    averages = {ends: _average(*ends) for ends in itertools.product(trims, trims)}
    for vertical in averages.values():
        rows = vertical @ x
        for horizontal in averages.values():
            yield rows @ horizontal.T


def _average(before: float, after: float) -> np.ndarray:
    """Matrix float32 `[32, 64]` that averages areas of a side from which shares are cut off at both ends."""
    edges = np.linspace(before * SIDE, (1 - after) * SIDE, _WORKED + 1)
    pixels = np.arange(SIDE)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.maximum(overlap, 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _dct_hash(x: np.ndarray) -> np.ndarray:
    """uint64 `[n]`: which of 8 x 8 low frequencies, none constant in a direction, exceed the median."""
    low = fft.dctn(x, axes=(1, 2))[:, 1:9, 1:9].reshape(len(x), -1)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _gradients(x: np.ndarray) -> np.ndarray:
    """Differences of neighbours g as g / (|g| + mean |g|), of unit length: `[n, 1984]` of `[n, 32, 32]`."""
    n = len(x)
    flat = np.concatenate([np.diff(x, axis=2).reshape(n, -1), np.diff(x, axis=1).reshape(n, -1)], axis=1)
    size = np.abs(flat)
    flat /= size + np.maximum(size.mean(axis=1, keepdims=True), 1e-6)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
