"""Weights of a file into reference modules: under the file's own names, strict both ways."""

import re
from typing import Any

import numpy as np
from etils import epath

from mmkd_jax.errors import InputError
from mmkd_jax.models import state_dict, weights
from mmkd_jax.specs import ModelSpec
from teachers.torch_backend import families
from teachers.torch_backend.libraries import need

WRAPPERS = ("state_dict", "model", "model_state_dict")


def load(spec: ModelSpec, file: epath.Path) -> families.Towers:
    """The reference towers of `spec` with the weights of `file`.

    Raises:
      InputError: a library is missing, or has no such towers; the file is damaged, or its keys are not theirs.
    """
    tensors = read(file)
    layout = state_dict.recognise(spec, tensors)
    towers = families.build(spec, layout, tensors)
    fill(towers.model, towers.rename(tensors), spec, layout)
    return towers


def read(file: epath.Path) -> dict[str, Any]:
    """The floating-point tensors of a file under their names, without the prefixes that training wrappers add.

    torch reads what it reads (of pickles: tensors only). The rest goes to this project's reader, which takes training
    checkpoints that hold more than tensors and models in several files, and says why it refuses a file.
    """
    torch = need("torch")
    found = {} if weights.is_divided(file) else _read_by_torch(file)
    if not found:
        arrays = weights.read_tensors(file)
        found = {key: torch.from_numpy(np.array(value, np.float32)) for key, value in arrays.items() if _real(value)}
    found = {key: value for key, value in found.items() if value.is_floating_point()}
    while found and (prefix := next((p for p in state_dict.WRAPPERS if all(k.startswith(p) for k in found)), None)):
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def fill(model: Any, tensors: dict[str, Any], spec: ModelSpec, layout: str) -> None:
    """Gives every weight of `model` its tensor, in float32.

    Raises:
      InputError: a key is missing or left over, or a shape differs; all are named.
    """
    unused = [*([state_dict.UNUSED[layout]] if layout in state_dict.UNUSED else []), state_dict.POOLER]
    wanted = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    given = {
        re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)): value
        for key, value in tensors.items()
        if key in wanted or not any(re.match(pattern, key) for pattern in unused)
    }
    if "logit_scale" in given:
        given["logit_scale"] = given["logit_scale"].reshape(())
    problems = [f"missing {key}" for key in sorted(wanted.keys() - given.keys())]
    problems += [f"left over {key}" for key in sorted(given.keys() - wanted.keys())]
    problems += [
        f"{key} is {tuple(given[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & given.keys())
        if given[key].shape != wanted[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(f"torch's {spec.name} does not take these weights: {'; '.join(problems[:8])}{more}")
    model.load_state_dict(given, strict=False)  # what it may miss are buffers of integers
    model.requires_grad_(False).eval()


def _read_by_torch(file: epath.Path) -> dict[str, Any]:
    """The tensors of a file that torch opens, none of one that it refuses for whatever reason."""
    try:
        if file.suffix == ".safetensors":
            return need("safetensors.torch").load(file.read_bytes())
        with file.open("rb") as opened:
            return _unwrapped(need("torch").load(opened, map_location="cpu", weights_only=True))
    except Exception:
        return {}


def _unwrapped(root: Any) -> dict[str, Any]:
    """The dictionary of tensors in a checkpoint."""
    is_tensor = need("torch").is_tensor
    while isinstance(root, dict):
        if tensors := {key: value for key, value in root.items() if is_tensor(value)}:
            return tensors
        root = next((root[name] for name in WRAPPERS if name in root), None)
    return {}


def _real(array: np.ndarray) -> bool:
    return array.dtype.kind not in "iub"
