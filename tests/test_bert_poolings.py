"""BERT's poolings and paddings agree with what PMC-CLIP's and MedCLIP's code does with transformers' `BertModel`."""

import dataclasses

import jax
import model_references as ref
import numpy as np
import pytest
import torch
from transformers import BertModel

from mmkd_jax.errors import InputError
from mmkd_jax.models import open_clip, state_dict
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ModelSpec, Preprocess, ResNetTower, TextTower

pytestmark = pytest.mark.usefixtures("quick_compilation")
IMAGES = {
    "pmc_clip": ResNetTower("modified_resnet", 4, (1, 1), 4, 32),
    "medclip": ResNetTower("resnet", 4, (1, 1), 0, 32),
}
CASES = {  # name: layout, pooling, padding
    "PMC-CLIP as trained": ("pmc_clip", "token", "attended"),
    "PMC-CLIP by its pooler": ("pmc_clip", "pooler", "attended"),
    "PMC-CLIP with a mask": ("pmc_clip", "token", "masked"),
    "MedCLIP one by one": ("medclip", "layers", "masked"),
    "MedCLIP in a padded batch": ("medclip", "layers", "pooled"),
}
BERTS = {"pmc_clip": "text_encoder.", "medclip": "text_model.model."}


def spec_of(layout: str, pooling: str, padding: str, text: TextTower | None = None) -> ModelSpec:
    text = text or ref.bert_tower(layers=4)
    text = dataclasses.replace(text, projection="linear", pooling=pooling, padding=padding)
    return ModelSpec(name="small", image=IMAGES[layout], text=text, embed=ref.EMBED, preprocess=Preprocess(32))


def reference(spec: ModelSpec) -> tuple[BertModel, torch.Tensor]:
    bert = ref.randomise(BertModel(ref.bert_config(spec.text)))
    return bert, torch.randn(spec.text.width, spec.embed, generator=torch.Generator().manual_seed(3)) * 0.1


def published(spec: ModelSpec, layout: str, bert: BertModel, matrix: torch.Tensor) -> dict[str, np.ndarray]:
    """The text tower's tensors, with an image tower beside them, as the published files name them."""
    shapes = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32), DualEncoder(spec).shapes())
    everything = state_dict.from_params(spec, shapes, layout)
    tensors = {key: value for key, value in everything.items() if not key.startswith("text")}
    tensors |= {BERTS[layout] + key: value for key, value in ref.tensors(bert).items()}
    if layout == "medclip":
        return tensors | {"text_model.projection_head.weight": matrix.numpy().T.copy()}
    return tensors | {"text_projection": matrix.numpy()}


