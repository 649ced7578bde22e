"""Texts to tokens, from local files: WordPiece (BERT) and byte-pair encoding (CLIP).

The vocabulary's size is checked against the model's: a library that does not find its file may fall back to a
vocabulary of five tokens in silence, and every word becomes unknown.
"""

import gzip
import heapq
import html
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import ftfy
import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mmkd_jax import io
from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from mmkd_jax.specs import TokenizerSpec

FILE = "tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The pattern of CLIP's tokenizer (openai/CLIP, simple_tokenizer.py).
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Texts to `TextBatch` for one model.

    Attributes:
      spec: kind and case.
      context: tokens of a text; longer ones are cut, keeping the end token.
      vocab_size: number of ids.
    """

    def __init__(self, spec: TokenizerSpec, backend: Backend, context: int):
        self.spec, self.context, self._backend = spec, context, backend
        self.vocab_size = backend.get_vocab_size()
        names = {"wordpiece": ("[CLS]", "[SEP]", "[PAD]"), "bpe": (START, END, None)}[spec.kind]
        self._start, self._end, self._pad = (0 if name is None else self._id(name) for name in names)

    def __call__(self, texts: Sequence[str]) -> TextBatch:
        """int32 `[n, context]` each; CLIP pads with 0 as open_clip does, BERT with [PAD]."""
        encoded = self._backend.encode_batch([self._clean(text) for text in texts], add_special_tokens=False)
        ids = np.full((len(texts), self.context), self._pad, np.int32)
        mask = np.zeros_like(ids)
        for row, text in enumerate(encoded):
            tokens = [self._start, *text.ids[: self.context - 2], self._end]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        positions = np.broadcast_to(np.arange(self.context, dtype=np.int32), ids.shape).copy()
        return TextBatch(ids, mask, positions, mask.copy())

    def files(self) -> dict[str, bytes]:
        """What it takes to make this tokenizer again, see `from_files`."""
        return {FILE: self._backend.to_str().encode()}

    def _id(self, name: str) -> int:
        number = self._backend.token_to_id(name)
        if number is None:
            raise InputError(f"the {self.spec.kind} vocabulary has no token {name}; it is of another kind")
        return number

    def _clean(self, text: str) -> str:
        if self.spec.kind == "wordpiece":
            return text
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        return re.sub(r"\s+", " ", text).strip().lower()


def load(spec: TokenizerSpec, path: str | os.PathLike, *, context: int, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a local file or folder: `tokenizer.json`, `vocab.txt`, or CLIP's merges (`.txt`, `.txt.gz`).

    Args:
      spec: kind and case.
      path: the file, or a folder that holds one of them.
      context: tokens of a text.
      vocab_size: the model's, checked against the vocabulary's.

    Raises:
      InputError: there is no such file, it is no vocabulary, or it has another size than the model's.
    """
    path = io.as_path(path)
    if path.is_dir():
        names = (FILE, "vocab.txt", "bpe_simple_vocab_16e6.txt.gz")
        path = next((path / name for name in names if (path / name).exists()), path / FILE)
    if not path.exists():
        raise InputError(f"there is no vocabulary {path}; give the model's vocab.txt, tokenizer.json or merges file")
    return from_files(spec, {path.name: path.read_bytes()}, context=context, vocab_size=vocab_size)


