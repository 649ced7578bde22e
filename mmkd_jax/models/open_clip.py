"""open_clip's model folders: `open_clip_config.json` to and from our spec.

Source: mlfoundations/open_clip 3.3 `model.py` (`CLIPVisionCfg`, `CLIPTextCfg`), `factory.py`, `hf_model.py`. What the
config does not say comes from a BERT's `config.json` in the same folder, from what is known of the named BERT, or
from the shapes of the weights.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmkd_jax.errors import InputError, near
from mmkd_jax.models.state_dict import Tensors
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, ResNetTower, TextTower, TokenizerSpec

CONFIG, BERT_CONFIG = "open_clip_config.json", "config.json"
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BERTS = {  # published BERTs that dual encoders name
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": BERT_BASE,
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract": BERT_BASE,
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext": BERT_BASE,
    "bert-base-uncased": BERT_BASE,
    "google-bert/bert-base-uncased": BERT_BASE,
}
# timm's names: (width, layers, heads, patch, image size); all have an MLP of four widths and exact GELU.
TIMM = {
    "vit_tiny_patch16_224": (192, 12, 3, 16, 224),
    "vit_small_patch32_224": (384, 12, 6, 32, 224),
    "vit_small_patch16_224": (384, 12, 6, 16, 224),
    "vit_base_patch32_224": (768, 12, 12, 32, 224),
    "vit_base_patch16_224": (768, 12, 12, 16, 224),
    "vit_large_patch32_224": (1024, 24, 16, 32, 224),
    "vit_large_patch16_224": (1024, 24, 16, 16, 224),
    "vit_large_patch14_224": (1024, 24, 16, 14, 224),
}
TIMM_EPSILON = 1e-6
POOLER = "cls_last_hidden_state_pooler"


def to_config(spec: ModelSpec, bert: str = "") -> dict[str, Any]:
    """The content of `open_clip_config.json`.

    Args:
      spec: the model.
      bert: where open_clip finds the BERT's `config.json` and tokenizer: a folder or a name on a hub.

    Raises:
      InputError: open_clip has no such model.
    """
    image, text = spec.image, spec.text
    _require(image.layout in _VISION, f"a {image.kind} image tower")
    pools = f"pooling {text.pooling!r} with padding {text.padding!r}"
    _require((text.pooling, text.padding) == ("token", "masked"), pools)
    own = image.layout == "openai"  # timm's towers and ResNets have the activation that they have
    model: dict[str, Any] = {"embed_dim": spec.embed, "quick_gelu": own and image.activation == "quick_gelu"}
    model["vision_cfg"] = _VISION[image.layout](image)
    if text.kind == "bert":
        model["text_cfg"] = {
            "hf_model_name": bert,
            "hf_tokenizer_name": bert,
            "hf_proj_type": text.projection,
            "hf_pooler_type": POOLER,
            "context_length": text.context,
        }
    else:
        _require(not own or text.activation == image.activation, "two activations in one model")
        _require(text.projection == "linear", "an MLP after CLIP's text tower")
        model["quick_gelu"] = text.activation == "quick_gelu"
        model["text_cfg"] = {
            "context_length": text.positions,
            "vocab_size": text.vocab_size,
            "hf_tokenizer_name": bert,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_width / text.width,
            **_norm_config(text.norm_epsilon),
        }
    p = spec.preprocess
    preprocess = {"mean": p.mean, "std": p.std, "interpolation": p.interpolation, "resize_mode": "shortest"}
    return {"model_cfg": model, "preprocess_cfg": {name: _plain(value) for name, value in preprocess.items()}}


def bert_config(text: TextTower) -> dict[str, Any]:
    """The content of a BERT's `config.json` for transformers."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "intermediate_size": text.mlp_width,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.positions,
        "type_vocab_size": 2,
        "hidden_act": text.activation,
        "layer_norm_eps": text.norm_epsilon,
        "hidden_dropout_prob": text.dropout,
        "attention_probs_dropout_prob": text.dropout,
        "pad_token_id": 0,
    }


