"""Files of every family, however they are wrapped and divided, give the same parameters; spoilt ones are named."""

import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch, which writes the files, is not installed")
import published_teachers as published
import torch
from etils import epath

import teachers
from mmkd_jax.cli import main
from mmkd_jax.errors import InputError
from mmkd_jax.models import state_dict, weights

FAMILIES = ("open_clip", "transformers", "unimed", "biomedclip", "pmc_clip", "medclip_vit", "medclip_resnet")
BUFFERS = {  # of integers, as older files hold them
    "open_clip": ("input_resolution", "context_length", "vocab_size"),
    "transformers": ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"),
    "unimed": ("text_encoder.transformer.embeddings.position_ids",),
    "biomedclip": ("text.transformer.embeddings.position_ids",),
    "pmc_clip": ("text_encoder.embeddings.position_ids", "visual.bn1.num_batches_tracked"),
    "medclip_vit": (
        "text_model.model.embeddings.position_ids",
        "vision_model.model.encoder.layers.0.blocks.0.attention.self.relative_position_index",
    ),
    "medclip_resnet": ("text_model.model.embeddings.position_ids", "vision_model.model.bn1.num_batches_tracked"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name, small teacher, and a folder with its weights and vocabulary."""
    made = published.make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    published.write(folder, made)
    return request.param, made, folder


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_wrappers_prefixes_half_precision_and_buffers_change_nothing(family, zipped, tmp_path):
    name, made, _ = family
    half = {key: value.half() if value.is_floating_point() else value for key, value in made.tensors.items()}
    wanted = state_dict.to_params(made.spec, {key: value.numpy() for key, value in half.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(wanted)} == {np.dtype(np.float32)}
    half |= {key: torch.arange(3) for key in BUFFERS[name]}
    wraps = {
        "training": {"epoch": 2, "state_dict": {f"module.{k}": v for k, v in half.items()}, "optimizer": {"m": half}},
        "compiled": {"model": {f"module._orig_mod.{k}": v for k, v in half.items()}},
        "plain": half,
    }
    for wrap, value in wraps.items():
        torch.save(value, tmp_path / f"{wrap}.pt", _use_new_zipfile_serialization=zipped)
        same(state_dict.to_params(made.spec, weights.read_tensors(epath.Path(tmp_path / f"{wrap}.pt"))), wanted)


@pytest.mark.parametrize("fault", ["missing", "left over", "of another shape"])
def test_one_key_missing_one_too_many_and_one_of_another_shape_are_named(family, fault, tmp_path, capsys):
    name, made, folder = family
    tensors = dict(made.tensors)
    bias = next(key for key in tensors if key.endswith("bias") and not key.startswith(("fusion", "ln_final")))
    if fault == "missing":
        del tensors[bias]
        wanted = f"missing {bias}"
    elif fault == "left over":
        tensors["visual.stranger" if "visual.proj" in tensors else "stranger.weight"] = torch.ones(2)
        wanted = "left over visual.stranger" if "visual.proj" in tensors else "left over stranger.weight"
    else:
        tensors[bias] = torch.ones(len(tensors[bias]) + 1)
        wanted = f"{bias} is ({len(tensors[bias])},), not ({len(tensors[bias]) - 1},)"
    shutil.copytree(folder, tmp_path / "in")
    (tmp_path / "in" / "w.safetensors").unlink()
    torch.save(tensors, tmp_path / "in" / "w.bin")
    arguments = ["--weights", str(tmp_path / "in" / "w.bin"), "--out", str(tmp_path / "out")]
    assert main(["teachers", "convert", published.record(name), *arguments]) == 2
    message = capsys.readouterr().err
    assert wanted in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.fixture(scope="module")
def pmc(tmp_path_factory):
    """PMC-CLIP in one file and in its three, each with its vocabulary."""
    made = published.make("pmc_clip_pooler")
    root = tmp_path_factory.mktemp("pmc")
    published.write(root / "whole", made)
    shutil.copytree(root / "whole", root / "three")
    (root / "three" / "w.safetensors").unlink()
    for name, prefix in weights.DIVIDED.items():
        own = {k.removeprefix(prefix): v for k, v in made.tensors.items() if k.startswith(prefix)}
        torch.save(own, root / "three" / name)
    matrix = torch.nn.Parameter(made.tensors["text_projection"])
    torch.save(matrix, root / "three" / weights.MATRIX)
    return root


def test_three_files_are_one_model(pmc):
    record = published.record("pmc_clip_pooler")
    whole, three = teachers.load(record, pmc / "whole"), teachers.load(record, pmc / "three")
    assert float(three.params["logit_scale"]) == pytest.approx(4.4292)
    same({**three.params, "logit_scale": 0}, {**whole.params, "logit_scale": 0})
    named = teachers.load(record, pmc / "three" / "image_encoder(resnet50).pth")
    same(named.params, three.params)
    assert named.weights_hash == three.weights_hash


@pytest.mark.parametrize("name", [*weights.DIVIDED, weights.MATRIX])
def test_each_of_the_three_counts(pmc, name, tmp_path):
    record = published.record("pmc_clip_pooler")
    before = teachers.load(record, pmc / "three")
    changed = shutil.copytree(pmc / "three", tmp_path / "three")
    value = torch.load(changed / name)
    parts = value.values() if isinstance(value, dict) else [value.data]
    for part in parts:
        if part.is_floating_point():
            part += 0.5
    torch.save(value, changed / name)
    after = teachers.load(record, changed)
    assert after.weights_hash != before.weights_hash
    alike = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), before.params, after.params)
    assert not all(jax.tree.leaves(alike))
    (changed / name).unlink()
    with pytest.raises(InputError) as caught:
        teachers.load(record, changed)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_full_training_checkpoint_says_what_it_leaves_out(caplog):
    made = published.make("pmc_clip")
    with caplog.at_level("INFO", "mmkd_jax.models.state_dict"):
        state_dict.to_params(made.spec, {key: value.numpy() for key, value in made.tensors.items()})
    assert "left out what no feature uses: fusion_module.layers.0.weight, ln_final.bias, mlm_projection" in caplog.text
