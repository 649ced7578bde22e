"""Published names of parameters: one entry for each parameter of ours, with how the arrays relate.

A further family is a further function that yields entries, and its place in `LAYOUTS`.
"""

import dataclasses
from collections.abc import Callable

from mmkd_jax.errors import InputError
from mmkd_jax.models import layouts_resnet, layouts_swin
from mmkd_jax.models.relations import CONV, LINEAR, OUT, SAME, TABLE, TOKEN, Entry, entry, linear, norm, qkv
from mmkd_jax.specs import ModelSpec


def _resblocks(path: str, key: str) -> list[Entry]:
    """The blocks of OpenAI's `Transformer`."""
    ours, theirs = f"{path}/layers", f"{key}transformer.resblocks.{{i}}"
    return [
        *norm(f"{ours}/norm1", f"{theirs}.ln_1"),
        *norm(f"{ours}/norm2", f"{theirs}.ln_2"),
        *qkv(f"{ours}/attention/qkv", (f"{theirs}.attn.in_proj_weight",), (f"{theirs}.attn.in_proj_bias",)),
        *linear(f"{ours}/attention/out", f"{theirs}.attn.out_proj", OUT),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj"),
    ]


def openai_image(spec: ModelSpec) -> list[Entry]:
    """OpenAI's and open_clip's `VisionTransformer`, under `visual.`."""
    return [
        entry("image/patch/kernel", CONV, "visual.conv1.weight"),
        entry("image/class_token", SAME, "visual.class_embedding"),
        entry("image/positions", SAME, "visual.positional_embedding"),
        *(norm("image/pre_norm", "visual.ln_pre") if spec.image.pre_norm else ()),
        *_resblocks("image", "visual."),
        *norm("image/norm", "visual.ln_post"),
        entry("image/projection/kernel", SAME, "visual.proj"),
    ]


def timm_image(spec: ModelSpec) -> list[Entry]:
    """timm's `VisionTransformer` with open_clip's linear head, under `visual.`."""
    ours, theirs = "image/layers", "visual.trunk.blocks.{i}"
    return [
        *linear("image/patch", "visual.trunk.patch_embed.proj", CONV),
        entry("image/class_token", TOKEN, "visual.trunk.cls_token"),
        entry("image/positions", TABLE, "visual.trunk.pos_embed"),
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *qkv(f"{ours}/attention/qkv", (f"{theirs}.attn.qkv.weight",), (f"{theirs}.attn.qkv.bias",)),
        *linear(f"{ours}/attention/out", f"{theirs}.attn.proj", OUT),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
        *norm("image/norm", "visual.trunk.norm"),
        entry("image/projection/kernel", LINEAR, "visual.head.proj.weight"),
    ]


def clip_text(spec: ModelSpec) -> list[Entry]:
    """The text tower of open_clip's `CLIP`, without a prefix."""
    return [
        entry("text/tokens/embedding", SAME, "token_embedding.weight"),
        entry("text/positions", SAME, "positional_embedding"),
        *_resblocks("text", ""),
        *norm("text/norm", "ln_final"),
        entry("text/projection/kernel", SAME, "text_projection"),
    ]


def bert(spec: ModelSpec, key: str) -> list[Entry]:
    """A `BertModel` under `key`, with its pooler where the spec uses it."""
    table, ours, theirs = f"{key}.embeddings", "text/layers", f"{key}.encoder.layer.{{i}}"
    attention = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
    return [
        entry("text/tokens/embedding", SAME, f"{table}.word_embeddings.weight"),
        entry("text/positions", SAME, f"{table}.position_embeddings.weight"),
        entry("text/types", SAME, f"{table}.token_type_embeddings.weight"),
        *norm("text/embed_norm", f"{table}.LayerNorm"),
        *qkv(f"{ours}/attention/qkv", tuple(f"{a}.weight" for a in attention), tuple(f"{a}.bias" for a in attention)),
        *linear(f"{ours}/attention/out", f"{theirs}.attention.output.dense", OUT),
        *norm(f"{ours}/norm1", f"{theirs}.attention.output.LayerNorm"),
        *linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
        *linear(f"{ours}/mlp/down", f"{theirs}.output.dense"),
        *norm(f"{ours}/norm2", f"{theirs}.output.LayerNorm"),
        *(linear("text/pooler", f"{key}.pooler.dense") if spec.text.pooling == "pooler" else ()),
    ]


def bert_text(spec: ModelSpec) -> list[Entry]:
    """open_clip's `HFTextEncoder` around a `BertModel`, under `text.`."""
    if spec.text.projection == "mlp":
        projection = [
            entry("text/projection/up/kernel", LINEAR, "text.proj.0.weight"),
            entry("text/projection/down/kernel", LINEAR, "text.proj.2.weight"),
        ]
    else:
        projection = [entry("text/projection/kernel", LINEAR, "text.proj.weight")]
    return [*bert(spec, "text.transformer"), *projection]


