"""Learning a vocabulary from counted words by merging the most frequent pair of neighbours (arXiv 1508.07909).

Written out rather than taken from a library because the result has to depend on the words alone: ties go to the pair
that comes first in the alphabet.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping

from mmkd_jax.errors import InputError

Pair = tuple[str, str]


def _bytes() -> list[str]:
    """openai/CLIP's printable stand-ins for the 256 byte values, in its order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


BYTES = _bytes()


def learn_bpe(words: Mapping[str, int], size: int) -> list[Pair]:
    """Merges that make at most `size` new tokens for CLIP's BPE, from words spelled in `BYTES` with their counts.

    Raises:
      InputError: the number is negative, that is the vocabulary smaller than the alphabet.
    """
    if size < 0:
        raise InputError(f"the vocabulary is {-size} tokens too small to hold CLIP's byte alphabet")
    spelled = {word: (*word[:-1], f"{word[-1]}</w>") for word in words}
    return _learn(spelled, words, size, lambda left, right: left + right)


def learn_wordpiece(words: Mapping[str, int], size: int) -> list[str]:
    """At most `size` tokens for WordPiece, from words with their counts: the alphabet, then merged pieces.

    Raises:
      InputError: the alphabet alone is larger.
    """
    spelled = {word: (word[0], *(f"##{letter}" for letter in word[1:])) for word in words}
    alphabet = sorted({piece for pieces in spelled.values() for piece in pieces})
    if len(alphabet) > size:
        raise InputError(f"the vocabulary is {len(alphabet) - size} tokens too small to hold the captions' alphabet")
    merges = _learn(spelled, words, size - len(alphabet), _join)
    return list(dict.fromkeys([*alphabet, *(_join(*pair) for pair in merges)]))


def _join(left: str, right: str) -> str:
    return left + right.removeprefix("##")


def _learn(spelled: Mapping[str, tuple[str, ...]], counts: Mapping[str, int], size: int, join) -> list[Pair]:
    """The most frequent pairs, each applied before the next is chosen, until they make `size` different tokens or
    every word is one token.
    """
    words = {word: list(pieces) for word, pieces in spelled.items()}
    frequency: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[str]] = defaultdict(set)
    for word, pieces in words.items():
        for pair in itertools.pairwise(pieces):
            frequency[pair] += counts[word]
            where[pair].add(word)
    queue = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(queue)
    learned: list[Pair] = []
    made: set[str] = set()
    while queue and len(made) < size:
        count, best = heapq.heappop(queue)
        if count == 0 or -count != frequency[best]:
            continue  # outdated: the pair was queued again when its count changed
        learned.append(best)
        made.add(join(*best))
        changed = set()
        for word in where.pop(best):
            before, after = words[word], _merge(words[word], best, join)
            words[word] = after
            for pieces, sign in ((before, -1), (after, 1)):
                for pair in itertools.pairwise(pieces):
                    frequency[pair] += sign * counts[word]
                    changed.add(pair)
            for pair in itertools.pairwise(after):
                where[pair].add(word)
        for pair in changed:
            heapq.heappush(queue, (-frequency[pair], pair))
    return learned


def _merge(pieces: list[str], pair: Pair, join) -> list[str]:
    merged, i = [], 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == pair:
            merged.append(join(*pair))
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return merged
