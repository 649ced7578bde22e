"""The Swin tower agrees with transformers' `SwinModel` under both generations of its names."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import model_references as ref
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import SwinConfig, SwinModel

from mmkd_jax.errors import InputError
from mmkd_jax.models import state_dict
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.models.swin import Swin
from mmkd_jax.specs import ModelSpec, Preprocess, SwinTower

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Sixteen, four and one windows: in the last stage nothing is shifted.
SMALL = SwinTower(width=12, stages=(2, 4, 2), heads=3, window=3, patch=2, image_size=24)
MODEL = "vision_model.model."


class MedClipVision(torch.nn.Module):
    """`SwinModel` pooled, and a head without bias, as MedCLIP's `MedCLIPVisionModelViT` has them."""

    def __init__(self, tower: SwinTower):
        super().__init__()
        self.model = SwinModel(swin_config(tower))
        self.projection_head = torch.nn.Linear(tower.features, ref.EMBED, bias=False)
        ref.randomise(self)

    def forward(self, images):
        return self.projection_head(self.model(images).pooler_output)


def swin_config(tower: SwinTower) -> SwinConfig:
    return SwinConfig(
        image_size=tower.image_size,
        patch_size=tower.patch,
        embed_dim=tower.width,
        depths=list(tower.stages),
        num_heads=[tower.heads * 2**stage for stage in range(len(tower.stages))],
        window_size=tower.window,
        mlp_ratio=tower.mlp_ratio,
        hidden_act=tower.activation,
        layer_norm_eps=tower.norm_epsilon,
        attn_implementation="eager",
    )


def spec_of(tower: SwinTower) -> ModelSpec:
    text = ref.bert_tower(projection="linear", pooling="layers")
    return ModelSpec(name="small", image=tower, text=text, embed=ref.EMBED, preprocess=Preprocess(tower.image_size))


def published(spec: ModelSpec, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The image tower's tensors as transformers names them, with a text tower beside them."""
    shapes = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32), DualEncoder(spec).shapes())
    everything = state_dict.from_params(spec, shapes, "medclip")
    text = {key: value for key, value in everything.items() if not key.startswith("vision_model.")}
    return text | {f"vision_model.{key}": value for key, value in ref.tensors(model).items()}


def error(spec, tensors, images, wanted) -> float:
    params = state_dict.to_params(spec, tensors)
    return ref.relative_error(jax.jit(DualEncoder(spec).encode_image)(params, images), wanted)


def changed(spec, **values):
    return dataclasses.replace(spec, image=dataclasses.replace(spec.image, **values))


def make(tower, n):
    spec = spec_of(tower)
    model = MedClipVision(tower)
    images = ref.pictures(spec, n)
    with torch.no_grad():
        return spec, published(spec, model), images, model(ref.torch_images(images)).numpy()


@pytest.fixture(scope="module")
def case():
    """Spec, published tensors, pictures, and the reference's features of them."""
    return make(SMALL, 3)


def test_features_agree(case):
    assert error(*case) <= ref.TOLERANCE


@pytest.mark.full
def test_full_size_features_agree():
    spec, tensors, images, wanted = make(SwinTower(), 2)
    assert error(spec, tensors, images, wanted) <= ref.TOLERANCE
    shapes = DualEncoder(spec).shapes()["image"]
    # 27.5 million of Swin-T without its classifier, and the head.
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    assert count == 27_519_354 + 768 * ref.EMBED


@pytest.mark.parametrize("change", [{"activation": "quick_gelu"}, {"norm_epsilon": 1e-3}])
def test_a_wrong_setting_that_weights_do_not_tell_is_caught(case, change):
    spec, *rest = case
    assert error(changed(spec, **change), *rest) > 2 * ref.TOLERANCE


