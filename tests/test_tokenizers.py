"""Token ids equal the reference tokenizers', small vocabularies are learned alike every time, bad files are refused."""

import dataclasses
import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from mmkd_jax import tokenizers
from mmkd_jax.errors import InputError
from mmkd_jax.specs import TokenizerSpec

BPE, WORDPIECE = TokenizerSpec("bpe"), TokenizerSpec("wordpiece")
CAPTIONS = [
    "Axial CT shows a 3.5 cm mass in the right lung, with spiculated margins.",
    "Chest X-ray: no pneumothorax; the heart isn't enlarged.",
    "Photomicrograph (H&E, 40x) of invasive ductal carcinoma",
    "T2-weighted MRI of the brain demonstrates periventricular hyperintensities",
    "Fundus photograph with microaneurysms and hard exudates",
    "the patient's lung, the patient's heart, the lung and the heart",
]
ODD = [
    "",
    "   ",
    "HELLO, World!! it's they'RE we'll",
    "'ſ don't 'S 'T",
    "naïve café Ångström",
    "ΣΑΣ ΟΔΟΣ",
    "İstanbul ẞ ß",
    "x²³ ½ ٣ Ⅷ ①",
    "日本語テスト नमस्ते مرحبا",
    "🫁 lungs 🩻🩻",
    "&lt;b&gt; &amp;amp; caf&eacute;",
    "schÃ¶n â€œquotesâ€\x9d",
    "a\u200bb\ufeffc\u00a0d",
    "\x1b[31mred\x07",
    "ﬁbrosis l’homme",
    "a" * 500,
    "word " * 100,
    "!!! !?! ... _under_score_",
    "tab\tnew\nline\r\n",
    "<|endoftext|> foo",
]


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    pytest.importorskip("torch", reason="open_clip's tokenizer needs torch")
    import torchvision_stub

    torchvision_stub.install()
    pytest.importorskip("open_clip", reason="open_clip is the reference")
    from open_clip import tokenizer

    return tokenizer


@pytest.fixture(scope="module")
def learned():
    return {
        spec.kind: tokenizers.train(spec, CAPTIONS, vocab_size=n, context=24)
        for spec, n in ((WORDPIECE, 120), (BPE, 600))
    }


@pytest.fixture(scope="module")
def vocab_txt(learned, tmp_path_factory):
    tokens = json.loads(learned["wordpiece"].files()["tokenizer.json"])["model"]["vocab"]
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("\n".join(sorted(tokens, key=tokens.get)) + "\n")
    return folder


def test_clips_ids_equal_open_clips(open_clip_tokenizer):
    ours = tokenizers.load(BPE, open_clip_tokenizer.default_bpe(), context=77, vocab_size=49408)
    texts = CAPTIONS + ODD
    wanted = open_clip_tokenizer.SimpleTokenizer()(texts).numpy()
    batch = ours(texts)
    assert batch.ids.dtype == np.int32
    for text, row, reference in zip(texts, batch.ids, wanted, strict=True):
        np.testing.assert_array_equal(row, reference, err_msg=text)
    assert (ours.begin, ours.end, ours.pad) == (49406, 49407, 0)


def test_clips_ids_equal_open_clips_on_real_captions(open_clip_tokenizer, mmkd_data):
    ours = tokenizers.load(BPE, open_clip_tokenizer.default_bpe(), context=77)
    manifests = sorted(mmkd_data.glob("*/manifest.jsonl"))
    texts = [json.loads(line).get("caption", "") for path in manifests for line in path.read_text().splitlines()]
    texts = sorted(set(texts))
    assert len(texts) > 1000
    np.testing.assert_array_equal(ours(texts).ids, open_clip_tokenizer.SimpleTokenizer()(texts).numpy())


def test_clips_ids_survive_the_files_of_a_checkpoint(open_clip_tokenizer):
    ours = tokenizers.load(BPE, open_clip_tokenizer.default_bpe(), context=77)
    again = tokenizers.from_files(BPE, ours.files(), context=77, vocab_size=49408)
    np.testing.assert_array_equal(again(CAPTIONS + ODD).ids, ours(CAPTIONS + ODD).ids)


