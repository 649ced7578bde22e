"""Each teacher's pictures and texts are prepared as its description says, on real ones of odd sizes and kinds."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from mmkd_jax import preprocess, tokenizers
from mmkd_jax.data.sources import sample
from mmkd_jax.data.sources.pictures import PICTURES
from mmkd_jax.specs import TokenizerSpec
from teachers import specs

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.5862785803043838,) * 3, (0.27950088968644304,) * 3


def normalised(pixels, mean_std) -> np.ndarray:
    mean, std = np.array(mean_std)
    return (np.asarray(pixels, np.float64) / 255 - mean) / std


def open_clips(image: Image.Image, mean_std=OPENAI) -> np.ndarray:
    """open_clip's `image_transform` for evaluation: shortest side to 224, bicubic, centre crop, and only then RGB."""
    short = min(image.size)
    image = image.resize([int(224 * side / short) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2.0) for side in image.size)
    return normalised(image.crop((left, top, left + 224, top + 224)).convert("RGB"), mean_std)


def imagenets(image: Image.Image) -> np.ndarray:
    """The same with the mean and std that PubMedCLIP's training took."""
    return open_clips(image, IMAGENET)


def processors(image: Image.Image) -> np.ndarray:
    """transformers' processor as CLIP's folders configure it: RGB first."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


def medclips(image: Image.Image) -> np.ndarray:
    """MedCLIP's feature extractor: the middle of a black greyscale square, bicubic, one channel three times."""
    side = max(224, *image.size)
    square = Image.new("L", (side, side), 0)
    square.paste(image, (int((side - image.width) / 2), int((side - image.height) / 2)))
    grey = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))
    return normalised(np.stack([grey] * 3, axis=-1), GREY)


PICTURES_OF = {
    **dict.fromkeys(("BMC-CLIP", "BiomedCLIP", "UniMed-CLIP", "MMKD-CLIP", "PubMedCLIP"), open_clips),
    **dict.fromkeys(("QuiltNet-B-32", "QuiltNet-B-16", "QuiltNet-B-16-PMB"), open_clips),
    **dict.fromkeys(("GenMedClip", "GenMedClip-B-16", "GenMedClip-B-32", "GenMedClip-B-16-PMB"), open_clips),
    **dict.fromkeys(("PMC-CLIP", "PMC-CLIP-pooler", "PMC-CLIP-masked"), open_clips),
    **dict.fromkeys(("PLIP", "PubMedCLIP-HF"), processors),
    **dict.fromkeys(("MedCLIP-ViT", "MedCLIP-ResNet"), medclips),
    "PubMedCLIP-ImageNet": imagenets,
}


def prepared(name: str, image: Image.Image, **changes) -> np.ndarray:
    """What `teachers.load(name, ...).preprocess` gives, or would with other settings."""
    p = dataclasses.replace(specs.find(name).spec.preprocess, **changes)
    return preprocess.normalise(preprocess.eval_image(image, p), p)