def from_files(
    spec: TokenizerSpec, files: dict[str, bytes], *, context: int, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer of one file's name and content; see `load`."""
    (name, data), *more = files.items()
    if more:
        raise InputError(f"a tokenizer is one file, not {', '.join(sorted(files))}")
    try:
        if name.endswith(".json"):
            backend = Backend.from_str(data.decode())
        elif spec.kind == "wordpiece":
            backend = _wordpiece(data.decode().splitlines(), spec.lowercase)
        else:
            backend = _bpe_from_merges(gzip.decompress(data) if name.endswith(".gz") else data)
    except InputError:
        raise
    except Exception as error:  # the library raises a bare Exception for a damaged file
        raise InputError(f"{name} is not a {spec.kind} vocabulary ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    found = backend.get_vocab_size()
    if vocab_size is not None and found != vocab_size:
        raise InputError(f"the vocabulary {name} has {found} tokens, the model has {vocab_size}; give the model's own")
    return Tokenizer(spec, backend, context)


def train(spec: TokenizerSpec, texts: Sequence[str], *, vocab_size: int, context: int) -> Tokenizer:
    """A small vocabulary learned from `texts`, the same every time; for runs that have no vocabulary file.

    Raises:
      InputError: the texts do not give `vocab_size` tokens.
    """
    if spec.kind == "wordpiece":
        blank = _wordpiece(BERT_SPECIAL, spec.lowercase)
        words = _words(blank, texts)
        split = {word: [word[0], *(f"##{c}" for c in word[1:])] for word in words}
        letters = sorted({symbol for symbols in split.values() for symbol in symbols})
        room = vocab_size - len(BERT_SPECIAL) - len(letters)
        merges = _learn(words, split, lambda a, b: a + b.removeprefix("##"), room)
        pieces = [*BERT_SPECIAL, *letters, *(a + b.removeprefix("##") for a, b in merges)]
        backend = _wordpiece(list(dict.fromkeys(pieces)), spec.lowercase)
    else:
        words = _words(_bpe(_byte_vocabulary(), []), [text.lower() for text in texts])
        split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
        merges = _learn(words, split, lambda a, b: a + b, vocab_size - 2 - len(_byte_vocabulary()))
        backend = _bpe(_with_merges(merges), merges)
    found = backend.get_vocab_size()
    if found != vocab_size:
        raise InputError(f"these texts give {found} tokens, not {vocab_size}; ask for at most {found}")
    return Tokenizer(spec, backend, context)


def _words(backend: Backend, texts: Sequence[str]) -> Counter[str]:
    """How often each word occurs, after the backend's own cleaning and splitting."""
    words: Counter[str] = Counter()
    for text in texts:
        clean = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(clean))
    return words


def _learn(
    words: Counter[str], split: dict[str, list[str]], join: Callable[[str, str], str], count: int
) -> list[tuple[str, str]]:
    """The `count` most frequent merges (Sennrich et al. 2016, arXiv 1508.07909, algorithm 1), equal counts by name.

    The library's own trainers number what ties by the order of a hash map, which changes from run to run.
    """
    pairs: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[str]] = defaultdict(set)
    for word, symbols in split.items():
        for pair in itertools.pairwise(symbols):
            pairs[pair] += words[word]
            where[pair].add(word)
    merges: list[tuple[str, str]] = []
    made: set[str] = set()
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(made) < count and heap:
        frequency, best = heapq.heappop(heap)
        if -frequency != pairs[best] or not pairs[best]:
            continue  # an entry from before a later merge changed the count
        merges.append(best)
        made.add(join(*best))
        touched = set()
        for word in where.pop(best):
            for pair in itertools.pairwise(split[word]):
                pairs[pair] -= words[word]
                touched.add(pair)
            split[word] = _merge(split[word], best, join)
            for pair in itertools.pairwise(split[word]):
                pairs[pair] += words[word]
                where[pair].add(word)
                touched.add(pair)
        for pair in touched:
            heapq.heappush(heap, (-pairs[pair], pair))
    return merges


def _merge(symbols: list[str], pair: tuple[str, str], join: Callable[[str, str], str]) -> list[str]:
    """`symbols` with every occurrence of `pair` joined, from the left."""
    merged, i = [], 0
    while i < len(symbols):
        found = tuple(symbols[i : i + 2]) == pair
        merged.append(join(*pair) if found else symbols[i])
        i += 2 if found else 1
    return merged


def _wordpiece(tokens: Sequence[str], lowercase: bool) -> Backend:
    """BERT's: clean, split at punctuation, longest match first."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if "[UNK]" not in vocabulary:
        raise InputError("the vocabulary has no [UNK]; it is not BERT's vocab.txt")
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in BERT_SPECIAL if t in vocabulary])
    return backend


def _bpe(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> Backend:
    """CLIP's: words by a pattern, bytes as visible characters, merges in order."""
    backend = Backend(models.BPE(vocab=vocabulary, merges=list(merges), end_of_word_suffix="</w>", fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [t for t in (START, END) if t in vocabulary]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return backend


def _bpe_from_merges(data: bytes) -> Backend:
    """CLIP's published list: 48,894 merges after a line of comment, 49,408 tokens."""
    lines = data.decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines if line]
    return _bpe(_with_merges(merges), merges)


def _with_merges(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Ids as CLIP numbers them: bytes, bytes that end a word, merges, and the two special tokens last."""
    vocabulary = _byte_vocabulary()
    for token in [*("".join(merge) for merge in merges), START, END]:
        vocabulary.setdefault(token, len(vocabulary))
    return vocabulary


def _byte_vocabulary() -> dict[str, int]:
    characters = list(_bytes_to_unicode().values())
    return {token: i for i, token in enumerate([*characters, *(c + "</w>" for c in characters)])}


def _bytes_to_unicode() -> dict[int, str]:
    """A visible character for each byte: itself where it is visible, the next code points from 256 on otherwise."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in visible]
    return {**{byte: chr(byte) for byte in visible}, **{byte: chr(256 + i) for i, byte in enumerate(rest)}}