def test_wordpiece_ids_equal_transformers(learned, vocab_txt):
    from transformers import BertTokenizer

    reference = BertTokenizer.from_pretrained(vocab_txt)
    assert len(reference) == 120
    texts = [tokenizers.clean(text, WORDPIECE) for text in CAPTIONS + ODD + ["a [SEP] b"]]
    wanted = reference(texts, padding="max_length", truncation=True, max_length=24)
    for ours in (tokenizers.load(WORDPIECE, vocab_txt, context=24, vocab_size=120), learned["wordpiece"]):
        batch = ours(texts)
        np.testing.assert_array_equal(batch.ids, wanted["input_ids"])
        np.testing.assert_array_equal(batch.mask, wanted["attention_mask"])


def test_wordpiece_ids_equal_open_clips_wrapper(open_clip_tokenizer, learned, vocab_txt):
    (vocab_txt / "config.json").write_text('{"model_type": "bert"}')
    reference = open_clip_tokenizer.HFTokenizer(str(vocab_txt), context_length=24)
    np.testing.assert_array_equal(learned["wordpiece"](CAPTIONS + ODD).ids, reference(CAPTIONS + ODD).numpy())


def test_unrepaired_ids_equal_transformers_on_the_texts_as_they_are(open_clip_tokenizer, learned, vocab_txt):
    """And repairing them would not: curled quotes, ligatures and entities become other tokens."""
    from transformers import BertTokenizer, CLIPTokenizer

    files = tokenizers.load(BPE, open_clip_tokenizer.default_bpe(), context=77).files()
    model = json.loads(files["tokenizer.json"])["model"]
    clip = CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    bert = BertTokenizer.from_pretrained(vocab_txt)
    texts = CAPTIONS + [text for text in ODD if "<|" not in text]
    cases = [(BPE, files, 77, clip, 49407), (WORDPIECE, learned["wordpiece"].files(), 24, bert, None)]
    for spec, vocabulary, context, reference, end in cases:
        plain = dataclasses.replace(spec, repair=False)
        ours = tokenizers.from_files(plain, vocabulary, context=context)(texts)
        wanted = reference(texts, padding="max_length", truncation=True, max_length=context)
        ids = np.where(ours.mask > 0, ours.ids, end or 0)  # CLIP's pads with its end token, and masks that
        np.testing.assert_array_equal(ids, wanted["input_ids"])
        np.testing.assert_array_equal(ours.mask, wanted["attention_mask"])
        repaired = tokenizers.from_files(spec, vocabulary, context=context)(texts)
        differ = {text for text, a, b in zip(texts, ours.ids, repaired.ids, strict=True) if (a != b).any()}
        assert {"&lt;b&gt; &amp;amp; caf&eacute;", "schÃ¶n â€œquotesâ€\x9d"} <= differ
        assert not differ & set(CAPTIONS)


def test_a_wrong_case_is_told_apart(learned, vocab_txt):
    cased = tokenizers.load(TokenizerSpec("wordpiece", lowercase=False), vocab_txt / "vocab.txt", context=24)
    assert (cased(CAPTIONS).ids != learned["wordpiece"](CAPTIONS).ids).any()
    with pytest.raises(InputError, match="for lowercased text"):
        tokenizers.from_files(cased.spec, learned["wordpiece"].files(), context=24)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_rows_are_padded_and_cut_keeping_the_end(learned, kind):
    tokenizer = learned[kind]
    batch = tokenizer(["lung", "lung " * 100, ""])
    assert all(array.shape == (3, 24) and array.dtype == np.int32 for array in batch)
    assert batch.ids[1, 0] == tokenizer.begin
    assert batch.ids[1, -1] == tokenizer.end
    assert batch.ids[2].tolist() == [tokenizer.begin, tokenizer.end] + [tokenizer.pad] * 22
    assert batch.mask.sum(1).tolist()[1:] == [24, 2]
    np.testing.assert_array_equal(batch.segments, batch.mask)
    np.testing.assert_array_equal(batch.positions, np.tile(np.arange(24), (3, 1)))
    assert tokenizer([]).ids.shape == (0, 24)


