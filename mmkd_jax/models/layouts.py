"""Published names of parameters: one entry for each parameter of ours, with how the arrays relate.

A further family is a further function that yields entries.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mmkd_jax.specs import ModelSpec

Read = Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray]
Write = Callable[[np.ndarray, int], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Relation:
    """How published arrays and one of ours relate: `read(theirs, our shape)`, `write(ours, number of keys)`."""

    read: Read
    write: Write


SAME = Relation(lambda theirs, shape: theirs[0].reshape(shape), lambda ours, _: [ours])
# [out, in] of torch's Linear; our kernels are [inputs..., outputs...].
LINEAR = Relation(lambda theirs, shape: theirs[0].T.reshape(shape), lambda ours, _: [ours.T])
# Leading axes of size one, as timm's class token and positions have.
TOKEN = Relation(SAME.read, lambda ours, _: [ours[None, None]])
TABLE = Relation(SAME.read, lambda ours, _: [ours[None]])
# [out, in, p, p] of torch's Conv2d to [1, p, p, in, out].
CONV = Relation(
    lambda theirs, shape: theirs[0].transpose(2, 3, 1, 0).reshape(shape),
    lambda ours, _: [ours[0].transpose(3, 2, 0, 1)],
)
# Rows in the order queries, keys, values, and heads within each: [3 D, D] in one array, or three of [D, D].
QKV = Relation(
    lambda theirs, shape: np.concatenate(theirs).T.reshape(shape),
    lambda ours, n: np.split(ours.reshape(ours.shape[0], -1).T, n),
)
QKV_BIAS = Relation(
    lambda theirs, shape: np.concatenate(theirs).reshape(shape), lambda ours, n: np.split(ours.reshape(-1), n)
)
OUT = Relation(LINEAR.read, lambda ours, _: [ours.reshape(-1, ours.shape[-1]).T])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its path (`/` between names), the published keys (`{i}` counts layers), and the relation."""

    path: str
    keys: tuple[str, ...]
    relation: Relation


def entry(path: str, relation: Relation, *keys: str) -> Entry:
    """Shorthand for `Entry`."""
    return Entry(path, keys, relation)


def norm(path: str, key: str) -> list[Entry]:
    """A LayerNorm."""
    return [entry(f"{path}/scale", SAME, f"{key}.weight"), entry(f"{path}/bias", SAME, f"{key}.bias")]


def linear(path: str, key: str, relation: Relation = LINEAR) -> list[Entry]:
    """A Linear with bias."""
    return [entry(f"{path}/kernel", relation, f"{key}.weight"), entry(f"{path}/bias", SAME, f"{key}.bias")]


def qkv(path: str, weights: tuple[str, ...], biases: tuple[str, ...]) -> list[Entry]:
    """Queries, keys and values: fused (one key each) or apart (three keys each)."""
    return [entry(f"{path}/kernel", QKV, *weights), entry(f"{path}/bias", QKV_BIAS, *biases)]


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


def bert_text(spec: ModelSpec) -> list[Entry]:
    """open_clip's `HFTextEncoder` around a `BertModel` without pooler, under `text.`."""
    table, ours, theirs = "text.transformer.embeddings", "text/layers", "text.transformer.encoder.layer.{i}"
    attention = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
    if spec.text.projection == "mlp":
        projection = [
            entry("text/projection/up/kernel", LINEAR, "text.proj.0.weight"),
            entry("text/projection/down/kernel", LINEAR, "text.proj.2.weight"),
        ]
    else:
        projection = [entry("text/projection/kernel", LINEAR, "text.proj.weight")]
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
        *projection,
    ]


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
    "open_clip": {"openai": openai_image, "timm": timm_image, "clip": clip_text, "bert": bert_text},
    "transformers_clip": {"openai": transformers_image, "clip": transformers_text},
}
