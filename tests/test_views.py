"""Views: a function of (policy, id, k); crops inside the picture; RandomResizedCrop's semantics."""

import io
import math
import re

import data_fixtures as toy
import numpy as np
import pytest
from PIL import Image

from mmkd_jax import preprocess, specs
from mmkd_jax.data import views
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError


def reference_box(draw, scale, ratio, width, height):
    """torchvision.transforms.RandomResizedCrop.get_params, written out with its own order of draws."""
    area = height * width
    for attempt in range(10):
        u = draw(attempt)
        target = area * (scale[0] + (scale[1] - scale[0]) * u[0])
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[1])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            i, j = math.floor(u[3] * (height - h + 1)), math.floor(u[2] * (width - w + 1))
            return j, i, j + w, i + h
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    i, j = (height - h) // 2, (width - w) // 2
    return j, i, j + w, i + h


def image(width=40, height=30, mode="RGB"):
    return Image.open(io.BytesIO(toy.picture(1, width, height, mode=mode)))


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (1, 1), (2, 500), (500, 2), (7, 7), (300, 100)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.05, 1.0), (1.0, 1.0)])
def test_box_against_an_independent_version(width, height, scale):
    policy = ViewPolicy(scale=scale, seed=4)
    for k in range(60):
        box = policy.box("id", k, width, height)
        expected = reference_box(
            lambda a, k=k: views._uniforms(policy.hash, "id", k, a), scale, (3 / 4, 4 / 3), width, height
        )
        assert box == expected
        left, top, right, bottom = box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_area_and_ratio_ranges_are_filled():
    policy = ViewPolicy(scale=(0.3, 0.6), ratio=(0.5, 2.0))
    boxes = np.array([policy.box(f"id{n}", n % 5, 1000, 1000) for n in range(4000)])
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    area, ratio = w * h / 1e6, np.log(w / h)
    assert 0.299 < area.min() < 0.31
    assert 0.59 < area.max() < 0.601
    assert abs(area.mean() - 0.45) < 0.01  # uniform in area
    assert abs(ratio.mean()) < 0.03  # uniform in log ratio
    assert -0.70 < ratio.min() < -0.66
    assert 0.66 < ratio.max() < 0.70
    x = boxes[:, 0] / np.maximum(1000 - w, 1)
    assert abs(x.mean() - 0.5) < 0.02
    assert abs(x.std() - 1 / np.sqrt(12)) < 0.02


def test_uniforms_are_uniform_and_below_one(monkeypatch):
    u = np.array([views._uniforms("p", "i", k, 0) for k in range(5000)])
    assert u.min() >= 0
    assert u.max() < 1
    np.testing.assert_allclose(u.mean(0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.06
    import types

    ones = types.SimpleNamespace(digest=lambda: b"\xff" * 32)
    monkeypatch.setattr(views.hashlib, "blake2b", lambda *_, **__: ones)
    assert max(views._uniforms("p", "i", 0, 0)) < 1


def test_a_view_depends_on_policy_id_and_k_alone():
    policy = ViewPolicy(scale=(0.2, 0.8))
    boxes = {(i, k): policy.box(i, k, 200, 200) for i in ("a", "b") for k in range(3)}
    assert len(set(boxes.values())) == 6
    for (i, k), box in reversed(boxes.items()):
        assert ViewPolicy.from_dict(policy.to_dict()).box(i, k, 200, 200) == box
    assert ViewPolicy(scale=(0.2, 0.8), seed=1).box("a", 0, 200, 200) != boxes["a", 0]
    assert policy.box("a", 0, 200, 200) == (3, 44, 98, 161)


def test_render_is_crop_then_resize():
    policy, picture = ViewPolicy(scale=(0.2, 0.8)), image()
    for k in range(3):
        got = policy.render(picture, "x", k, 12)
        box = policy.box("x", k, *picture.size)
        expected = picture.crop(box).convert("RGB").resize((12, 12), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(got, np.asarray(expected))
        assert got.shape == (12, 12, 3)
        assert got.dtype == np.uint8
    # what lies outside the box has no influence
    spoilt = np.asarray(picture).copy()
    left, top, right, bottom = policy.box("x", 0, *picture.size)
    spoilt[:top] = spoilt[bottom:] = 255 - spoilt[:top].max(initial=0)
    spoilt[:, :left] = spoilt[:, right:] = 0
    np.testing.assert_array_equal(
        policy.render(Image.fromarray(spoilt), "x", 0, 12), policy.render(picture, "x", 0, 12)
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(mode):
    picture = image(mode="RGB").convert(mode)
    policy = ViewPolicy(scale=(0.5, 1.0))
    got = policy.render(picture, "x", 1, 12)
    box = policy.box("x", 1, *picture.size)
    expected = picture.convert("RGB").crop(box).resize((12, 12), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(got, np.asarray(expected))


def test_center_is_evaluation_preprocessing():
    policy = ViewPolicy(kind="center")
    for picture in (image(), image(30, 41), image(mode="L")):
        expected = preprocess.eval_image(picture, specs.Preprocess(size=16))
        for k in range(2):
            np.testing.assert_array_equal(policy.render(picture, f"id{k}", k, 16), expected)


def test_hash_tells_policies_apart_and_ignores_what_has_no_effect():
    policies = [
        ViewPolicy(),
        ViewPolicy(seed=1),
        ViewPolicy(scale=(0.8, 1)),
        ViewPolicy(ratio=(1, 1)),
        ViewPolicy("center"),
    ]
    assert len({p.hash for p in policies}) == 5
    assert ViewPolicy("center", seed=5).hash == ViewPolicy("center").hash
    assert ViewPolicy(scale=[0.9, 1]).hash == ViewPolicy().hash
    for policy in policies:
        assert ViewPolicy.from_dict(policy.to_dict()).hash == policy.hash


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "centre"}, "did you mean 'center'"),
        ({"scale": (0.0, 1.0)}, "scale (0.0, 1.0)"),
        ({"scale": (0.9, 0.5)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"size": 3}, "no field 'size'"),
    ],
)
def test_wrong_policies(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ViewPolicy.from_dict(fields)
