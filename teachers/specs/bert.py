"""A vision transformer with BERT and an MLP: BiomedCLIP, UniMed-CLIP and the variants named PMB.

The student published with MMKD-CLIP is of UniMed-CLIP's architecture, under the same names.
"""

import dataclasses

from mmkd_jax.specs import ImageTower, ModelSpec, TextTower
from teachers.specs.clip import OPEN_CLIP_FOLDER, WHICH, vit
from teachers.specs.facts import ALL, WORDPIECE, Facts, known, likely

BIOMED_BERT = TextTower(context=256)
TIMM_B16 = ImageTower(768, 12, 12, 16, 224, 3072, "gelu", 1e-6, False, True, "timm")

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
    weights=f"{OPEN_CLIP_FOLDER} and vocab.txt",
    facts=(
        known("towers, pooling, projections, context, mean and std", "its open_clip_config.json"),
        known("195,902,721 parameters", "the size of the published file"),
        likely("interpolation and resize mode", "open_clip's defaults, which its config does not override"),
    ),
    published_as="BiomedCLIP",
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
        modalities=("ct", "mri", "xray", "ultrasound", "histopathology", "fundus"),
    ),
    weights="unimed-clip-vit-b16.pt; keys `visual.*` and `text_encoder.*`; vocab.txt is BiomedBERT's",
    facts=(
        known("towers, QuickGELU, pooling, projections, context", "src/open_clip/model.py and hf_model.py"),
        known("preprocessing and key names", "src/open_clip/transform.py and model.py"),
        known("which size", "features of width 512 in the published samples leave only ViT-B/16"),
    ),
    layout="unimed",
    terms="non-commercial",
    published_as="UniMedCLIP",
)

MMKD_CLIP = Facts(
    dataclasses.replace(
        UNIMED_CLIP.spec,
        name="MMKD-CLIP",
        license="unknown",
        source="https://github.com/wangshansong1/MMKD-CLIP",
        modalities=ALL,
    ),
    weights="MMKD_B16.pth, linked in the repository's README; vocab.txt is BiomedBERT's",
    facts=(
        known("UniMed-CLIP's architecture, preprocessing and key names", "its src/open_clip is UniMed-CLIP's"),
        known("ViT-B-16-quickgelu, BiomedBERT, 256 tokens", "README.md and src/training/run_configs_400m.py"),
        likely("licence", "the repository has an MIT text that names an unrelated owner"),
    ),
    layout="unimed",
    terms="the published student; licence of the weights not stated, UniMed-CLIP among its teachers is non-commercial",
)


def _like_biomedclip(name: str, modalities: tuple[str, ...], *facts, published_as: str) -> Facts:
    """A model of BiomedCLIP's architecture under another name."""
    source = f"https://huggingface.co/wisdomik/{name}"
    spec = dataclasses.replace(BIOMEDCLIP.spec, name=name, source=source, modalities=modalities)
    facts += (likely("which variant MMKD-CLIP used", WHICH), *BIOMEDCLIP.unverified)
    return dataclasses.replace(BIOMEDCLIP, spec=spec, facts=facts, published_as=published_as)


QUILTNET_B16_PMB = _like_biomedclip(
    "QuiltNet-B-16-PMB",
    ("histopathology",),
    known("the architecture and config of BiomedCLIP", "its open_clip_config.json"),
    published_as="QuiltNet",
)
GENMEDCLIP_B16_PMB = _like_biomedclip(
    "GenMedClip-B-16-PMB",
    ALL,
    known("embedding of 512", "the published samples"),
    likely("the architecture and config of BiomedCLIP", "its name; its config was not seen"),
    published_as="GenMedClip",
)