def test_other_heads_or_windows_do_not_fit_the_offsets(case):
    spec, tensors, *_ = case
    with pytest.raises(InputError, match=r"relative_position_bias_table is \(25, 3\), not \(25, 6\)"):
        state_dict.to_params(changed(spec, heads=6), tensors)
    with pytest.raises(InputError, match=r"relative_position_bias_table is \(25, 3\), not \(121, 3\)"):
        state_dict.to_params(changed(spec, window=6, patch=1), tensors)


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("shift_mask", lambda side, window, shift: None),
        ("offset_index", lambda window: np.arange(window**4).reshape(window**2, -1) % (2 * window - 1) ** 2),
        ("jnp.roll", lambda x, shift, axes: x),
    ],
)
def test_a_forgotten_mask_bias_or_shift_is_caught(case, monkeypatch, function, fault):
    spec, *rest = case
    monkeypatch.setattr(f"mmkd_jax.models.swin.{function}", fault)
    assert error(spec, *rest) > 100 * ref.TOLERANCE


def test_another_order_of_merged_cells_is_caught(case, monkeypatch):
    def across_first(self, x):
        four = [x[:, row::2, column::2] for row in range(2) for column in range(2)]
        return self.reduction(self.norm(jnp.concatenate(four, axis=-1)))

    spec, *rest = case
    monkeypatch.setattr("mmkd_jax.models.swin.Merge.__call__", across_first)
    assert error(spec, *rest) > 100 * ref.TOLERANCE


def test_pooling_one_token_is_caught(case, monkeypatch):
    spec, *rest = case
    original = Swin.cells
    monkeypatch.setattr(Swin, "cells", lambda self, images: original(self, images)[:, :1, :1])
    assert error(spec, *rest) > 100 * ref.TOLERANCE


def test_both_generations_of_names_are_read_and_the_first_is_written(case, tmp_path):
    spec, tensors, *_ = case
    params = state_dict.to_params(spec, tensors)
    first = state_dict.from_params(spec, params, "medclip")
    block = f"{MODEL}encoder.layers.1.blocks.3."
    assert f"{block}attention.q_proj.weight" in tensors
    assert f"{block}attention.self.query.weight" in first
    # transformers itself reads the first generation's names and knows the second's.
    swin = {
        key.removeprefix(MODEL): np.array(value, order="C") for key, value in first.items() if key.startswith(MODEL)
    }
    save_file(swin, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(swin_config(SMALL).to_dict()))
    theirs = ref.tensors(SwinModel.from_pretrained(tmp_path))
    assert theirs.keys() == {key.removeprefix(MODEL) for key in tensors if key.startswith(MODEL)}
    assert all(np.array_equal(value, tensors[MODEL + key]) for key, value in theirs.items())
    # Files of the first generation hold buffers as well, and BERT's pooler, which is not used.
    index = f"{block}attention.self.relative_position_index"
    buffers = {index: np.zeros((9, 9), np.int64), "text_model.model.embeddings.position_ids": np.arange(20)[None]}
    pooler = {"text_model.model.pooler.dense.weight": np.ones((40, 40), np.float32)}
    again = state_dict.to_params(spec, first | buffers | pooler)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_weights_that_do_not_fit_are_refused_by_name(case):
    spec, tensors, *_ = case
    name = f"{MODEL}encoder.layers.0.downsample.reduction.weight"
    with pytest.raises(InputError, match=f"missing {name}"):
        state_dict.to_params(spec, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(InputError, match=rf"{name} is \(48, 24\), not \(24, 48\)"):
        state_dict.to_params(spec, tensors | {name: tensors[name].T})
    extra = name.replace("layers.0", "layers.2")
    with pytest.raises(InputError, match=f"left over {extra}"):
        state_dict.to_params(spec, tensors | {extra: tensors[name]})


def test_towers_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="not a multiple of 24, which whole windows"):
        dataclasses.replace(SMALL, image_size=28)
    with pytest.raises(InputError, match="blocks come in pairs"):
        dataclasses.replace(SMALL, stages=(2, 3, 2))
    with pytest.raises(InputError, match="did you mean 'swin'"):
        ModelSpec.from_dict({"image": {"kind": "swim"}})
    with pytest.raises(InputError, match=r"spec\.image has no field 'layers'"):
        ModelSpec.from_dict({"image": {"kind": "swin", "layers": 12}})
    spec = spec_of(SMALL)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