def through(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    """Written to a file and decoded from it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return preprocess.decode(buffer.getvalue())


@pytest.fixture(scope="module")
def real():
    """An X-ray, a fundus photograph and a stained slide, cut to odd sizes."""
    pytest.importorskip("pydicom", reason="the embedded pictures' packages (extra demo) are not installed")
    frames = {}
    for picture in PICTURES:
        if picture.name == "chest" or picture.modality in ("fundus", "histopathology"):
            with sample._path(picture) as path:
                frames[picture.modality] = picture.read(str(path))[0]
    cuts = {"xray": (689, 325), "fundus": (333, 501), "histopathology": (223, 491)}
    return {name: Image.fromarray(frames[name][60 : 60 + high, 40 : 40 + wide]) for name, (wide, high) in cuts.items()}


@pytest.fixture(scope="module")
def kinds(real):
    """The pictures as files of every kind, decoded: and what a description is given instead, where PIL cannot."""
    colour, grey = real["fundus"], real["xray"].convert("L")
    alpha = grey.resize(colour.size)
    see_through = colour.copy()
    see_through.putalpha(alpha)
    sixteen = np.asarray(grey).astype(np.uint16) * 256 + 77
    palette = colour.quantize(48)
    return {
        "rgb": (through(colour), colour),
        "jpeg": (jpeg := through(real["histopathology"], "JPEG", quality=80), jpeg),
        "grey": (through(grey), grey),
        "palette": (through(palette), palette),
        "transparent": (through(see_through), see_through),
        "grey and alpha": (through(see_through.convert("LA")), see_through.convert("LA")),
        "bits": (through(grey.convert("1")), grey.convert("1")),
        "cmyk": (through(colour.convert("CMYK"), "TIFF"), colour.convert("CMYK")),
        "sixteen bits": (through(Image.fromarray(sixteen)), grey),
        "small": (through(colour.resize((61, 97))), colour.resize((61, 97))),
        "exact": (through(colour.resize((224, 224))), colour.resize((224, 224))),
    }


def test_every_teacher_is_described():
    assert set(PICTURES_OF) == set(specs.TEACHERS) == set(TEXTS_OF)


@pytest.mark.parametrize("name", specs.TEACHERS)
def test_pictures_are_prepared_as_described(name, kinds):
    for kind, (decoded, described) in kinds.items():
        if kind == "cmyk" and PICTURES_OF[name] is processors:
            continue  # transformers' own conversion of CMYK is PIL's, which the next test covers
        ours = prepared(name, decoded)
        assert (ours.shape, ours.dtype) == ((224, 224, 3), np.float32)
        np.testing.assert_allclose(ours, PICTURES_OF[name](described), atol=3e-6, err_msg=kind)


@pytest.mark.parametrize("name", ["BiomedCLIP", "PLIP", "PubMedCLIP-ImageNet", "MedCLIP-ViT"])
def test_another_preparation_is_caught(name, kinds, real):
    """Negative controls, each with the difference that it makes at least, in units of normalised pixels."""
    own, image = PICTURES_OF[name], real["fundus"]
    wrong = {"bilinear": ({"interpolation": "bilinear"}, image, 0.05), "mean": ({"mean": (0.5,) * 3}, image, 0.02)}
    wrong["std"] = {"std": (0.5,) * 3}, image, 0.2
    if own is medclips:
        wrong["crop"] = {"frame": "crop"}, image, 1.0
        wrong["colour"] = {"greyscale": False}, image, 0.3
    else:
        wrong["square"] = {"frame": "square"}, image, 1.0
        wrong["greyscale"] = {"greyscale": True}, image, 0.3
        wrong["order of RGB"] = {"rgb_first": own is not processors}, kinds["palette"][0], 0.3
    for what, (changes, picture, least) in wrong.items():
        difference = np.abs(prepared(name, picture, **changes) - own(picture)).max()
        assert difference > least, (what, difference)
    for other in (open_clips, processors, imagenets, medclips):
        different = max(np.abs(prepared(name, kinds[k][0]) - other(kinds[k][1])).max() for k in ("rgb", "palette"))
        assert (different < 3e-6) == (other is own), other.__name__


def test_cutting_sixteen_bits_to_eight_would_be_another_picture(kinds):
    """Negative control: PIL's own conversion of 16 bits makes all of it white."""
    decoded, described = kinds["sixteen bits"]
    cut = Image.fromarray(np.asarray(described).astype(np.uint16) * 256 + 77).convert("L")
    assert np.abs(open_clips(cut) - prepared("BiomedCLIP", decoded)).max() > 1


def test_real_files_are_prepared_as_described(mmkd_data):
    pictures = [path.read_bytes() for path in sorted(mmkd_data.glob("mmkd_clip_demo/features/*/*/*.jpg"))]
    for path in sorted(mmkd_data.glob("*/*.tar")):
        with tarfile.open(path) as archive:
            files = [member for member in archive if member.name.endswith(".jpg")]
            pictures += [archive.extractfile(files[i]).read() for i in (0, len(files) // 2)]
    assert len(pictures) > 20
    for data in pictures:
        image = preprocess.decode(data)
        for name in ("BiomedCLIP", "PLIP", "PubMedCLIP-ImageNet", "MedCLIP-ViT"):
            wanted = PICTURES_OF[name](Image.open(io.BytesIO(data)))
            np.testing.assert_allclose(prepared(name, image), wanted, atol=3e-6, err_msg=f"{name} {image}")


CAPTIONS = [
    "Axial CT shows a 3.5 cm mass in the right lung, with spiculated margins.",
    "H&E, 40x: the patient's carcinoma; CAFÉ-au-lait Ångström",
    "the lung and the heart " * 9,
    "the lung and the heart " * 80,
    "lung",
    "",
]
# What transformers leaves as it is and open_clip repairs.
ODD = ["the patient\u2019s \u201clung\u201d", "\ufb01brosis &lt; 5 &amp;amp; more", "a\u00a0b\u2009c"]


@pytest.fixture(scope="module")
def references():
    pytest.importorskip("torch", reason="open_clip's tokenizers need torch")
    import torchvision_stub

    torchvision_stub.install()
    pytest.importorskip("open_clip", reason="open_clip is the reference")
    return pytest.importorskip("transformers", reason="transformers is the reference")


@pytest.fixture(scope="module")
def vocabularies(references, tmp_path_factory):
    """CLIP's own vocabulary, and folders with one in the order of PubMedBERT's ids and one in that of BERT's."""
    from open_clip import tokenizer

    learned = tokenizers.train(TokenizerSpec(), CAPTIONS + ODD, vocab_size=130, context=9)
    tokens = list(json.loads(learned.files()["tokenizer.json"])["model"]["vocab"])
    folders = {"bpe": tokenizer.default_bpe()}
    for name, unused in (("pubmed", 0), ("bert", 99)):
        folders[name] = tmp_path_factory.mktemp(name)
        order = [tokens[0], *(f"[unused{i}]" for i in range(unused)), *tokens[1:]]
        (folders[name] / "vocab.txt").write_text("\n".join(order) + "\n")
        (folders[name] / "config.json").write_text('{"model_type": "bert"}')
    return folders


def open_clip_bpe(folders, texts):
    """open_clip's tokenizer of CLIP: 77 ids, 0 after the end."""
    from open_clip import tokenizer

    ids = tokenizer.SimpleTokenizer()(texts, context_length=77).numpy()
    return ids, np.arange(77) <= ids.argmax(1)[:, None]


def processor_bpe(folders, texts):
    """transformers' tokenizer of CLIP as `plip.py` calls it: it pads with the end token, and masks that."""
    from transformers import CLIPTokenizer

    spec = TokenizerSpec("bpe")
    model = json.loads(tokenizers.load(spec, folders["bpe"], context=77).files()["tokenizer.json"])["model"]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    found = tokenizer(texts, max_length=77, padding="max_length", truncation=True, return_tensors="np")
    return np.where(found["attention_mask"] > 0, found["input_ids"], 0), found["attention_mask"]


def open_clip_bert(folders, texts):
    """open_clip's wrapper of a BERT's tokenizer, which repairs the text; 256 ids, and a mask of what is not 0."""
    from open_clip import tokenizer

    ids = tokenizer.HFTokenizer(str(folders["pubmed"]), context_length=256)(texts).numpy()
    return ids, ids != 0


def bert(folders, texts, name="pubmed"):
    """transformers' tokenizer of a BERT on the text as it is, as PMC-CLIP's code calls it."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(folders[name])
    found = tokenizer(texts, max_length=77, padding="max_length", truncation=True, return_tensors="np")
    return found["input_ids"], found["attention_mask"]


def one_by_one(folders, texts):
    """MedCLIP's tokenizer for one caption at a time, which pads nothing; here put into rows of equal length."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(folders["bert"], do_lower_case=True)
    tokenizer.model_max_length = 77
    ids, mask = np.zeros((len(texts), 77), int), np.zeros((len(texts), 77), int)
    for i, text in enumerate(texts):
        found = tokenizer([text], padding=True, truncation=True)["input_ids"][0]
        ids[i, : len(found)], mask[i, : len(found)] = found, 1
    return ids, mask


TEXTS_OF = {
    **dict.fromkeys(("BMC-CLIP", "QuiltNet-B-32", "QuiltNet-B-16", "PubMedCLIP"), open_clip_bpe),
    **dict.fromkeys(("GenMedClip", "GenMedClip-B-16", "GenMedClip-B-32", "PubMedCLIP-ImageNet"), open_clip_bpe),
    **dict.fromkeys(("BiomedCLIP", "UniMed-CLIP", "MMKD-CLIP"), open_clip_bert),
    **dict.fromkeys(("QuiltNet-B-16-PMB", "GenMedClip-B-16-PMB"), open_clip_bert),
    **dict.fromkeys(("PLIP", "PubMedCLIP-HF"), processor_bpe),
    **dict.fromkeys(("PMC-CLIP", "PMC-CLIP-pooler", "PMC-CLIP-masked"), bert),
    **dict.fromkeys(("MedCLIP-ViT", "MedCLIP-ResNet"), one_by_one),
}
VOCABULARY_OF = {open_clip_bpe: "bpe", processor_bpe: "bpe", open_clip_bert: "pubmed", bert: "pubmed"}


def tokenized(name: str, folders, texts, context: int = 0, **changes):
    """What `teachers.load(name, ...).tokenize` gives, or would with other settings."""
    spec = specs.find(name).spec
    place = folders[VOCABULARY_OF.get(TEXTS_OF[name], "bert")]
    place = place / "vocab.txt" if TEXTS_OF[name] not in (open_clip_bpe, processor_bpe) else place
    kind = dataclasses.replace(spec.tokenizer, **changes)
    return tokenizers.load(kind, place, context=context or spec.text.context)(texts)


@pytest.mark.parametrize("name", specs.TEACHERS)
def test_texts_are_cut_padded_and_masked_as_described(name, vocabularies):
    texts = CAPTIONS + ODD
    ids, mask = TEXTS_OF[name](vocabularies, texts)
    batch = tokenized(name, vocabularies, texts)
    np.testing.assert_array_equal(batch.ids, ids)
    np.testing.assert_array_equal(batch.mask, mask)
    np.testing.assert_array_equal(batch.mask, batch.segments)
    lengths = batch.mask.sum(1)
    context = specs.find(name).spec.text.context
    assert lengths[3] == context  # the long caption is cut, and keeps its end
    assert len({batch.ids[i, lengths[i] - 1] for i in range(len(texts))}) == 1
    assert lengths[5] == 2
    # Negative controls.
    assert tokenized(name, vocabularies, texts, context=context - 1).ids.shape != ids.shape
    assert (tokenized(name, vocabularies, texts, lowercase=False).ids != ids).any()
    repair = not specs.find(name).spec.tokenizer.repair
    differ = (tokenized(name, vocabularies, texts, repair=repair).ids != ids).any(1)
    assert not differ[: len(CAPTIONS)].any()
    assert differ[len(CAPTIONS)]


def test_ids_of_special_tokens_are_read_by_name(vocabularies):
    pmc, med = (tokenized(name, vocabularies, ["lung"]) for name in ("PMC-CLIP", "MedCLIP-ViT"))
    assert (pmc.ids[0, 0], med.ids[0, 0]) == (2, 101)


@pytest.mark.parametrize("name", ["BMC-CLIP", "BiomedCLIP", "PLIP", "PMC-CLIP", "MedCLIP-ViT"])
def test_real_captions_are_cut_padded_and_masked_as_described(name, vocabularies, mmkd_data):
    lines = [json.loads(line) for path in sorted(mmkd_data.glob("*/manifest.jsonl")) for line in path.open()]
    texts = sorted({line.get("caption", "") for line in lines})[::5]
    texts += [json.loads(line)["txt"] for line in (mmkd_data / "mmkd_clip_demo" / "meta.jsonl").open()]
    assert len(texts) > 300
    ids, mask = TEXTS_OF[name](vocabularies, texts)
    batch = tokenized(name, vocabularies, texts)
    np.testing.assert_array_equal(batch.ids, ids)
    np.testing.assert_array_equal(batch.mask, mask)
    assert ids.shape[1] in batch.mask.sum(1)


def test_decoded_pictures_keep_their_size_and_kind(kinds):
    modes = {kind: decoded.mode for kind, (decoded, _) in kinds.items()}
    assert modes["palette"] == "P"
    assert modes["sixteen bits"] == "L"
    assert modes["transparent"] == "RGBA"
    assert all(decoded.size == described.size for decoded, described in kinds.values())


def test_pictures_of_the_greyscale_teacher_have_three_equal_channels(real):
    ours = prepared("MedCLIP-ResNet", real["fundus"])
    np.testing.assert_array_equal(ours, np.repeat(ours[..., :1], 3, axis=-1))
