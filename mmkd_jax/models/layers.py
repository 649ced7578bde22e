"""Building blocks of the towers: linear maps, LayerNorm, attention, MLP, and a stack of equal blocks.

Flax NNX modules without RngStream: keys are arguments, so that a block is a pure function of (state, inputs, key).
Weights are float32; products run in the compute dtype with float32 accumulation; LayerNorm and softmax are float32.
float32 compute means float32 on every device (`Precision.HIGHEST`: a TPU's default would be bfloat16 passes).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmkd_jax.errors import InputError, near
from mmkd_jax.models import constraints, draws
from mmkd_jax.specs import ImageTower, TextTower

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

REMAT: dict[str, Callable] = {
    "none": lambda body: body,
    "full": lambda body: jax.checkpoint(body, prevent_cse=False),
    "dots": lambda body: jax.checkpoint(
        body, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


@dataclasses.dataclass(frozen=True)
class Scales:
    """Standard deviations of a block's initial kernels."""

    qkv: float
    out: float
    up: float
    down: float

    @classmethod
    def clip(cls, width: int, layers: int) -> "Scales":
        """CLIP's own (`initialize_parameters` of openai/CLIP `model.py`)."""
        attention, residual = width**-0.5, width**-0.5 * (2 * layers) ** -0.5
        return cls(attention, residual, (2 * width) ** -0.5, residual)

    @classmethod
    def constant(cls, std: float) -> "Scales":
        """One for all: 0.02 in BERT and timm's ViT."""
        return cls(std, std, std, std)


