"""Answers to questions: one spelling of what means the same, and how near one answer is to another.

`normalise` follows the rules by which the VQA challenge compares answers (Antol et al., ICCV 2015, section 4, and its
public evaluation): lower case, number words as digits, no articles, no punctuation but a point within a number.
Contractions are made alike by leaving all apostrophes out. Token F1 is that of SQuAD (Rajpurkar et al., EMNLP 2016,
section 6.1), BLEU-1 that of Papineni et al., ACL 2002, for one sentence: clipped precision times brevity penalty.
"""

import math
import re
import unicodedata
from collections import Counter

_DIGITS = "zero one two three four five six seven eight nine ten"
_DIGIT = {word: str(number) for number, word in enumerate(_DIGITS.split())} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_APOSTROPHES = re.compile("['’‘`´]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_OUTSIDE = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_")


def normalise(answer: str) -> str:
    """An answer in the one spelling that answers are compared in; "" for one that is punctuation and articles only."""
    text = unicodedata.normalize("NFKC", answer).lower()
    text = _THOUSANDS.sub("", _APOSTROPHES.sub("", text))
    words = [_DIGIT.get(word, word) for word in _OUTSIDE.sub(" ", text).split()]
    return " ".join(word for word in words if word not in _ARTICLES)


def token_f1(said: str, truth: str) -> float:
    """Harmonic mean of the shares of words in common, of two normalised answers; repeated words count as often."""
    a, b = said.split(), truth.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def bleu1(said: str, truth: str) -> float:
    """Share of words said that are in the truth, less for an answer shorter than it, of two normalised answers."""
    a, b = said.split(), truth.split()
    if not a:
        return 0.0
    precision = sum((Counter(a) & Counter(b)).values()) / len(a)
    return precision * min(1.0, math.exp(1 - len(b) / len(a)))
