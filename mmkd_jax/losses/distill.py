"""Feature-level distillation losses, in the terms of CLIP-KD (arXiv 2307.12732) and MMKD-CLIP (arXiv 2506.22567).

Rows are samples of the global batch. Targets are constants: nothing here is differentiated through a teacher.
Where a row has no target its weight is zero, and whatever stands in the target row does not matter.
"""

import jax
import jax.numpy as jnp

from mmkd_jax.losses.contrastive import normalise, similarity


def feature_mse(student: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
    """Feature distillation as released: `mean_{i,d} (s_id - u_id)^2` over rows of weight 1 (CLIP-KD eq. 11).

    The mean runs over the dimensions as well, so that a weight of 50 at width 512 stands for 50 / 512 of the squared
    distance (MMKD-CLIP, src/open_clip/loss.py).

    Args:
      student: float32 `[n, d]`.
      target: float32 `[n, d]`, of any norm.
      weight: float32 `[n]`, 0 where there is no target.

    Returns:
      Float32 scalar: the weighted mean over rows, 0 if all weights are.
    """
    square = jnp.mean(jnp.square(student - target), axis=-1)
    return weighted_mean(square, weight)


def cosine_distance(student: jax.Array, target: jax.Array) -> jax.Array:
    """`1 - cos(s_i, u_i)` for each row: float32 `[n]` from `[n, d]` and `[n, d]`."""
    return 1.0 - jnp.sum(normalise(student) * normalise(target), axis=-1)


def interactive_contrastive(
    image: jax.Array,
    text: jax.Array,
    target_image: jax.Array,
    target_text: jax.Array,
    weight: jax.Array,
    scale: jax.Array | float,
) -> jax.Array:
    """Interactive contrastive learning, ICL: the student against the teacher of the other tower (CLIP-KD eq. 14-16).

    `1/2 [CE_i(c s_i . w_j) + CE_i(c r_i . u_j)]`. Rows and columns of weight 0 take no part.

    Args:
      image: student image embeddings s, float32 `[n, d]`.
      text: student text embeddings r, float32 `[n, d]`.
      target_image: teacher image features u, float32 `[n, d]`.
      target_text: teacher text features w, float32 `[n, d]`.
      weight: float32 `[n]`.
      scale: the factor c. MMKD-CLIP as released takes ln(1 / 0.07) = 2.659, not exponentiated and not trained.

    Returns:
      The loss in nats, a float32 scalar.
    """
    columns = weight > 0
    both = [
        _cross_entropy(scale * similarity(student, target), columns)
        for student, target in ((image, target_text), (text, target_image))
    ]
    return weighted_mean(0.5 * (both[0] + both[1]), weight)


def affinity_kl(
    image: jax.Array,
    text: jax.Array,
    target_image: jax.Array,
    target_text: jax.Array,
    weight: jax.Array,
    scale: jax.Array | float,
    target_scale: jax.Array | float,
) -> jax.Array:
    """Affinity distillation among the samples that share a teacher (CRD of CLIP-KD eq. 4-10; MobileCLIP's KL).

    `1/2 [KL(p_i || q_i) + the text-to-image counterpart]` with `p = softmax_j(target_scale u_i . w_j)` and
    `q = softmax_j(scale s_i . r_j)`, where j runs over the samples of positive weight only: comparing features of two
    teachers as if they shared a space says nothing.

    Args:
      image: unit student image embeddings s, float32 `[n, d]`.
      text: unit student text embeddings r, float32 `[n, d]`.
      target_image: unit teacher image features u, float32 `[n, e]`.
      target_text: unit teacher text features w, float32 `[n, e]`.
      weight: float32 `[n]`; 0 takes a sample out, as a row and as a column.
      scale: the student's exponentiated logit scale.
      target_scale: the teacher's exponentiated logit scale (an inverse temperature).

    Returns:
      The divergence in nats, a float32 scalar: the weighted mean over rows.
    """
    columns = weight > 0
    student = scale * similarity(image, text)
    teacher = target_scale * similarity(target_image, target_text)
    forward = _kl(teacher, student, columns)
    backward = _kl(teacher.T, student.T, columns)
    return weighted_mean(0.5 * (forward + backward), weight)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """`sum(w x) / sum(w)` of `[n]` and `[n]`; 0 where all weights are 0."""
    total = jnp.sum(weight)
    return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight) / jnp.where(total > 0, total, 1.0)


def _cross_entropy(logits: jax.Array, columns: jax.Array) -> jax.Array:
    """Cross-entropy of the diagonal among the columns that take part: `[n]` from `[n, n]` and bool `[n]`."""
    return jax.nn.logsumexp(_masked(logits, columns), axis=1) - jnp.diagonal(logits)


def _kl(teacher: jax.Array, student: jax.Array, columns: jax.Array) -> jax.Array:
    """KL of each row's softmax over the columns that take part: `[n]` from two `[n, n]`."""
    log_p = jax.nn.log_softmax(_masked(teacher, columns), axis=1)
    log_q = jax.nn.log_softmax(_masked(student, columns), axis=1)
    return jnp.sum(jnp.where(columns[None, :], jnp.exp(log_p) * (log_p - log_q), 0.0), axis=1)


def _masked(logits: jax.Array, columns: jax.Array) -> jax.Array:
    # A large finite number and not -inf: a batch without any such sample must give 0, not NaN gradients.
    return jnp.where(columns[None, :], logits, -1e9)
