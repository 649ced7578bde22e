"""A small head in which a question's words look at a picture's patches: cross-attention, then answers.

Words and patches are the last states of two towers, each normalised and mapped to one width. In every block the words
attend to the patches, then pass an MLP, both added to what was there (the blocks of METER, arXiv 2111.02387, section
3.2, without attention among the words: their tower has done that). The mean over words, beside that over patches, gives
a number for every answer.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from mmkd_jax.models import layers as nn
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.models.vit import VisionTransformer

Params = dict[str, Any]
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class FusionSpec:
    """What a head is.

    Attributes:
      patch_width, word_width: of the towers' states.
      answers: how many.
      width, heads, layers: of the blocks.
      dropout: share that training leaves out of each block's changes and of what gives the answers.
    """

    patch_width: int
    word_width: int
    answers: int
    width: int = 128
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1

    def to_dict(self) -> dict[str, Any]:
        """JSON-like record."""
        return {"head": "cross_attention", **dataclasses.asdict(self)}


class CrossAttention(nnx.Module):
    """Multi-head attention of one sequence to another."""

    def __init__(self, spec: FusionSpec, scales: nn.Scales):
        each = (spec.heads, spec.width // spec.heads)
        self.query = nn.Linear((spec.width,), each, scales.qkv, jnp.float32)
        self.key_value = nn.Linear((spec.width,), (2, *each), scales.qkv, jnp.float32)
        self.out = nn.Linear(each, (spec.width,), scales.out, jnp.float32)

    def __call__(self, words: jax.Array, patches: jax.Array) -> jax.Array:
        """`[n, words, width]` and `[n, patches, width]` to `[n, words, width]`."""
        query, both = self.query(words), self.key_value(patches)
        exact = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("nqhd,nkhd->nhqk", query * query.shape[-1] ** -0.5, both[:, :, 0], precision=exact)
        return self.out(jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), both[:, :, 1], precision=exact))


class Block(nnx.Module):
    """Words look at patches, then each passes an MLP."""

    def __init__(self, spec: FusionSpec, scales: nn.Scales):
        self.norm1, self.norm2 = nn.Norm(spec.width, _EPSILON), nn.Norm(spec.width, _EPSILON)
        self.attention = CrossAttention(spec, scales)
        self.mlp = nn.MLP(spec.width, 4 * spec.width, "gelu", scales, jnp.float32)
        self.dropout = spec.dropout

    def __call__(self, words: jax.Array, patches: jax.Array, key: jax.Array | None) -> jax.Array:
        """Words `[n, words, width]` that have seen the patches; a key drops parts of what is added."""
        first, second = (None, None) if key is None else jax.random.split(key)
        words = words + nn.dropout(self.attention(self.norm1(words), patches), self.dropout, first)
        return words + nn.dropout(self.mlp(self.norm2(words)), self.dropout, second)


class Fusion(nnx.Module):
    """The head: `word_norm`, `word`, `patch_norm`, `patch`, `blocks` by number, `norm`, `answer`."""

    def __init__(self, spec: FusionSpec):
        scales = nn.Scales.clip(spec.width, spec.layers)
        self.word_norm, self.patch_norm = nn.Norm(spec.word_width, _EPSILON), nn.Norm(spec.patch_width, _EPSILON)
        self.word = nn.Linear((spec.word_width,), (spec.width,), spec.word_width**-0.5, jnp.float32)
        self.patch = nn.Linear((spec.patch_width,), (spec.width,), spec.patch_width**-0.5, jnp.float32)
        for number in range(spec.layers):
            setattr(self, f"block{number}", Block(spec, scales))
        self.norm = nn.Norm(2 * spec.width, _EPSILON)
        self.answer = nn.Linear((2 * spec.width,), (spec.answers,), 0.02, jnp.float32)
        self.spec = spec

    def __call__(self, patches: jax.Array, words: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        """See `apply`."""
        keys = [None] * (self.spec.layers + 1) if key is None else jax.random.split(key, self.spec.layers + 1)
        words, patches = self.word(self.word_norm(words)), self.patch(self.patch_norm(patches))
        for number in range(self.spec.layers):
            words = getattr(self, f"block{number}")(words, patches, keys[number])
        there = (mask > 0)[..., None].astype(jnp.float32)
        said = (words * there).sum(1) / jnp.maximum(there.sum(1), 1)
        both = self.norm(jnp.concatenate([said, patches.mean(1)], axis=1))
        return self.answer(nn.dropout(both, self.spec.dropout, keys[-1]))


def init(spec: FusionSpec, key: jax.Array) -> Params:
    """Fresh parameters, float32."""
    if spec.width % spec.heads:
        raise InputError(f"a width of {spec.width} cannot be divided among {spec.heads} heads")
    return nn.fill(Fusion(spec), key, spec.width)


def apply(
    spec: FusionSpec,
    params: Params,
    patches: jax.Array,
    words: jax.Array,
    mask: jax.Array,
    key: jax.Array | None = None,
) -> jax.Array:
    """A score for every answer, float32 `[n, answers]`.

    Args:
      spec: of the head.
      params: of `init`.
      patches: float `[n, patches, patch_width]`.
      words: float `[n, length, word_width]`.
      mask: `[n, length]`, positive where there is a word.
      key: turns dropout on.
    """
    graph, state = _skeleton(spec)
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(patches.astype(jnp.float32), words.astype(jnp.float32), mask, key)


def patches_of(model: DualEncoder, params: Params, images: jax.Array) -> jax.Array:
    """States of the image tower for normalised pictures `[n, S, S, 3]`: class token and patches, `[n, 1 + N, width]`.

    Raises:
      InputError: the tower has no patches.
    """
    tower = model._tower("image", params)
    if not isinstance(tower, VisionTransformer):
        raise InputError(f"cross-attention needs patches: an image tower of kind vit, not {model.spec.image.kind}")
    return tower.tokens(images)


def words_of(model: DualEncoder, params: Params, text: TextBatch, key: jax.Array | None = None) -> jax.Array:
    """States of the text tower for tokens `[n, length]`: `[n, length, width]`; a key turns its dropout on."""
    tower = model._tower("text", params)
    return tower.hidden(text, key)[-1] if model.spec.text.kind == "bert" else tower.hidden(text)


@functools.lru_cache(maxsize=16)
def _skeleton(spec: FusionSpec):
    return nnx.split(nnx.eval_shape(lambda: Fusion(spec)))