def unimed_text(spec: ModelSpec) -> list[Entry]:
    """UniMed-CLIP's `text_encoder.`, which is open_clip's `text.`; the student published with MMKD-CLIP has it too."""
    prefix = "text_encoder."
    return [
        dataclasses.replace(item, keys=tuple(prefix + key.removeprefix("text.") for key in item.keys))
        for item in bert_text(spec)
    ]


def pmc_text(spec: ModelSpec) -> list[Entry]:
    """PMC-CLIP's `BertModel` under `text_encoder.` and its bare matrix (`src/pmc_clip/model` of its repository)."""
    return [*bert(spec, "text_encoder"), entry("text/projection/kernel", SAME, "text_projection")]


def medclip_text(spec: ModelSpec) -> list[Entry]:
    """MedCLIP's `BertModel` under `text_model.model.` and its linear head (`medclip/modeling_medclip.py`)."""
    head = entry("text/projection/kernel", LINEAR, "text_model.projection_head.weight")
    return [*bert(spec, "text_model.model"), head]


def _transformers_layers(ours: str, key: str) -> list[Entry]:
    """The blocks of Hugging Face's CLIP."""
    ours, theirs = f"{ours}/layers", f"{key}.encoder.layers.{{i}}"
    attention = [f"{theirs}.self_attn.{name}_proj" for name in ("q", "k", "v")]
    return [
        *norm(f"{ours}/norm1", f"{theirs}.layer_norm1"),
        *norm(f"{ours}/norm2", f"{theirs}.layer_norm2"),
        *qkv(f"{ours}/attention/qkv", tuple(f"{a}.weight" for a in attention), tuple(f"{a}.bias" for a in attention)),
        *linear(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj", OUT),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    ]


def transformers_image(spec: ModelSpec) -> list[Entry]:
    """`vision_model` of Hugging Face's `CLIPModel` (`pre_layrnorm` is its spelling)."""
    table = "vision_model.embeddings"
    return [
        entry("image/patch/kernel", CONV, f"{table}.patch_embedding.weight"),
        entry("image/class_token", SAME, f"{table}.class_embedding"),
        entry("image/positions", SAME, f"{table}.position_embedding.weight"),
        *norm("image/pre_norm", "vision_model.pre_layrnorm"),
        *_transformers_layers("image", "vision_model"),
        *norm("image/norm", "vision_model.post_layernorm"),
        entry("image/projection/kernel", LINEAR, "visual_projection.weight"),
    ]


def transformers_text(spec: ModelSpec) -> list[Entry]:
    """`text_model` of Hugging Face's `CLIPModel`."""
    table = "text_model.embeddings"
    return [
        entry("text/tokens/embedding", SAME, f"{table}.token_embedding.weight"),
        entry("text/positions", SAME, f"{table}.position_embedding.weight"),
        *_transformers_layers("text", "text_model"),
        *norm("text/norm", "text_model.final_layer_norm"),
        entry("text/projection/kernel", LINEAR, "text_projection.weight"),
    ]


# Layout -> entries of the image tower by its own layout, and of the text tower by its kind.
LAYOUTS: dict[str, dict[str, Callable[[ModelSpec], list[Entry]]]] = {
    "open_clip": {
        "openai": openai_image,
        "timm": timm_image,
        "modified_resnet": layouts_resnet.modified_resnet,
        "clip": clip_text,
        "bert": bert_text,
    },
    "transformers_clip": {"openai": transformers_image, "clip": transformers_text},
    "unimed": {"openai": openai_image, "bert": unimed_text},
    "pmc_clip": {"modified_resnet": layouts_resnet.modified_resnet, "bert": pmc_text},
    "medclip": {"swin": layouts_swin.medclip_swin, "resnet": layouts_resnet.medclip_resnet, "bert": medclip_text},
}


def tower_entries(spec: ModelSpec, layout: str, tower: str) -> list[Entry]:
    """The entries of one tower (`image` or `text`), `indices` filled in where a parameter is stacked.

    Raises:
      InputError: the layout has no such tower.
    """
    part = getattr(spec, tower)
    kind = part.layout if tower == "image" else part.kind
    if kind not in LAYOUTS[layout]:
        raise InputError(f"the {layout} layout has no {kind} tower, which {spec.name} has")
    entries = LAYOUTS[layout][kind](spec)
    plain = [item.indices is not None or "{i}" not in item.keys[0] for item in entries]
    every = None if all(plain) else tuple(range(part.layers))
    return [e if p else dataclasses.replace(e, indices=every) for e, p in zip(entries, plain, strict=True)]
