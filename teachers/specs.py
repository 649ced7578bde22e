"""What is known of published biomedical CLIP models: one record a teacher, because weights do not say it.

Each says where the architecture was read, and which statements could not be checked against the published weights or
config. A folder in open_clip's layout describes itself; these records serve bare weight files, and give folders their
licence and source.
"""

import dataclasses

from mmkd_jax import registry
from mmkd_jax.errors import InputError
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower, TokenizerSpec


@dataclasses.dataclass(frozen=True)
class Facts:
    """A published model.

    Attributes:
      spec: what it takes to build and feed it.
      weights: where its authors put them, and in which form.
      verified: facts read in the authors' code or config, or fixed by the size of the published features.
      unverified: facts that are likely but that no public source seen states.
    """

    spec: ModelSpec
    weights: str
    verified: str
    unverified: str = ""


CLIP_BPE, WORDPIECE = TokenizerSpec("bpe"), TokenizerSpec("wordpiece")
BIOMED_BERT = TextTower(context=256)
TIMM_B16 = ImageTower(768, 12, 12, 16, 224, 3072, "gelu", 1e-6, False, True, "timm")
ALL = ("ct", "mri", "xray", "ultrasound", "pathology", "fundus", "dermatology", "endoscopy", "microscopy")


def vit(patch: int, activation: str) -> ImageTower:
    """OpenAI's ViT-B at 224 px."""
    return ImageTower(768, 12, 12, patch, 224, 3072, activation)


def clip_text(activation: str, width: int = 512) -> TextTower:
    """CLIP's text tower with 77 tokens of its own vocabulary."""
    heads = width // 64
    return TextTower("clip", width, 12, heads, 4 * width, 49408, 77, 77, activation, 1e-5, "linear", 0.0)


BIOMEDCLIP = Facts(
    ModelSpec(
        name="BiomedCLIP",
        image=TIMM_B16,
        text=BIOMED_BERT,
        embed=512,
        tokenizer=WORDPIECE,
        license="mit",
        source="https://huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        modalities=ALL,
    ),
    weights="open_clip_pytorch_model.bin beside open_clip_config.json and vocab.txt (a pickle: convert it first)",
    verified="towers, pooling, projections, context, mean and std (its open_clip_config.json); 195,902,721 "
    "parameters, which is the published file's size",
    unverified="interpolation and resize mode (open_clip's defaults, which its config does not override)",
)


UNIMED_CLIP = Facts(
    ModelSpec(
        name="UniMed-CLIP",
        image=vit(16, "quick_gelu"),
        text=BIOMED_BERT,
        embed=512,
        tokenizer=WORDPIECE,
        license="cc-by-nc-4.0",
        source="https://github.com/mbzuai-oryx/UniMed-CLIP",
        modalities=("ct", "mri", "xray", "ultrasound", "pathology", "fundus"),
    ),
    weights="unimed-clip-vit-b16.pt (a pickle: convert it first); keys `visual.*` and `text_encoder.*`",
    verified="towers, QuickGELU, pooling, projections, context, preprocessing, key names (src/open_clip/model.py, "
    "hf_model.py, transform.py of the repository)",
    unverified="which of its models MMKD-CLIP used; features of width 512 leave only the B/16 one",
)


BMC_CLIP = Facts(
    ModelSpec(
        name="BMC-CLIP",
        image=ImageTower(1024, 24, 16, 14, 224, 4096, "gelu"),
        text=clip_text("gelu", 768),
        embed=768,
        tokenizer=CLIP_BPE,
        source="https://huggingface.co/BIOMEDICA/BMC_CLIP_CF",
        modalities=ALL,
    ),
    weights="BMC_CLIP_CF.pt (a training checkpoint: convert it first)",
    verified="open_clip's ViT-L-14 with exact GELU (open_clip's config of that name; arXiv 2501.07171)",
    unverified="licence; which of the full, filtered and balanced models MMKD-CLIP used",
)


