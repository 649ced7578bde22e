"""Starting weights of one tower, from a published state dict that may hold much else.

Understood, in safetensors or torch files: CLIPs of OpenAI, MetaCLIP, open_clip and Hugging Face, whole or one tower
alone; timm's ViTs; MedCLIP's ResNet and Swin; transformers' Swins; BERTs with or without the heads they were pretrained
with. What the tower needs must be there and of the right shape, and no part of the tower may be left over (a deeper
model than the spec's); what is not the tower's own (classifiers, poolers, the other tower) is not looked at.
"""

import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
from flax.traverse_util import unflatten_dict

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.models.dual_encoder import DualEncoder, Params
from mmkd_jax.models.layouts import tower_entries
from mmkd_jax.models.layouts_swin import first_names
from mmkd_jax.models.relations import Entry
from mmkd_jax.models.state_dict import WRAPPERS, Tensors
from mmkd_jax.models.weights import find_weights, read_tensors
from mmkd_jax.specs import ModelSpec

# Kind of tower -> (layout, prefix found in files, prefix of the layout) to try; an empty prefix fits every name.
PREFIXES = {
    "openai": (("open_clip", "", ""), ("open_clip", "", "visual."), ("transformers_clip", "", "")),
    "modified_resnet": (("open_clip", "", ""), ("open_clip", "", "visual.")),
    "resnet": (("medclip", "", ""),),
    "swin": (
        ("medclip", "", ""),
        ("medclip", "swin.", "vision_model.model."),
        ("medclip", "", "vision_model.model."),
    ),
    "timm": (("open_clip", "", ""), ("open_clip", "", "visual.trunk.")),
    "clip": (("open_clip", "", ""), ("open_clip", "text.", ""), ("transformers_clip", "", "")),
    "bert": (
        ("open_clip", "", ""),
        ("open_clip", "text_encoder.", "text."),
        ("open_clip", "bert.", "text.transformer."),
        ("open_clip", "", "text.transformer."),
    ),
}
# What stands beside a tower's own parameters: poolers, and the heads of masked language models and classifiers.
BESIDE = r"(^|\.)(pooler|cls|classifier|visual\.trunk\.(head|head_dist|fc_norm))\."
OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of TensorFlow's first BERTs


def read(path: str | os.PathLike, spec: ModelSpec, tower: str, *, fresh: Sequence[str] = ()) -> Params:
    """The parameters of one tower of `spec`, float32 NumPy in a nested dict.

    Args:
      path: a weights file, or a folder with one.
      spec: the model that the tower is to become part of.
      tower: `image` or `text`.
      fresh: patterns; a parameter that the file lacks is left out where one is found in its name.

    Raises:
      InputError: the file holds no such tower, or one of another size; what is wrong is named.
    """
    path = io.as_path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; it should be the weights that the {tower} tower starts from")
    tensors = read_tensors(find_weights(path) if path.is_dir() else path)
    entries, named = _recognise(tensors, spec, tower)
    shapes = DualEncoder(spec).shapes()
    problems, values, used = [], {}, set()
    for item in entries:
        shape, layers = _shape(shapes, item.path), item.indices or (0,)
        keys = [key.format(i=i) for i in layers for key in item.keys]
        missing = [key for key in keys if key not in named]
        if len(missing) == len(keys) and any(re.search(rule, item.path) for rule in fresh):
            continue
        one = np.broadcast_to(np.float32(0), shape[1:] if item.indices else shape)
        fitting = [array.shape for array in item.relation.write(one, len(item.keys))] * len(layers)
        pairs = zip(keys, fitting, strict=True)
        wrong = [f"{key} is {named[key].shape}, not {s}" for key, s in pairs if key in named and named[key].shape != s]
        problems += [f"{key} is missing" for key in missing] + wrong
        used.update(keys)
        if not missing and not wrong:
            values[item.path] = _convert(item, named, shape)
    own = {key.split(".")[0] for item in entries for key in item.keys}
    left = sorted(key for key in named if key.split(".")[0] in own and key not in used and not re.search(BESIDE, key))
    problems += [f"{key} is left over" for key in left]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{path} does not fit the {tower} tower of {spec.name}: {'; '.join(problems[:3])}{more}")
    return unflatten_dict({path.removeprefix(f"{tower}/"): value for path, value in values.items()}, sep="/")


def _recognise(tensors: Tensors, spec: ModelSpec, tower: str) -> tuple[list[Entry], Tensors]:
    """The entries of the layout that fits best, and the tensors by its names."""
    kind = spec.image.layout if tower == "image" else spec.text.kind
    if kind not in PREFIXES:
        raise InputError(f"{kind} {tower} towers have no starting weights of their own; start by --config.init")
    tensors = {key: np.asarray(value) for key, value in tensors.items() if np.asarray(value).dtype.kind not in "iub"}
    found: list[tuple[int, list[Entry], Tensors]] = []
    for layout, named in _named(tensors, kind):
        entries = tower_entries(spec, layout, tower)
        score = sum(key.format(i=(item.indices or (0,))[0]) in named for item in entries for key in item.keys)
        found.append((score, entries, named))
    score, entries, named = max(found, key=lambda one: one[0])
    if score < 3:
        some = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise InputError(f"no {kind} {tower} tower is found in the weights ({some}, ...); see --config.model")
    return entries, named


def _named(tensors: Tensors, kind: str) -> Iterator[tuple[str, Tensors]]:
    while tensors and (prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in tensors)), None)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    for layout, old, new in PREFIXES[kind]:
        renamed = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in tensors.items()}
        yield layout, {_first_name(key, kind): value for key, value in renamed.items()}


def _first_name(key: str, kind: str) -> str:
    """A key under the name that layouts know, whatever a library's later or earlier version calls it."""
    if kind == "bert":
        for old, new in OLD_NORMS.items():
            key = key.replace(old, new)
    return first_names(key) if kind == "swin" else key


def _convert(item: Entry, named: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    if item.indices is None:
        value = item.relation.read([named[key] for key in item.keys], shape)
    else:
        each = ([named[key.format(i=i)] for key in item.keys] for i in item.indices)
        value = np.stack([item.relation.read(arrays, shape[1:]) for arrays in each])
    return np.array(value, np.float32, order="C")


def _shape(shapes: Params, path: str) -> tuple[int, ...]:
    for name in path.split("/"):
        shapes = shapes[name]
    return shapes.shape
