"""An image tower and a text tower as pure functions of a plain dict of float32 arrays.

The NNX modules stay inside: optimiser, sharding rules and checkpoints see `{"image": ..., "text": ...,
"logit_scale": []}` with the names that the towers document.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from mmkd_jax.models.bert import BertText
from mmkd_jax.models.clip_text import ClipText
from mmkd_jax.models.layers import fill
from mmkd_jax.models.resnet import ResNet
from mmkd_jax.models.swin import Swin
from mmkd_jax.models.vit import VisionTransformer
from mmkd_jax.specs import ModelSpec

Params = dict[str, Any]
TOWERS = {
    "image": {"vit": VisionTransformer, "modified_resnet": ResNet, "resnet": ResNet, "swin": Swin},
    "text": {"bert": BertText, "clip": ClipText},
}
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # arXiv 2103.00020, section 2.5


@dataclasses.dataclass(frozen=True)
class DualEncoder:
    """A light, hashable handle: the architecture of `spec`, the compute dtype and the remat policy.

    Attributes:
      spec: the architecture.
      dtype: compute dtype; parameters and results are float32 whatever it is.
      remat: `none`, `full` (keep only each layer's input) or `dots` (keep the matrix products) for the backward pass.
    """

    spec: ModelSpec
    dtype: Any = jnp.float32
    remat: str = "none"

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters: `{"image", "text", "logit_scale"}`, float32."""
        return _init(self, key)

    def shapes(self) -> Params:
        """The tree of `init` as `jax.ShapeDtypeStruct`, computed without allocating."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def encode_image(
        self,
        params: Params,
        images: jax.Array,
        *,
        projected: bool = True,
        key: jax.Array | None = None,
        kept: jax.Array | None = None,
    ) -> jax.Array:
        """Normalised pictures float32 `[n, H, W, 3]` to float32 `[n, embed]`, not of unit length.

        Args:
          params: what `init` returns (`logit_scale` is not looked at).
          images: of the spec's size.
          projected: False gives the pooled features `[n, width]` before the projection.
          key: training mode; for dropout where the tower has it.
          kept: int32 `[n, K]`, the patches of each picture that a ViT sees; None: all.

        Raises:
          InputError: pictures of another size; `kept` for a tower without patches.
        """
        size = self.spec.image.image_size
        if images.shape[1:] != (size, size, 3):
            raise InputError(f"pictures of shape {images.shape[1:]}; {self.spec.name} takes ({size}, {size}, 3)")
        tower = self._tower("image", params)
        if kept is None:
            return tower(images, projected, key)
        if not isinstance(tower, VisionTransformer):
            raise InputError(f"{self.spec.image.kind} towers cannot leave patches out; only a vit can")
        return tower(images, projected, key, kept)

    def encode_text(
        self, params: Params, text: TextBatch, *, projected: bool = True, key: jax.Array | None = None
    ) -> jax.Array:
        """Tokens to float32 `[n, embed]`, not of unit length; arguments as in `encode_image`.

        Raises:
          InputError: texts longer than the position table.
        """
        if text.ids.shape[1] > self.spec.text.positions:
            raise InputError(f"texts of {text.ids.shape[1]} tokens; {self.spec.name} has {self.spec.text.positions}")
        return self._tower("text", params)(text, projected, key)

    def _tower(self, tower: str, params: Params) -> nnx.Module:
        graph, state = _skeleton(tower, self.spec, np.dtype(self.dtype), self.remat)
        names = jax.tree.structure(nnx.to_pure_dict(state))
        if jax.tree.structure(params[tower]) != names:
            raise InputError(f"the {tower} parameters do not have the names that {self.spec.name}'s spec asks for")
        state = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(state, params[tower])
        return nnx.merge(graph, state)


@functools.partial(jax.jit, static_argnums=0)
def _init(encoder: DualEncoder, key: jax.Array) -> Params:
    params = {}
    for tower, tower_key in zip(("image", "text"), jax.random.split(key), strict=True):
        module = _build(tower, encoder.spec, np.dtype(encoder.dtype), encoder.remat)
        params[tower] = fill(module, tower_key, getattr(encoder.spec, tower).width)
    params["logit_scale"] = jnp.asarray(INITIAL_LOGIT_SCALE, jnp.float32)
    return params


def _build(tower: str, spec: ModelSpec, dtype: np.dtype, remat: str) -> nnx.Module:
    part = getattr(spec, tower)
    return TOWERS[tower][part.kind](part, spec.embed, dtype, remat)


@functools.lru_cache(maxsize=64)
def _skeleton(tower: str, spec: ModelSpec, dtype: np.dtype, remat: str):
    """Graph definition and abstract state of one tower."""
    module = nnx.eval_shape(lambda: _build(tower, spec, dtype, remat))
    return nnx.split(module)
