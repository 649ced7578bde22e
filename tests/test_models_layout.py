"""Names, shapes and sizes of the parameters, pure functions of them, and where torch must not appear."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from mmkd_jax.models import heads, state_dict
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower, TokenizerSpec

BLOCK = {
    "norm1/scale": "D",
    "norm1/bias": "D",
    "norm2/scale": "D",
    "norm2/bias": "D",
    "attention/qkv/kernel": "D 3 H K",
    "attention/qkv/bias": "3 H K",
    "attention/out/kernel": "H K D",
    "attention/out/bias": "D",
    "mlp/up/kernel": "D M",
    "mlp/up/bias": "M",
    "mlp/down/kernel": "M D",
    "mlp/down/bias": "D",
}
STUDENT = {
    "logit_scale": (),
    "image/patch/kernel": (1, 16, 16, 3, 768),
    "image/class_token": (768,),
    "image/positions": (197, 768),
    "image/pre_norm/scale": (768,),
    "image/pre_norm/bias": (768,),
    "image/norm/scale": (768,),
    "image/norm/bias": (768,),
    "image/projection/kernel": (768, 512),
    "text/tokens/embedding": (30522, 768),
    "text/positions": (512, 768),
    "text/types": (2, 768),
    "text/embed_norm/scale": (768,),
    "text/embed_norm/bias": (768,),
    "text/projection/up/kernel": (768, 640),
    "text/projection/down/kernel": (640, 512),
}
SMALL = {
    "logit_scale": (),
    "image/patch/kernel": (1, 4, 4, 3, 24),
    "image/patch/bias": (24,),
    "image/class_token": (24,),
    "image/positions": (17, 24),
    "image/norm/scale": (24,),
    "image/norm/bias": (24,),
    "image/projection/kernel": (24, 8),
    "text/tokens/embedding": (50, 12),
    "text/positions": (10, 12),
    "text/norm/scale": (12,),
    "text/norm/bias": (12,),
    "text/projection/kernel": (12, 8),
}


def small_spec(**text) -> ModelSpec:
    return ModelSpec(
        image=ImageTower(24, 2, 3, 4, 16, 40, "gelu", 1e-6, False, True, "timm"),
        text=TextTower("clip", 12, 3, 2, 20, 50, 10, 10, "gelu", 1e-5, "linear"),
        embed=8,
        preprocess=Preprocess(16),
        tokenizer=TokenizerSpec("bpe"),
    )


def bert_spec(**text) -> ModelSpec:
    tower = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 24, "vocab_size": 40, "positions": 12, "context": 8}
    return ModelSpec(
        image=ImageTower(16, 2, 2, 8, 16, 24), text=TextTower(**tower, **text), embed=8, preprocess=Preprocess(16)
    )


def text_batch(ids) -> TextBatch:
    ids = np.asarray(ids, np.int32)
    mask = (ids != 0).astype(np.int32)
    return TextBatch(ids, mask, np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1)), mask)


def flat(tree) -> dict:
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_blocks(golden, image, text):
    """`golden` with the stacked blocks of both towers; sizes are (layers, width, heads, mlp width)."""
    golden = dict(golden)
    for tower, (layers, width, heads_, mlp) in (("image", image), ("text", text)):
        sizes = {"D": width, "H": heads_, "K": width // heads_, "M": mlp, "3": 3}
        golden |= {f"{tower}/layers/{k}": (layers, *(sizes[a] for a in v.split())) for k, v in BLOCK.items()}
    return golden


def test_names_and_shapes_of_the_full_student():
    shapes = flat(DualEncoder(ModelSpec()).shapes())
    golden = with_blocks(STUDENT, (12, 768, 12, 3072), (12, 768, 12, 3072))
    assert {name: leaf.shape for name, leaf in shapes.items()} == golden
    assert {leaf.dtype for leaf in shapes.values()} == {np.dtype("float32")}


def test_names_and_shapes_of_a_small_timm_and_clip_pair():
    params = flat(DualEncoder(small_spec()).init(jax.random.key(0)))
    assert {name: leaf.shape for name, leaf in params.items()} == with_blocks(SMALL, (2, 24, 3, 40), (3, 12, 2, 20))


def test_parameter_counts_of_the_full_student():
    def count(part):
        return sum(int(np.prod(leaf.shape)) for name, leaf in shapes.items() if name.startswith(part))

    shapes = flat(DualEncoder(ModelSpec()).shapes())
    assert count("image/") == 86_192_640
    assert count("text/projection/") == 819_200
    assert count("text/") == 108_891_648 + 819_200


def test_vit_l_14_is_a_matter_of_the_spec():
    spec = ModelSpec(
        image=ImageTower(1024, 24, 16, 14, 224, 4096, "gelu"),
        text=TextTower("clip", 768, 12, 12, 3072, 49408, 77, 77, "gelu", 1e-5, "linear"),
        embed=768,
        tokenizer=TokenizerSpec("bpe"),
    )
    shapes = DualEncoder(spec).shapes()
    # The published parameter count of open_clip's ViT-L-14.
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == 427_616_513


def test_initial_values_are_those_of_the_key_and_the_logit_scale_is_clips():
    encoder = DualEncoder(bert_spec())
    first, again, other = (encoder.init(jax.random.key(k)) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["image"]["patch"]["kernel"], other["image"]["patch"]["kernel"])
    assert float(first["logit_scale"]) == pytest.approx(np.log(1 / 0.07))
    layers = first["text"]["layers"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])
    assert float(jnp.abs(layers).max()) <= 0.04 + 1e-6


def test_each_remat_policy_gives_the_same_values_and_gradients():
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    params = DualEncoder(bert_spec()).init(jax.random.key(0))

    def both(remat):
        encoder = DualEncoder(bert_spec(), remat=remat)
        loss = jax.value_and_grad(lambda p: jnp.square(encoder.encode_image(p, images)).sum())
        return jax.jit(loss)(params)

    plain = both("none")
    for remat in ("full", "dots"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, both(remat))
    with pytest.raises(InputError, match="did you mean 'full'"):
        both("ful")


def test_bfloat16_compute_keeps_float32_outside():
    spec = bert_spec()
    params = DualEncoder(spec).init(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    exact = jax.jit(DualEncoder(spec).encode_image)(params, images)
    coarse_encoder = DualEncoder(spec, dtype=jnp.bfloat16)
    coarse = jax.jit(coarse_encoder.encode_image)(params, images)
    gradients = jax.jit(jax.grad(lambda p: coarse_encoder.encode_image(p, images).sum()))(params)
    assert coarse.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}
    difference = float(jnp.abs(exact - coarse).max() / jnp.abs(exact).max())
    assert 1e-5 < difference < 0.05


def test_dropout_needs_a_key_and_depends_on_it_alone():
    encoder = DualEncoder(bert_spec(dropout=0.5))
    params = encoder.init(jax.random.key(0))
    text = text_batch([[3, 5, 7, 9, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0, 0, 0]])
    encode = jax.jit(encoder.encode_text)
    calm = encode(params, text)
    np.testing.assert_array_equal(calm, encode(params, text))
    one, same, other = (encode(params, text, key=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert not np.allclose(one, calm)
    none = DualEncoder(bert_spec(dropout=0.0))
    np.testing.assert_array_equal(calm, jax.jit(none.encode_text)(params, text, key=jax.random.key(1)))


def test_dropout_keeps_the_mean_at_its_rate():
    from mmkd_jax.models.layers import dropout

    x = jnp.ones((200, 500))
    dropped = dropout(x, 0.1, jax.random.key(0))
    assert float((dropped == 0).mean()) == pytest.approx(0.1, abs=0.003)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.003)


@pytest.mark.parametrize("make", [bert_spec, small_spec])
def test_padding_changes_nothing(make):
    encoder = DualEncoder(make())
    params = encoder.init(jax.random.key(0))
    end = make().text.vocab_size - 1
    short = text_batch([[3, 5, 7, end]])
    long = text_batch([[3, 5, 7, end, 0, 0, 0, 0]])
    encode = jax.jit(encoder.encode_text)
    np.testing.assert_allclose(encode(params, short), encode(params, long), atol=1e-6)


def test_a_feature_does_not_depend_on_its_neighbours():
    encoder = DualEncoder(bert_spec())
    params = encoder.init(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    encode = jax.jit(encoder.encode_image)
    together = encode(params, images)
    np.testing.assert_allclose(encode(params, images[1:2]), together[1:2], atol=1e-6)
    under_vmap = jax.jit(jax.vmap(lambda image: encoder.encode_image(params, image[None])[0]))(images)
    np.testing.assert_allclose(under_vmap, together, atol=1e-6)


def test_unprojected_features_have_the_towers_width():
    encoder = DualEncoder(small_spec())
    params = encoder.init(jax.random.key(0))
    image = jax.eval_shape(lambda p: encoder.encode_image(p, np.zeros((2, 16, 16, 3)), projected=False), params)
    assert image.shape == (2, 24)
    text = text_batch([[1, 49]])
    pooled, projected = (jax.jit(lambda p, q=q: encoder.encode_text(p, text, projected=q))(params) for q in (0, 1))
    assert pooled.shape == (1, 12)
    np.testing.assert_allclose(pooled @ params["text"]["projection"]["kernel"], projected, atol=1e-6)


def test_wrong_inputs_are_refused_with_a_reason():
    encoder = DualEncoder(bert_spec())
    params = encoder.init(jax.random.key(0))
    with pytest.raises(InputError, match=r"takes \(16, 16, 3\)"):
        encoder.encode_image(params, np.zeros((1, 3, 16, 16), np.float32))
    with pytest.raises(InputError, match="13 tokens; student has 12"):
        encoder.encode_text(params, text_batch(np.ones((1, 13))))
    with pytest.raises(InputError, match="do not have the names"):
        encoder.encode_image({"image": params["text"]}, np.zeros((1, 16, 16, 3), np.float32))


def test_heads_are_keyed_by_name_and_apply():
    alone = heads.init(jax.random.key(0), {"a": 5}, 8)
    both = heads.init(jax.random.key(0), {"b": 3, "a": 5}, 8)
    jax.tree.map(np.testing.assert_array_equal, alone["a"], both["a"])
    assert not np.array_equal(both["a"]["image"]["kernel"], both["a"]["text"]["kernel"])
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    np.testing.assert_allclose(heads.apply(both["b"]["text"], x), x @ both["b"]["text"]["kernel"], rtol=1e-5)
    deep = heads.init(jax.random.key(0), {"a": 5}, 8, kind="mlp")["a"]["image"]
    assert deep["up"]["kernel"].shape == (8, 16)
    assert heads.apply(deep, x).shape == (4, 5)
    with pytest.raises(InputError, match="not one of linear, mlp"):
        heads.init(jax.random.key(0), {"a": 5}, 8, kind="deep")


def random_tensors(spec) -> dict:
    return state_dict.from_params(spec, DualEncoder(spec).init(jax.random.key(0)))


def test_wrappers_prefixes_other_prefix_names_buffers_and_half_precision_are_read():
    spec = bert_spec()
    tensors = random_tensors(spec)
    wanted = state_dict.to_params(spec, tensors)
    dressed = {f"module._orig_mod.{k.replace('text.', 'text_encoder.', 1)}": v for k, v in tensors.items()}
    dressed["module._orig_mod.text_encoder.transformer.embeddings.position_ids"] = np.arange(12)[None]
    dressed["module._orig_mod.logit_scale"] = np.full(1, np.log(1 / 0.07), np.float32)
    jax.tree.map(np.testing.assert_array_equal, state_dict.to_params(spec, dressed), wanted)
    half = state_dict.to_params(spec, {k: v.astype(np.float16) for k, v in tensors.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype("float32")}
    custom = {
        f"text.{k}" if not k.startswith(("visual", "logit")) else k: v for k, v in random_tensors(small_spec()).items()
    }
    jax.tree.map(
        np.testing.assert_array_equal,
        state_dict.to_params(small_spec(), custom),
        state_dict.to_params(small_spec(), random_tensors(small_spec())),
    )


def test_weights_that_do_not_fit_are_refused_by_name():
    spec = bert_spec()
    tensors = random_tensors(spec)
    incomplete = {k: v for k, v in tensors.items() if k != "visual.proj"}
    with pytest.raises(InputError, match=r"missing visual\.proj"):
        state_dict.to_params(spec, incomplete)
    with pytest.raises(InputError, match=r"left over text\.pooler\.weight"):
        state_dict.to_params(spec, tensors | {"text.pooler.weight": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match=r"visual\.proj is \(8, 16\), not \(16, 8\)"):
        state_dict.to_params(spec, tensors | {"visual.proj": tensors["visual.proj"].T})
    biased = dataclasses.replace(spec, image=dataclasses.replace(spec.image, patch_bias=True))
    with pytest.raises(InputError, match="do not share image/patch/bias"):
        random_tensors(biased)
    deep = dataclasses.replace(small_spec(), text=dataclasses.replace(small_spec().text, projection="mlp"))
    with pytest.raises(InputError, match="do not share text/projection/down/kernel, text/projection/kernel"):
        random_tensors(deep)


def test_a_tower_without_the_first_norm_has_its_names_too():
    spec = dataclasses.replace(bert_spec(), image=dataclasses.replace(bert_spec().image, pre_norm=False))
    tensors = random_tensors(spec)
    assert not [name for name in tensors if "ln_pre" in name]
    assert "pre_norm" not in state_dict.to_params(spec, tensors)["image"]


def test_models_do_not_import_torch():
    code = (
        "import sys, mmkd_jax, mmkd_jax.models.state_dict, mmkd_jax.tokenizers, mmkd_jax.preprocess, mmkd_jax.export\n"
        "import teachers\n"
        "print([m for m in ('torch', 'tensorflow', 'open_clip', 'timm') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
