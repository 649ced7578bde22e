"""Using a trained student: `mmkd_jax.load(checkpoint)`."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from mmkd_jax import io, preprocess, tokenizers
from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ModelSpec
from mmkd_jax.train import checkpoint as checkpoints

Picture = Image.Image | str | os.PathLike
TEMPLATES = ("{}", "a medical image of {}.")


def load(path: str | os.PathLike, *, name: str | None = None, batch: int = 64) -> "Student":
    """The student of a run's folder, a `checkpoints` folder, or one checkpoint in it; nothing else is needed.

    Args:
      path: local or `gs://`.
      name: what to call it in results; the name in its spec by default.
      batch: pictures or texts at a time; results do not depend on how many there are beside.

    Raises:
      InputError: there is no checkpoint, or it is damaged.
    """
    folder = checkpoints.find(path)
    meta = checkpoints.load_meta(folder)
    spec = ModelSpec.from_dict(meta["spec"])
    tokenizer = tokenizers.from_files(
        spec.tokenizer,
        checkpoints.tokenizer_files(meta),
        context=spec.text.context,
        vocab_size=spec.text.vocab_size,
    )
    whole = NamedSharding(local_mesh(), PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), DualEncoder(spec).shapes())
    params = checkpoints.load_params(folder, like)
    return Student(name or spec.name, os.fspath(folder), spec, params, tokenizer, meta, batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A dual encoder with its parameters, ready for pictures and texts.

    Attributes:
      name: in results.
      checkpoint: where it comes from.
      spec: architecture, preprocessing, tokenizer kind.
      params: `{"image", "text", "logit_scale"}`, float32.
      tokenizer: texts to `TextBatch`.
      meta: the checkpoint's record: config, data.
      batch: the fixed micro-batch.
    """

    name: str
    checkpoint: str
    spec: ModelSpec
    params: Any
    tokenizer: tokenizers.Tokenizer
    meta: dict[str, Any]
    batch: int = 64

    @property
    def logit_scale(self) -> float:
        """The exponentiated logit scale."""
        return math.exp(float(self.params["logit_scale"]))

    @property
    def identity(self) -> str:
        """Hash of all that makes its features what they are; "" for parameters that no checkpoint holds."""
        sums = checkpoints.sums(self.meta)
        return io.hash_of([sums, self.spec.to_dict(), self.meta["tokenizer"]]) if sums else ""

    def encode_image(self, images: Sequence[Picture] | np.ndarray, *, projected: bool = True) -> np.ndarray:
        """Embeddings of unit length, float32 `[n, embed]`.

        Args:
          images: PIL pictures, paths, or uint8 `[n, S, S, 3]` that is already at the model's size.
          projected: False gives the features before the projection, float32 `[n, width]`.

        Raises:
          InputError: a file is missing or is no picture.
        """
        if not isinstance(images, np.ndarray):
            images = [preprocess.eval_image(open_picture(image), self.spec.preprocess) for image in images]
        encode = functools.partial(_encode_image, DualEncoder(self.spec), self.params, projected)
        return _unit(in_batches(encode, np.asarray(images, np.uint8), self.batch))

    def encode_text(self, texts: Sequence[str], *, projected: bool = True) -> np.ndarray:
        """Embeddings of unit length, float32 `[n, embed]`; longer texts are cut at the context length."""
        encode = functools.partial(_encode_text, DualEncoder(self.spec), self.params, projected)
        return _unit(in_batches(encode, self.tokenizer(list(texts)), self.batch))

    def zero_shot(
        self,
        images: Sequence[Picture] | np.ndarray,
        class_names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> np.ndarray:
        """Probability of each class for each picture, float32 `[n, classes]`.

        A class is the mean of its prompts' unit embeddings, at unit length again (arXiv 2103.00020, section 3.1.4).
        """
        prompts = [template.format(name) for name in class_names for template in templates]
        text = self.encode_text(prompts).reshape(len(class_names), len(templates), -1)
        logits = self.logit_scale * self.encode_image(images) @ _unit(text.mean(axis=1)).T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)


def open_picture(image: Picture) -> Image.Image:
    """A PIL picture from itself or from a path.

    Raises:
      InputError: the file is missing or is no picture.
    """
    if isinstance(image, Image.Image):
        return image
    path = io.as_path(image)
    if not path.exists():
        raise InputError(f"there is no picture {path}")
    try:
        return preprocess.decode(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def local_mesh() -> Mesh:
    """The accelerators of this process in a row: parameters lie whole on each, samples are divided among them.

    Of a CPU's devices (there are several only where XLA_FLAGS asks for them) it takes one: they share its cores.
    """
    devices = jax.local_devices()
    return Mesh(np.asarray(devices[:1] if devices[0].platform == "cpu" else devices), ("sample",))


def everywhere(params: Any) -> Any:
    """Parameters (NumPy) whole on each device of `local_mesh`, as `in_batches` wants what `encode` holds."""
    return jax.device_put(params, NamedSharding(local_mesh(), PartitionSpec()))


def in_batches(encode: Callable[[Any], jax.Array], inputs: Any, batch: int) -> np.ndarray:
    """`encode` over `inputs` (an array or a tuple of arrays, first dimension = samples) at one fixed batch size.

    Each batch is divided among the devices of `local_mesh`; one that is no multiple of their number becomes the next.
    The last batch is filled up with its own first row, so that there is one compilation and a sample's result does
    not depend on how many others there are.
    """
    count = len(jax.tree.leaves(inputs)[0])
    if count == 0:
        raise InputError("nothing to encode: give at least one picture or text")
    mesh = local_mesh()
    batch += -batch % mesh.size
    divided = NamedSharding(mesh, PartitionSpec("sample"))
    parts = []
    for start in range(0, count, batch):
        part = jax.tree.map(lambda x, start=start: x[start : start + batch], inputs)
        size = len(jax.tree.leaves(part)[0])
        filled = jax.tree.map(lambda x, size=size: np.concatenate([x, np.repeat(x[:1], batch - size, axis=0)]), part)
        parts.append(np.asarray(encode(jax.device_put(filled, divided)))[:size])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _encode_image(model: DualEncoder, params: Any, projected: bool, images: jax.Array) -> jax.Array:
    images = preprocess.normalise(images, model.spec.preprocess)
    return model.encode_image(params, jax.lax.optimization_barrier(images), projected=projected)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _encode_text(model: DualEncoder, params: Any, projected: bool, text: TextBatch) -> jax.Array:
    return model.encode_text(params, text, projected=projected)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
