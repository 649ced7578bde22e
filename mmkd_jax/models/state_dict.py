"""Weights under their published names, to and from our parameters.

Reading and writing both follow from the entries of a layout, strict both ways: every key is used once and none is
missing. Layouts:

- `open_clip`: open_clip's `CLIP` (also OpenAI's files) and `CustomTextCLIP`, with its own or timm's ViT as the image
  tower and CLIP's or BERT's as the text tower (mlfoundations/open_clip `model.py`, `timm_model.py`, `hf_model.py`);
- `transformers_clip`: Hugging Face's `CLIPModel` (`modeling_clip.py`).
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.models.dual_encoder import DualEncoder, Params
from mmkd_jax.models.layouts import LAYOUTS, SAME, Entry, entry
from mmkd_jax.specs import ModelSpec

Tensors = dict[str, np.ndarray]
WRAPPERS = ("module.", "_orig_mod.")  # of torch's DistributedDataParallel and torch.compile


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
      InputError: the layout has no such architecture, or its parameters are not those of `params`.
    """
    entries = list(_entries(spec, layout))
    named = {item.path for item, _ in entries}
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if paths != named:
        raise InputError(f"the {layout} layout and {spec.name} do not share {_some(paths ^ named)}")
    tensors: Tensors = {}
    for item, layers in entries:
        value = np.asarray(_get(params, item.path), np.float32)
        for i in range(1 if layers is None else layers):
            arrays = item.relation.write(value if layers is None else value[i], len(item.keys))
            tensors.update((key.format(i=i), array) for key, array in zip(item.keys, arrays, strict=True))
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
