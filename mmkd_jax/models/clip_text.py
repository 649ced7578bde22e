"""The text tower of CLIP: causal pre-norm transformer, hidden state at the end token, one projection matrix.

Source: arXiv 2103.00020, openai/CLIP `model.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmkd_jax.batch import TextBatch
from mmkd_jax.models import layers as nn
from mmkd_jax.models.bert import Embedding, Projection
from mmkd_jax.specs import TextTower


class ClipText(nnx.Module):
    """Captions to one vector each.

    Parameters: `tokens/embedding [V, D]`, `positions [P, D]`, `layers` (stacked), `norm`, `projection`.
    """

    def __init__(self, spec: TextTower, embed: int, dtype=jnp.float32, remat: str = "none"):
        self.tokens = Embedding(spec.vocab_size, spec.width)
        self.positions = nn.normal((spec.positions, spec.width), 0.01)
        scales = nn.Scales.clip(spec.width, spec.layers)
        self.layers = nn.stack(lambda: nn.PreNormBlock(spec, scales, dtype), spec.layers)
        self.norm = nn.Norm(spec.width, spec.norm_epsilon)
        self.projection = Projection(spec.width, embed, spec.projection, dtype)
        self.spec, self.dtype, self.remat = spec, np.dtype(dtype), remat

    def hidden(self, text: TextBatch) -> jax.Array:
        """Tokens to the last block's output `[n, length, D]` in the compute dtype.

        Padding needs no mask: it comes after the end token, which causal attention does not let it reach.
        """
        x = self.tokens(text.ids) + jnp.take(self.positions[...], text.positions, axis=0)
        length = text.ids.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        return nn.apply_stack(self.layers, x.astype(self.dtype), causal, None, self.spec.layers, self.remat)

    def __call__(self, text: TextBatch, projected: bool = True, key: jax.Array | None = None) -> jax.Array:
        """Tokens to float32 `[n, E]`, or the end token's state `[n, D]` before the projection.

        The end token has the highest id (as in openai/CLIP); its first occurrence counts. The tower has no dropout:
        `key` is taken so that both towers are called alike.
        """
        hidden = self.hidden(text)
        end = jnp.argmax(text.ids, axis=1)
        pooled = self.norm(hidden[jnp.arange(hidden.shape[0]), end].astype(jnp.float32))
        return self.projection(pooled) if projected else pooled
