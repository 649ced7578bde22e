"""ResNets as image towers: OpenAI's with attention pooling, and the plain one with an average.

Sources: arXiv 1512.03385; arXiv 2103.00020 and openai/CLIP `model.py` (`ModifiedResNet`, the tower of PMC-CLIP);
torchvision `resnet.py` (strides in the 3 x 3 convolutions; the tower of MedCLIP's ResNet variant).

BatchNorm always uses the stored statistics, so that a feature does not depend on its neighbours. The statistics are
leaves of the parameters, `mean` and `variance`, and frozen: they get no gradient, and the optimiser decays none of
that name.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmkd_jax.image_towers import ResNetTower
from mmkd_jax.models import layers as nn

EXPANSION = 4  # a bottleneck block's output over its inner width


class Conv(nnx.Module):
    """Convolution without bias over squares, zero-padded by half its size; `kernel [k, k, C, D]`."""

    def __init__(self, size: int, inputs: int, outputs: int, dtype, stride: int = 1):
        self.kernel = nn.normal((size, size, inputs, outputs), (2 / (size * size * inputs)) ** 0.5)
        self.size, self.stride, self.dtype = size, stride, np.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, H, W, C]` to `[n, H / stride, W / stride, D]` in the compute dtype."""
        kernel, x, precision = self.kernel[...].astype(self.dtype), x.astype(self.dtype), nn.precision_for(self.dtype)
        if self.size == 1:  # a matrix product, which compilers do better as such
            x = x[:, :: self.stride, :: self.stride]
            return jnp.tensordot(x, kernel[0, 0], axes=1, precision=precision, preferred_element_type=self.dtype)
        pad = (self.size // 2,) * 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            (pad, pad),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
            preferred_element_type=self.dtype,
        )


class BatchNorm(nnx.Module):
    """Normalises channels by stored statistics, in float32: `scale`, `bias`, `mean`, `variance`, all `[C]`."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.mean = nnx.Param(jnp.zeros(width, jnp.float32))
        self.variance = nnx.Param(jnp.ones(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` to the same shape and dtype."""
        mean, variance = (jax.lax.stop_gradient(value[...]) for value in (self.mean, self.variance))
        scale = self.scale[...] * jax.lax.rsqrt(variance + self.epsilon)
        return (x.astype(jnp.float32) * scale + (self.bias[...] - mean * scale)).astype(x.dtype)


