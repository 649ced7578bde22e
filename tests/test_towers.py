"""Starting weights of one tower, from files as torch, timm and transformers write them."""

import dataclasses

import model_references as reference
import numpy as np
import pytest
from safetensors.torch import save_file

from mmkd_jax.errors import InputError
from mmkd_jax.models import state_dict, towers
from mmkd_jax.train.checksums import path_of

torch = reference.torch
NO_PROJECTION = ("/projection/",)


def flat(params):
    import jax

    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def assert_tower(found, expected, without=""):
    mine, theirs = flat(found), flat(expected)
    assert mine.keys() == {name for name in theirs if not without or without not in name}
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
        assert mine[name].dtype == np.float32


def test_a_clip_gives_each_tower(tmp_path):
    """OpenAI's, MetaCLIP's and open_clip's names, as a torch file."""
    spec = reference.clip_spec()
    model = reference.open_clip_clip(spec)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "wrapped.pt")
    expected = state_dict.to_params(spec, reference.tensors(model))
    for name in ("clip.pt", "wrapped.pt"):
        for tower in ("image", "text"):
            assert_tower(towers.read(tmp_path / name, spec, tower), expected[tower])
    visual = {k.removeprefix("visual."): v for k, v in model.state_dict().items() if k.startswith("visual.")}
    torch.save(visual, tmp_path / "visual.pt")
    assert_tower(towers.read(tmp_path / "visual.pt", spec, "image"), expected["image"])


def test_the_image_tower_of_a_clip_beside_a_bert(tmp_path):
    """The start of MMKD-CLIP's student: MetaCLIP's pictures and another text tower."""
    clip = reference.clip_spec("quick_gelu")
    model = reference.open_clip_clip(clip)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    expected = state_dict.to_params(clip, reference.tensors(model))
    assert_tower(towers.read(tmp_path / "clip.pt", reference.bert_spec(), "image"), expected["image"])
    with pytest.raises(InputError, match="no bert text tower"):
        towers.read(tmp_path / "clip.pt", reference.bert_spec(), "text", fresh=(".*",))


def test_hugging_faces_clip(tmp_path):
    spec = reference.clip_spec("quick_gelu")
    model = reference.transformers_clip(spec)
    (tmp_path / "folder").mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "folder" / "model.safetensors")
    expected = state_dict.to_params(spec, reference.tensors(model))
    for tower in ("image", "text"):
        assert_tower(towers.read(tmp_path / "folder", spec, tower), expected[tower])


def test_a_bare_timm_vit(tmp_path):
    spec = reference.timm_spec()
    model = reference.CustomText(spec)
    trunk = dict(model.visual.trunk.state_dict()) | {"head.weight": torch.ones(10, 192), "head.bias": torch.ones(10)}
    torch.save(trunk, tmp_path / "vit.bin")
    expected = state_dict.to_params(spec, reference.tensors(model))["image"]
    assert_tower(towers.read(tmp_path / "vit.bin", spec, "image", fresh=NO_PROJECTION), expected, "projection")
    with pytest.raises(InputError, match=r"visual\.head\.proj\.weight is missing"):
        towers.read(tmp_path / "vit.bin", spec, "image")


def test_a_resnet_of_openai_and_of_medclip(tmp_path):
    import test_resnet

    for kind in ("modified_resnet", "resnet"):
        tower = test_resnet.small(kind)
        spec, prefix = test_resnet.spec_of(tower), test_resnet.HEADS[kind]
        tensors = {prefix + key: value for key, value in test_resnet.reference(tower).state_dict().items()}
        torch.save({**tensors, "logit_scale": torch.ones(())}, tmp_path / f"{kind}.pt")
        expected = test_resnet.published(spec, test_resnet.reference(tower))
        expected = state_dict.to_params(spec, expected)["image"]
        assert_tower(towers.read(tmp_path / f"{kind}.pt", spec, "image"), expected)
        deeper = dataclasses.replace(tower, stages=(2, 1, 2, 1))
        with pytest.raises(InputError, match=r"layer3\.2\.\S+ is left over"):
            towers.read(tmp_path / f"{kind}.pt", dataclasses.replace(spec, image=deeper), "image")
    spec = test_resnet.spec_of(test_resnet.small("modified_resnet"))
    whole = tmp_path / "modified_resnet.pt"
    bare = {key.removeprefix("visual."): value for key, value in torch.load(whole).items() if key != "logit_scale"}
    torch.save(bare, tmp_path / "bare.pt")
    assert_tower(towers.read(tmp_path / "bare.pt", spec, "image"), towers.read(whole, spec, "image"))


