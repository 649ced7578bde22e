"""Both towers agree with open_clip, timm and transformers, and each wrong setting is caught by the tolerance."""

import dataclasses

import jax
import model_references as ref
import numpy as np
import pytest
import torch

from mmkd_jax.models import state_dict
from mmkd_jax.models.dual_encoder import DualEncoder

CASES = {
    "clip": (ref.clip_spec, ref.open_clip_clip),
    "clip quick_gelu": (lambda: ref.clip_spec("quick_gelu"), ref.open_clip_clip),
    "bert": (ref.bert_spec, ref.CustomText),
    "bert linear": (lambda: ref.bert_spec(projection="linear"), ref.CustomText),
    "timm": (ref.timm_spec, ref.CustomText),
    "transformers": (lambda: ref.clip_spec("quick_gelu"), ref.transformers_clip),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make_spec, make_model = CASES[request.param]
    spec = make_spec()
    model = make_model(spec)
    return spec, model, state_dict.to_params(spec, ref.tensors(model))


def image_features(model, images):
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            return model.visual_projection(model.vision_model(images).pooler_output)
        return model.encode_image(images)


def text_features(model, ids):
    ids = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        if hasattr(model, "get_text_features"):
            return model.text_projection(model.text_model(ids).pooler_output)
        return model.encode_text(ids)


def image_error(spec, params, model):
    images = ref.pictures(spec)
    return ref.relative_error(
        jax.jit(DualEncoder(spec).encode_image)(params, images), image_features(model, ref.torch_images(images))
    )


def text_error(spec, params, model, text=None):
    text = text or ref.texts(spec)
    return ref.relative_error(
        jax.jit(DualEncoder(spec).encode_text)(params, text), text_features(model, ref.texts(spec).ids)
    )


def test_both_towers_agree(case):
    spec, model, params = case
    assert image_error(spec, params, model) <= ref.TOLERANCE
    assert text_error(spec, params, model) <= ref.TOLERANCE


def test_weights_survive_the_way_there_and_back(case):
    spec, model, params = case
    theirs = ref.tensors(model)
    layout = "transformers_clip" if "visual_projection.weight" in theirs else "open_clip"
    back = state_dict.from_params(spec, params, layout)
    theirs = {key: value for key, value in theirs.items() if value.dtype == np.float32}
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(back[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("tower", "changes"),
    [
        ("image", {"activation": "gelu"}),
        ("image", {"heads": 8}),
        ("image", {"norm_epsilon": 1e-3}),
        ("text", {"activation": "quick_gelu"}),
        ("text", {"heads": 4}),
        ("text", {"norm_epsilon": 1e-3}),
    ],
)
def test_a_wrong_setting_that_weights_do_not_tell_is_caught(tower, changes):
    spec = ref.bert_spec()
    model = ref.CustomText(spec)
    tensors = ref.tensors(model)
    wrong = dataclasses.replace(spec, **{tower: dataclasses.replace(getattr(spec, tower), **changes)})
    params = state_dict.to_params(wrong, tensors)
    error = (image_error if tower == "image" else text_error)(wrong, params, model)
    assert error > 2 * ref.TOLERANCE


def test_a_forgotten_padding_mask_is_caught():
    spec = ref.bert_spec()
    model = ref.CustomText(spec)
    text = ref.texts(spec)
    unmasked = text._replace(mask=np.ones_like(text.mask))
    assert text_error(spec, state_dict.to_params(spec, ref.tensors(model)), model, unmasked) > 100 * ref.TOLERANCE


def test_a_forgotten_causal_mask_is_caught(monkeypatch):
    spec = ref.clip_spec()
    model = ref.open_clip_clip(spec)
    params = state_dict.to_params(spec, ref.tensors(model))
    monkeypatch.setattr(jax.numpy, "tril", lambda x: x)
    assert text_error(spec, params, model) > 100 * ref.TOLERANCE


def test_pooling_another_token_is_caught():
    spec = ref.clip_spec()
    model = ref.open_clip_clip(spec)
    params = state_dict.to_params(spec, ref.tensors(model))
    text = ref.texts(spec)
    ids = text.ids.copy()
    ids[ids == spec.text.vocab_size - 1] = 0  # without end tokens the highest id is elsewhere
    assert text_error(spec, params, model, text._replace(ids=ids)) > 100 * ref.TOLERANCE


def test_swapped_norms_are_caught():
    spec = ref.bert_spec()
    model = ref.CustomText(spec)
    params = state_dict.to_params(spec, ref.tensors(model))
    layers = params["image"]["layers"]
    layers["norm1"], layers["norm2"] = layers["norm2"], layers["norm1"]
    assert image_error(spec, params, model) > 100 * ref.TOLERANCE


@pytest.mark.parametrize("tower", ["image", "text"])
def test_gradients_equal_torch(tower):
    spec = ref.bert_spec()
    model = ref.CustomText(spec)
    params = state_dict.to_params(spec, ref.tensors(model))
    images, text = ref.pictures(spec), ref.texts(spec)
    weights = np.random.default_rng(5).normal(size=(len(images if tower == "image" else text.ids), spec.embed))
    weights = weights.astype(np.float32)
    encoder = DualEncoder(spec)

    def loss(params):
        features = encoder.encode_image(params, images) if tower == "image" else encoder.encode_text(params, text)
        return (features * weights).sum()

    ours = state_dict.from_params(spec, jax.jit(jax.grad(loss))(params))
    theirs = (
        model.encode_image(ref.torch_images(images))
        if tower == "image"
        else model.encode_text(torch.from_numpy(text.ids.astype(np.int64)))
    )
    (theirs * torch.from_numpy(weights)).sum().backward()
    checked = 0
    for name, value in model.named_parameters():
        assert np.isfinite(ours[name]).all()
        if value.grad is None:
            assert not ours[name].any()
        # A key's bias shifts all logits of a query alike: its gradient is zero but for rounding.
        elif not name.endswith("key.bias"):
            error = np.abs(ours[name] - value.grad.numpy()).max()
            scale = max(np.abs(value.grad.numpy()).max(), 1e-2)
            assert error <= ref.TOLERANCE * scale, name
            checked += 1
    assert checked > 20
