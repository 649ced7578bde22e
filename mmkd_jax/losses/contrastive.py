"""The contrastive task loss of CLIP and the products that every loss here is made of."""

import jax
import jax.numpy as jnp


def normalise(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Rows of `x` float32 `[..., d]` at unit length; a zero row stays zero and has a zero gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, epsilon**2))


def similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner products float32 `[n, m]` of the rows of `a` `[n, d]` and `b` `[m, d]`.

    In float32 at `Precision.HIGHEST`: the default of a TPU multiplies float32 in bfloat16 passes, which moves a
    similarity of temperature 0.01 by several units.
    """
    return jnp.einsum("id,jd->ij", a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def cross_entropy_of_matches(logits: jax.Array) -> jax.Array:
    """Mean over both directions of the cross-entropy of the diagonal of `logits` `[n, n]`; a float32 scalar."""
    rows = jax.nn.logsumexp(logits, axis=1)
    columns = jax.nn.logsumexp(logits, axis=0)
    return jnp.mean(0.5 * (rows + columns) - jnp.diagonal(logits))


def softmax_loss(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, arXiv 2103.00020, figure 3).

    `1/2 [CE_i(scale * v_i . t_j) + CE_i(scale * t_i . v_j)]`, mean over i.

    Args:
      image: unit image embeddings v, float32 `[n, d]`.
      text: unit text embeddings t, float32 `[n, d]`.
      scale: exponentiated logit scale, a float32 scalar.

    Returns:
      The loss in nats, a float32 scalar.
    """
    return cross_entropy_of_matches(scale * similarity(image, text))
