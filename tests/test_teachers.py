"""Teachers from folders, weight files and checkpoints: the same features, identities that tell them apart, refusals."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import mmkd_jax
import teachers
from mmkd_jax import export, preprocess, tokenizers
from mmkd_jax.cli import main
from mmkd_jax.errors import InputError
from mmkd_jax.models import pickles, state_dict
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower
from mmkd_jax.train import checkpoint
from teachers import specs

CAPTIONS = ["Chest X-ray: no pneumothorax", "a lung", "the heart isn't enlarged, the lung is", "H&E of a carcinoma"]
SPEC = ModelSpec(
    name="small",
    image=ImageTower(16, 2, 2, 8, 16, 24),
    text=TextTower(width=16, layers=2, heads=2, mlp_width=24, vocab_size=60, positions=12, context=8),
    embed=8,
    preprocess=Preprocess(16),
    license="mit",
)
FACTS = specs.Facts(SPEC, weights="a file", facts=(specs.known("all of it", "this test"),))
NOT_FACTS = SPEC
BARE = f"{__name__}.FACTS"


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, DualEncoder(SPEC).init(jax.random.key(0)))


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(SPEC.tokenizer, CAPTIONS, vocab_size=60, context=8)


@pytest.fixture(scope="module")
def folder(params, tokenizer, tmp_path_factory):
    return export.export_model(SPEC, params, tokenizer, tmp_path_factory.mktemp("teacher") / "open_clip")


def bare(folder, tensors, tokenizer):
    """A weights file with its vocabulary beside it."""
    for name, data in tokenizer.files().items():
        (folder / name).write_bytes(data)
    save_file({name: np.array(tensor, order="C") for name, tensor in tensors.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def pictures(n=3):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 31, 3), np.uint8)) for i in range(n)]


def test_a_folder_gives_the_towers_features(folder, params, tokenizer):
    teacher = teachers.load("first", folder)
    images = np.stack([teacher.preprocess(image) for image in pictures()])
    assert images.dtype == np.float32
    wanted = [preprocess.normalise(preprocess.eval_image(p, SPEC.preprocess), SPEC.preprocess) for p in pictures()]
    np.testing.assert_array_equal(images, np.stack(wanted))
    encoder = DualEncoder(SPEC)
    features = teacher.encode_image(images)
    assert isinstance(features, np.ndarray)
    np.testing.assert_allclose(features, jax.jit(encoder.encode_image)(params, images), atol=1e-6)
    text = teacher.tokenize(CAPTIONS)
    np.testing.assert_array_equal(text.ids, tokenizer(CAPTIONS).ids)
    np.testing.assert_allclose(teacher.encode_text(text), jax.jit(encoder.encode_text)(params, text), atol=1e-6)
    assert teacher.encode_image(images, projected=False).shape == (3, 16)
    assert (teacher.name, teacher.spec.name, teacher.spec.license) == ("first", "first", "mit")
    assert teacher.logit_scale == pytest.approx(1 / 0.07)


def test_a_feature_is_the_same_to_the_bit_whatever_is_beside_it(folder):
    teacher = teachers.load("first", folder, micro_batch=4)
    images = np.stack([teacher.preprocess(image) for image in pictures(9)])
    together = teacher.encode_image(images)
    for start in range(9):
        np.testing.assert_array_equal(teacher.encode_image(images[start : start + 2]), together[start : start + 2])
    text = teacher.encode_text(teacher.tokenize(CAPTIONS * 2))
    np.testing.assert_array_equal(text[:4], text[4:])


def test_a_weights_file_takes_its_spec_from_a_record(params, tokenizer, tmp_path, folder):
    tensors = state_dict.from_params(SPEC, params)
    dressed = {f"module.{k.replace('text.', 'text_encoder.', 1)}": v.astype(np.float16) for k, v in tensors.items()}
    dressed["module.text_encoder.transformer.embeddings.position_ids"] = np.arange(12)[None]
    teacher = teachers.load(BARE, bare(tmp_path, dressed, tokenizer))
    text = teacher.tokenize(CAPTIONS)
    wanted = teachers.load("first", folder).encode_text(text)
    assert np.abs(teacher.encode_text(text) - wanted).max() < 2e-3 * np.abs(wanted).max()
    pickles.write(tmp_path / "weights.pt", dressed)
    pickled = teachers.load(BARE, tmp_path / "weights.pt")
    jax.tree.map(np.testing.assert_array_equal, pickled.params, teacher.params)


def test_bfloat16_files_are_read(params, tokenizer, tmp_path):
    torch = pytest.importorskip("torch", reason="writes the file")
    from safetensors.torch import save_file as save

    bare(tmp_path, {"x": np.zeros(1)}, tokenizer)
    tensors = state_dict.from_params(SPEC, params)
    tensors = {name: torch.from_numpy(np.array(tensor, order="C")).bfloat16() for name, tensor in tensors.items()}
    save(tensors, tmp_path / "weights.safetensors")
    read = teachers.load(BARE, tmp_path / "weights.safetensors").params
    kernel = read["text"]["tokens"]["embedding"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors["text.transformer.embeddings.word_embeddings.weight"].float().numpy())


def test_a_checkpoint_of_ours_is_a_teacher(params, tokenizer, tmp_path, folder):
    writer = checkpoint.Checkpoints(tmp_path)
    writer.save(0, {"params": params}, checkpoint.describe(SPEC, tokenizer.files(), {}, {}))
    writer.close()
    own, published = teachers.load("own", tmp_path), teachers.load("first", folder)
    assert own.spec == dataclasses.replace(SPEC, name="own")
    text = own.tokenize(CAPTIONS)
    np.testing.assert_array_equal(own.encode_text(text), published.encode_text(text))
    assert own.preprocess_hash == published.preprocess_hash
    assert own.weights_hash == teachers.load("again", tmp_path).weights_hash


def test_identities_change_with_what_they_identify(folder, params, tokenizer, tmp_path):
    first = teachers.load("first", folder)
    other = {**params, "logit_scale": params["logit_scale"] + 1}
    weights = teachers.load("x", export.export_model(SPEC, other, tokenizer, tmp_path / "weights"))
    assert weights.weights_hash != first.weights_hash
    assert weights.preprocess_hash == first.preprocess_hash
    spec = dataclasses.replace(SPEC, preprocess=Preprocess(16, mean=(0.5, 0.5, 0.5)))
    pictures_changed = teachers.load("x", export.export_model(spec, params, tokenizer, tmp_path / "mean"))
    assert pictures_changed.preprocess_hash != first.preprocess_hash
    swapped = tokenizers.train(SPEC.tokenizer, [c.upper()[::-1] for c in CAPTIONS], vocab_size=60, context=8)
    texts_changed = teachers.load("x", export.export_model(SPEC, params, swapped, tmp_path / "texts"))
    assert texts_changed.preprocess_hash != first.preprocess_hash


def test_a_teacher_can_be_evaluated_like_a_student(folder):
    encoder = teachers.as_encoder(teachers.load("first", folder))
    assert (encoder.name, encoder.spec.embed) == ("teacher:first", 8)
    assert encoder.checkpoint.endswith("open_clip_model.safetensors")
    assert encoder.logit_scale == pytest.approx(1 / 0.07)
    assert encoder.encode_image(pictures()).shape == (3, 8)
    assert encoder.encode_image(pictures(), projected=False).shape == (3, 16)
    assert encoder.encode_text(CAPTIONS).shape == (4, 8)
    assert teachers.as_encoder(teachers.load("first", folder), "teacher:other").name == "teacher:other"


def test_unusable_weights_are_refused_in_one_line(folder, params, tokenizer, tmp_path):
    def refused(match, name, weights, **options):
        with pytest.raises(InputError, match=match) as caught:
            teachers.load(name, weights, **options)
        assert "\n" not in str(caught.value)

    refused("does not exist", "first", tmp_path / "no")
    refused("backend 'onnx' is not one of flax, torch", "first", folder, backend="onnx")
    (tmp_path / "weights.bin").write_bytes(b"\x80")
    refused("not a readable file of torch", BARE, tmp_path / "weights.bin")
    refused("not a readable file of torch", BARE, tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused("asks to run os.system, which has no place in weights", BARE, tmp_path)
    (tmp_path / "other.pt").write_bytes(b"")
    refused(r"several weights files \(other.pt, weights.bin\); name the one", BARE, tmp_path)
    (tmp_path / "other.pt").unlink()
    (tmp_path / "weights.onnx").write_bytes(b"")
    refused("ends in '.onnx'; weights are read from .safetensors, .bin", BARE, tmp_path / "weights.onnx")
    file = bare(tmp_path, state_dict.from_params(SPEC, params), tokenizer)
    refused("did you mean 'BiomedCLIP'", "BiomedCLIPP", file)
    refused("not teachers.specs.Facts", f"{__name__}.NOT_FACTS", file)
    refused("these are not the weights of PubMedCLIP: missing", "PubMedCLIP", file)
    (tmp_path / "tokenizer.json").unlink()
    refused("holds no vocabulary", BARE, file)
    file.write_bytes(file.read_bytes()[:-100])
    refused("not a readable safetensors file", BARE, file)
    (tmp_path / "run").mkdir()
    refused("holds no checkpoint", "own", tmp_path / "run")


def test_a_folder_without_its_license_gets_the_records(folder, params, tokenizer, tmp_path):
    spec = dataclasses.replace(SPEC, license="unknown")
    out = export.export_model(spec, params, tokenizer, tmp_path / "out")
    teacher = teachers.load("UniMed-CLIP", out)
    assert teacher.spec.license == "cc-by-nc-4.0"
    assert teacher.spec.image == SPEC.image
    assert teachers.load("mine", out).spec.license == "unknown"


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("BiomedCLIP", 195_902_721, 351),
        ("QuiltNet-B-16-PMB", 195_902_721, 351),
        ("BMC-CLIP", 427_616_513, 446),
        ("QuiltNet-B-32", 151_277_313, 302),
        ("PLIP", 151_277_313, 302),
        ("PubMedCLIP", 151_277_313, 302),
        ("QuiltNet-B-16", 149_620_737, 302),
        ("UniMed-CLIP", 195_903_489, None),
    ],
)
def test_records_have_the_published_sizes(name, parameters, tensors):
    facts = specs.find(name)
    shapes = DualEncoder(facts.spec).shapes()
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == parameters
    empty = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    if tensors:
        assert len(state_dict.from_params(facts.spec, empty)) == tensors
    assert facts.spec.name == name
    assert facts.spec.source.startswith("https://")
    assert facts.verified


def test_conversion_gives_a_checkpoint_that_needs_nothing_else(params, tokenizer, tmp_path, capsys):
    tensors = state_dict.from_params(SPEC, params)
    source = tmp_path / "source"
    source.mkdir()
    file = bare(source, {"x": np.zeros(1)}, tokenizer).with_suffix(".pt")
    pickles.write(file, {f"module.{name}": tensor for name, tensor in tensors.items()})
    before = teachers.load(BARE, file)
    out = tmp_path / "out"
    assert main(["teachers", "convert", BARE, "--weights", str(file), "--out", str(out)]) == 0
    assert f"converted to {out}" in capsys.readouterr().out
    shutil.rmtree(source)
    student, teacher = mmkd_jax.load(out), teachers.load("mine", out)
    jax.tree.map(np.testing.assert_array_equal, student.params, params)
    assert student.spec == SPEC
    text = before.tokenize(CAPTIONS)
    np.testing.assert_array_equal(teacher.tokenize(CAPTIONS).ids, text.ids)
    np.testing.assert_array_equal(teacher.encode_text(text), before.encode_text(text))
    record = student.meta["config"]["converted"]
    assert record == {"teacher": BARE, "file": "weights.pt", "sha256": before.weights_hash}
    assert main(["teachers", "convert", BARE, "--weights", str(out), "--out", str(out)]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


def test_a_conversion_that_fails_leaves_nothing(params, tokenizer, tmp_path, capsys, monkeypatch):
    tensors = state_dict.from_params(SPEC, params)
    spoilt = {
        "missing visual.proj": {name: tensor for name, tensor in tensors.items() if name != "visual.proj"},
        "left over extra": {**tensors, "extra": np.zeros(3, np.float32)},
        "visual.proj is (16, 7), not (16, 8)": {**tensors, "visual.proj": np.zeros((16, 7), np.float32)},
    }
    arguments = ["teachers", "convert", BARE, "--weights", str(tmp_path), "--out", str(tmp_path / "out")]
    for message, wrong in spoilt.items():
        bare(tmp_path, wrong, tokenizer)
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    bare(tmp_path, tensors, tokenizer)
    whole = checkpoint.Checkpoints.close

    def failing(self):
        whole(self)
        raise InputError("disk full")

    monkeypatch.setattr(checkpoint.Checkpoints, "close", failing)
    assert main(arguments) == 2
    assert "disk full" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "weights.safetensors"]


def test_the_command_lists_and_shows(capsys):
    assert main(["teachers", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(specs.TEACHERS) + 1
    assert main(["teachers", "show", "UniMed-CLIP"]) == 0
    text = capsys.readouterr().out
    assert ModelSpec.from_dict(json.loads(text[text.index("{") :])) == specs.find("UniMed-CLIP").spec
    assert "licence  cc-by-nc-4.0 (non-commercial)" in text
    assert "not verified\n  nothing" in text
    assert main(["teachers", "show", "UnimedCLIP"]) == 2
    assert "did you mean 'UniMed-CLIP'" in capsys.readouterr().err
