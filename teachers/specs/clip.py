"""CLIP's own two towers: BMC-CLIP, QuiltNet, GenMedCLIP, PLIP, PubMedCLIP."""

import dataclasses

from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower
from teachers.specs.facts import ALL, CLIP_BPE, PLAIN_BPE, Facts, known, likely

OPEN_CLIP_FOLDER = "open_clip_pytorch_model.bin beside open_clip_config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHICH = "features of width 512 in the published samples fit all of its models"


def vit(patch: int, activation: str) -> ImageTower:
    """OpenAI's ViT-B at 224 px."""
    return ImageTower(768, 12, 12, patch, 224, 3072, activation)


def clip_text(activation: str, width: int = 512) -> TextTower:
    """CLIP's text tower with 77 tokens of its own vocabulary."""
    heads = width // 64
    return TextTower("clip", width, 12, heads, 4 * width, 49408, 77, 77, activation, 1e-5, "linear", 0.0)


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
    weights="BMC_CLIP_CF.pt (a training checkpoint with `state_dict`; keys begin with `module.`)",
    facts=(
        known("ViT-L-14 with exact GELU", "open_clip's config of that name; arXiv 2501.07171"),
        known("embedding of 768", "the published samples"),
        likely("preprocessing and tokenizer", "open_clip's, which the authors' fork leaves as they are"),
        likely("which of the full, filtered and balanced models MMKD-CLIP used", "all are ViT-L/14 as far as known"),
        likely("licence and access", "none was found; users log in to fetch it"),
    ),
    terms="licence not known; the weights may ask for a login",
    published_as="BMCA",
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
            modalities=("histopathology",),
        ),
        weights=OPEN_CLIP_FOLDER,
        facts=(
            known("towers, context, mean and std", "its open_clip_config.json"),
            known("exact GELU", "that config has no quick_gelu, which is what open_clip goes by"),
            likely("which QuiltNet MMKD-CLIP used", f"{WHICH}; B-32 is the one most used"),
        ),
        published_as="QuiltNet",
    )


QUILTNET_B32, QUILTNET_B16 = _quilt("QuiltNet-B-32", 32), _quilt("QuiltNet-B-16", 16)


def _genmed(name: str, *facts, patch: int = 32, source: str = "") -> Facts:
    return Facts(
        ModelSpec(
            name=name,
            image=vit(patch, "gelu"),
            text=clip_text("gelu"),
            embed=512,
            tokenizer=CLIP_BPE,
            license="mit",
            source=f"https://huggingface.co/wisdomik/{source or name}",
            modalities=ALL,
        ),
        weights="open_clip_model.safetensors beside open_clip_config.json, which says what is not verified here",
        facts=(
            known("CLIP's tokenizer, hence its text tower", "the size of the tokenizer.json beside the weights"),
            known("embedding of 512", "the published samples"),
            *facts,
            likely("exact GELU and preprocessing", "open_clip's defaults; its config was not seen"),
            likely("which GenMedCLIP MMKD-CLIP used", WHICH),
        ),
        published_as="GenMedClip",
    )


_PATCH = "conversion refuses weights of another, naming the shapes; there is a record for 32 and one for 16"
GENMEDCLIP = _genmed("GenMedClip", likely("patch size 32", _PATCH))
GENMEDCLIP_B16 = _genmed("GenMedClip-B-16", likely("patch size 16", _PATCH), patch=16, source="GenMedClip")
GENMEDCLIP_B32 = _genmed("GenMedClip-B-32", likely("ViT-B with patch size 32", "its name"))

PLIP = Facts(
    ModelSpec(
        name="PLIP",
        image=vit(32, "quick_gelu"),
        text=clip_text("quick_gelu"),
        embed=512,
        preprocess=Preprocess(rgb_first=True),
        tokenizer=PLAIN_BPE,
        source="https://huggingface.co/vinid/plip",
        modalities=("histopathology",),
    ),
    weights="the folder of Hugging Face's CLIPModel: pytorch_model.bin or model.safetensors beside config.json",
    facts=(
        known("CLIPModel and CLIPProcessor", "plip.py of github.com/PathologyFoundation/plip"),
        known("embedding of 512", "the published samples"),
        likely("sizes and QuickGELU", "those of CLIP ViT-B/32, which it fine-tunes; its config.json was not seen"),
        likely("licence", "none was found"),
    ),
    layout="transformers_clip",
    terms="licence not known",
    published_as="PLIP",
)

_PUBMED_FACTS = (
    known("ViT-B/32 with QuickGELU", "PubMedCLIP/main/train.py fine-tunes OpenAI's ViT-B/32"),
    known("which size", "features of width 512 in the published samples leave only ViT-B/32"),
)
_PUBMED_COPY = likely("which copy MMKD-CLIP used", "both hold ViT-B/32")
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
    weights="PubMedCLIP_ViT32.pth (`state_dict` in half precision under OpenAI's names)",
    facts=(
        *_PUBMED_FACTS,
        known("file layout and half precision", "PubMedCLIP/main/train.py"),
        likely("mean and std that MMKD-CLIP used", "training took ImageNet's, later users take CLIP's as here"),
        _PUBMED_COPY,
    ),
    published_as="PUBMEDCLIP",
)
PUBMEDCLIP_IMAGENET = dataclasses.replace(
    PUBMEDCLIP,
    spec=dataclasses.replace(
        PUBMEDCLIP.spec, name="PubMedCLIP-ImageNet", preprocess=Preprocess(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    ),
    facts=(
        *_PUBMED_FACTS,
        known("file layout and half precision", "PubMedCLIP/main/train.py"),
        known("ImageNet's mean and std in training", "PubMedCLIP/lib/data_transform/transform_wrapper.py"),
        likely("mean and std that MMKD-CLIP used", "these are the training's; the record PubMedCLIP has the users'"),
        _PUBMED_COPY,
    ),
)
PUBMEDCLIP_HF = Facts(
    dataclasses.replace(
        PUBMEDCLIP.spec,
        name="PubMedCLIP-HF",
        preprocess=Preprocess(rgb_first=True),
        tokenizer=PLAIN_BPE,
        source="https://huggingface.co/flaviagiammarino/pubmed-clip-vit-base-patch32",
    ),
    weights="the folder of Hugging Face's CLIPModel: pytorch_model.bin or model.safetensors beside config.json",
    facts=(
        *_PUBMED_FACTS,
        known("a copy of the ViT-B/32 model in transformers' layout, CLIPProcessor", "its model card"),
        likely("licence", "that of the original repository"),
        _PUBMED_COPY,
    ),
    layout="transformers_clip",
    published_as="PUBMEDCLIP",
)
