"""Weights under their published names, to and from our parameters.

Reading and writing both follow from the entries of a layout, strict both ways: every key is used once and none is
missing. Layouts:

- `open_clip`: open_clip's `CLIP` (also OpenAI's files) and `CustomTextCLIP`, with its own or timm's ViT or a
  `ModifiedResNet` as the image tower and CLIP's or BERT's as the text tower (mlfoundations/open_clip `model.py`,
  `timm_model.py`, `modified_resnet.py`, `hf_model.py`);
- `unimed`: mbzuai-oryx/UniMed-CLIP's, and so MMKD-CLIP's student: as `open_clip` with `text_encoder.` for `text.`;
- `transformers_clip`: Hugging Face's `CLIPModel` (`modeling_clip.py`);
- `pmc_clip`: WeixiongLin/PMC-CLIP's training checkpoints: `visual.`, `text_encoder.`, `text_projection`;
- `medclip`: RyanWangZf/MedCLIP's files: `vision_model.`, `text_model.`; its Swin under either of transformers' namings.
"""

import logging
import re
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.models.dual_encoder import DualEncoder, Params
from mmkd_jax.models.layouts import tower_entries
from mmkd_jax.models.layouts_swin import first_names
from mmkd_jax.models.relations import SAME, Entry, entry
from mmkd_jax.specs import ModelSpec

logger = logging.getLogger(__name__)
Tensors = dict[str, np.ndarray]
WRAPPERS = ("module.", "_orig_mod.")  # of torch's DistributedDataParallel and torch.compile

# What the files of a layout hold beside the towers: parts of the training that features do not use. BERT's pooler is
# among them only where the spec does not pool by it.
UNUSED = {
    "pmc_clip": r"(fusion_module|ln_final)\.|(mlm_projection|img_special_token|positional_embedding)(\.|$)",
}
POOLER = r"(text_encoder|text_model\.model)\.pooler\."


def to_params(spec: ModelSpec, tensors: Tensors) -> Params:
    """Published weights as our parameters, float32 NumPy.

    The layout is recognised by its names. Prefixes of wrappers (`module.`, `_orig_mod.`) are stripped,
    `CustomTextCLIP`'s `text.` is understood, integer buffers and parts that serve only a teacher's training are
    dropped, half precision is cast.

    Raises:
      InputError: keys are missing, left over, or of another shape than `spec` says; all are named.
    """
    tensors = _without_wrappers({k: v for k, v in tensors.items() if np.asarray(v).dtype.kind not in "iub"})
    layout = recognise(spec, tensors)
    tensors = _plain_names(tensors, spec, layout)
    shapes = DualEncoder(spec).shapes()
    if "logit_scale" in tensors:
        tensors["logit_scale"] = np.asarray(tensors["logit_scale"]).reshape(())
    _check(spec, tensors, {key: array.shape for key, array in from_params(spec, _zeros(shapes), layout).items()})
    params: Params = {}
    for item in _entries(spec, layout):
        shape = _get(shapes, item.path).shape
        if item.indices is None:
            value = item.relation.read([tensors[key] for key in item.keys], shape)
        else:
            parts = [[tensors[key.format(i=i)] for key in item.keys] for i in item.indices]
            value = np.stack([item.relation.read(part, shape[1:]) for part in parts])
        _set(params, item.path, np.array(value, np.float32, order="C"))
    return params


def from_params(spec: ModelSpec, params: Params, layout: str = "open_clip") -> Tensors:
    """Our parameters under the published names of `layout`, float32 NumPy.

    Raises:
      InputError: the layout has no such architecture, or its parameters are not those of `params`.
    """
    entries = _entries(spec, layout)
    named = {item.path for item in entries}
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if paths != named:
        raise InputError(f"the {layout} layout and {spec.name} do not share {_some(paths ^ named)}")
    tensors: Tensors = {}
    for item in entries:
        value = np.asarray(_get(params, item.path), np.float32)
        for i, part in [(0, value)] if item.indices is None else zip(item.indices, value, strict=True):
            arrays = item.relation.write(part, len(item.keys))
            tensors.update((key.format(i=i), array) for key, array in zip(item.keys, arrays, strict=True))
    return tensors


def recognise(spec: ModelSpec, names: Collection[str]) -> str:
    """The layout that names without wrappers' prefixes follow; `open_clip` where nothing speaks for another."""
    if any(name.startswith("text_model.model.") for name in names):
        return "medclip"
    if any(name.startswith(("vision_model.", "text_model.")) for name in names):
        return "transformers_clip"
    if any(name.startswith(("text_encoder.embeddings.", "text_encoder.encoder.")) for name in names):
        return "pmc_clip"
    if any(name.startswith("text_encoder.transformer.") for name in names):
        return "unimed"
    return "open_clip"


def _entries(spec: ModelSpec, layout: str) -> list[Entry]:
    towers = [item for tower in ("image", "text") for item in tower_entries(spec, layout, tower)]
    return [*towers, entry("logit_scale", SAME, "logit_scale")]


def _without_wrappers(tensors: Tensors) -> Tensors:
    """Keys without the prefixes that all of them share and that wrappers gave them."""
    while tensors and (prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in tensors)), None)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _plain_names(tensors: Tensors, spec: ModelSpec, layout: str) -> Tensors:
    """Keys as the layout's entries have them, without what the spec has no use for."""
    unused = [UNUSED[layout]] if layout in UNUSED else []
    unused += [] if spec.text.pooling == "pooler" else [POOLER]
    left = {key for key in tensors if any(re.match(pattern, key) for pattern in unused)}
    if left:
        logger.info("%s: left out what no feature uses: %s", spec.name, _some(left))
    tensors = {key: value for key, value in tensors.items() if key not in left}
    # Names of BERTs that were converted from TensorFlow's.
    tensors = {re.sub(r"LayerNorm\.(gamma|beta)$", _torch_name, key): value for key, value in tensors.items()}
    if layout == "medclip":
        tensors = {first_names(key): value for key, value in tensors.items()}
    if layout == "open_clip" and spec.text.kind == "clip":
        return {key.removeprefix("text."): value for key, value in tensors.items()}
    return tensors


def _torch_name(match: re.Match) -> str:
    return "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]]


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
