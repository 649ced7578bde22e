"""BERT as a text tower: its hidden states pooled into one vector, then a projection without biases.

Sources: arXiv 1810.04805 and transformers `modeling_bert.py`; the projection is open_clip's `hf_model.py` (`mlp`:
width -> (width + embed) / 2 -> embed with exact GELU, no biases). `TextTower` says which poolings there are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmkd_jax.batch import TextBatch
from mmkd_jax.models import constraints
from mmkd_jax.models import layers as nn
from mmkd_jax.specs import TextTower


class Embedding(nnx.Module):
    """A table of vectors, `embedding [V, D]`."""

    def __init__(self, size: int, width: int):
        self.embedding = nn.normal((size, width), 0.02)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32 `[...]` to float32 `[..., D]`."""
        return constraints.columns(jnp.take(self.embedding[...], ids, axis=0))


class Projection(nnx.Module):
    """Pooled text to the embedding: `kernel [D, E]`, or `up/kernel [D, M]`, GELU, `down/kernel [M, E]`."""

    def __init__(self, width: int, embed: int, kind: str, dtype):
        self.kind = kind
        if kind == "linear":
            self.kernel = nn.normal((width, embed), width**-0.5)
        else:
            middle = (width + embed) // 2
            self.up = nn.Linear((width,), (middle,), width**-0.5, dtype, bias=False)
            self.down = nn.Linear((middle,), (embed,), middle**-0.5, dtype, bias=False)
        self.dtype = np.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, D]` to float32 `[n, E]`."""
        if self.kind == "mlp":
            return self.down(nn.ACTIVATIONS["gelu"](self.up(x)), jnp.float32)
        return jnp.matmul(
            x.astype(self.dtype),
            constraints.weights(self.kernel[...].astype(self.dtype)),
            precision=nn.precision_for(self.dtype),
            preferred_element_type=jnp.float32,
        )


class BertText(nnx.Module):
    """Captions to one vector each.

    Parameters: `tokens/embedding [V, D]`, `positions [P, D]`, `types [2, D]` (row 0 is always added), `embed_norm`,
    `layers` (stacked), `pooler/kernel [D, D]` and `pooler/bias` (only with pooling `pooler`), `projection`.
    """

    def __init__(self, spec: TextTower, embed: int, dtype=jnp.float32, remat: str = "none"):
        self.tokens = Embedding(spec.vocab_size, spec.width)
        self.positions = nn.normal((spec.positions, spec.width), 0.02)
        self.types = nn.normal((2, spec.width), 0.02)
        self.embed_norm = nn.Norm(spec.width, spec.norm_epsilon)
        scales = nn.Scales.constant(0.02)
        self.layers = nn.stack(lambda: nn.PostNormBlock(spec, scales, dtype), spec.layers)
        if spec.pooling == "pooler":
            self.pooler = nn.Linear((spec.width,), (spec.width,), 0.02, dtype)
        self.projection = Projection(spec.width, embed, spec.projection, dtype)
        self.spec, self.dtype, self.remat = spec, np.dtype(dtype), remat

    def hidden(self, text: TextBatch, key: jax.Array | None = None, after: tuple[int, ...] = ()) -> list[jax.Array]:
        """Tokens to the states `[n, length, D]` after some layers (counted from 1) and after the last, compute dtype.

        Args:
          text: the tokens.
          key: turns dropout on.
          after: ascending; none of them gives the last hidden state alone.
        """
        first, rest = (None, None) if key is None else jax.random.split(key)
        positions = jnp.take(self.positions[...], text.positions, axis=0)
        x = self.embed_norm(self.tokens(text.ids) + positions + self.types[0])
        x = nn.dropout(x, self.spec.dropout, first).astype(self.dtype)
        mask = None if self.spec.padding == "attended" else (text.mask > 0)[:, None, None, :]
        states, start = [], 0
        for stop in sorted({*after, self.spec.layers}):
            part = _slice(self.layers, start, stop)
            layer_key = rest if rest is None or not after else jax.random.fold_in(rest, start)
            x = nn.apply_stack(part, x, mask, layer_key, stop - start, self.remat)
            states.append(x)
            start = stop
        return states

    def __call__(self, text: TextBatch, projected: bool = True, key: jax.Array | None = None) -> jax.Array:
        """Tokens to float32 `[n, E]`, or pooled `[n, D]` before the projection; `key` turns dropout on."""
        if self.spec.pooling == "layers":
            pooled = self._mean(text, key)
        else:
            pooled = self.hidden(text, key)[-1][:, 0].astype(jnp.float32)
        if self.spec.pooling == "pooler":
            pooled = jnp.tanh(self.pooler(pooled, jnp.float32))
        return self.projection(pooled) if projected else pooled

    def _mean(self, text: TextBatch, key: jax.Array | None) -> jax.Array:
        """The mean over tokens of the states after layers 1, 2 and last (MedCLIP's `modeling_medclip.py`)."""
        states = dict(zip(sorted({1, 2, self.spec.layers}), self.hidden(text, key, (1, 2)), strict=True))
        total = sum(states[layer].astype(jnp.float32) for layer in (1, 2, self.spec.layers)) / 3
        if self.spec.padding != "masked":
            return total.mean(1)
        weights = (text.mask > 0)[..., None].astype(jnp.float32)
        return (total * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def _slice(block: nnx.Module, start: int, stop: int) -> nnx.Module:
    """Layers `start` to `stop` of a stack."""
    graph, state = nnx.split(block)
    return nnx.merge(graph, jax.tree.map(lambda x: x[start:stop], state))
