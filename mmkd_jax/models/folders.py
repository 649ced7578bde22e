"""Model folders that describe themselves: open_clip's, Hugging Face's `CLIPModel`, and what this project exported."""

import dataclasses

from etils import epath

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.models import open_clip, transformers_clip
from mmkd_jax.models.state_dict import Tensors
from mmkd_jax.models.weights import find_weights, read_tensors
from mmkd_jax.specs import ModelSpec

OWN_SPEC = "mmkd_spec.json"  # what this project adds, as foreign configs have no place for all of it


def describes_itself(folder: epath.Path) -> bool:
    """Whether a folder holds a description of its weights."""
    if (folder / OWN_SPEC).exists() or (folder / open_clip.CONFIG).exists():
        return True
    config = folder / transformers_clip.CONFIG
    return config.exists() and io.read_json(config).get("model_type") == "clip"


def load_folder(folder: epath.Path, name: str) -> tuple[ModelSpec, Tensors, epath.Path]:
    """Spec, weights and the weights' file of a folder that describes itself; the model is called `name`.

    Raises:
      InputError: something is missing or not supported.
    """
    file = find_weights(folder)
    tensors = read_tensors(file)
    return _spec(folder, name, tensors), tensors, file


def _spec(folder: epath.Path, name: str, tensors: Tensors) -> ModelSpec:
    if (folder / OWN_SPEC).exists():
        return dataclasses.replace(ModelSpec.from_dict(io.read_json(folder / OWN_SPEC)), name=name)
    known = open_clip if (folder / open_clip.CONFIG).exists() else transformers_clip
    config = io.read_json(folder / known.CONFIG)
    try:
        if known is open_clip:
            return open_clip.to_spec(name, config, tensors, _optional(folder / open_clip.BERT_CONFIG))
        return transformers_clip.to_spec(name, config, _optional(folder / transformers_clip.PREPROCESSOR))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / known.CONFIG} does not describe a model that this project has ({error})"
        ) from error


def _optional(path: epath.Path):
    return io.read_json(path) if path.exists() else None
