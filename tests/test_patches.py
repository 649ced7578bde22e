"""Patch dropping and nested widths of the student: what is left out changes nothing, and the finish sees all."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower
from mmkd_jax.tasks import patches
from mmkd_jax.tasks.base import Features
from mmkd_jax.tasks.clip import ClipTask

pytestmark = pytest.mark.usefixtures("quick_compilation")
N, SIZE, PATCH, EMBED = 4, 32, 8, 16
SPEC = ModelSpec(
    image=ImageTower(width=16, layers=1, heads=2, patch=PATCH, image_size=SIZE, mlp_width=32),
    text=TextTower(width=16, layers=1, heads=2, mlp_width=32, vocab_size=30, positions=8, context=8, dropout=0.0),
    embed=EMBED,
    preprocess=Preprocess(size=SIZE),
)


@pytest.fixture(scope="module")
def task():
    return ClipTask(SPEC, patch_drop=0.5, patch_drop_steps=10)


@pytest.fixture(scope="module")
def params(task):
    return task.init(jax.random.key(0))[0]


def test_all_patches_in_any_order_are_the_whole_picture(task, params):
    image = jnp.asarray(np.random.default_rng(0).normal(size=(N, SIZE, SIZE, 3)), jnp.float32)
    order = jnp.asarray([np.random.default_rng(i).permutation(16) for i in range(N)])
    whole = task.model.encode_image(params, image)
    np.testing.assert_allclose(task.model.encode_image(params, image, kept=order), whole, rtol=1e-4, atol=1e-5)
    fewer = task.model.encode_image(params, image, kept=order[:, :15])
    assert jnp.abs(fewer - whole).max() > 1e-3


def test_dropped_patches_change_nothing_until_the_finish(task, params):
    """The gradient by the pixels: zero in half of the patches, other ones at each step; everywhere at the finish."""
    image = np.random.default_rng(1).integers(0, 256, (N, SIZE, SIZE, 3)).astype(np.float32)
    text = TextBatch(*(jnp.ones((N, 8), jnp.int32) for _ in range(4)))

    @jax.jit
    def seen(step, seed):
        def first(pixels):
            batch = {"image": pixels, "text": text}
            return jnp.sum(task.encode(params, {}, batch, jax.random.key(seed), step).image[:, 0])

        gradient = jnp.abs(jax.grad(first)(image))
        return gradient.reshape(N, 4, PATCH, 4, PATCH, 3).max((2, 4, 5)).reshape(N, 16) > 0

    first, other, finish = (np.asarray(seen(*at)) for at in ((0, 0), (9, 1), (10, 0)))
    assert (first.sum(1) == 8).all()
    assert (other.sum(1) == 8).all()
    assert (first != other).any(1).all()
    assert len({tuple(row) for row in first}) == N  # each picture has its own
    assert finish.all()


def test_each_patch_is_as_likely_as_another():
    kept = np.asarray(patches.draw(jax.random.key(0), 2000, SPEC.image, 0.75))
    assert kept.shape == (2000, 4)
    assert all(len(set(row)) == 4 for row in kept)
    share = np.bincount(kept.ravel(), minlength=16) / 2000
    assert np.abs(share - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / 2000)


def test_nested_widths_are_the_mean_of_the_losses_of_prefixes():
    rng = np.random.default_rng(2)
    image, text = rng.normal(size=(2, 12, EMBED))
    scale = 10.0

    def loss(width):
        v, t = (x[:, :width] / np.linalg.norm(x[:, :width], axis=1, keepdims=True) for x in (image, text))
        logits = scale * v @ t.T
        return np.mean([np.log(np.exp(logits).sum(axis)) - np.diag(logits) for axis in (0, 1)])

    unit = Features(*(jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32) for x in (image, text)))
    for form in ("plain", "ring"):
        nested = ClipTask(SPEC, widths=(4, 8), form=form)
        value = nested.objective({"logit_scale": jnp.log(scale)}, unit, {}, 0)[0]
        np.testing.assert_allclose(value, (loss(4) + loss(8) + loss(EMBED)) / 3, rtol=1e-5)
    assert abs(value / loss(EMBED) - 1) > 1e-2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_drop": 1.0}, "the share of patches to drop is 1.0"),
        ({"patch_drop": 0.5}, "patches are to be dropped in no step"),
        ({"widths": (16,)}, "must lie between 0 and the embedding's 16"),
        ({"loss": "sofmax"}, "did you mean 'softmax'"),
        ({"form": "rings"}, "did you mean 'ring'"),
    ],
)
def test_switches_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        ClipTask(SPEC, **changes)


def test_a_tower_without_patches_cannot_drop_them():
    with pytest.raises(InputError, match="swin towers cannot leave patches out"):
        patches.check(0.5, types.SimpleNamespace(kind="swin"))