def test_clips_end_token_has_the_highest_id(learned):
    tokenizer = learned["bpe"]
    assert (tokenizer.begin, tokenizer.end) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    batch = tokenizer(CAPTIONS + ODD)
    np.testing.assert_array_equal(batch.ids.argmax(1), batch.mask.sum(1) - 1)


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 120), ("bpe", 600)])
def test_learning_is_the_same_in_another_process(learned, kind, size):
    code = (
        "import sys; from mmkd_jax import tokenizers; from mmkd_jax.specs import TokenizerSpec\n"
        f"t = tokenizers.train(TokenizerSpec({kind!r}), {CAPTIONS!r}, vocab_size={size}, context=24)\n"
        "sys.stdout.buffer.write(t.files()['tokenizer.json'])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert output == learned[kind].files()["tokenizer.json"]
    assert learned[kind].vocab_size == size


def test_learned_words_are_whole_tokens(learned):
    for tokenizer in learned.values():
        assert tokenizer(["the lung"]).mask.sum() == 4
        assert tokenizer(["xqzv"]).mask.sum() > 3 or tokenizer.spec.kind == "wordpiece"


def test_wrong_vocabularies_are_refused_in_one_line(learned, tmp_path, vocab_txt):
    def refused(match, call):
        with pytest.raises(InputError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)

    load = tokenizers.load
    refused("120 tokens, the model 30522", lambda: load(WORDPIECE, vocab_txt, context=24, vocab_size=30522))
    refused("does not exist", lambda: load(WORDPIECE, tmp_path / "no", context=24))
    (tmp_path / "empty").mkdir()
    refused("holds no vocabulary", lambda: load(BPE, tmp_path / "empty", context=24))
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    refused(r"lacks \[PAD\], \[UNK\]", lambda: load(WORDPIECE, tmp_path, context=24))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na\nb\n")
    refused("gaps or repetitions", lambda: load(WORDPIECE, tmp_path, context=24))
    (tmp_path / "tokenizer.json").write_text("{")
    refused("not a vocabulary", lambda: load(WORDPIECE, tmp_path, context=24))
    refused("holds a WordPiece model", lambda: tokenizers.from_files(BPE, learned["wordpiece"].files(), context=24))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x\na b\n" * 50)[:-20])
    refused("not a vocabulary", lambda: load(BPE, tmp_path / "cut.txt.gz", context=24))
    refused("no room for text", lambda: tokenizers.from_files(BPE, learned["bpe"].files(), context=2))
    refused("is one file", lambda: tokenizers.from_files(BPE, {}, context=24))


def test_impossible_sizes_are_refused():
    with pytest.raises(InputError, match="tokens too small to hold the captions' alphabet"):
        tokenizers.train(WORDPIECE, CAPTIONS, vocab_size=20, context=24)
    with pytest.raises(InputError, match="too small to hold CLIP's byte alphabet"):
        tokenizers.train(BPE, CAPTIONS, vocab_size=500, context=24)


@pytest.mark.parametrize("spec", [WORDPIECE, BPE], ids=lambda spec: spec.kind)
def test_few_captions_give_a_smaller_vocabulary_that_knows_every_word(spec):
    few = ["a cat", "a dog"]
    learned = tokenizers.train(spec, few, vocab_size=5000, context=8)
    assert learned.vocab_size < 600
    assert learned(few).mask.sum(axis=1).tolist() == [4, 4]  # begin, two words of one token each, end
    again = tokenizers.from_files(spec, learned.files(), context=8, vocab_size=learned.vocab_size)
    np.testing.assert_array_equal(again(few).ids, learned(few).ids)