def medclip_features(bert, ids, mask):
    """`MedCLIPTextModel.forward` of RyanWangZf/MedCLIP, without its head."""
    states = bert(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    stacked = torch.stack([states[1], states[2], states[-1]])
    return stacked.permute(1, 0, 2, 3).mean(2).mean(1)


def wanted_features(spec: ModelSpec, bert, matrix, text) -> np.ndarray:
    ids, mask = torch.from_numpy(text.ids).long(), torch.from_numpy(text.mask).long()
    pooling, padding = spec.text.pooling, spec.text.padding
    with torch.no_grad():
        if pooling == "layers" and padding == "masked":
            rows = [medclip_features(bert, i[None, : m.sum()], m[None, : m.sum()]) for i, m in zip(ids, mask)]
            pooled = torch.cat(rows)
        elif pooling == "layers":
            pooled = medclip_features(bert, ids, mask)
        else:
            # Without a mask given, transformers makes one of ones: padding is attended to.
            output = bert(input_ids=ids, **({} if padding == "attended" else {"attention_mask": mask}))
            pooled = output.pooler_output if pooling == "pooler" else output.last_hidden_state[:, 0]
        return (pooled @ matrix).numpy()


def error(spec, tensors, text, wanted) -> float:
    params = state_dict.to_params(spec, tensors)
    return ref.relative_error(jax.jit(DualEncoder(spec).encode_text)(params, text), wanted)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Layout, spec, published tensors, texts, and the reference's features of them."""
    layout, pooling, padding = CASES[request.param]
    spec = spec_of(layout, pooling, padding)
    bert, matrix = reference(spec)
    text = ref.texts(spec)
    return layout, spec, published(spec, layout, bert, matrix), text, wanted_features(spec, bert, matrix, text)


def test_features_agree(case):
    assert error(*case[1:]) <= ref.TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_full_size_features_agree(name):
    layout, pooling, padding = CASES[name]
    sizes = {"pmc_clip": TextTower(context=77), "medclip": TextTower(vocab_size=28996, context=77)}
    spec = spec_of(layout, pooling, padding, sizes[layout])
    bert, matrix = reference(spec)
    text = ref.texts(spec, 3)
    tensors = published(spec, layout, bert, matrix)
    assert error(spec, tensors, text, wanted_features(spec, bert, matrix, text)) <= ref.TOLERANCE


def test_every_other_pooling_and_padding_is_caught(case):
    layout, spec, tensors, text, wanted = case
    if spec.text.pooling != "layers":
        others = [("token", "attended"), ("token", "masked"), ("pooler", "attended"), ("layers", "masked")]
    else:
        others = [("layers", "masked"), ("layers", "pooled"), ("layers", "attended"), ("token", "masked")]
    for pooling, padding in others:
        if (pooling, padding) != (spec.text.pooling, spec.text.padding):
            other = spec_of(layout, pooling, padding)
            assert error(other, tensors, text, wanted) > 100 * ref.TOLERANCE, (pooling, padding)


def test_weights_survive_the_way_there_and_back(case):
    layout, spec, tensors, *_ = case
    back = state_dict.from_params(spec, state_dict.to_params(spec, tensors), layout)
    unused = () if spec.text.pooling == "pooler" else ("pooler.dense.weight", "pooler.dense.bias")
    theirs = {k: v for k, v in tensors.items() if v.dtype == np.float32 and not k.endswith(unused)}
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(back[key], theirs[key]) for key in theirs)


def test_what_only_training_used_is_left_out_of_a_full_checkpoint(case):
    layout, spec, tensors, *_ = case
    if layout != "pmc_clip":
        pytest.skip("the other project publishes the towers alone")
    some = np.ones((2, 2), np.float32)
    extra = ("fusion_module.layers.0.weight", "mlm_projection", "img_special_token", "positional_embedding")
    extra += ("ln_final.weight", "ln_final.bias")
    full = {f"module.{key}": value for key, value in (tensors | dict.fromkeys(extra, some)).items()}
    full["module.text_encoder.embeddings.position_ids"] = np.arange(20)[None]
    wanted = state_dict.to_params(spec, tensors)
    jax.tree.map(np.testing.assert_array_equal, state_dict.to_params(spec, full), wanted)
    with pytest.raises(InputError, match=r"left over text_encoder\.other"):
        state_dict.to_params(spec, tensors | {"text_encoder.other": some})
    if spec.text.pooling == "pooler":
        with pytest.raises(InputError, match=r"missing text_encoder\.pooler\.dense\.bias"):
            state_dict.to_params(spec, {k: v for k, v in tensors.items() if not k.endswith("pooler.dense.bias")})


def test_old_names_of_norms_are_read(case):
    _, spec, tensors, *_ = case
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    wanted = state_dict.to_params(spec, tensors)
    jax.tree.map(np.testing.assert_array_equal, state_dict.to_params(spec, old), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "mean"}, "not one of token, pooler, layers"),
        ({"padding": "none"}, "not one of masked, attended, pooled"),
        ({"padding": "pooled"}, "counts in a mean over tokens"),
        ({"pooling": "layers", "layers": 1}, "the tower has 1"),
        ({"kind": "clip", "padding": "attended"}, "only BERT has these"),
    ],
)
def test_poolings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(ref.bert_tower(), **changes)


@pytest.mark.parametrize(
    ("layout", "pooling", "padding", "message"),
    [
        ("medclip", "layers", "masked", "no common form for a resnet image tower"),
        ("vit", "token", "attended", "no common form for pooling 'token' with padding 'attended'"),
        ("vit", "pooler", "masked", "no common form for pooling 'pooler' with padding 'masked'"),
    ],
)
def test_open_clip_has_no_form_for_them(layout, pooling, padding, message):
    spec = spec_of("pmc_clip" if layout == "vit" else layout, pooling, padding)
    if layout == "vit":
        spec = dataclasses.replace(ref.bert_spec(), text=spec.text)
    with pytest.raises(InputError, match=message):
        open_clip.to_config(spec)
