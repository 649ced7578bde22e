"""The torch backend is the reference libraries' towers on a file's own names, and the flax backend agrees with it."""

import argparse
import dataclasses
import functools
import os
import sys

import model_references as ref
import numpy as np
import published_teachers as published
import pytest
import torch

import teachers
from mmkd_jax import cli, export, io, tokenizers
from mmkd_jax.errors import InputError
from mmkd_jax.models import state_dict
from mmkd_jax.models.layouts_swin import first_names
from teachers import specs, torch_backend
from teachers.torch_backend import families, files
from teachers.verify import TOLERANCE, relative_difference

pytestmark = pytest.mark.usefixtures("quick_compilation")
CAPTIONS = published.CAPTIONS


@pytest.fixture(scope="module", params=published.FAMILIES)
def case(request, tmp_path_factory):
    """A family: the authors' model, the file of its weights, and both backends' teachers of that file."""
    model = published.make(request.param)
    file = published.write(tmp_path_factory.mktemp(request.param), model)
    name = published.record(request.param)
    return model, file, *(teachers.load(name, file, backend, micro_batch=4) for backend in ("torch", "flax"))


def inputs(spec):
    return ref.pictures(spec), ref.texts(spec)


def differences(teacher, model) -> list[float]:
    """Relative differences of a teacher's image and text features from the authors' model's."""
    images, text = inputs(model.spec)
    wanted = model.features(images, text)
    return [
        relative_difference(a, b) for a, b in zip((teacher.encode_image(images), teacher.encode_text(text)), wanted)
    ]


def test_features_are_the_libraries_own(case):
    model, _, theirs, _ = case
    assert isinstance(theirs, torch_backend.TorchTeacher)
    assert max(differences(theirs, model)) < 2e-6  # of the order of rounding: attention may be computed otherwise
    assert theirs.logit_scale == pytest.approx(np.exp(3.3), rel=1e-6)


