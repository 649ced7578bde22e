"""Weights under their published names, to and from our parameters.

A layout is a list of entries, one for each parameter of ours: its path, the published key or keys, and how the arrays
relate. Reading and writing both follow from it, strict both ways: every key is used once and none is missing. Layouts:

- `open_clip`: open_clip's `CLIP` (also OpenAI's files) and `CustomTextCLIP`, with its own or timm's ViT as the image
  tower and CLIP's or BERT's as the text tower (mlfoundations/open_clip `model.py`, `timm_model.py`, `hf_model.py`);
- `transformers_clip`: Hugging Face's `CLIPModel` (`modeling_clip.py`).

A further family is a further function that yields entries.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.models.dual_encoder import DualEncoder, Params
from mmkd_jax.specs import ModelSpec

Tensors = dict[str, np.ndarray]
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
        *norm("image/pre_norm", "visual.ln_pre"),
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


WRAPPERS = ("module.", "_orig_mod.")  # of torch's DistributedDataParallel and torch.compile

# Layout -> entries of the image tower by its own layout, and of the text tower by its kind.
LAYOUTS: dict[str, dict[str, Callable[[ModelSpec], list[Entry]]]] = {
    "open_clip": {"openai": openai_image, "timm": timm_image, "clip": clip_text, "bert": bert_text},
    "transformers_clip": {"openai": transformers_image, "clip": transformers_text},
}


def to_params(spec: ModelSpec, tensors: Tensors) -> Params:
    """Published weights as our parameters, float32 NumPy.

    The layout is recognised by its names. Prefixes of wrappers (`module.`, `_orig_mod.`) are stripped, UniMed-CLIP's
    `text_encoder.` and `CustomTextCLIP`'s `text.` are understood, integer buffers are dropped, half precision is cast.

    Raises:
      InputError: keys are missing, left over, or of another shape than `spec` says; all are named.
    """
    tensors = _plain_names({k: v for k, v in tensors.items() if np.asarray(v).dtype.kind not in "iub"}, spec)
    layout = "transformers_clip" if "vision_model.post_layernorm.weight" in tensors else "open_clip"
    shapes = DualEncoder(spec).shapes()
    if "logit_scale" in tensors:
        tensors["logit_scale"] = np.asarray(tensors["logit_scale"]).reshape(())
    _check(spec, tensors, {key: array.shape for key, array in from_params(spec, _zeros(shapes), layout).items()})
    params: Params = {}
    for item, layers in _entries(spec, layout):
        shape = _get(shapes, item.path).shape
        if layers is None:
            value = item.relation.read([tensors[key] for key in item.keys], shape)
        else:
            value = np.stack(
                [item.relation.read([tensors[key.format(i=i)] for key in item.keys], shape[1:]) for i in range(layers)]
            )
        _set(params, item.path, np.array(value, np.float32, order="C"))
    return params


def from_params(spec: ModelSpec, params: Params, layout: str = "open_clip") -> Tensors:
    """Our parameters under the published names of `layout`, float32 NumPy.

    Raises:
      InputError: the layout has no names for the architecture, or `params` has parameters that it does not name.
    """
    tensors: Tensors = {}
    named = set()
    for item, layers in _entries(spec, layout):
        value = np.asarray(_get(params, item.path), np.float32)
        named.add(item.path)
        for i in range(1 if layers is None else layers):
            arrays = item.relation.write(value if layers is None else value[i], len(item.keys))
            tensors.update((key.format(i=i), array) for key, array in zip(item.keys, arrays, strict=True))
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if paths != named:
        raise InputError(f"the {layout} layout has no name for {_some(paths - named)} of {spec.name}")
    return tensors


def _entries(spec: ModelSpec, layout: str) -> Iterator[tuple[Entry, int | None]]:
    """All entries with the number of layers that they are stacked over."""
    towers = LAYOUTS[layout]
    for kind in (spec.image.layout, spec.text.kind):
        if kind not in towers:
            raise InputError(f"the {layout} layout has no {kind} tower, which {spec.name} has")
    for make, layers in ((towers[spec.image.layout], spec.image.layers), (towers[spec.text.kind], spec.text.layers)):
        for item in make(spec):
            yield item, layers if "{i}" in item.keys[0] else None
    yield entry("logit_scale", SAME, "logit_scale"), None


def _plain_names(tensors: Tensors, spec: ModelSpec) -> Tensors:
    """Keys without wrappers' prefixes and with the text tower under open_clip's own name."""
    while tensors and (prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in tensors)), None)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if spec.text.kind == "bert":
        return {_rename(key, "text_encoder.", "text."): value for key, value in tensors.items()}
    return {_rename(key, "text.", ""): value for key, value in tensors.items()}


def _rename(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key


def _check(spec: ModelSpec, tensors: Tensors, wanted: dict[str, tuple[int, ...]]) -> None:
    problems = []
    if missing := wanted.keys() - tensors.keys():
        problems.append(f"missing {_some(missing)}")
    if extra := tensors.keys() - wanted.keys():
        problems.append(f"left over {_some(extra)}")
    shapes = {key: np.shape(tensors[key]) for key in wanted.keys() & tensors.keys()}
    if wrong := {f"{key} is {shapes[key]}, not {wanted[key]}" for key in shapes if shapes[key] != wanted[key]}:
        problems.append(f"of another shape: {_some(wrong)}")
    if problems:
        raise InputError(f"these are not the weights of {spec.name}: {'; '.join(problems)}")


def _some(names, n: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _zeros(shapes: Params) -> Params:
    """The tree with zeros that occupy no memory."""
    return jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)


def _get(tree: Params, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _set(tree: Params, path: str, value: np.ndarray) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value