@pytest.mark.parametrize("prefix", ["vision_model.model.", "swin.", ""])
def test_a_swin_of_medclip_and_of_transformers(tmp_path, prefix):
    import test_swin

    spec = test_swin.spec_of(test_swin.SMALL)
    model = test_swin.MedClipVision(test_swin.SMALL)
    expected = state_dict.to_params(spec, test_swin.published(spec, model))["image"]
    tensors = {prefix + key.removeprefix("model."): value for key, value in model.state_dict().items()}
    head = tensors.pop(f"{prefix}projection_head.weight")
    tensors |= {"classifier.weight": torch.ones(3, 48)}
    without = "projection" if prefix != "vision_model.model." else ""
    if not without:
        tensors["vision_model.projection_head.weight"] = head
    torch.save(tensors, tmp_path / "swin.pt")
    assert_tower(towers.read(tmp_path / "swin.pt", spec, "image", fresh=NO_PROJECTION), expected, without)
    if without:
        with pytest.raises(InputError, match=r"vision_model\.projection_head\.weight is missing"):
            towers.read(tmp_path / "swin.pt", spec, "image")


def test_a_tower_without_starting_weights_is_one_line(tmp_path, monkeypatch):
    spec = reference.clip_spec()
    torch.save(reference.open_clip_clip(spec).state_dict(), tmp_path / "clip.pt")
    monkeypatch.delitem(towers.PREFIXES, "openai")
    with pytest.raises(InputError, match=r"openai image towers have no starting weights .*--config\.init") as caught:
        towers.read(tmp_path / "clip.pt", spec, "image")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["bare", "masked", "old"])
def test_a_bert_with_and_without_its_heads(tmp_path, form):
    from transformers import BertForMaskedLM

    spec = reference.bert_spec()
    model = reference.CustomText(spec)
    whole = BertForMaskedLM(model.text.transformer.config)
    whole.bert.load_state_dict(model.text.transformer.state_dict())
    if form == "bare":
        weights = whole.bert.state_dict() | {"pooler.dense.weight": torch.ones(40, 40)}
    else:
        weights = whole.state_dict()
    assert (form == "bare") != any(key.startswith("cls.") for key in weights)
    if form == "old":
        for old, new in towers.OLD_NORMS.items():
            weights = {key.replace(new, old): value for key, value in weights.items()}
        assert any(key.endswith("LayerNorm.gamma") for key in weights)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    expected = state_dict.to_params(spec, reference.tensors(model))["text"]
    found = towers.read(tmp_path / "pytorch_model.bin", spec, "text", fresh=NO_PROJECTION)
    assert_tower(found, expected, "projection")


def test_what_does_not_fit_is_named(tmp_path):
    spec = reference.clip_spec()
    model = reference.open_clip_clip(spec)
    torch.save(model.state_dict(), tmp_path / "clip.pt")

    def refused(says, path="clip.pt", **image):
        other = dataclasses.replace(spec, image=dataclasses.replace(spec.image, **image))
        with pytest.raises(InputError, match=says) as caught:
            towers.read(tmp_path / path, other, "image", fresh=NO_PROJECTION)
        assert "\n" not in str(caught.value)

    refused(r"visual\.transformer\.resblocks\.2\.attn\.in_proj_bias is left over", layers=2)
    refused(r"visual\.transformer\.resblocks\.3\.ln_1\.weight is missing", layers=4)
    refused(r"mlp\.c_fc\.weight is \(160, 64\), not \(128, 64\)", mlp_width=128)
    refused("no timm image tower", layout="timm", patch_bias=True, pre_norm=False)
    refused("does not exist", path="nothing.pt")
    # square matrices of the right size in the wrong order would pass a check of sizes
    weights = dict(model.state_dict())
    key = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    weights[key] = weights[key].T.contiguous()
    torch.save(weights, tmp_path / "turned.pt")
    refused(r"c_fc\.weight is \(64, 160\), not \(160, 64\)", path="turned.pt")