def test_flax_agrees(case):
    *_, theirs, ours = case
    images, text = inputs(ours.spec)
    assert relative_difference(ours.encode_image(images), theirs.encode_image(images)) <= TOLERANCE
    assert relative_difference(ours.encode_text(text), theirs.encode_text(text)) <= TOLERANCE
    assert (ours.weights_hash, ours.preprocess_hash) == (theirs.weights_hash, theirs.preprocess_hash)
    assert ours.logit_scale == pytest.approx(theirs.logit_scale, rel=1e-6)
    for mine, other in zip(ours.tokenize(CAPTIONS), theirs.tokenize(CAPTIONS), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.full
@pytest.mark.parametrize("name", specs.TEACHERS)
def test_full_size_backends_agree(name):
    """Weights of every record's size, random in biases, norms and statistics, under the names of its files."""
    facts = specs.find(name)
    towers = families.build(facts.spec, facts.layout)
    published.randomise(towers.model)
    params = state_dict.to_params(facts.spec, {k: v.numpy() for k, v in towers.model.state_dict().items()})
    images, text = ref.pictures(facts.spec, 2), ref.texts(facts.spec, 3)
    common = {"name": name, "checkpoint": "", "spec": facts.spec, "tokenizer": None, "weights_hash": ""}
    ours = teachers.Teacher(params=params, micro_batch=3, **common)
    theirs = torch_backend.TorchTeacher(towers=towers, micro_batch=3, **common)
    assert relative_difference(ours.encode_image(images), theirs.encode_image(images)) <= TOLERANCE
    assert relative_difference(ours.encode_text(text), theirs.encode_text(text)) <= TOLERANCE


@pytest.fixture(scope="module")
def unimed(tmp_path_factory):
    """The cheapest family: model, file."""
    model = published.make("unimed")
    return model, published.write(tmp_path_factory.mktemp("unimed"), model)


def read(spec, path, tensors, save=torch.save, **wrap):
    """Features of a picture by the torch backend from a file of `tensors`."""
    save({**wrap, "state_dict": tensors} if wrap else tensors, path)
    return files.load(spec, io.as_path(path)).encode_image(ref.pictures(spec))


def test_every_form_of_a_file_gives_the_same(unimed, tmp_path):
    model, file = unimed
    wanted = files.load(model.spec, io.as_path(file)).encode_image(ref.pictures(model.spec))
    spec, tensors = model.spec, model.tensors
    buffers = {"text_encoder.transformer.embeddings.position_ids": torch.arange(20)[None]}
    wrapped = {f"_orig_mod.module.{key}": value for key, value in (tensors | buffers).items()}
    legacy = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    forms = {
        "plain.pt": {"tensors": tensors},
        "wrapped.pth": {"tensors": wrapped, "epoch": 3, "optimizer": {"state": {}}},
        "legacy.bin": {"tensors": tensors, "save": legacy},
        "scale.pt": {"tensors": tensors | {"logit_scale": tensors["logit_scale"].reshape(1)}},
        # torch refuses what is no tensor; this project's reader reads it as nothing.
        "arguments.pt": {"tensors": tensors, "args": argparse.Namespace(lr=1.0)},
    }
    for name, form in forms.items():
        np.testing.assert_array_equal(read(spec, tmp_path / name, **form), wanted, err_msg=name)
    half = {key: value.half() for key, value in tensors.items()}
    rough = read(spec, tmp_path / "half.pt", half)
    assert 0 < relative_difference(rough, wanted) < 1e-2


def test_text_towers_of_their_own_prefix_are_taken(tmp_path):
    model = published.make("open_clip")
    own = {k: v for k, v in model.tensors.items() if k.startswith("visual.") or k == "logit_scale"}
    apart = own | {f"text.{key}": value for key, value in model.tensors.items() if key not in own}
    torch.save(apart, tmp_path / "w.pt")
    towers = files.load(model.spec, io.as_path(tmp_path / "w.pt"))
    images, text = inputs(model.spec)
    np.testing.assert_allclose(towers.encode_text(text.ids, text.mask), model.features(images, text)[1], atol=1e-6)


def test_swin_is_read_under_the_names_of_both_generations(tmp_path):
    model = published.make("medclip_vit")
    first = {first_names(key): value for key, value in model.tensors.items()}
    assert first.keys() != model.tensors.keys()
    index = "vision_model.model.encoder.layers.0.blocks.1.attention.self.relative_position_index"
    wanted = model.features(*inputs(model.spec))[0]
    np.testing.assert_allclose(
        read(model.spec, tmp_path / "old.pt", first | {index: torch.zeros(9, 9).long()}), wanted, atol=1e-5
    )
    name = "vision_model.model.encoder.layers.1.downsample.norm.bias"
    with pytest.raises(InputError, match=r"Swin does not take these weights.*layers\.1\.downsample"):
        read(model.spec, tmp_path / "extra.pt", first | {name: torch.zeros(48)})


def test_the_three_files_of_pmc_clip_are_one_model(tmp_path):
    model = published.make("pmc_clip")
    for prefix, file in (("visual.", "image_encoder(resnet50).pth"), ("text_encoder.", "text_encoder.pth")):
        part = {key.removeprefix(prefix): value for key, value in model.tensors.items() if key.startswith(prefix)}
        torch.save(part, tmp_path / file)
    torch.save(model.tensors["text_projection"], tmp_path / "text_projection_layer.pth")
    towers = files.load(model.spec, io.as_path(tmp_path / "image_encoder(resnet50).pth"))
    images, text = inputs(model.spec)
    wanted = model.features(images, text)
    assert relative_difference(towers.encode_image(images), wanted[0]) < 2e-6
    assert relative_difference(towers.encode_text(text.ids, text.mask), wanted[1]) < 2e-6
    assert towers.logit_scale == pytest.approx(np.exp(4.4292), rel=1e-6)


@pytest.mark.parametrize("family", ["pmc_clip", "medclip_resnet"])
def test_old_names_of_norms_are_read(family, tmp_path):
    model = published.make(family)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in model.tensors.items()
    }
    assert old.keys() != model.tensors.keys()
    torch.save(old, tmp_path / "w.pt")
    images, text = inputs(model.spec)
    features = files.load(model.spec, io.as_path(tmp_path / "w.pt")).encode_text(text.ids, text.mask)
    assert relative_difference(features, model.features(images, text)[1]) < 2e-6


