"""Swin transformer as an image tower, average-pooled: the tower of MedCLIP's ViT variant.

Sources: arXiv 2103.14030; transformers `modeling_swin.py` (`SwinModel`, whose `pooler_output` is the mean of the
normalised tokens). Attention stays within windows; every second block shifts them by half, around the picture's edges,
and a mask keeps apart what the shift brought together.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmkd_jax.image_towers import SwinTower
from mmkd_jax.models import layers as nn
from mmkd_jax.models.vit import patches

MASKED = -100.0  # added to logits, as in the authors' code


class WindowAttention(nnx.Module):
    """Attention within each window, with a learned bias for each offset between two tokens.

    Parameters: `qkv/kernel [C, 3, H, K]`, `out/kernel [H, K, C]`, their biases, `offsets [(2 w - 1)^2, H]`.
    """

    def __init__(self, width: int, heads: int, window: int, scales: nn.Scales, dtype):
        self.qkv = nn.Linear((width,), (3, heads, width // heads), scales.qkv, dtype, tensor=2)
        self.out = nn.Linear((heads, width // heads), (width,), scales.out, dtype, tensor=0)
        self.offsets = nn.normal(((2 * window - 1) ** 2, heads), 0.02)
        self.window, self.dtype = window, np.dtype(dtype)

    def __call__(self, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
        """`[n, windows, tokens, C]` to the same; `mask [windows, tokens, tokens]` is added to the logits."""
        queries, keys, values = jnp.moveaxis(self.qkv(x), 3, 0)
        precision = nn.precision_for(self.dtype)
        queries = queries * queries.shape[-1] ** -0.5
        logits = jnp.einsum(
            "nwqhd,nwkhd->nwhqk", queries, keys, precision=precision, preferred_element_type=jnp.float32
        )
        logits += self.offsets[...][offset_index(self.window)].transpose(2, 0, 1)
        if mask is not None:
            logits += mask[:, None]
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        return self.out(jnp.einsum("nwhqk,nwkhd->nwqhd", weights, values, precision=precision))


class Block(nnx.Module):
    """Normalise, attend within windows, add; normalise, MLP, add. Windows are shifted by `shift` cells."""

    def __init__(self, spec: SwinTower, stage: int, shift: int, dtype):
        width, heads, scales = spec.width * 2**stage, spec.heads * 2**stage, nn.Scales.constant(0.02)
        self.norm1, self.norm2 = nn.Norm(width, spec.norm_epsilon), nn.Norm(width, spec.norm_epsilon)
        self.attention = WindowAttention(width, heads, spec.window, scales, dtype)
        self.mlp = nn.MLP(width, int(spec.mlp_ratio * width), spec.activation, scales, dtype)
        self.window, self.shift = spec.window, shift

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, side, side, C]` to the same."""
        side, shift = x.shape[1], self.shift
        y = jnp.roll(self.norm1(x), (-shift, -shift), (1, 2))
        mask = shift_mask(side, self.window, shift) if shift else None
        y = from_windows(self.attention(to_windows(y, self.window), mask), side)
        x = x + jnp.roll(y, (shift, shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Pair(nnx.Module):
    """Two blocks: `plain`, then `shifted` (where one window is all there is, that one is not shifted either)."""

    def __init__(self, spec: SwinTower, stage: int, dtype):
        side = spec.image_size // spec.patch // 2**stage
        self.plain = Block(spec, stage, 0, dtype)
        self.shifted = Block(spec, stage, 0 if side <= spec.window else spec.window // 2, dtype)

    def __call__(self, x: jax.Array, mask: None, key: None) -> jax.Array:
        """`[n, side, side, C]` to the same; `mask` and `key` are what a stack passes its blocks."""
        return self.shifted(self.plain(x))


def _pairs(spec: SwinTower, stage: int, dtype) -> nnx.Module:
    """The blocks of one stage, stacked by pairs."""
    return nn.stack(lambda: Pair(spec, stage, dtype), spec.stages[stage] // 2)


class Merge(nnx.Module):
    """Each 2 x 2 cells to one of twice the width: `norm`, `reduction/kernel [4 C, 2 C]`."""

    def __init__(self, width: int, epsilon: float, dtype):
        self.norm = nn.Norm(4 * width, epsilon)
        self.reduction = nn.Linear((4 * width,), (2 * width,), 0.02, dtype, bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, side, side, C]` to `[n, side / 2, side / 2, 2 C]`; down before right within the four."""
        four = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        return self.reduction(self.norm(jnp.concatenate(four, axis=-1)))


class Swin(nnx.Module):
    """Pictures to one vector each.

    Parameters: `patch/kernel [1, p, p, 3, D]`, `patch/bias [D]`, `embed_norm`, `stage0`, `stage1` ... (each `plain` and
    `shifted`, stacked by pairs), `merge0`, `merge1` ... between them, `norm`, `projection/kernel [C, E]`.
    """

    def __init__(self, spec: SwinTower, embed: int, dtype=jnp.float32, remat: str = "none"):
        size, width, stages = spec.patch, spec.width, len(spec.stages)
        self.patch = nn.Linear((1, size, size, 3), (width,), 0.02, dtype)
        self.embed_norm = nn.Norm(width, spec.norm_epsilon)
        for stage in range(stages):
            setattr(self, f"stage{stage}", _pairs(spec, stage, dtype))
            if stage + 1 < stages:
                setattr(self, f"merge{stage}", Merge(width * 2**stage, spec.norm_epsilon, dtype))
        self.norm = nn.Norm(spec.features, spec.norm_epsilon)
        self.projection = nn.Linear((spec.features,), (embed,), spec.features**-0.5, dtype, bias=False)
        self.spec, self.dtype, self.remat = spec, np.dtype(dtype), remat

    def cells(self, images: jax.Array) -> jax.Array:
        """Normalised pictures `[n, H, W, 3]` to the last stage's output `[n, side, side, C]` in the compute dtype."""
        spec = self.spec
        side = spec.image_size // spec.patch
        x = self.embed_norm(self.patch(patches(images, spec.patch).astype(self.dtype)))
        x = x.reshape(x.shape[0], side, side, spec.width)
        for stage, depth in enumerate(spec.stages):
            x = nn.apply_stack(getattr(self, f"stage{stage}"), x, None, None, depth // 2, self.remat)
            if stage + 1 < len(spec.stages):
                x = getattr(self, f"merge{stage}")(x)
        return x

    def __call__(self, images: jax.Array, projected: bool = True, key: jax.Array | None = None) -> jax.Array:
        """Normalised pictures `[n, H, W, 3]` to float32 `[n, E]`, or `[n, C]` before the projection.

        The tower is run without dropout: `key` is taken so that both towers are called alike.
        """
        pooled = self.norm(self.cells(images).astype(jnp.float32)).mean((1, 2))
        return self.projection(pooled, jnp.float32) if projected else pooled


def to_windows(x: jax.Array, window: int) -> jax.Array:
    """`[n, side, side, C]` to `[n, windows, window^2, C]`, row by row."""
    return patches(x, window).reshape(x.shape[0], -1, window * window, x.shape[-1])


def from_windows(x: jax.Array, side: int) -> jax.Array:
    """The inverse of `to_windows`."""
    n, windows, tokens, channels = x.shape
    across, window = round(windows**0.5), round(tokens**0.5)
    x = x.reshape(n, across, across, window, window, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, side, side, channels)


@functools.cache
def offset_index(window: int) -> np.ndarray:
    """Row of the offset table for each query and key of a window, int `[window^2, window^2]`."""
    row, column = (axis.reshape(-1) for axis in np.mgrid[:window, :window])
    down, right = row[:, None] - row, column[:, None] - column
    return (down + window - 1) * (2 * window - 1) + right + window - 1


@functools.cache
def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """float32 `[windows, window^2, window^2]`: `MASKED` between cells that were not neighbours before the shift."""
    place = np.arange(side)
    region = (place >= side - window).astype(int) + (place >= side - shift)
    regions = (3 * region[:, None] + region).reshape(side // window, window, side // window, window)
    regions = regions.transpose(0, 2, 1, 3).reshape(-1, window * window)
    return np.where(regions[:, :, None] == regions[:, None], 0.0, MASKED).astype(np.float32)
