"""open_clip loads what we export and computes the same features, wherever the folder lies; nothing is half-written."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

import teachers
from mmkd_jax import export, io, licences, preprocess, tokenizers
from mmkd_jax.cli import main
from mmkd_jax.errors import InputError
from mmkd_jax.models import folders, state_dict
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, ResNetTower, TextTower, TokenizerSpec
from mmkd_jax.train import checkpoint

CAPTIONS = [
    "Axial CT shows a 3.5 cm mass in the right lung, with spiculated margins!",
    "Chest X-ray: no pneumothorax; the heart isn't enlarged.",
    "a very long caption " * 20,
    "HELLO !!! Ångström &amp; é",
]
IMAGE = ImageTower(64, 2, 4, 8, 32, 128, "quick_gelu")


def bert_spec(**changes) -> ModelSpec:
    text = TextTower(width=40, layers=2, heads=5, mlp_width=72, vocab_size=120, positions=32, context=16)
    values = {"image": IMAGE, "text": text, "embed": 48, "preprocess": Preprocess(32), "name": "small bert"}
    return ModelSpec(**{**values, **changes})


def clip_spec(**image) -> ModelSpec:
    text = TextTower("clip", 40, 2, 5, 120, 600, 16, 16, "quick_gelu", 1e-5, "linear", 0.0)
    tower = dataclasses.replace(IMAGE, **image)
    return bert_spec(image=tower, text=text, tokenizer=TokenizerSpec("bpe"), name="small clip", license="mit")


def timm_spec() -> ModelSpec:
    tower = ImageTower(192, 12, 3, 16, 224, 768, "gelu", 1e-6, False, True, "timm")
    return bert_spec(image=tower, preprocess=Preprocess(224))


def resnet_spec() -> ModelSpec:
    tower = ResNetTower("modified_resnet", 12, (2, 1, 1, 1), 8, 64)
    return dataclasses.replace(clip_spec(), image=tower, preprocess=Preprocess(64), name="small resnet")


def resnet_bert_spec() -> ModelSpec:
    return bert_spec(image=resnet_spec().image, preprocess=Preprocess(64))


SPECS = {
    "bert": bert_spec,
    "clip": clip_spec,
    "timm": timm_spec,
    "resnet": resnet_spec,
    "resnet bert": resnet_bert_spec,
}


def model(spec: ModelSpec):
    """Parameters with nothing zero or one, and a tokenizer learned from the captions."""
    params = DualEncoder(spec).init(jax.random.key(0))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32), params)
    return params, tokenizers.train(
        spec.tokenizer, CAPTIONS, vocab_size=spec.text.vocab_size, context=spec.text.context
    )


def relative(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def parity(spec, params, tokenizer, theirs, their_tokenizer):
    """Relative errors of image features, of text features on our tokens, and on their tokenizer's."""
    import torch

    size = spec.image.image_size
    images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    encoder, batch = DualEncoder(spec), tokenizer(CAPTIONS)
    with torch.no_grad():
        image = theirs.encode_image(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        text = theirs.encode_text(torch.from_numpy(batch.ids.astype(np.int64))).numpy()
        own = theirs.encode_text(their_tokenizer(CAPTIONS)).numpy()
    features = jax.jit(encoder.encode_text)(params, batch)
    return (
        relative(jax.jit(encoder.encode_image)(params, images), image),
        relative(features, text),
        relative(features, own),
    )


@pytest.fixture(scope="module")
def open_clip():
    pytest.importorskip("torch", reason="open_clip needs torch")
    import torchvision_stub

    torchvision_stub.install()
    pytest.importorskip("timm", reason="timm is not installed")
    return pytest.importorskip("open_clip", reason="open_clip is not installed")


@pytest.mark.parametrize("kind", SPECS)
def test_open_clip_computes_the_same(open_clip, kind, tmp_path):
    spec = SPECS[kind]()
    params, tokenizer = model(spec)
    out = export.export_model(spec, {**params, "heads": {}}, tokenizer, tmp_path / "out")
    theirs = open_clip.create_model(f"local-dir:{out}", require_pretrained=True).eval()
    errors = parity(spec, params, tokenizer, theirs, open_clip.get_tokenizer(f"local-dir:{out}"))
    assert max(errors) <= 2e-5
    assert theirs.logit_scale.item() == pytest.approx(float(params["logit_scale"]))
    assert tuple(theirs.visual.preprocess_cfg["mean"]) == spec.preprocess.mean


def test_the_cards_way_to_load_a_moved_folder_works(open_clip, tmp_path):
    spec = bert_spec()
    params, tokenizer = model(spec)
    (tmp_path / "elsewhere").mkdir()
    out = export.export_model(spec, params, tokenizer, tmp_path / "out").rename(tmp_path / "elsewhere" / "model")
    snippets = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(snippets[-1].replace("THE_FOLDER", str(out)), names)
    assert max(parity(spec, params, tokenizer, names["model"].eval(), names["tokenizer"])) <= 2e-5


def test_the_names_of_unimed_clip_load_strictly(tmp_path):
    """In the two towers that its code is made of, under the names that it gives them."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    import model_references as ref
    import transformers

    spec = bert_spec()
    params, tokenizer = model(spec)
    out = export.export_model(spec, params, tokenizer, tmp_path / "out", form="unimed")
    theirs = ref.CustomText(spec)
    theirs.text_encoder = theirs.text
    del theirs.text
    theirs.load_state_dict(torch.load(out / "unimed_clip.pt", weights_only=True), strict=True)
    # Their code begins with BERT from the folder, before it reads the file.
    bert, found = transformers.AutoModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert not any(found.values())
    for key, value in bert.state_dict().items():
        torch.testing.assert_close(value, theirs.text_encoder.transformer.state_dict()[key], rtol=0, atol=0)
    theirs.text = theirs.text_encoder
    ids = tokenizer(CAPTIONS).ids
    assert max(parity(spec, params, tokenizer, theirs, lambda _: torch.from_numpy(ids.astype(np.int64)))) <= 2e-5


def test_transformers_computes_the_same(tmp_path):
    """By the card's own words: model, processor and tokenizer."""
    torch = pytest.importorskip("torch", reason="transformers' CLIPModel needs torch")
    plain = TokenizerSpec("bpe", repair=False)
    spec = dataclasses.replace(clip_spec(), tokenizer=plain, preprocess=Preprocess(32, mean=(0.4,) * 3, rgb_first=True))
    params, tokenizer = model(spec)
    out = export.export_model(spec, params, tokenizer, tmp_path / "out", form="hf")
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 41, 3), np.uint8)).quantize(9)
    pixels = names["processor"](picture, return_tensors="pt")["pixel_values"]
    tokens = names["tokenizer"](CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    clip, encoder, p = names["model"].eval(), DualEncoder(spec), spec.preprocess
    with torch.no_grad():
        image = clip.visual_projection(clip.vision_model(pixels).pooler_output).numpy()
        text = clip.text_projection(clip.text_model(**tokens).pooler_output).numpy()
    ours = preprocess.normalise(preprocess.eval_image(picture, p), p)[None]
    np.testing.assert_allclose(pixels.numpy().transpose(0, 2, 3, 1), ours, atol=2e-6)
    assert relative(jax.jit(encoder.encode_image)(params, ours), image) <= 2e-5
    assert relative(jax.jit(encoder.encode_text)(params, tokenizer(CAPTIONS)), text) <= 2e-5
    assert clip.logit_scale.item() == pytest.approx(float(params["logit_scale"]))
    # A model whose texts were mended has other tokens where there is something to mend, and its card says so.
    mended = dataclasses.replace(spec, tokenizer=TokenizerSpec("bpe"))
    learned = tokenizers.from_files(mended.tokenizer, tokenizer.files(), context=16, vocab_size=600)
    wrong = relative(jax.jit(encoder.encode_text)(params, learned(CAPTIONS)), text)
    assert wrong > 1e-3
    card = export.export_model(mended, params, learned, tmp_path / "mended", form="hf") / "README.md"
    assert "ftfy" in card.read_text()
    assert "ftfy" not in (out / "README.md").read_text()


def test_a_checkpoints_card_has_every_part(tmp_path):
    spec = clip_spec()
    params, tokenizer = model(spec)
    terms = {"teachers": {"first": "mit", "second": "cc-by-nc-4.0"}, "data": {"CC BY 4.0": 3}}
    meta = checkpoint.describe(
        spec, tokenizer.files(), {"loss": {"icl": 1}, "model": {}}, {"set": "pairs-hash", "licences": terms}
    )
    writer = checkpoint.Checkpoints(tmp_path / "run")
    writer.save(0, {"params": params}, meta)
    writer.close()
    rows = [{"model": "small", "dataset": "busi", "task": "zeroshot", "metric": "auc", "value": 0.71234, "n": 139}]
    out = export.export_checkpoint(
        tmp_path / "run", tmp_path / "out", results=rows, use="commercial", accept_licences=True
    )
    card = (out / "README.md").read_text()
    parts = dict(re.findall(r"^## (.+?)\n\n(.*?)(?=\n\n## |\Z)", card, re.DOTALL | re.MULTILINE))
    assert set(parts) == {"Use", "Intended use", "Data", "Teachers", "Recipe", "Results"}
    assert "local-dir:" in parts["Use"]
    assert "not a medical device" in parts["Intended use"]
    assert "Meant for commercial use." in parts["Intended use"]
    assert "Exported although teacher second (cc-by-nc-4.0) forbids commercial use" in parts["Intended use"]
    assert "pairs-hash" in parts["Data"]
    assert "CC BY 4.0" in parts["Data"]
    assert "| first | mit |" in parts["Teachers"]
    assert '- loss: `{"icl": 1}`' in parts["Recipe"]
    assert "| small | busi | zeroshot | auc | 0.7123 |" in parts["Results"]


FORMS = [
    ("open_clip", "bert"),
    ("open_clip", "clip"),
    ("open_clip", "timm"),
    ("open_clip", "resnet"),
    ("hf", "clip"),
    ("unimed", "bert"),
]


@pytest.mark.parametrize(("form", "kind"), FORMS)
def test_there_and_back_is_exact(form, kind, tmp_path):
    spec = SPECS[kind]()
    params, tokenizer = model(spec)
    out = export.export_model(spec, params, tokenizer, tmp_path / "out", form=form)
    back = teachers.load(spec.name, out)
    assert back.spec == spec
    jax.tree.map(np.testing.assert_array_equal, back.params, params)


def test_what_a_form_has_not_is_refused(tmp_path):
    def refused(match, spec, form):
        params, tokenizer = model(spec)
        with pytest.raises(InputError, match=match):
            export.export_model(spec, params, tokenizer, tmp_path / "out", form=form)
        assert not list(tmp_path.iterdir())

    refused("no common form for BERT as the text tower", bert_spec(), "hf")
    refused("the unimed layout has no clip tower", clip_spec(), "unimed")
    square = dataclasses.replace(clip_spec(), preprocess=Preprocess(32, frame="square"))
    refused("no common form for pictures on black squares", square, "hf")


LICENCES = {
    "mit": (True, True),
    "Apache-2.0": (True, True),
    "CC BY 4.0": (True, True),
    "cc-by-nc-4.0": (True, False),
    "CC BY-NC-SA 4.0": (True, False),
    "research only": (True, False),
    "unknown": (True, False),
    "not stated": (True, False),
    "cc-by-nd-4.0": (False, False),
    "CC BY-NC-ND 4.0": (False, False),
    "no derivatives": (False, False),
}


@pytest.mark.parametrize("licence", LICENCES)
def test_what_licences_forbid(licence):
    allowed = tuple(not licences.conflicts({"teacher x": licence}, use) for use in licences.USES)
    assert allowed == LICENCES[licence]


def test_an_export_that_licences_forbid_needs_to_be_told(tmp_path, capsys):
    spec = dataclasses.replace(clip_spec(), license="unknown")
    params, tokenizer = model(spec)
    terms = {"teachers": {"first": "mit", "second": "cc-by-nc-4.0"}, "data": {"CC BY-ND 4.0": 3}}
    for name, changed in {"nd": terms, "nc": {**terms, "data": {"CC0-1.0": 3}}}.items():
        writer = checkpoint.Checkpoints(tmp_path / name)
        writer.save(0, {"params": params}, checkpoint.describe(spec, tokenizer.files(), {}, {"licences": changed}))
        writer.close()

    def run(name, *more):
        arguments = ["export", "--checkpoint", str(tmp_path / name), "--out", str(tmp_path / "out"), *more]
        return main(arguments), capsys.readouterr().err

    assert run("nd") == (
        2,
        "mmkd export: data under CC BY-ND 4.0 (CC BY-ND 4.0) forbids derivatives; export with "
        "--accept-licences if you have another permission\n",
    )
    code, message = run("nc", "--use", "commercial", "--format", "hf")
    assert code == 2
    assert "teacher second (cc-by-nc-4.0) forbids commercial use;" in message
    assert not (tmp_path / "out").exists()
    assert run("nc", "--format", "hf")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| second | cc-by-nc-4.0 |" in card
    assert "CC0-1.0" in card
    assert "Meant for research use." in card
    (tmp_path / "out").rename(tmp_path / "first")
    assert run("nd", "--accept-licences")[0] == 0
    assert "Exported although data under CC BY-ND 4.0" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", SPECS)
def test_the_config_alone_describes_the_model(kind, tmp_path):
    spec = SPECS[kind]()
    params, tokenizer = model(spec)
    out = export.export_model(spec, params, tokenizer, tmp_path / "out")
    exact, tensors, file = folders.load_folder(io.as_path(out), "same")
    assert exact == dataclasses.replace(spec, name="same")
    assert file.name == "open_clip_model.safetensors"
    (out / "mmkd_spec.json").unlink()
    read, _, _ = folders.load_folder(io.as_path(out), spec.name)
    assert read == dataclasses.replace(spec, license="unknown")
    jax.tree.map(np.testing.assert_array_equal, state_dict.to_params(read, tensors), params)


def test_the_card_tells_data_teachers_recipe_and_results(tmp_path):
    spec = clip_spec()
    params, tokenizer = model(spec)
    card = {
        "data": "Two sets.",
        "teachers": [{"name": "first", "license": "mit"}, {"name": "second", "license": "cc-by-nc-4.0"}],
        "recipe": {"lr": 1e-3, "loss": {"icl": 1}},
        "results": [{"dataset": "busi", "value": 0.71234}],
    }
    text = (export.export_model(spec, params, tokenizer, tmp_path / "out", card=card) / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n")
    assert "| second | cc-by-nc-4.0 |" in text
    assert '- loss: `{"icl": 1}`' in text
    assert "| busi | 0.7123 |" in text
    assert "Two sets." in text


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    spec = clip_spec()
    params, tokenizer = model(spec)

    def refused(match, **changes):
        values = {"spec": spec, "params": params, "tokenizer": tokenizer, "out": tmp_path / "new"} | changes
        with pytest.raises(InputError, match=match):
            export.export_model(**values)
        assert not (tmp_path / "new").exists()
        assert not list(tmp_path.glob(".*"))

    (tmp_path / "there").mkdir()
    refused("exists; choose another folder", out=tmp_path / "there")
    refused("no part \\['recipes'\\]", card={"recipes": ""})
    refused("600 tokens, small bert has 120", spec=bert_spec())
    biased = clip_spec(patch_bias=True)
    refused("no common form for a patch bias without timm", spec=biased)
    refused("two activations", spec=clip_spec(activation="gelu"))
    monkeypatch.setattr(export.model_card, "text", lambda *args: (_ for _ in ()).throw(InputError("disk full")))
    refused("disk full")


def test_a_config_for_something_else_is_refused(tmp_path):
    spec = clip_spec()
    params, tokenizer = model(spec)
    out = export.export_model(spec, params, tokenizer, tmp_path / "out")
    (out / "mmkd_spec.json").unlink()
    config = json.loads((out / "open_clip_config.json").read_text())

    def refused(match, part, **changes):
        changed = json.loads(json.dumps(config))
        changed["model_cfg"][part].update(changes)
        (out / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=match):
            folders.load_folder(io.as_path(out), "x")

    refused("a ResNet of 3 stages", "vision_cfg", layers=[3, 4, 6])
    refused("vision_cfg.ls_init_value = 0.1 is not supported", "vision_cfg", ls_init_value=0.1)
    refused("text_cfg.no_causal_mask = True is not supported", "text_cfg", no_causal_mask=True)
    refused("did you mean 'vit_base_patch16_224'", "vision_cfg", timm_model_name="vit_base_patch16_244")
    refused("BERT 'roberta-base' is not known here", "text_cfg", hf_model_name="roberta-base")
    (out / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match="does not describe a model"):
        folders.load_folder(io.as_path(out), "x")


def test_the_names_before_open_clip_2_are_read(tmp_path):
    spec = timm_spec()
    params, tokenizer = model(spec)
    out = export.export_model(spec, params, tokenizer, tmp_path / "out")
    (out / "mmkd_spec.json").unlink()
    config = json.loads((out / "open_clip_config.json").read_text())
    text = config["model_cfg"]["text_cfg"]
    text["proj"], text["pooler_type"] = text.pop("hf_proj_type"), text.pop("hf_pooler_type")
    (out / "open_clip_config.json").write_text(json.dumps(config))
    assert folders.load_folder(io.as_path(out), spec.name)[0] == spec
    text["pooler_type"] = "mean_pooler"
    (out / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="pooling 'mean_pooler'"):
        folders.load_folder(io.as_path(out), spec.name)
