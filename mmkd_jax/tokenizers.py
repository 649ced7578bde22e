"""Captions to token ids: WordPiece (BERT) and byte-level BPE (CLIP), padded to a fixed context.

The pipelines are fixed by `TokenizerSpec`, a file only brings the vocabulary. They reproduce transformers' tokenizers,
and with `repair` open_clip's (mlfoundations/open_clip `tokenizer.py`), where text is repaired with ftfy, HTML entities
are resolved and white space is collapsed. BPE lowercases and splits as openai/CLIP's `simple_tokenizer.py`, WordPiece
does what BERT does (arXiv 1810.04805). Text that spells a special token of BPE is ordinary text.
"""

import gzip
import html
import json
import unicodedata
from collections.abc import Mapping, Sequence

import ftfy
import numpy as np
from etils import epath
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

from mmkd_jax import io, vocabulary
from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from mmkd_jax.specs import TokenizerSpec

FILE = "tokenizer.json"
WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BPE_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
BPE_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_MERGES = 49152 - 256 - 2  # of the file's lines, CLIP's vocabulary takes these


class Tokenizer:
    """Texts to a `TextBatch`.

    Attributes:
      spec: which pipeline.
      context: length of every row.
      vocab_size: number of tokens.
      begin, end, pad: ids of the special tokens, read by name.
    """

    def __init__(self, spec: TokenizerSpec, engine: Engine, context: int):
        if context < 3:
            raise InputError(f"a context of {context} tokens has no room for text between the two special tokens")
        self.spec, self.context, self._engine = spec, context, engine
        self.vocab_size = engine.get_vocab_size()
        begin, end, pad = ("[CLS]", "[SEP]", "[PAD]") if spec.kind == "wordpiece" else (*BPE_SPECIAL, None)
        self.begin, self.end = engine.token_to_id(begin), engine.token_to_id(end)
        self.pad = 0 if pad is None else engine.token_to_id(pad)  # CLIP pads with 0, whatever token that is

    def __call__(self, texts: Sequence[str]) -> TextBatch:
        """Tokenises `texts`; long ones are cut, keeping the end token. int32 `[len(texts), context]` each."""
        ids = np.full((len(texts), self.context), self.pad, np.int32)
        mask = np.zeros_like(ids)
        encodings = self._engine.encode_batch([clean(text, self.spec) for text in texts], add_special_tokens=False)
        for row, row_mask, encoding in zip(ids, mask, encodings, strict=True):
            tokens = [self.begin, *encoding.ids[: self.context - 2], self.end]
            row[: len(tokens)] = tokens
            row_mask[: len(tokens)] = 1
        positions = np.tile(np.arange(self.context, dtype=np.int32), (len(texts), 1))
        return TextBatch(ids, mask, positions, mask.copy())

    def files(self) -> dict[str, bytes]:
        """What `from_files` needs; `tokenizer.json` is in the format of the `tokenizers` library."""
        return {FILE: self._engine.to_str().encode()}


def clean(text: str, spec: TokenizerSpec) -> str:
    """Repaired text with single spaces, lowercased for BPE (WordPiece's normaliser lowercases by itself).

    Without `spec.repair` only what transformers does: accents become parts of letters for BPE, and the tokenizer's own
    normaliser lowercases.
    """
    if not spec.repair:
        return unicodedata.normalize("NFC", text) if spec.kind == "bpe" else text
    if not (text.isascii() and text.isprintable() and "&" not in text):  # ftfy leaves all other text as it is
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split())
    return text.lower() if spec.kind == "bpe" and spec.lowercase else text


