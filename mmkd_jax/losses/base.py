"""What every loss is given, and the products and means that all are made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """The global batch as a loss sees it; rows are samples, and each loss says which fields it reads.

    Only `image`, `text`, `scale` and `bias` are differentiated: targets, weights and teachers' temperatures are
    constants. A row of weight 0 takes no part, and whatever stands in its targets does not matter.

    Attributes:
      image: the student's image embeddings, v^S of CLIP-KD, float32 `[n, d]`.
      text: its text embeddings, s^S there, float32 `[n, d]`.
      target_image: a teacher's image features v^T, float32 `[n, e]`.
      target_text: its text features s^T, float32 `[n, e]`.
      weight: float32 `[n]`, at least 0; None: all 1.
      scale: exponentiated logit scale 1 / tau of the student, a scalar.
      target_scale: the same of the teacher.
      bias: added to the logits of the sigmoid loss, a scalar.
      between: `similarity(image, text)`, where several losses look at it: computed once, features and their gradient go
        over the mesh once, not once a loss; None: each loss computes its own.
    """

    image: jax.Array
    text: jax.Array
    target_image: jax.Array | None = None
    target_text: jax.Array | None = None
    weight: jax.Array | None = None
    scale: jax.Array | float = 1.0
    target_scale: jax.Array | float = 1.0
    bias: jax.Array | float = 0.0
    between: jax.Array | None = None

    @property
    def weights(self) -> jax.Array:
        """`weight`, float32 `[n]`."""
        return jnp.ones(len(self.image), jnp.float32) if self.weight is None else self.weight

    @property
    def similarities(self) -> jax.Array:
        """Those of the student's images and texts, float32 `[n, n]`."""
        return similarity(self.image, self.text) if self.between is None else self.between

    @property
    def towers(self) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """(student, target) of images, and of texts."""
        target_image, target_text = jax.lax.stop_gradient((self.target_image, self.target_text))
        return (self.image, target_image), (self.text, target_text)


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


def own_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """The diagonal of `similarity`: float32 `[n]` from `[n, d]` and `[n, d]`."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def matches(x: jax.Array) -> jax.Array:
    """The diagonal of float32 `[n, n]`, `[n]`, by elements: `jnp.diagonal` gathers by indices.

    Where rows are divided over a mesh, those indices and their gradient would travel to every device.
    """
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.sum(jnp.where(rows == columns, x, 0.0), axis=1)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """`sum(w x) / sum(w)` of `[n]` and `[n]`; 0 where all weights are 0."""
    total = jnp.sum(weight)
    return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight) / jnp.where(total > 0, total, 1.0)


def masked(logits: jax.Array, columns: jax.Array | None, axis: int = 1) -> jax.Array:
    """Logits `[n, m]` without the columns (or what lies along `axis`) that take no part (bool `[m]`; None: all do)."""
    # A large finite number and not -inf: a batch without any such sample must give 0, not NaN gradients.
    return logits if columns is None else jnp.where(jnp.expand_dims(columns, 1 - axis), logits, -1e9)