def test_weights_that_do_not_fit_are_refused_by_name(unimed, tmp_path):
    model, _ = unimed
    tensors, name = model.tensors, "visual.ln_post.bias"
    for spoilt, message in [
        ({key: value for key, value in tensors.items() if key != name}, f"missing {name}$"),
        (tensors | {"visual.other": torch.ones(3)}, r"left over visual\.other$"),
        (tensors | {name: torch.ones(3)}, rf"{name} is \(3,\), not \(64,\)$"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            read(model.spec, tmp_path / "w.pt", spoilt)
        assert "\n" not in str(caught.value)
    many = {key: value for key, value in tensors.items() if not key.startswith("visual.")}
    with pytest.raises(InputError, match=r"and \d+ more$"):
        read(model.spec, tmp_path / "w.pt", many)


def test_no_code_of_a_file_runs_and_damage_is_told(unimed, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "w.pt"
    torch.save({"state_dict": unimed[0].tensors, "x": Hostile()}, path)
    with pytest.raises(InputError, match=r"asks to run posix\.mkdir"):
        files.load(unimed[0].spec, io.as_path(path))
    assert not (tmp_path / "ran").exists()
    path.write_bytes(b"no pickle")
    with pytest.raises(InputError, match="not a readable file of torch"):
        files.load(unimed[0].spec, io.as_path(path))
    broken = tmp_path / "w.safetensors"
    broken.write_bytes(unimed[1].read_bytes()[:-9])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        files.load(unimed[0].spec, io.as_path(broken))


def test_towers_that_no_library_has_are_refused():
    spec = published.FAMILIES["pmc_clip"][1]
    deep = dataclasses.replace(spec, image=dataclasses.replace(spec.image, norm_epsilon=1e-3))
    with pytest.raises(InputError, match="open_clip has no such image tower"):
        families.build(deep, "pmc_clip")
    with pytest.raises(InputError, match="no common form for pooling 'token' with padding 'attended'"):
        families.build(dataclasses.replace(ref.bert_spec(), text=spec.text), "open_clip")
    narrow = published.of_berts(dataclasses.replace(published.PLAIN, width=32), "narrow", pooling="layers")
    with pytest.raises(InputError, match="timm has no such image tower"):
        families.build(narrow, "medclip")


def test_a_feature_is_the_same_to_the_bit_whatever_is_beside_it(unimed):
    model, file = unimed
    teacher = teachers.load(published.record("unimed"), file, "torch", micro_batch=4)
    images = ref.pictures(model.spec, 9)
    together = teacher.encode_image(images)
    for start in range(9):
        np.testing.assert_array_equal(teacher.encode_image(images[start : start + 2]), together[start : start + 2])
    text = teacher.encode_text(teacher.tokenize(CAPTIONS * 2))
    np.testing.assert_array_equal(text[:4], text[4:])


@pytest.mark.parametrize("form", ["open_clip", "hf"])
def test_folders_that_describe_themselves_are_run(form, tmp_path):
    spec = published.FAMILIES["openai"][1]
    model = published.make("openai")
    params = state_dict.to_params(spec, {key: value.numpy() for key, value in model.tensors.items()})
    tokenizer = tokenizers.train(spec.tokenizer, CAPTIONS, vocab_size=spec.text.vocab_size, context=spec.text.context)
    folder = export.export_model(spec, params, tokenizer, tmp_path / form, form=form)
    (folder / "mmkd_spec.json").unlink()  # what others' folders do not have
    assert max(differences(teachers.load("mine", folder, "torch", micro_batch=4), model)) < 2e-6


def test_checkpoints_of_ours_have_no_names_for_torch(unimed, tmp_path, capsys):
    _, file = unimed
    out = str(tmp_path / "converted")
    assert cli.main(["teachers", "convert", published.record("unimed"), "--weights", str(file), "--out", out]) == 0
    with pytest.raises(InputError, match="checkpoint of this project, which torch has no names for"):
        teachers.load("mine", out, "torch")


@pytest.mark.parametrize("missing", ["torch", "open_clip.model", "transformers", "timm.models.resnet"])
def test_a_missing_library_is_one_clear_line(missing, tmp_path, capsys, monkeypatch):
    family = {"timm.models.resnet": "medclip_resnet", "transformers": "transformers"}.get(missing, "unimed")
    file = published.write(tmp_path, published.make(family))
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = ["teachers", "verify", published.record(family), "--weights", str(file), "--texts", "a"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    package = missing.split(".")[0]
    assert f"the torch backend needs {package}, which cannot be imported" in error
    assert "pip install torch open_clip_torch timm transformers, or take the flax backend" in error
    assert error.count("\n") == 1


def test_emission_runs_by_either_backend(unimed, tmp_path):
    import data_fixtures as toy

    from mmkd_jax.data.features import FeatureSet

    pairs, name, rows = toy.make_pairs(tmp_path / "pairs", 6, 1), published.record("unimed"), np.arange(6)
    found = {}
    for backend in ("torch", "flax"):
        out = tmp_path / backend
        arguments = ["emit", "--teacher", f"{name}={unimed[1]}", "--pairs", str(pairs.path), "--out", str(out)]
        assert cli.main([*arguments, "--backend", backend, "--dtype", "float32"]) == 0
        found[backend] = FeatureSet.open(out / name, pairs).read(rows, 0 * rows, 0 * rows)
    for tower in ("image", "text"):
        theirs, ours = found["torch"][tower], found["flax"][tower]
        assert 0 < relative_difference(ours, theirs) <= TOLERANCE, tower


def test_evaluation_runs_by_either_backend_and_on_what_was_emitted(unimed, tmp_path):
    """One set of weights: as a flax teacher, as a torch teacher, and as the features that were stored of it."""
    import data_fixtures as toy

    from mmkd_jax.evals import results

    rows = {"toy.train": list(range(16)), "toy.test": list(range(16, 24))}
    pairs, entry = toy.make_pairs(tmp_path / "pairs", 24, 1, rows=rows), f"{published.record('unimed')}={unimed[1]}"
    emitted = tmp_path / "emitted"
    said = ["--teacher", entry, "--pairs", str(pairs.path)]
    assert cli.main(["emit", *said, "--out", str(emitted), "--dtype", "float32", "--center"]) == 0
    (folder,) = (path for path in emitted.iterdir() if path.is_dir())
    models = ["--torch", entry, "--features", f"stored={folder}"]
    tasks = ["--tasks", "linear_probe", "zeroshot", "--bootstrap", "10"]
    assert cli.main(["eval", *said, *models, "--out", str(tmp_path / "out"), *tasks]) == 0
    rows = results.load(tmp_path / "out" / "results.json")
    values = {}
    for row in rows:
        values.setdefault((row["task"], row["metric"]), {})[row["model"]] = row["value"]
    assert {model for found in values.values() for model in found} == {
        f"teacher:{published.record('unimed')}", f"teacher:{published.record('unimed')}.torch", "stored"
    }  # fmt: skip
    assert {task for task, _ in values} == {"linear_probe", "zeroshot"}
    for found in values.values():
        assert len(set(found.values())) == 1


@pytest.mark.parametrize("family", ["open_clip", "medclip_vit", "medclip_resnet", "pmc_clip"])
def test_texts_run_at_a_length_of_their_own_where_padding_changes_nothing(family, monkeypatch):
    """Against all of them at the full length; the two whose padding counts are never cut."""
    model = published.make(family)
    spec = model.spec
    params = state_dict.to_params(spec, {key: value.numpy() for key, value in model.tensors.items()})
    common = {"name": "x", "checkpoint": "", "spec": spec, "tokenizer": None, "weights_hash": "", "params": params}
    teacher = teachers.Teacher(**common, micro_batch=4)
    text = ref.texts(spec, 9)
    whole = teacher.encode_text(text)
    lengths, in_batches = [], teachers.api.in_batches

    def noting(encode, inputs, batch):
        lengths.append(inputs.ids.shape)
        assert inputs.mask.shape == inputs.ids.shape
        return in_batches(encode, inputs, batch)

    monkeypatch.setattr(teachers, "LENGTHS", (4, 8))
    monkeypatch.setattr(teachers.api, "in_batches", noting)
    cut = teacher.encode_text(text)
    assert relative_difference(cut, whole) <= (2e-6 if len(lengths) > 1 else 0)
    used = text.mask.sum(1)
    if spec.text.padding == "masked":
        wanted = [(int(sum(used <= 4)), 4), (int(sum((used > 4) & (used <= 8))), 8), (int(sum(used > 8)), 12)]
        assert lengths == [shape for shape in wanted if shape[0]]
        assert len(lengths) == 3
    else:
        assert lengths == [(9, 12)]
    # One alone is the same to the bit.
    for row in range(9):
        alone = teacher.encode_text(type(text)(*(part[row : row + 1] for part in text)))
        np.testing.assert_array_equal(alone[0], cut[row])


def test_cutting_too_much_is_seen(monkeypatch):
    """Negative control of the test above: a length that leaves tokens out."""
    model = published.make("medclip_vit")
    params = state_dict.to_params(model.spec, {key: value.numpy() for key, value in model.tensors.items()})
    common = {"name": "x", "checkpoint": "", "spec": model.spec, "tokenizer": None, "weights_hash": ""}
    teacher = teachers.Teacher(params=params, micro_batch=4, **common)
    text = ref.texts(model.spec, 4)
    whole = teacher.encode_text(text)
    monkeypatch.setattr(teachers, "_by_length", lambda tower, mask: [(np.arange(len(mask)), 4)])
    assert relative_difference(teacher.encode_text(text), whole) > 1e-2
