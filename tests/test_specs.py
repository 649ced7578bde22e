"""The records of published models: what they say, the names and shapes of their weights, and what is not theirs."""

import json
import re
import textwrap

import jax
import numpy as np
import pytest

from mmkd_jax.errors import InputError
from mmkd_jax.models import state_dict
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ModelSpec
from teachers import specs

NINE = ("BMCA", "BiomedCLIP", "UniMedCLIP", "QuiltNet", "GenMedClip", "PLIP", "PUBMEDCLIP", "PMCCLIP")


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a teacher's weights, computed without any."""
    facts = specs.find(name)
    shapes = DualEncoder(facts.spec).shapes()
    empty = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    return {key: t.shape for key, t in state_dict.from_params(facts.spec, empty, facts.layout).items()}


def folded(names: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """The same with the numbers of layers pulled out: `a.{0..11}.b` for twelve keys of one shape, in sorted order."""
    found: dict[tuple[str, str], list[str]] = {}
    for key, shape in names.items():
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", key)
        place = (re.sub(r"(?<=\.)\d+(?=\.)", "#", key), "x".join(map(str, shape)) or "scalar")
        found.setdefault(place, []).append(".".join(numbers))
    lines = {}
    for (key, shape), numbers in found.items():
        lines.setdefault(key, []).append(
            f"{shape} for {' '.join(sorted(numbers, key=natural))}" if "#" in key else shape
        )
    return {key: "; ".join(sorted(lines[key])) for key in sorted(lines)}


def natural(text: str) -> list[int]:
    return [int(part) for part in text.split(".") if part]


@pytest.fixture(scope="module")
def golden(repository):
    return json.loads((repository / "tests" / "golden" / "teachers.json").read_text())


@pytest.mark.parametrize("name", specs.TEACHERS)
def test_names_and_shapes_of_the_weights(name, golden):
    record = golden["lists"][golden["teachers"][name]["list"]]
    names = published(name)
    assert len(names) == golden["teachers"][name]["tensors"]
    assert sum(int(np.prod(shape)) for shape in names.values()) == golden["teachers"][name]["numbers"]
    assert folded(names) == record


def test_the_golden_lists_are_of_all_teachers(golden):
    assert set(golden["teachers"]) == set(specs.TEACHERS)
    assert {entry["list"] for entry in golden["teachers"].values()} == set(golden["lists"])


def test_folding_loses_nothing():
    names = {"a.0.w": (2,), "a.1.w": (2,), "a.10.w": (3,), "b": (), "c.0.1.w": (4, 5)}
    wanted = {"a.#.w": "2 for 0 1; 3 for 10", "b": "scalar", "c.#.#.w": "4x5 for 0.1"}
    assert folded(names) == wanted
    assert folded({**names, "a.1.w": (3,)}) != wanted


@pytest.mark.parametrize("name", ["BMC-CLIP", "QuiltNet-B-16", "BiomedCLIP", "UniMed-CLIP", "PLIP"])
def test_the_libraries_have_the_same_names(name):
    """Models of open_clip and transformers at full size, without memory."""
    torch = pytest.importorskip("torch", reason="the references need torch")
    import model_references as ref
    from open_clip.hf_model import HFTextEncoder
    from transformers import CLIPConfig, CLIPModel

    spec = specs.find(name).spec
    with torch.device("meta"):
        if name == "PLIP":
            theirs = CLIPModel(CLIPConfig(projection_dim=512)).state_dict()
        elif spec.text.kind == "clip":
            theirs = ref.open_clip.model.CLIP(
                spec.embed,
                {"layers": spec.image.layers, "width": spec.image.width, "patch_size": spec.image.patch},
                {"width": spec.text.width, "heads": spec.text.heads, "layers": spec.text.layers},
            ).state_dict()
        else:
            vision = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "", "timm_proj": "linear"}
            vision = vision if spec.image.layout == "timm" else {"patch_size": 16}
            tower = ref.open_clip.model._build_vision_tower(spec.embed, vision, False).state_dict()
            pool = "cls_last_hidden_state_pooler"
            text = HFTextEncoder("", 512, ref.bert_config(spec.text), pooler_type=pool, proj_type="mlp")
            prefix = "text." if spec.image.layout == "timm" else "text_encoder."
            theirs = {f"visual.{key}": value for key, value in tower.items()}
            theirs |= {f"{prefix}{k}": v for k, v in text.state_dict().items() if ".pooler." not in k}
            theirs["logit_scale"] = torch.zeros(())
    theirs = {key: tuple(value.shape) for key, value in theirs.items() if not key.endswith("position_ids")}
    assert published(name) == theirs


@pytest.mark.parametrize("name", ["QuiltNet-B-32", "UniMed-CLIP", "PLIP", "PMC-CLIP", "MedCLIP-ViT"])
def test_wrong_keys_are_named(name):
    facts = specs.find(name)
    names = {key: np.broadcast_to(np.float32(0), shape) for key, shape in published(name).items()}
    key = next(key for key in names if key.startswith(("visual.", "vision_model.")) and names[key].ndim == 1)

    def refused(match, tensors):
        with pytest.raises(InputError, match=re.escape(match)) as caught:
            state_dict.to_params(facts.spec, tensors)
        assert f"these are not the weights of {name}" in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(f"missing {key}", {k: v for k, v in names.items() if k != key})
    refused("left over visual.stranger", {**names, "visual.stranger": np.zeros(2, np.float32)})
    refused(f"{key} is (3,), not", {**names, key: np.zeros(3, np.float32)})


