"""Vision transformer with a class token: the image tower of OpenAI's CLIP, and timm's variant of it.

Sources: arXiv 2010.11929 (ViT); arXiv 2103.00020 and openai/CLIP `model.py` (the LayerNorm before the blocks, no
patch bias, a bare projection matrix); huggingface/pytorch-image-models `vision_transformer.py` (patch bias, LayerNorm
epsilon 1e-6).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmkd_jax.models import layers as nn
from mmkd_jax.specs import ImageTower


class VisionTransformer(nnx.Module):
    """Pictures to one vector each.

    Parameters: `patch/kernel [1, p, p, 3, D]` (`patch/bias [D]`), `class_token [D]`, `positions [1 + N, D]`,
    `pre_norm`, `layers` (stacked), `norm`, `projection/kernel [D, E]`.
    """

    def __init__(self, spec: ImageTower, embed: int, dtype=jnp.float32, remat: str = "none"):
        size, width = spec.patch, spec.width
        timm = spec.layout == "timm"
        scales = nn.Scales.constant(0.02) if timm else nn.Scales.clip(width, spec.layers)
        table = 0.02 if timm else width**-0.5
        fan_in = 3 * size * size
        self.patch = nn.Linear((1, size, size, 3), (width,), fan_in**-0.5, dtype, bias=spec.patch_bias)
        self.class_token = nn.normal((width,), table)
        self.positions = nn.normal((1 + (spec.image_size // size) ** 2, width), table)
        if spec.pre_norm:
            self.pre_norm = nn.Norm(width, spec.norm_epsilon)
        self.layers = nn.stack(lambda: nn.PreNormBlock(spec, scales, dtype), spec.layers)
        self.norm = nn.Norm(width, spec.norm_epsilon)
        self.projection = nn.Linear((width,), (embed,), width**-0.5, dtype, bias=False)
        self.spec, self.dtype, self.remat = spec, np.dtype(dtype), remat

    def tokens(self, images: jax.Array, kept: jax.Array | None = None) -> jax.Array:
        """Normalised pictures `[n, H, W, 3]` to the last block's output `[n, 1 + N, D]` in the compute dtype.

        With `kept`, int32 `[n, K]`, it sees only those patches of each picture: `[n, 1 + K, D]`.
        """
        pixels, positions = patches(images, self.spec.patch), self.positions[...]
        if kept is not None:
            pixels = jnp.take_along_axis(pixels, kept[:, :, None, None, None, None], axis=1)
            first = jnp.broadcast_to(positions[:1], (len(kept), 1, positions.shape[-1]))
            positions = jnp.concatenate([first, jnp.take(positions[1:], kept, axis=0)], axis=1)
        x = self.patch(pixels.astype(self.dtype))
        first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + positions.astype(x.dtype)
        if self.spec.pre_norm:
            x = self.pre_norm(x)
        return nn.apply_stack(self.layers, x, None, None, self.spec.layers, self.remat)

    def __call__(
        self,
        images: jax.Array,
        projected: bool = True,
        key: jax.Array | None = None,
        kept: jax.Array | None = None,
    ) -> jax.Array:
        """Normalised pictures `[n, H, W, 3]` to float32 `[n, E]`, or `[n, D]` before the projection.

        The tower has no dropout: `key` is taken so that both towers are called alike. `kept` as in `tokens`.
        """
        pooled = self.norm(self.tokens(images, kept)[:, 0].astype(jnp.float32))
        return self.projection(pooled, jnp.float32) if projected else pooled


def patches(images: jax.Array, size: int) -> jax.Array:
    """`[n, H, W, C]` to `[n, N, 1, size, size, C]`, row by row: the patch embedding is then one matrix product."""
    n, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(n, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * columns, 1, size, size, channels)
