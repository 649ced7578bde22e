"""Published features tell which variant of a teacher gave them; what is missing, damaged or hostile is refused."""

import dataclasses
import functools
import json
import pickle
import shutil
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from mmkd_jax import export, preprocess, tokenizers
from mmkd_jax.cli import main
from mmkd_jax.errors import InputError
from mmkd_jax.models import pickles, state_dict
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, ResNetTower, TextTower, TokenizerSpec
from teachers import samples, specs

pytestmark = pytest.mark.usefixtures("quick_compilation")
CAPTIONS = ["Chest X-ray: no pneumothorax", "the heart isn't enlarged, the lung is " * 9, "H&E of a carcinoma, 40x"]
BERT = TextTower(width=16, layers=2, heads=2, mlp_width=24, vocab_size=70, positions=40, context=32)
CLIP = TextTower("clip", 16, 2, 2, 24, 556, 40, 40, "quick_gelu", 1e-5, "linear", 0.0)
RESNET = ResNetTower("modified_resnet", 8, (1, 1), 8, 32)


def facts(spec: ModelSpec, published_as: str, layout: str = "open_clip") -> specs.Facts:
    known = (specs.known("all of it", "this test"),)
    return specs.Facts(spec, weights="a file", facts=known, layout=layout, published_as=published_as)


def other(record: specs.Facts, name: str, image=None, text=None, preprocess=None) -> specs.Facts:
    changes = {"image": image or {}, "text": text or {}, "preprocess": preprocess or {}}
    parts = {part: dataclasses.replace(getattr(record.spec, part), **change) for part, change in changes.items()}
    return dataclasses.replace(record, spec=dataclasses.replace(record.spec, name=name, **parts))


PMC_TEXT = dataclasses.replace(BERT, projection="linear", padding="attended")
PMC = facts(ModelSpec("pmc", RESNET, PMC_TEXT, 24, Preprocess(32)), "PMCCLIP", "pmc_clip")
POOLER = other(PMC, "pmc-pooler", {"heads": 2}, {"pooling": "pooler"})
MASKED = other(PMC, "pmc-masked", {"heads": 2}, {"padding": "masked"})
VIT = ImageTower(16, 2, 2, 8, 32, 24, "quick_gelu")
PUBMED = facts(ModelSpec("pubmed", VIT, CLIP, 24, Preprocess(32), TokenizerSpec("bpe")), "PUBMEDCLIP")
IMAGENET = other(PUBMED, "pubmed-imagenet", preprocess={"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
COPY = dataclasses.replace(other(PUBMED, "pubmed-hf", preprocess={"rgb_first": True}), layout="transformers_clip")
QUILT8 = facts(dataclasses.replace(PUBMED.spec, name="quilt"), "QuiltNet")
QUILT16 = other(QUILT8, "quilt-16", {"patch": 16})
UNSEEN = facts(dataclasses.replace(PUBMED.spec, name="unseen"), "")
RECORDS = {
    record.spec.name: f"{__name__}.{variable}"
    for variable, record in list(globals().items())
    if isinstance(record, specs.Facts)
}


@pytest.fixture(autouse=True)
def records(monkeypatch):
    monkeypatch.setattr(specs, "TEACHERS", RECORDS)


@functools.cache
def model(record: specs.Facts, seed: int = 0):
    """Random parameters, large enough that every switch is seen in the features, and a tokenizer."""
    rng = np.random.default_rng(seed)
    shapes = DualEncoder(record.spec).shapes()
    params = jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape) * 0.5 + 0.2), shapes)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: np.abs(x) + 0.5 if "variance" in jax.tree_util.keystr(path) else x, params
    )
    text = record.spec.text
    learned = tokenizers.train(record.spec.tokenizer, CAPTIONS, vocab_size=text.vocab_size, context=text.context)
    assert learned.vocab_size == text.vocab_size
    return params, learned


@functools.partial(jax.jit, static_argnums=0)
def pair(encoder: DualEncoder, params, pictures, texts):
    """Features of pictures and texts."""
    return encoder.encode_image(params, pictures), encoder.encode_text(params, texts)


