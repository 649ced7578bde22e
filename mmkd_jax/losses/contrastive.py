"""Contrastive task losses over the global batch: the softmax of CLIP and the sigmoid of SigLIP."""

import jax
import jax.numpy as jnp

from mmkd_jax.losses import forms, reductions
from mmkd_jax.losses.base import Inputs, matches, normalise, own_similarity, similarity

__all__ = ["LOSSES", "cross_entropy_of_matches", "normalise", "sigmoid", "similarity", "softmax"]


def softmax(x: Inputs, form: str = "plain") -> jax.Array:
    """Symmetric InfoNCE (Radford et al. 2021, arXiv 2103.00020, figure 3; CLIP-KD eq. 1-3).

    `1/2 [CE_i(scale * v_i . t_j) + CE_i(scale * t_i . v_j)]`, mean over i.

    Args:
      x: unit `image` v and `text` t `[n, d]`, and `scale`.
      form: of `forms.FORMS`.

    Returns:
      The loss in nats, a float32 scalar.
    """
    if form == "plain":
        return cross_entropy_of_matches(x.scale * x.similarities)
    scale = jnp.asarray(x.scale, jnp.float32)
    live = reductions.Tile(x.image, x.text, scale)
    rows, columns = forms.statistics(reductions.LogSumExp(), form, live, reductions.NOTHING_FIXED)
    return jnp.mean(0.5 * (rows.total + columns.total) - scale * own_similarity(x.image, x.text))


def sigmoid(x: Inputs, form: str = "plain") -> jax.Array:
    """Every pair by itself (SigLIP, Zhai et al. 2023, arXiv 2303.15343, section 3.2).

    `-1/n sum_ij log sigma(z_ij (scale v_i . t_j + bias))`, z = 1 where i = j and -1 elsewhere.

    Args:
      x: unit `image` v and `text` t `[n, d]`, `scale` and `bias`.
      form: of `forms.FORMS`.

    Returns:
      The loss in nats a sample, a float32 scalar.
    """
    if form == "plain":
        logits = x.scale * x.similarities + x.bias
        signs = 2.0 * jnp.eye(len(logits)) - 1.0
        return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=1))
    shared = jnp.asarray(x.scale, jnp.float32), jnp.asarray(x.bias, jnp.float32)
    live = reductions.Tile(x.image, x.text, shared)
    rows, _ = forms.statistics(reductions.SoftplusSum(), form, live, reductions.NOTHING_FIXED)
    # -log sigma(l) = softplus(-l) = softplus(l) - l for the pairs that match.
    return jnp.mean(rows.total - shared[0] * own_similarity(x.image, x.text)) - shared[1]


def cross_entropy_of_matches(logits: jax.Array) -> jax.Array:
    """Mean over both directions of the cross-entropy of the diagonal of `logits` `[n, n]`; a float32 scalar."""
    rows = jax.nn.logsumexp(logits, axis=1)
    columns = jax.nn.logsumexp(logits, axis=0)
    return jnp.mean(0.5 * (rows + columns) - matches(logits))


LOSSES = {"softmax": softmax, "sigmoid": sigmoid}