class ConvNorm(nnx.Module):
    """A convolution and a BatchNorm: `conv`, `norm`."""

    def __init__(self, size: int, inputs: int, outputs: int, epsilon: float, dtype, stride: int = 1):
        self.conv = Conv(size, inputs, outputs, dtype, stride)
        self.norm = BatchNorm(outputs, epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, H, W, C]` to `[n, H / stride, W / stride, D]`."""
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions beside a shortcut: `first`, `second`, `third`, and `shortcut` where it differs.

    Where `stride` is 2, OpenAI's block averages 2 x 2 cells before the last convolution and before the shortcut's; the
    plain one strides in the middle convolution and in the shortcut's.
    """

    def __init__(self, spec: ResNetTower, inputs: int, width: int, stride: int, dtype):
        self.pools = spec.kind == "modified_resnet" and stride > 1
        stride = 1 if self.pools else stride
        outputs, epsilon = EXPANSION * width, spec.norm_epsilon
        self.first = ConvNorm(1, inputs, width, epsilon, dtype)
        self.second = ConvNorm(3, width, width, epsilon, dtype, stride)
        self.third = ConvNorm(1, width, outputs, epsilon, dtype)
        self.differs = inputs != outputs
        if self.differs:
            self.shortcut = ConvNorm(1, inputs, outputs, epsilon, dtype, stride)

    def __call__(self, x: jax.Array, mask: None = None, key: None = None) -> jax.Array:
        """`[n, H, W, C]` to `[n, H / stride, W / stride, D]`; `mask` and `key` are what a stack passes its blocks."""
        y = jax.nn.relu(self.second(jax.nn.relu(self.first(x))))
        if self.pools:
            x, y = average_pool(x), average_pool(y)
        return jax.nn.relu(self.third(y) + (self.shortcut(x) if self.differs else x))


class Stage(nnx.Module):
    """Blocks of one width: `first`, which changes the shape, and `rest` (stacked)."""

    def __init__(self, spec: ResNetTower, index: int, dtype):
        width = spec.width * 2**index
        inputs = spec.width if index == 0 else EXPANSION * width // 2
        self.first = Bottleneck(spec, inputs, width, 1 if index == 0 else 2, dtype)
        self.others = spec.stages[index] - 1
        if self.others:
            self.rest = nn.stack(lambda: Bottleneck(spec, EXPANSION * width, width, 1, dtype), self.others)

    def __call__(self, x: jax.Array, remat: str) -> jax.Array:
        """`[n, H, W, C]` to `[n, H / stride, W / stride, D]`."""
        x = self.first(x)
        return nn.apply_stack(self.rest, x, None, None, self.others, remat) if self.others else x


class AttentionPool(nnx.Module):
    """The mean of all cells, as a query, attends to itself and to all cells.

    Parameters: `positions [1 + N, C]`, `query/kernel [C, H, K]`, `key_value/kernel [C, 2, H, K]`, and their biases. The
    output map is the tower's projection.
    """

    def __init__(self, cells: int, width: int, heads: int, dtype):
        std = width**-0.5
        self.positions = nn.normal((1 + cells, width), std)
        self.query = nn.Linear((width,), (heads, width // heads), std, dtype)
        self.key_value = nn.Linear((width,), (2, heads, width // heads), std, dtype)
        self.dtype = np.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, H, W, C]` to float32 `[n, C]`."""
        x = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1) + self.positions[...]
        query, (keys, values) = self.query(x[:, 0]), jnp.moveaxis(self.key_value(x), 2, 0)
        query, precision = query * query.shape[-1] ** -0.5, nn.precision_for(self.dtype)
        logits = jnp.einsum("nhd,nkhd->nhk", query, keys, precision=precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        pooled = jnp.einsum("nhk,nkhd->nhd", weights, values, precision=precision, preferred_element_type=jnp.float32)
        return pooled.reshape(pooled.shape[0], -1)


class ModifiedStem(nnx.Module):
    """OpenAI's stem: three 3 x 3 convolutions, the first with stride 2: `first`, `second`, `third`."""

    def __init__(self, width: int, epsilon: float, dtype):
        self.first = ConvNorm(3, 3, width // 2, epsilon, dtype, 2)
        self.second = ConvNorm(3, width // 2, width // 2, epsilon, dtype)
        self.third = ConvNorm(3, width // 2, width, epsilon, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, H, W, 3]` to `[n, H / 2, W / 2, width]`, before the last activation."""
        return self.third(jax.nn.relu(self.second(jax.nn.relu(self.first(x)))))


class ResNet(nnx.Module):
    """Pictures to one vector each.

    Parameters: `stem` (OpenAI's: `stem/first`, `second`, `third`; plain: `stem`, 7 x 7), `stage0`, `stage1` ... (each
    `first` and `rest`, stacked), `pool` (OpenAI's only), `projection/kernel [C, E]` (OpenAI's: `projection/bias`).
    """

    def __init__(self, spec: ResNetTower, embed: int, dtype=jnp.float32, remat: str = "none"):
        self.modified = spec.kind == "modified_resnet"
        width, epsilon = spec.width, spec.norm_epsilon
        self.stem = ModifiedStem(width, epsilon, dtype) if self.modified else ConvNorm(7, 3, width, epsilon, dtype, 2)
        for index in range(len(spec.stages)):
            setattr(self, f"stage{index}", Stage(spec, index, dtype))
        if self.modified:
            self.pool = AttentionPool((spec.image_size // spec.stride) ** 2, spec.features, spec.heads, dtype)
        std = spec.features**-0.5
        self.projection = nn.Linear((spec.features,), (embed,), std, dtype, bias=self.modified)
        self.spec, self.remat = spec, remat

    def cells(self, images: jax.Array) -> jax.Array:
        """Normalised pictures `[n, H, W, 3]` to the last stage's output `[n, H / 32, W / 32, C]`, compute dtype."""
        x = jax.nn.relu(self.stem(images))
        x = average_pool(x) if self.modified else max_pool(x)
        for index in range(len(self.spec.stages)):
            x = getattr(self, f"stage{index}")(x, self.remat)
        return x

    def __call__(self, images: jax.Array, projected: bool = True, key: jax.Array | None = None) -> jax.Array:
        """Normalised pictures `[n, H, W, 3]` to float32 `[n, E]`, or `[n, C]` before the projection.

        The tower has no dropout: `key` is taken so that both towers are called alike.
        """
        x = self.cells(images)
        pooled = self.pool(x) if self.modified else x.astype(jnp.float32).mean((1, 2))
        return self.projection(pooled, jnp.float32) if projected else pooled


def average_pool(x: jax.Array) -> jax.Array:
    """`[n, H, W, C]` to `[n, H / 2, W / 2, C]`: the mean of each 2 x 2 cells, an odd last row or column left out."""
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    cells = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return cells.astype(jnp.float32).mean((2, 4)).astype(x.dtype)


def max_pool(x: jax.Array) -> jax.Array:
    """`[n, H, W, C]` to `[n, H / 2, W / 2, C]`: the largest of 3 x 3 cells around every second one."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, np.array(-np.inf, x.dtype), jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
