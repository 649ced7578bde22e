"""Image towers that are no plain vision transformers, with BERT: PMC-CLIP and MedCLIP."""

import dataclasses

from mmkd_jax.specs import ModelSpec, Preprocess, ResNetTower, SwinTower, TextTower
from teachers.specs.facts import ALL, PLAIN_WORDPIECE, Facts, known, likely

TRAINING = "src/pmc_clip of github.com/WeixiongLin/PMC-CLIP"

PMC_CLIP = Facts(
    ModelSpec(
        name="PMC-CLIP",
        image=ResNetTower("modified_resnet", 64, (3, 4, 6, 3), 32, 224),
        text=TextTower(context=77, projection="linear", pooling="token", padding="attended"),
        embed=768,
        tokenizer=PLAIN_WORDPIECE,
        license="mit",
        source="https://github.com/WeixiongLin/PMC-CLIP",
        modalities=ALL,
    ),
    weights="of the data set axiong/pmc_oa: checkpoint.pt (keys begin with `module.`), or the folder of "
    "image_encoder(resnet50).pth, text_encoder.pth and text_projection_layer.pth; vocab.txt is PubMedBERT's",
    facts=(
        known("ModifiedResNet [3, 4, 6, 3] of width 64, attention pool to 768, 224 px", TRAINING),
        known("PubMedBERT, context 77, a bare text projection, OpenAI's mean and std", TRAINING),
        known("transformers' tokenizer on the text as it is", f"{TRAINING}: model/pmc_clip.py"),
        known(
            "32 heads in the attention pool, class token, padding attended to", f"{TRAINING}: what it was trained with"
        ),
        likely("which recipe MMKD-CLIP used", "three are in circulation and load alike; see the other two"),
    ),
    layout="pmc_clip",
    terms="the repository is MIT; the weights lie with a data set that has terms of its own",
    published_as="PMCCLIP",
)


def _recipe(name: str, heads: int, pooling: str, padding: str, source: str) -> Facts:
    """PMC-CLIP's weights as others run them: the file stores neither heads nor pooling nor mask."""
    spec = dataclasses.replace(
        PMC_CLIP.spec,
        name=name,
        image=dataclasses.replace(PMC_CLIP.spec.image, heads=heads),
        text=dataclasses.replace(PMC_CLIP.spec.text, pooling=pooling, padding=padding),
    )
    facts = (*PMC_CLIP.facts[:3], likely(f"{heads} heads, pooling {pooling!r}, padding {padding!r}", source))
    return dataclasses.replace(PMC_CLIP, spec=spec, facts=(*facts, PMC_CLIP.facts[-1]))


PMC_CLIP_POOLER = _recipe("PMC-CLIP-pooler", 8, "pooler", "attended", "github.com/HealthX-Lab/BiomedCoOp")
PMC_CLIP_MASKED = _recipe("PMC-CLIP-masked", 8, "token", "masked", "a later user's code")

MEDCLIP_PREPROCESS = Preprocess(
    mean=(0.5862785803043838,) * 3, std=(0.27950088968644304,) * 3, frame="square", greyscale=True
)
MEDCLIP_CODE = "github.com/RyanWangZf/MedCLIP"
MEDCLIP_MODEL = f"{MEDCLIP_CODE}: medclip/modeling_medclip.py"
_MEDCLIP_TEXT = (
    known("Bio_ClinicalBERT, mean over tokens of the states 1, 2 and last", MEDCLIP_MODEL),
    known("black square, greyscale, mean and std", f"{MEDCLIP_CODE}: medclip/dataset.py"),
    likely(
        "padding left out of the mean",
        "the published code counts it, so that a caption's vector depends on its "
        "batch; this is what that code gives for one caption at a time",
    ),
    known("77 tokens, transformers' tokenizer on the text as it is", f"{MEDCLIP_CODE}: medclip/dataset.py"),
    likely("that MedCLIP is one of the nine, and which of its two models", "no sample of it is published"),
    likely("licence", "none was found"),
)
MEDCLIP_VIT = Facts(
    ModelSpec(
        name="MedCLIP-ViT",
        image=SwinTower(),
        text=TextTower(vocab_size=28996, context=77, projection="linear", pooling="layers"),
        embed=512,
        preprocess=MEDCLIP_PREPROCESS,
        tokenizer=PLAIN_WORDPIECE,
        source="https://github.com/RyanWangZf/MedCLIP",
        modalities=("xray",),
    ),
    weights="pytorch_model.bin in the zip named in medclip_vit_weight.txt; vocab.txt is Bio_ClinicalBERT's",
    facts=(
        known("Swin-T, pooled, with a projection without bias", MEDCLIP_MODEL),
        *_MEDCLIP_TEXT,
    ),
    layout="medclip",
    terms="licence not known",
)
MEDCLIP_RESNET = dataclasses.replace(
    MEDCLIP_VIT,
    spec=dataclasses.replace(MEDCLIP_VIT.spec, name="MedCLIP-ResNet", image=ResNetTower("resnet", heads=0)),
    weights="pytorch_model.bin in the zip named in medclip_resnet_weight.txt; vocab.txt is Bio_ClinicalBERT's",
    facts=(
        known("ResNet-50 whose fc is a projection without bias", MEDCLIP_MODEL),
        *_MEDCLIP_TEXT,
    ),
)
