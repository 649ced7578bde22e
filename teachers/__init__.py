"""Teachers: published CLIP models, and any model of ours, behind one interface.

`teachers.load(name, weights=PATH)` gives a `Teacher`; the library never imports this package, only commands do.
"""

import dataclasses
import functools
import hashlib
import os
from typing import Any

import flax
import jax
import numpy as np
from etils import epath

from mmkd_jax import api, io, tokenizers
from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from mmkd_jax.evals.teachers import TeacherEncoder
from mmkd_jax.models import folders, state_dict
from mmkd_jax.models import weights as _weights
from mmkd_jax.models.dual_encoder import DualEncoder, Params
from mmkd_jax.specs import ModelSpec, TextTower
from teachers import specs
from teachers.base import Base

BACKENDS = ("flax", "torch")
LENGTHS = 16, 32, 48, 64, 96, 128  # of texts, beside the full one: each is compiled once


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher(Base):
    """A dual encoder as it was published, in float32, run by this project's towers.

    Attributes:
      params: `{"image", "text", "logit_scale"}`.
      micro_batch: pictures or texts at a time; a result does not depend on how many there are beside.
    """

    params: Params
    micro_batch: int = 64

    @property
    def backend(self) -> str:
        """What runs the towers, with its versions."""
        return f"flax {flax.__version__}, jax {jax.__version__}"

    @property
    def logit_scale(self) -> float:
        """Factor on cosines, exponentiated."""
        return float(np.exp(self.params["logit_scale"]))

    def encode_image(self, images: np.ndarray, projected: bool = True) -> np.ndarray:
        """Preprocessed pictures float32 `[n, S, S, 3]` to the tower's own output, float32 `[n, embed]`, any length.

        `projected=False` gives the features before the projection, float32 `[n, width]`.
        """
        encode = functools.partial(_encode, DualEncoder(self.spec), "image", projected, self.params)
        return api.in_batches(encode, np.asarray(images, np.float32), self.micro_batch)

    def encode_text(self, text: TextBatch, projected: bool = True) -> np.ndarray:
        """Tokens to the tower's own output, float32 `[n, embed]`; as `encode_image`.

        Where padding changes nothing but the time, a text runs at the least of a few lengths that holds it. It depends
        on the text alone, and so does the result.
        """
        encode = functools.partial(_encode, DualEncoder(self.spec), "text", projected, self.params)
        text = TextBatch(*map(np.asarray, text))
        groups = _by_length(self.spec.text, text.mask)
        cut = [TextBatch(*(part[rows, :length] for part in text)) for rows, length in groups]
        features = np.concatenate([api.in_batches(encode, part, self.micro_batch) for part in cut])
        return features[np.argsort(np.concatenate([rows for rows, _ in groups]))]


def _by_length(tower: TextTower, mask: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """The rows of `mask [n, length]` by the number of tokens that they are run with: (rows, number) of each group."""
    full = mask.shape[1]
    steps = np.array([*(length for length in LENGTHS if length < full and tower.padding == "masked"), full])
    used = ((mask > 0) * np.arange(1, full + 1)).max(axis=1, initial=1)
    lengths = steps[np.searchsorted(steps, used)]
    return [(np.flatnonzero(lengths == n), n) for n in np.unique(lengths)] or [(np.arange(0), full)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(model: DualEncoder, tower: str, projected: bool, params: Params, inputs: Any) -> jax.Array:
    encode = model.encode_image if tower == "image" else model.encode_text
    return encode(params, inputs, projected=projected)


def load(name: str, weights: str | os.PathLike, backend: str = "flax", micro_batch: int = 64) -> Base:
    """A teacher from its weights.

    Args:
      name: what to call it; for a bare weights file the name of a record in `teachers.specs` (or a dotted path).
      weights: a folder of open_clip or of Hugging Face's CLIPModel (config, weights, tokenizer); a weights file
        (safetensors, or what torch saved), or a folder with one, with the vocabulary beside it; or a run's folder or
        checkpoint of ours.
      backend: `flax` converts the weights to this project's towers; `torch` runs published weights as they are in
        open_clip's, timm's and transformers' own modules, which must be installed.
      micro_batch: pictures or texts at a time.

    Returns:
      A `Teacher`, or with torch a `teachers.torch_backend.TorchTeacher`, which is called alike.

    Raises:
      InputError: the weights are missing, damaged, or not of the model that the spec or config describes; or torch was
        asked for and is not there, or has no names for the weights.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    path = io.as_path(weights)
    if not path.exists():
        raise InputError(f"teacher {name}: {path} does not exist; give its weights")
    if folders.describes_itself(path):
        spec, tensors, file = folders.load_folder(path, name)
        return _published(name, _with_facts(spec), file, backend, micro_batch, tensors)
    if path.is_dir() and not _is_bare(path):
        return _own(name, path, backend, micro_batch)
    file = _weights.find_weights(path) if path.is_dir() else path
    return _published(name, specs.find(name).spec, file, backend, micro_batch)


def as_encoder(teacher: Base, name: str = "") -> TeacherEncoder:
    """`teacher` in the form that evaluators take; results call it `name`, or `teacher:` and its own name."""
    return TeacherEncoder((name or teacher.name).removeprefix("teacher:"), teacher.checkpoint, teacher)


def _published(
    name: str,
    spec: ModelSpec,
    file: epath.Path,
    backend: str,
    micro_batch: int,
    tensors: state_dict.Tensors | None = None,
) -> Base:
    """A teacher of published weights, with the vocabulary that lies beside them; `tensors` where they are read."""
    if backend == "torch":
        from teachers import torch_backend

        teacher = functools.partial(torch_backend.TorchTeacher, towers=torch_backend.load(spec, file))
    else:
        params = state_dict.to_params(spec, _weights.read_tensors(file) if tensors is None else tensors)
        teacher = functools.partial(Teacher, params=api.everywhere(params))  # once, not with every micro-batch
    text = spec.text
    return teacher(
        name=name,
        checkpoint=os.fspath(file),
        spec=spec,
        tokenizer=tokenizers.load(spec.tokenizer, file.parent, context=text.context, vocab_size=text.vocab_size),
        weights_hash=_weights.identity(file),
        micro_batch=micro_batch,
    )


def _own(name: str, path: epath.Path, backend: str, micro_batch: int) -> Teacher:
    """A teacher that this project trained or converted."""
    if backend != "flax":
        raise InputError(
            f"{path} is a checkpoint of this project, which {backend} has no names for; give the weights as they were "
            "published, or the folder that mmkd export writes"
        )
    student = api.load(path, name=name)
    return Teacher(
        name=name,
        checkpoint=os.fspath(path),
        spec=dataclasses.replace(student.spec, name=name),
        tokenizer=student.tokenizer,
        weights_hash=_hash(student.params),
        params=student.params,
        micro_batch=micro_batch,
    )


def _with_facts(spec: ModelSpec) -> ModelSpec:
    """Licence, source and modalities of the record of this name, where the folder does not tell."""
    if spec.license != "unknown" or spec.name not in specs.TEACHERS:
        return spec
    known = specs.find(spec.name).spec
    return dataclasses.replace(spec, license=known.license, source=known.source, modalities=known.modalities)


def _is_bare(folder: epath.Path) -> bool:
    """Whether a folder holds a weights file and not a run."""
    return any(child.suffix in (".safetensors", ".bin", ".pt", ".pth") for child in folder.iterdir())


def _hash(params: Params) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} ".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