def normal(shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter that `fill` draws with standard deviation `std` (before truncation)."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), std=std)


def fill(module: nnx.Module, key: jax.Array, width: int) -> dict[str, Any]:
    """A module's parameters as a plain dict, drawn from normal distributions truncated at two standard deviations.

    Those that have a dimension of `width` come out of one draw `[width, ...]`, the others out of a second: XLA compiles
    the generator twice, not once for each parameter (half a minute on a CPU), and a mesh divides the first draw, nearly
    all of a transformer, by rows: no device draws the whole model.
    """
    state = nnx.state(module, nnx.Param)
    leaves, tree = jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    stds = [leaf.get_metadata().get("std") for leaf in leaves]
    drawn = [i for i, std in enumerate(stds) if std is not None]
    values = [leaf[...] for leaf in leaves]
    for part, rows in enumerate((width, 1)):
        chosen = [i for i in drawn if (width in values[i].shape) == (rows == width)]
        ends = np.cumsum([values[i].size // rows for i in chosen], dtype=int).tolist()
        draw = _draw(jax.random.fold_in(key, part), (rows, ends[-1])) if chosen else None
        for i, start, end in zip(chosen, [0, *ends], ends):
            values[i] = stds[i] * _unfold(draw[:, start:end], values[i].shape)
    filled = jax.tree.unflatten(tree, [leaf.replace(value) for leaf, value in zip(leaves, values, strict=True)])
    return nnx.to_pure_dict(filled)


def _draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal, truncated at two standard deviations, float32, in rows as weights are divided."""
    return constraints.rows(jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32))


def _unfold(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Numbers `[n, ...]` as an array of `shape`: rows along its last dimension of size n; one row in any order."""
    if rows.shape[0] == 1:
        return rows.reshape(shape)
    place = len(shape) - 1 - shape[::-1].index(rows.shape[0])
    return jnp.moveaxis(rows.reshape(rows.shape[0], *shape[:place], *shape[place + 1 :]), 0, place)


def precision_for(dtype: np.dtype) -> jax.lax.Precision | None:
    """Matmul precision that a compute dtype asks for."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability `rate` and rescales the rest; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    # 16 random bits an entry decide as well as 32 (the rate is off by at most 2^-17) and cost half as much.
    kept = draws.bits(key, x.shape, jnp.uint16) >= np.uint16(round(rate * 65536))
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


class Linear(nnx.Module):
    """Contracts the trailing axes of the input with the leading axes of `kernel [*inputs, *outputs]`.

    `tensor` is the kernel's dimension that a mesh with that axis divides.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        std: float,
        dtype,
        bias: bool = True,
        tensor: int | None = None,
    ):
        self.kernel = normal((*inputs, *outputs), std)
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.contracted, self.has_bias, self.dtype, self.tensor = len(inputs), bias, np.dtype(dtype), tensor

    def __call__(self, x: jax.Array, out_dtype=None) -> jax.Array:
        """`[..., *inputs]` to `[..., *outputs]` in `out_dtype` (the compute dtype unless given)."""
        kernel = constraints.weights(self.kernel[...].astype(self.dtype), self.tensor)  # cast first: less travels
        y = jnp.tensordot(
            x.astype(self.dtype),
            kernel,
            axes=self.contracted,
            precision=precision_for(self.dtype),
            preferred_element_type=out_dtype or self.dtype,
        )
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y


class Norm(nnx.Module):
    """LayerNorm over the last axis, in float32, with an explicit epsilon (it differs between tower families)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to the same shape and dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * scale * self.scale[...] + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused kernel for queries, keys and values."""

    def __init__(self, width: int, heads: int, scales: Scales, dtype, dropout: float = 0.0):
        self.qkv = Linear((width,), (3, heads, width // heads), scales.qkv, dtype, tensor=2)
        self.out = Linear((heads, width // heads), (width,), scales.out, dtype, tensor=0)
        self.dtype, self.dropout = np.dtype(dtype), dropout

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """Attends within each row.

        Args:
          x: `[n, length, width]`.
          mask: bool, broadcast to `[n, heads, queries, keys]`; True where a query may look.
          key: drops attention weights if given.
        """
        qkv = constraints.samples(self.qkv(x), tensor=3)
        queries, keys, values = (qkv[:, :, part] for part in range(3))
        precision = precision_for(self.dtype)
        queries = queries * queries.shape[-1] ** -0.5
        logits = jnp.einsum("nqhd,nkhd->nhqk", queries, keys, precision=precision, preferred_element_type=jnp.float32)
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = dropout(jax.nn.softmax(logits, axis=-1), self.dropout, key).astype(self.dtype)
        if self.dropout and key is not None and constraints.platform() == "tpu":
            # Without the barrier the TPU compiler fuses draws and products so deep that its stack overflows: it crashes
            # with signal 11 (libtpu 0.0.42.1, width 768, 256 tokens).
            weights = jax.lax.optimization_barrier(weights)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", weights, values, precision=precision)
        return self.out(mixed)


class MLP(nnx.Module):
    """Two linear maps with an activation between."""

    def __init__(self, width: int, hidden: int, activation: str, scales: Scales, dtype):
        self.up = Linear((width,), (hidden,), scales.up, dtype, tensor=1)
        self.down = Linear((hidden,), (width,), scales.down, dtype, tensor=0)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., width]`."""
        hidden = constraints.samples(self.up(x), tensor=x.ndim - 1)
        return self.down(ACTIVATIONS[self.activation](hidden))


class PreNormBlock(nnx.Module):
    """Transformer block of ViT and of CLIP's text tower: normalise, transform, add."""

    def __init__(self, spec: ImageTower | TextTower, scales: Scales, dtype):
        self.norm1, self.norm2 = Norm(spec.width, spec.norm_epsilon), Norm(spec.width, spec.norm_epsilon)
        self.attention = Attention(spec.width, spec.heads, scales, dtype)
        self.mlp = MLP(spec.width, spec.mlp_width, spec.activation, scales, dtype)

    def __call__(self, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """`[n, length, width]` to the same; these towers have no dropout, so `key` changes nothing."""
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class PostNormBlock(nnx.Module):
    """Transformer block of BERT (arXiv 1810.04805): transform, drop, add, normalise."""

    def __init__(self, spec: TextTower, scales: Scales, dtype):
        self.norm1, self.norm2 = Norm(spec.width, spec.norm_epsilon), Norm(spec.width, spec.norm_epsilon)
        self.attention = Attention(spec.width, spec.heads, scales, dtype, spec.dropout)
        self.mlp = MLP(spec.width, spec.mlp_width, spec.activation, scales, dtype)
        self.dropout = spec.dropout

    def __call__(self, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """`[n, length, width]` to the same; with a key, drops attention weights and both branches' outputs."""
        weights, first, second = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.norm1(x + dropout(self.attention(x, mask, weights), self.dropout, first))
        return self.norm2(x + dropout(self.mlp(x), self.dropout, second))


def stack(make: Callable[[], nnx.Module], layers: int) -> nnx.Module:
    """One module whose every parameter has a leading axis of `layers`, from `make()` of one layer."""
    return nnx.vmap(make, in_axes=(), axis_size=layers)()


def apply_stack(
    block: nnx.Module, x: jax.Array, mask: jax.Array | None, key: jax.Array | None, layers: int, remat: str
) -> jax.Array:
    """Applies stacked blocks one after another: a scan over their state under the remat policy `remat`."""
    if remat not in REMAT:
        raise InputError(f"unknown remat policy {remat!r}; {near(remat, REMAT)}")
    graph, states = nnx.split(block)
    keys = None if key is None else jax.random.split(key, layers)

    def body(x, layer):
        state, layer_key = layer
        x = nnx.merge(graph, state)(constraints.samples(x), mask, layer_key)
        return constraints.samples(x), None

    # On a CPU a loop's stacked residuals are copied and not fused: four layers at a time are about a fifth faster
    # (forward and backward, width 128, 4 layers, batch 128). Accelerators keep the short program.
    unroll = 4 if constraints.platform() == "cpu" else 1
    return jax.lax.scan(REMAT[remat](body), constraints.samples(x), (states, keys), unroll=unroll)[0]
