"""The recipes of stage 1 as resolved configs, beside the description of the published model."""

import pytest
import train_fixtures as tiny

from mmkd_jax import config as configs
from mmkd_jax.errors import InputError
from mmkd_jax.specs import ModelSpec
from mmkd_jax.train import setup
from teachers.specs.bert import BIOMEDCLIP


def flat(tree: dict, name: str = "") -> dict:
    """The fields of nested dicts by dotted name."""
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, child in tree.items() for k, v in flat(child, f"{name}.{key}" if name else key).items()}


def resolved(argument: str) -> dict:
    return configs.to_dict(configs.load(f"{tiny.CONFIGS}/stage1_clip.py{argument}"))


def test_biomedclip_has_the_published_towers_and_its_schedule():
    found, published = resolved(":recipe=biomedclip"), BIOMEDCLIP.spec
    spec = ModelSpec.from_dict(found["model"])
    assert (spec.image, spec.text, spec.embed) == (published.image, published.text, published.embed)
    assert (spec.tokenizer, spec.preprocess) == (published.tokenizer, published.preprocess)
    assert spec.text.context == 256
    assert found["loss"] == {"task": "softmax", "form": "plain", "widths": []}
    schedule = {"lr": 5e-4, "warmup": 2000, "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-6, "decay": 0.2, "clip": 0.0}
    assert found["optimizer"] == schedule
    assert (found["epochs"], found["steps"], found["batch"]) == (32, 0, 4096)


def test_what_the_recipe_does_not_name_is_as_released():
    """The difference between the two, field by field."""
    ours, released = flat(resolved(":recipe=biomedclip")), flat(resolved(""))
    image = {f"model.image.{name}" for name in ("activation", "norm_epsilon", "pre_norm", "patch_bias", "layout")}
    assert {name for name in ours if ours[name] != released[name]} == {
        "name",
        "epochs",
        "batch",
        "optimizer.lr",
        *image,
    }
    assert resolved(":recipe=released") == resolved("")


def test_a_small_one_is_of_the_same_kind():
    config = configs.load(f"{tiny.CONFIGS}/stage1_clip.py:recipe=biomedclip,smoke", tiny.overrides())
    image = setup.build(config).task.model.spec.image
    assert (image.layout, image.activation, image.width) == ("timm", "gelu", 32)


def test_an_unknown_recipe_is_one_line():
    with pytest.raises(InputError, match=r"unknown recipe 'biomedcilp'; did you mean 'biomedclip'") as caught:
        resolved(":recipe=biomedcilp")
    assert "\n" not in str(caught.value)