def to_spec(name: str, config: Mapping[str, Any], tensors: Tensors, bert: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec that a config and the shapes of the weights describe.

    Args:
      name: what to call the model.
      config: the content of `open_clip_config.json`.
      tensors: the weights.
      bert: the content of the BERT's `config.json` if there is one.

    Raises:
      InputError: the config asks for something that this project does not have.
    """
    model = config.get("model_cfg", config)
    vision, text, embed = model["vision_cfg"], model["text_cfg"], model["embed_dim"]
    quick = bool(model.get("quick_gelu", False))
    if "timm_model_name" in vision:
        image = _read_timm(vision)
    else:
        image = _read_vit(vision, quick) if isinstance(vision.get("layers", 12), int) else _read_resnet(vision)
    tower = _read_bert(text, tensors, bert) if "hf_model_name" in text else _read_clip_text(text, quick)
    p = config.get("preprocess_cfg", {})
    _require(p.get("resize_mode", "shortest") == "shortest", f"resize mode {p.get('resize_mode')!r}")
    chosen = {key: tuple(p[key]) for key in ("mean", "std") if key in p}
    return ModelSpec(
        name=name,
        image=image,
        text=tower,
        embed=embed,
        preprocess=Preprocess(image.image_size, p.get("interpolation", "bicubic"), **chosen),
        tokenizer=TokenizerSpec("wordpiece" if tower.kind == "bert" else "bpe"),
    )


def _vit_config(image: ImageTower) -> dict[str, Any]:
    _require(not image.patch_bias, "a patch bias without timm")
    return {
        "image_size": image.image_size,
        "layers": image.layers,
        "width": image.width,
        "head_width": image.width // image.heads,
        "patch_size": image.patch,
        "mlp_ratio": image.mlp_width / image.width,
        "no_ln_pre": not image.pre_norm,
        **_norm_config(image.norm_epsilon),
    }


def _timm_config(image: ImageTower) -> dict[str, Any]:
    sizes = (image.width, image.layers, image.heads, image.patch, image.image_size)
    known = {value: name for name, value in TIMM.items()}
    same = dataclasses.replace(
        image, mlp_width=4 * image.width, activation="gelu", norm_epsilon=TIMM_EPSILON, pre_norm=False, patch_bias=True
    )
    _require(sizes in known and same == image, f"a timm ViT of {sizes}")
    return {"timm_model_name": known[sizes], "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}


def _resnet_config(image: ResNetTower) -> dict[str, Any]:
    _require(len(image.stages) == 4, f"a ResNet of {len(image.stages)} stages")
    _require(image.norm_epsilon == 1e-5, f"a BatchNorm epsilon of {image.norm_epsilon}")
    return {
        "image_size": image.image_size,
        "layers": list(image.stages),
        "width": image.width,
        "head_width": image.features // image.heads,
        "patch_size": None,
    }


_VISION = {"openai": _vit_config, "timm": _timm_config, "modified_resnet": _resnet_config}


def _norm_config(epsilon: float) -> dict[str, Any]:
    return {} if epsilon == 1e-5 else {"norm_kwargs": {"eps": epsilon}}


def _read_vit(vision: Mapping[str, Any], quick: bool) -> ImageTower:
    known = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "no_ln_pre", "norm_kwargs"}
    _only(vision, known, {"patch_dropout": 0.0, "pool_type": "tok", "pos_embed_type": "learnable"}, "vision_cfg")
    width = vision.get("width", 768)
    return ImageTower(
        width=width,
        layers=vision.get("layers", 12),
        heads=width // vision.get("head_width", 64),
        patch=vision.get("patch_size", 16),
        image_size=vision.get("image_size", 224),
        mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
        activation="quick_gelu" if quick else "gelu",
        norm_epsilon=vision.get("norm_kwargs", {}).get("eps", 1e-5),
        pre_norm=not vision.get("no_ln_pre", False),
    )


def _read_resnet(vision: Mapping[str, Any]) -> ResNetTower:
    """open_clip's `ModifiedResNet`; its head count follows from the width that heads have."""
    _only(vision, {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}, {}, "vision_cfg")
    width, stages = vision.get("width", 64), tuple(vision["layers"])
    _require(len(stages) == 4, f"a ResNet of {len(stages)} stages")
    return ResNetTower(
        "modified_resnet",
        width=width,
        stages=stages,
        heads=width * 32 // vision.get("head_width", 64),
        image_size=vision.get("image_size", 224),
    )


def _read_timm(vision: Mapping[str, Any]) -> ImageTower:
    name = vision["timm_model_name"]
    if name not in TIMM:
        raise InputError(f"timm model {name!r} is not supported; {near(name, TIMM)}")
    # timm's own pooling, which an empty name keeps, is the class token.
    _require(vision.get("timm_pool", "avg") in ("", "token"), f"timm pooling {vision.get('timm_pool', 'avg')!r}")
    _require(vision.get("timm_proj", "linear") == "linear", f"timm projection {vision.get('timm_proj')!r}")
    width, layers, heads, patch, size = TIMM[name]
    _require(vision.get("image_size", size) == size, f"{name} at {vision.get('image_size')} px")
    return ImageTower(width, layers, heads, patch, size, 4 * width, "gelu", TIMM_EPSILON, False, True, "timm")


def _read_clip_text(text: Mapping[str, Any], quick: bool) -> TextTower:
    known = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"}
    known |= {"hf_tokenizer_name", "tokenizer_kwargs"}
    _only(text, known, {"pool_type": "argmax", "proj_type": "linear", "proj_bias": False, "pad_id": 0}, "text_cfg")
    width, context = text.get("width", 512), text.get("context_length", 77)
    return TextTower(
        kind="clip",
        width=width,
        layers=text.get("layers", 12),
        heads=text.get("heads", 8),
        mlp_width=int(width * text.get("mlp_ratio", 4.0)),
        vocab_size=text.get("vocab_size", 49408),
        positions=context,
        context=context,
        activation="quick_gelu" if quick else "gelu",
        norm_epsilon=text.get("norm_kwargs", {}).get("eps", 1e-5),
        projection="linear",
        dropout=0.0,
    )


def _read_bert(text: Mapping[str, Any], tensors: Tensors, bert: Mapping[str, Any] | None) -> TextTower:
    """A BERT; `proj` and `pooler_type` are what open_clip called its options before version 2."""
    name = text["hf_model_name"]
    bert = bert or BERTS.get(name)
    if bert is None:
        raise InputError(f"BERT {name!r} is not known here; put its config.json into the folder; {near(name, BERTS)}")
    pooler = text.get("hf_pooler_type", text.get("pooler_type"))
    _require(pooler == POOLER, f"pooling {pooler!r}")
    projection = text.get("hf_proj_type", text.get("proj", "mlp"))
    _require(projection in ("linear", "mlp"), f"projection {projection!r}")
    shapes = {key.split("embeddings.", 1)[1]: np.shape(t) for key, t in tensors.items() if ".embeddings." in key}
    positions = shapes["position_embeddings.weight"][0]
    return TextTower(
        kind="bert",
        width=bert["hidden_size"],
        layers=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"],
        mlp_width=bert["intermediate_size"],
        vocab_size=shapes["word_embeddings.weight"][0],
        positions=positions,
        context=min(text.get("context_length", 77), positions),
        activation=bert.get("hidden_act", "gelu"),
        norm_epsilon=bert.get("layer_norm_eps", 1e-12),
        projection=projection,
        dropout=bert.get("hidden_dropout_prob", 0.1),
    )


def _only(config: Mapping[str, Any], known: set[str], fixed: Mapping[str, Any], where: str) -> None:
    """Refuses options that change the model and are not understood; empty ones change nothing."""
    for key, value in config.items():
        if key not in known and value not in (None, False, fixed.get(key)):
            raise InputError(f"{where}.{key} = {value!r} is not supported")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InputError(f"open_clip's config and this project have no common form for {what}")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