def write_weights(folder, record: specs.Facts, seed: int = 0):
    """A weights file with its vocabulary, as the record's layout names it."""
    params, tokenizer = model(record, seed)
    folder.mkdir()
    for name, data in tokenizer.files().items():
        (folder / name).write_bytes(data)
    tensors = state_dict.from_params(record.spec, params, record.layout)
    save_file({name: np.array(t, order="C") for name, t in tensors.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def write_samples(folder, records_, seed: int = 0, count: int = 3):
    """The authors' layout, with the features that `records_` give."""
    lines = []
    for i, caption in enumerate(CAPTIONS[:count]):
        name = f"{i:032x}"
        place = folder / "features" / "data_1" / name
        place.mkdir(parents=True)
        noise = np.random.default_rng(i).integers(0, 256, (50 + 7 * i, 61, 3), np.uint8)
        Image.fromarray(noise).resize((90, 75 + i)).save(place / "figure.jpg")
        (place / "figure.json").write_text("{}")
        picture = preprocess.decode((place / "figure.jpg").read_bytes())
        features = {}
        for record in records_:
            params, tokenizer = model(record, seed)
            p = record.spec.preprocess
            square = preprocess.normalise(preprocess.eval_image(picture, p), p)[None]
            both = pair(DualEncoder(record.spec), params, square, tokenizer([caption]))
            for end, feature in zip(("img", "txt"), both, strict=True):
                features[f"{record.published_as}_{end}"] = np.asarray(feature[0] / np.linalg.norm(feature[0]))
        pickles.write(place / "clips_output.pt", features)
        path = f"features/data_1/{name}/figure"
        line = {"folderid": "data_1", "id": name, "imgpath": f"{path}.jpg", "metapath": f"{path}.json", "txt": caption}
        lines.append(json.dumps({**line, "available_clips": [record.published_as for record in records_]}))
    (folder / "meta.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("wrote", [PMC, POOLER, MASKED], ids=lambda record: record.spec.name)
def test_the_recipe_that_wrote_the_features_wins(wrote, tmp_path):
    folder = write_samples(tmp_path / "samples", [wrote])
    weights = write_weights(tmp_path / "weights", wrote)
    fits = samples.compare("pmc", weights, samples.read(folder))
    names = [fit.variant for fit in fits]
    wanted = ["pmc", "pmc-masked"] + (["pmc-pooler"] if wrote is POOLER else [])  # others' files lack the pooler
    assert sorted(names) == sorted(wanted)
    assert names[0] == wrote.spec.name
    assert max(fits[0].distance("image"), fits[0].distance("text")) < 1e-11
    for fit in fits[1:]:
        heads_differ = (fit.variant == "pmc") != (wrote is PMC)
        assert (fit.distance("image") > 1e-8) == heads_differ
        assert fit.distance("text") > 1e-6
    page = samples.page("pmc", weights, folder)
    assert f"text: reproduced: {wrote.spec.name} fits best; lowest cosine 1.000000" in page
    assert len([line for line in page.splitlines() if line.startswith("0000")]) == 3 * len(fits)


@pytest.fixture(scope="module")
def pubmed(tmp_path_factory):
    """Samples with features of PubMedCLIP by OpenAI's and, in another folder, by ImageNet's mean and std."""
    root = tmp_path_factory.mktemp("pubmed")
    for record in (PUBMED, IMAGENET):
        write_samples(root / record.spec.name, [record])
        write_weights(root / f"weights-{record.spec.name}", record)
    write_weights(root / "weights-pubmed-hf", COPY)
    return root


@pytest.mark.parametrize("wrote", [PUBMED, IMAGENET], ids=lambda record: record.spec.name)
def test_mean_and_std_are_told_apart_and_text_is_not_blamed(wrote, pubmed):
    page = samples.page("pubmed", pubmed / "weights-pubmed" / "weights.safetensors", pubmed / wrote.spec.name)
    alike = "pubmed = pubmed-hf" if wrote is PUBMED else "pubmed-imagenet"
    assert f"image: reproduced: {alike} fits best; lowest cosine 1.000000" in page
    assert "text: reproduced: all variants do alike" in page


def test_another_layout_of_the_weights_is_compared_as_well(pubmed):
    fits = samples.compare("pubmed", pubmed / "weights-pubmed-hf", samples.read(pubmed / "pubmed"))
    assert fits[-1].variant == "pubmed-imagenet"
    assert len(fits) == 3
    assert fits[0].distance() < 1e-11 < 1e-6 < fits[-1].distance("image")


def test_a_folder_that_describes_itself_is_run_as_it_says_and_as_the_records_say(pubmed, tmp_path):
    mine = dataclasses.replace(PUBMED.spec, preprocess=Preprocess(32, mean=(0.5, 0.5, 0.5)))
    params, tokenizer = model(PUBMED)
    out = export.export_model(mine, params, tokenizer, tmp_path / "out")
    fits = samples.compare("pubmed", out, samples.read(pubmed / "pubmed"))
    assert {fit.variant for fit in fits[:2]} == {"pubmed", "pubmed-hf"}
    assert {fit.variant for fit in fits[2:]} == {"pubmed's folder", "pubmed-imagenet"}
    exact = export.export_model(IMAGENET.spec, params, tokenizer, tmp_path / "exact")
    assert samples.compare("pubmed-imagenet", exact, samples.read(pubmed / "pubmed"))[-1].variant == "pubmed-imagenet"


def test_weights_of_the_other_size_are_recognised(tmp_path):
    folder = write_samples(tmp_path / "samples", [QUILT16, PMC])
    weights = write_weights(tmp_path / "weights", QUILT16)
    page = samples.page("quilt", weights, folder)
    assert page.splitlines()[1] == "these are not weights of quilt, but of quilt-16"
    assert "image: reproduced by quilt-16" in page
    assert "quilt " not in page.split("\n", 2)[2]


def test_other_weights_are_not_reproduced(pubmed, tmp_path):
    """Negative control: the right architecture with other numbers."""
    page = samples.page("pubmed", write_weights(tmp_path / "weights", PUBMED, seed=1), pubmed / "pubmed")
    assert "image: NOT reproduced" in page
    assert "text: NOT reproduced" in page


def test_the_command_prints_the_page_or_says_what_is_wrong(pubmed, tmp_path, capsys):
    words = ["teachers", "verify", "pubmed", "--weights", str(pubmed / "weights-pubmed"), "--samples"]
    assert main([*words, str(pubmed / "pubmed")]) == 0
    page = samples.page("pubmed", pubmed / "weights-pubmed", pubmed / "pubmed")
    assert capsys.readouterr().out == page + "\n"
    assert main([*words, str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "meta.jsonl does not exist; give the folder of published samples" in message
    assert message.count("\n") == 1


def test_what_has_no_features_is_said(pubmed, tmp_path):
    assert "no features of it were published" in samples.page("unseen", tmp_path / "none", tmp_path / "none")
    page = samples.page("quilt", tmp_path / "none", pubmed / "pubmed")
    assert page == "quilt: none of the 3 samples holds features of QuiltNet; they hold PUBMEDCLIP"


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_missing_damaged_and_hostile_files_are_refused_in_one_line(tmp_path, pubmed):
    weights = pubmed / "weights-pubmed" / "weights.safetensors"
    whole = write_samples(tmp_path / "whole", [PUBMED], count=1)

    def refused(match, change):
        folder = shutil.copytree(whole, tmp_path / f"s{len(list(tmp_path.iterdir()))}")
        change(folder, folder / "features" / "data_1" / f"{0:032x}")
        with pytest.raises(InputError, match=match) as caught:
            samples.page("pubmed", weights, folder)
        assert "\n" not in str(caught.value)

    def meta(**changes):
        def change(folder, place):
            line = json.loads((folder / "meta.jsonl").read_text())
            line = {key: value for key, value in {**line, **changes}.items() if value is not None}
            (folder / "meta.jsonl").write_text(json.dumps(line))

        return change

    def pickled(data):
        def change(folder, place):
            with zipfile.ZipFile(place / "clips_output.pt", "w") as archive:
                archive.writestr("archive/data.pkl", data)

        return change

    def features(**changes):
        return lambda folder, place: pickles.write(
            place / "clips_output.pt", {**pickles.read(place / "clips_output.pt"), **changes}
        )

    mark = tmp_path / "ran"
    refused("meta.jsonl does not exist", lambda folder, place: (folder / "meta.jsonl").unlink())
    refused("not a list of samples", lambda folder, place: (folder / "meta.jsonl").write_text("{"))
    refused("not a list of samples", lambda folder, place: (folder / "meta.jsonl").write_text("[1]"))
    refused("not a list of samples", lambda folder, place: (folder / "meta.jsonl").write_bytes(b"\xff\xfe"))
    refused("not a list of samples .KeyError: 'txt'", meta(txt=None))
    refused("not a list of samples", meta(txt=3))
    refused("names no samples", lambda folder, place: (folder / "meta.jsonl").write_text("\n"))
    refused("which is outside of", meta(imgpath="../../../etc/passwd"))
    refused("which is outside of", meta(imgpath="/etc/passwd"))
    refused("which is outside of", meta(folderid="../../x"))
    refused("figure.jpg does not exist", lambda folder, place: (place / "figure.jpg").unlink())
    refused("not a readable picture", lambda folder, place: (place / "figure.jpg").write_bytes(b"\xff\xd8"))
    refused("clips_output.pt does not exist", lambda folder, place: (place / "clips_output.pt").unlink())
    refused("not a readable file of torch", lambda folder, place: (place / "clips_output.pt").write_bytes(b"PK"))
    refused("asks to run .*open, which has no place", pickled(pickle.dumps({"PUBMEDCLIP_img": Touch(mark)})))
    refused("is no feature", features(PUBMEDCLIP_img=np.full(24, np.nan, np.float32)))
    refused("is no feature", features(PUBMEDCLIP_txt=np.zeros(24, np.float32)))
    refused("PUBMEDCLIP_txt of width 25: they come from", features(PUBMEDCLIP_txt=np.ones(25, np.float32)))
    assert not mark.exists()
    with pytest.raises(InputError, match="no-weights does not exist"):
        samples.page("pubmed", tmp_path / "no-weights", pubmed / "pubmed")
    with pytest.raises(InputError, match="did you mean 'pubmed'"):
        samples.page("pubmedd", weights, pubmed / "pubmed")


def test_the_published_samples_are_read(mmkd_data):
    folder = mmkd_data / "mmkd_clip_demo"
    if not folder.is_dir():
        pytest.skip("MMKD_DATA holds no mmkd_clip_demo")
    found = samples.read(folder)
    counts = {name: sum(f"{name}_img" in s.features and f"{name}_txt" in s.features for s in found) for name in WIDTHS}
    assert len(found) == 6
    assert counts == {name: count for name, (count, _) in WIDTHS.items()}
    for sample in found:
        assert sample.picture.exists()
        assert sample.caption
        assert {key.rpartition("_")[0] for key in sample.features} <= set(WIDTHS)
        for key, feature in sample.features.items():
            assert feature.shape == (WIDTHS[key.rpartition("_")[0]][1],)
            assert np.linalg.norm(feature) == pytest.approx(1, abs=1e-4)


# Of the published samples: how many hold a teacher's features, and how wide these are.
WIDTHS = {
    "BMCA": (6, 768),
    "BiomedCLIP": (6, 512),
    "UniMedCLIP": (4, 512),
    "QuiltNet": (6, 512),
    "GenMedClip": (6, 512),
    "PLIP": (3, 512),
    "PUBMEDCLIP": (2, 512),
    "PMCCLIP": (1, 768),
}