def _quilt(name: str, patch: int) -> Facts:
    return Facts(
        ModelSpec(
            name=name,
            image=vit(patch, "gelu"),
            text=clip_text("gelu"),
            embed=512,
            tokenizer=CLIP_BPE,
            license="mit",
            source=f"https://huggingface.co/wisdomik/{name}",
            modalities=("pathology",),
        ),
        weights="open_clip_pytorch_model.bin beside open_clip_config.json (a pickle: convert it first)",
        verified="towers and exact GELU: its open_clip_config.json has no quick_gelu, so open_clip runs exact GELU",
        unverified="which QuiltNet MMKD-CLIP used",
    )


QUILTNET_B32, QUILTNET_B16 = _quilt("QuiltNet-B-32", 32), _quilt("QuiltNet-B-16", 16)
QUILTNET_B16_PMB = dataclasses.replace(
    BIOMEDCLIP,
    spec=dataclasses.replace(
        BIOMEDCLIP.spec,
        name="QuiltNet-B-16-PMB",
        source="https://huggingface.co/wisdomik/QuiltNet-B-16-PMB",
        modalities=("pathology",),
    ),
    verified="the architecture and config of BiomedCLIP (its open_clip_config.json)",
    unverified=f"{BIOMEDCLIP.unverified}; which QuiltNet MMKD-CLIP used",
)


PLIP = Facts(
    ModelSpec(
        name="PLIP",
        image=vit(32, "quick_gelu"),
        text=clip_text("quick_gelu"),
        embed=512,
        preprocess=Preprocess(rgb_first=True),
        tokenizer=CLIP_BPE,
        source="https://huggingface.co/vinid/plip",
        modalities=("pathology",),
    ),
    weights="the files of Hugging Face's CLIPModel; model.safetensors if there is one, else convert it first",
    verified="CLIPModel and CLIPProcessor (plip.py of PathologyFoundation/plip); width 512",
    unverified="its config.json (sizes and QuickGELU are those of CLIP ViT-B/32); licence",
)


PUBMEDCLIP = Facts(
    ModelSpec(
        name="PubMedCLIP",
        image=vit(32, "quick_gelu"),
        text=clip_text("quick_gelu"),
        embed=512,
        tokenizer=CLIP_BPE,
        license="mit",
        source="https://github.com/sarahESL/PubMedCLIP",
        modalities=("ct", "mri", "xray", "ultrasound"),
    ),
    weights="PubMedCLIP_ViT32.pth (half precision, OpenAI's names; convert it first)",
    verified="towers and file layout (PubMedCLIP/main/train.py fine-tunes OpenAI's ViT-B/32)",
    unverified="mean and std that MMKD-CLIP used: training took ImageNet's, later users take CLIP's as here",
)


TEACHERS = {
    "BiomedCLIP": "teachers.specs.BIOMEDCLIP",
    "UniMed-CLIP": "teachers.specs.UNIMED_CLIP",
    "BMC-CLIP": "teachers.specs.BMC_CLIP",
    "QuiltNet-B-32": "teachers.specs.QUILTNET_B32",
    "QuiltNet-B-16": "teachers.specs.QUILTNET_B16",
    "QuiltNet-B-16-PMB": "teachers.specs.QUILTNET_B16_PMB",
    "PLIP": "teachers.specs.PLIP",
    "PubMedCLIP": "teachers.specs.PUBMEDCLIP",
}


def find(name: str) -> Facts:
    """The record of `name`; a dotted path (`my_lab.teachers.OURS`) names one of one's own.

    Raises:
      InputError: there is none; near names are told.
    """
    facts = registry.resolve(name, TEACHERS, "teacher")
    if not isinstance(facts, Facts):
        raise InputError(f"teacher {name!r} is a {type(facts).__name__}, not teachers.specs.Facts")
    return facts