def load(spec: TokenizerSpec, path, *, context: int, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a vocabulary file.

    Args:
      spec: which pipeline.
      path: `tokenizer.json`, BERT's `vocab.txt`, CLIP's `bpe_simple_vocab_16e6.txt.gz`, or a folder with one of them.
      context: length of every row.
      vocab_size: the model's; checked if given.

    Raises:
      InputError: there is no such file, it is damaged, of another kind, or of another size than the model's.
    """
    path = _find(io.as_path(path))
    return from_files(spec, {path.name: path.read_bytes()}, context=context, vocab_size=vocab_size)


def from_files(
    spec: TokenizerSpec, files: Mapping[str, bytes], *, context: int, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer of files in memory, such as `Tokenizer.files()`; arguments and errors as in `load`."""
    if len(files) != 1:
        raise InputError(f"a tokenizer is one file, not {sorted(files) or 'none'}")
    ((name, data),) = files.items()
    try:
        engine = _engine(spec, *_read(spec, name, data))
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise InputError(f"{name} is not a vocabulary for a {spec.kind} tokenizer ({error})") from error
    if vocab_size is not None and engine.get_vocab_size() != vocab_size:
        raise InputError(
            f"{name} has {engine.get_vocab_size()} tokens, the model {vocab_size}; give the model's own vocabulary"
        )
    return Tokenizer(spec, engine, context)


def train(spec: TokenizerSpec, texts: Sequence[str], *, vocab_size: int, context: int) -> Tokenizer:
    """Learns a vocabulary of at most `vocab_size` tokens from captions, for a model that starts from nothing.

    The result depends on the captions alone. Few captions give fewer tokens; the tokenizer's own `vocab_size` tells.

    Raises:
      InputError: `vocab_size` does not even hold the alphabet.
    """
    engine = _pipeline(spec, Engine(models.BPE()))
    words: dict[str, int] = {}
    for text in texts:
        normal = engine.normalizer.normalize_str(clean(text, spec))
        for word, _ in engine.pre_tokenizer.pre_tokenize_str(normal):
            words[word] = words.get(word, 0) + 1
    if spec.kind == "bpe":
        merges = vocabulary.learn_bpe(words, vocab_size - 2 * 256 - len(BPE_SPECIAL))
        return Tokenizer(spec, _engine(spec, _bpe_vocabulary(merges), merges), context)
    tokens = vocabulary.learn_wordpiece(words, vocab_size - len(WORDPIECE_SPECIAL))
    tokens = {token: i for i, token in enumerate((*WORDPIECE_SPECIAL, *tokens))}
    return Tokenizer(spec, _engine(spec, tokens, []), context)


def _find(path: epath.Path) -> epath.Path:
    if not path.exists():
        raise InputError(f"{path} does not exist; it should be a vocabulary: tokenizer.json, vocab.txt or *.txt.gz")
    if not path.is_dir():
        return path
    found = [path / name for name in (FILE, "vocab.txt") if (path / name).exists()] or sorted(path.glob("*.txt.gz"))
    if not found:
        raise InputError(f"{path} holds no vocabulary: tokenizer.json, vocab.txt or *.txt.gz")
    return found[0]


def _read(spec: TokenizerSpec, name: str, data: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges (empty for WordPiece) of a file."""
    if name.endswith(".json"):
        return _read_json(spec, json.loads(data))
    if name.endswith(".gz"):
        lines = gzip.decompress(data).decode().split("\n")[1 : CLIP_MERGES + 1]
        merges = [tuple(line.split()) for line in lines if line]
        return _bpe_vocabulary(merges), merges
    tokens = data.decode().rstrip("\n").split("\n")
    return {token.rstrip("\r"): i for i, token in enumerate(tokens)}, []


def _read_json(spec: TokenizerSpec, record: dict) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = record["model"]
    kind = {"WordPiece": "wordpiece", "BPE": "bpe"}.get(model.get("type"))
    if kind != spec.kind:
        raise ValueError(f"it holds a {model.get('type')} model")
    lowercase = _lowercases(record.get("normalizer") or {})
    if lowercase != spec.lowercase:
        raise ValueError(f"it is for {'lowercased' if lowercase else 'cased'} text, the spec says otherwise")
    vocab = dict(model["vocab"]) | {token["content"]: token["id"] for token in record.get("added_tokens", [])}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    return vocab, merges


def _lowercases(normalizer: dict) -> bool:
    parts = normalizer.get("normalizers", [normalizer])
    return any(part.get("type") == "Lowercase" or part.get("lowercase") is True for part in parts)


def _bpe_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order of ids: 256 bytes, the same at a word's end, the merges, begin and end of text."""
    tokens = [*vocabulary.BYTES, *(f"{b}</w>" for b in vocabulary.BYTES), *("".join(m) for m in merges), *BPE_SPECIAL]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def _engine(spec: TokenizerSpec, vocab: dict[str, int], merges: list[tuple[str, str]]) -> Engine:
    """The fixed pipeline of `spec` around a vocabulary."""
    special = WORDPIECE_SPECIAL if spec.kind == "wordpiece" else BPE_SPECIAL
    if spec.kind == "bpe":  # open_clip spells them differently
        aliases = {"<start_of_text>": BPE_SPECIAL[0], "<end_of_text>": BPE_SPECIAL[1]}
        vocab = {aliases.get(token, token): i for token, i in vocab.items()}
    if missing := [token for token in special if token not in vocab and token != "[MASK]"]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError("its ids have gaps or repetitions")
    if spec.kind == "wordpiece":
        engine = Engine(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        engine.add_special_tokens([token for token in special if token in vocab])
        begin, end = "[CLS]", "[SEP]"
    else:
        engine = Engine(models.BPE(vocab, merges, end_of_word_suffix="</w>", fuse_unk=False))
        begin, end = BPE_SPECIAL
    template = {"single": f"{begin} $A {end}", "special_tokens": [(begin, vocab[begin]), (end, vocab[end])]}
    engine.post_processor = processors.TemplateProcessing(**template)
    return _pipeline(spec, engine)


def _pipeline(spec: TokenizerSpec, engine: Engine) -> Engine:
    if spec.kind == "wordpiece":
        engine.normalizer = normalizers.BertNormalizer(lowercase=spec.lowercase)
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        engine.normalizer = normalizers.Sequence([normalizers.Lowercase()] if spec.lowercase else [])
        pattern = BPE_SPLIT if spec.repair else BPE_SPLIT.replace("(?i:", "(?:")
        split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        engine.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return engine