# What weights do not tell, from the sources that the records name: (activation, epsilon, heads, rgb first) of the image
# tower; (activation, epsilon, heads, context, pooling, padding, projection, texts repaired) of the text tower.
CLIP_B = ("gelu", 1e-5, 8, 77, "token", "masked", "linear", True)
CLIP_B_QUICK = ("quick_gelu", *CLIP_B[1:])
BIOMED = ("gelu", 1e-12, 12, 256, "token", "masked", "mlp", True)
TIMM = ("gelu", 1e-6, 12, False)
SWITCHES = {
    "BMC-CLIP": (("gelu", 1e-5, 16, False), ("gelu", 1e-5, 12, *CLIP_B[3:])),
    "BiomedCLIP": (TIMM, BIOMED),
    "UniMed-CLIP": (("quick_gelu", 1e-5, 12, False), BIOMED),
    "MMKD-CLIP": (("quick_gelu", 1e-5, 12, False), BIOMED),
    **dict.fromkeys(("QuiltNet-B-32", "QuiltNet-B-16"), (("gelu", 1e-5, 12, False), CLIP_B)),
    **dict.fromkeys(("GenMedClip", "GenMedClip-B-16", "GenMedClip-B-32"), (("gelu", 1e-5, 12, False), CLIP_B)),
    **dict.fromkeys(("QuiltNet-B-16-PMB", "GenMedClip-B-16-PMB"), (TIMM, BIOMED)),
    **dict.fromkeys(("PLIP", "PubMedCLIP-HF"), (("quick_gelu", 1e-5, 12, True), (*CLIP_B_QUICK[:-1], False))),
    **dict.fromkeys(("PubMedCLIP", "PubMedCLIP-ImageNet"), (("quick_gelu", 1e-5, 12, False), CLIP_B_QUICK)),
    "PMC-CLIP": ((None, 1e-5, 32, False), ("gelu", 1e-12, 12, 77, "token", "attended", "linear", False)),
    "PMC-CLIP-pooler": ((None, 1e-5, 8, False), ("gelu", 1e-12, 12, 77, "pooler", "attended", "linear", False)),
    "PMC-CLIP-masked": ((None, 1e-5, 8, False), ("gelu", 1e-12, 12, 77, "token", "masked", "linear", False)),
    "MedCLIP-ViT": (("gelu", 1e-5, 3, False), ("gelu", 1e-12, 12, 77, "layers", "masked", "linear", False)),
    "MedCLIP-ResNet": ((None, 1e-5, 0, False), ("gelu", 1e-12, 12, 77, "layers", "masked", "linear", False)),
}


@pytest.mark.parametrize("name", specs.TEACHERS)
def test_what_weights_do_not_tell(name):
    """The reference modules are built from the same records, so that they cannot see a wrong one."""
    spec = specs.find(name).spec
    image, text = spec.image, spec.text
    ours = (getattr(image, "activation", None), image.norm_epsilon, image.heads, spec.preprocess.rgb_first)
    words = (text.activation, text.norm_epsilon, text.heads, text.context, text.pooling, text.padding, text.projection)
    assert (ours, (*words, spec.tokenizer.repair)) == SWITCHES[name]


@pytest.mark.parametrize("name", specs.TEACHERS)
def test_a_record_is_complete(name):
    facts = specs.find(name)
    spec = facts.spec
    assert spec.name == name
    assert spec.source.startswith("https://")
    assert spec.modalities
    assert facts.verified
    assert all(fact.about and fact.source for fact in facts.facts)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.license != "unknown" or any("licence" in fact.about for fact in facts.unverified)
    page = specs.page(name)
    assert all(fact.about in page for fact in facts.facts)
    assert max(map(len, page.splitlines())) < 250


def test_all_nine_are_there():
    assert {specs.find(name).published_as for name in specs.TEACHERS} - {""} == set(NINE)
    assert [name for name in specs.TEACHERS if not specs.find(name).published_as] == [
        "MedCLIP-ViT",
        "MedCLIP-ResNet",
        "MMKD-CLIP",
    ]


def test_the_readme_has_the_table_of_the_records(repository):
    assert specs.markdown() in (repository / "teachers" / "README.md").read_text()


def test_the_readmes_tenth_teacher_works(repository, tmp_path, monkeypatch):
    text = (repository / "teachers" / "README.md").read_text()
    code = re.search(r"    # my_lab/teachers.py\n(.*?)\n\nand it is", text, re.DOTALL)[1]
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "teachers.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    assert "mean and std: CLIP's, as our code sets no others" in specs.page("my_lab.teachers.OURS")
    assert specs.find("my_lab.teachers.OURS").spec.text.context == 128
