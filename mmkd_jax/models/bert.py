"""BERT as a text tower: class token of the last hidden state, then a projection without biases.

Sources: arXiv 1810.04805 and transformers `modeling_bert.py`; the projection is open_clip's `hf_model.py` (`mlp`:
width -> (width + embed) / 2 -> embed with exact GELU, no biases).
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
    `layers` (stacked), `projection`.
    """

    def __init__(self, spec: TextTower, embed: int, dtype=jnp.float32, remat: str = "none"):
        self.tokens = Embedding(spec.vocab_size, spec.width)
        self.positions = nn.normal((spec.positions, spec.width), 0.02)
        self.types = nn.normal((2, spec.width), 0.02)
        self.embed_norm = nn.Norm(spec.width, spec.norm_epsilon)
        scales = nn.Scales.constant(0.02)
        self.layers = nn.stack(lambda: nn.PostNormBlock(spec, scales, dtype), spec.layers)
        self.projection = Projection(spec.width, embed, spec.projection, dtype)
        self.spec, self.dtype, self.remat = spec, np.dtype(dtype), remat

    def hidden(self, text: TextBatch, key: jax.Array | None = None) -> jax.Array:
        """Tokens to the last hidden state `[n, length, D]` in the compute dtype; `key` turns dropout on."""
        first, rest = (None, None) if key is None else jax.random.split(key)
        positions = jnp.take(self.positions[...], text.positions, axis=0)
        x = self.embed_norm(self.tokens(text.ids) + positions + self.types[0])
        x = nn.dropout(x, self.spec.dropout, first).astype(self.dtype)
        mask = (text.mask > 0)[:, None, None, :]
        return nn.apply_stack(self.layers, x, mask, rest, self.spec.layers, self.remat)

    def __call__(self, text: TextBatch, projected: bool = True, key: jax.Array | None = None) -> jax.Array:
        """Tokens to float32 `[n, E]`, or the class token `[n, D]` before the projection; `key` turns dropout on."""
        pooled = self.hidden(text, key)[:, 0].astype(jnp.float32)
        return self.projection(pooled) if projected else pooled
