"""Distillation losses from features, in the terms of CLIP-KD (arXiv 2307.12732) and of what came after.

All have one signature, `loss(inputs, form) -> scalar`. `form` says how the global batch is compared with itself (see
`forms`); it changes nothing where each sample is compared with its own target alone.
"""

import jax
import jax.numpy as jnp

from mmkd_jax.losses import forms, reductions
from mmkd_jax.losses.base import Inputs, masked, matches, normalise, own_similarity, similarity, weighted_mean


def feature(x: Inputs, form: str = "plain") -> jax.Array:
    """Feature distillation, FD (CLIP-KD eq. 11): `mean_i |v^S_i - v^T_i|^2 + mean_i |s^S_i - s^T_i|^2`.

    With `image` from pictures of which a part of the patches was taken away before the tower (their ratio is 0.75
    there), this is masked feature distillation, MFD (eq. 12): the targets are those of the whole pictures.

    Args:
      x: `image`, `text`, `target_image`, `target_text` `[n, d]`, `weight`.
      form: changes nothing.

    Returns:
      Float32 scalar; 0 if all weights are.
    """
    return sum(weighted_mean(jnp.sum(jnp.square(s - t), axis=-1), x.weights) for s, t in x.towers)


def released_feature(x: Inputs, form: str = "plain") -> jax.Array:
    """FD as released: the mean runs over the dimensions too, so that 50 at width 512 weighs as 50 / 512 of eq. 11.

    `mean_{i,d} (v^S_id - v^T_id)^2` + the same of texts (MMKD-CLIP and CLIP-KD, src/open_clip/loss.py).

    Args:
      x: `image`, `text`, `target_image`, `target_text` `[n, d]`, `weight`.
      form: changes nothing.

    Returns:
      Float32 scalar; 0 if all weights are.
    """
    (image, target_image), (text, target_text) = x.towers
    of_image = weighted_mean(jnp.mean(jnp.square(image - target_image), axis=-1), x.weights)
    return of_image + weighted_mean(jnp.mean(jnp.square(text - target_text), axis=-1), x.weights)


def cosine(x: Inputs, form: str = "plain") -> jax.Array:
    """`1/2 [mean_i (1 - cos(v^S_i, v^T_i)) + mean_i (1 - cos(s^S_i, s^T_i))]`.

    The summary loss of AM-RADIO (arXiv 2312.06709, section 3.3), here of both towers.

    Args:
      x: `image`, `text`, `target_image`, `target_text` `[n, d]` of any length, `weight`.
      form: changes nothing.

    Returns:
      Float32 scalar in [0, 2]; 0 if all weights are.
    """
    first, second = (weighted_mean(cosine_distance(s, t), x.weights) for s, t in x.towers)
    return 0.5 * (first + second)


def smooth_l1(x: Inputs, form: str = "plain") -> jax.Array:
    """`1/2 [mean_{i,d} h(v^S_id - v^T_id) + the same of texts]`, h(z) = z^2 / 2 if |z| < 1, else |z| - 1/2.

    Girshick 2015 (arXiv 1504.08083, eq. 3); with the cosine loss, half each, it is UNIC's (arXiv 2408.05088).

    Args:
      x: `image`, `text`, `target_image`, `target_text` `[n, d]`, `weight`.
      form: changes nothing.

    Returns:
      Float32 scalar; 0 if all weights are.
    """

    def huber(z):
        size = jnp.abs(z)
        return jnp.mean(jnp.where(size < 1.0, 0.5 * jnp.square(z), size - 0.5), axis=-1)

    return 0.5 * sum(weighted_mean(huber(s - t), x.weights) for s, t in x.towers)


def interactive(x: Inputs, form: str = "plain") -> jax.Array:
    """Interactive contrastive learning, ICL: the student against the teacher of the other tower (CLIP-KD eq. 14-16).

    `1/2 [CE_i(scale v^S_i . s^T_j) + CE_i(scale s^S_i . v^T_j)]`, j over the samples that take part. MMKD-CLIP as
    released has `scale` = ln(1 / 0.07) = 2.659, neither exponentiated nor trained.

    Args:
      x: `image`, `text`, `target_image`, `target_text` `[n, d]`, `weight` and `scale`.
      form: of `forms.FORMS`.

    Returns:
      The loss in nats, a float32 scalar; 0 if all weights are.
    """
    weight, (_, target_image), (_, target_text) = x.weights, *x.towers
    keep = weight > 0
    crossed = (x.image, target_text), (x.text, target_image)
    if form == "plain":
        both = [_cross_entropy(x.scale * similarity(student, target), keep) for student, target in crossed]
    else:
        scale = jnp.asarray(x.scale, jnp.float32)
        both = []
        for student, target in crossed:
            fixed = reductions.NOTHING_FIXED._replace(columns=(target, keep))
            rows, _ = forms.statistics(ONE_WAY, form, reductions.Tile(student, (), scale), fixed)
            both.append(rows.total - scale * own_similarity(student, target))
    return weighted_mean(0.5 * (both[0] + both[1]), weight)


def affinity(x: Inputs, form: str = "plain") -> jax.Array:
    """Affinities among the samples that share a teacher (MobileCLIP, arXiv 2311.17049, eq. 2-4, with one teacher).

    `1/2 [KL(p_i || q_i) + the text-to-image counterpart]` with `p = softmax_j(target_scale v^T_i . s^T_j)` and
    `q = softmax_j(scale v^S_i . s^S_j)`, where j runs over the samples of positive weight only: comparing features of
    two teachers as if they shared a space says nothing. The mean over i is weighted.

    Args:
      x: unit `image`, `text` `[n, d]`, unit `target_image`, `target_text` `[n, e]`, `weight` (0 takes a sample out, as
        a row and as a column), `scale` and `target_scale`.
      form: of `forms.FORMS`.

    Returns:
      The divergence in nats, a float32 scalar; 0 if all weights are.
    """
    weight, (_, target_image), (_, target_text) = x.weights, *x.towers
    keep = weight > 0
    if form == "plain":
        student = x.scale * x.similarities
        teacher = x.target_scale * similarity(target_image, target_text)
        forward, backward = _kl(teacher, student, keep, axis=1), _kl(teacher, student, keep, axis=0)
    else:
        live = reductions.Tile(x.image, x.text, jnp.asarray(x.scale, jnp.float32))
        target_scale = jnp.asarray(x.target_scale, jnp.float32)
        fixed = reductions.Tile((target_image, keep), (target_text, keep), target_scale)
        rows, columns = forms.statistics(reductions.Divergence(), form, live, fixed)
        forward, backward = rows.divergence, columns.divergence
    return weighted_mean(0.5 * (forward + backward), weight)


def relation(x: Inputs, form: str = "plain") -> jax.Array:
    """Contrastive relational distillation, CRD (CLIP-KD eq. 4-10): `affinity` of the whole batch, one teacher for all.

    Args:
      x: as for `affinity`; `weight` is not looked at.
      form: of `forms.FORMS`.

    Returns:
      The divergence in nats, a float32 scalar.
    """
    return affinity(x._replace(weight=None), form)


def cosine_distance(student: jax.Array, target: jax.Array) -> jax.Array:
    """`1 - cos(s_i, u_i)` for each row: float32 `[n]` from `[n, d]` and `[n, d]`."""
    return 1.0 - jnp.sum(normalise(student) * normalise(target), axis=-1)


def _cross_entropy(logits: jax.Array, columns: jax.Array) -> jax.Array:
    """Cross-entropy of the diagonal among the columns that take part: `[n]` from `[n, n]` and bool `[n]`."""
    return jax.nn.logsumexp(masked(logits, columns), axis=1) - matches(logits)


def _kl(teacher: jax.Array, student: jax.Array, keep: jax.Array, axis: int) -> jax.Array:
    """KL of the softmax along an axis, over the samples that take part: `[n]` from two `[n, n]`.

    Transposed matrices would be exchanged whole among devices that each hold some rows; sums along an axis are not.
    """
    log_p, log_q = (jax.nn.log_softmax(masked(x, keep, axis), axis=axis) for x in (teacher, student))
    return jnp.sum(jnp.where(jnp.expand_dims(keep, 1 - axis), jnp.exp(log_p) * (log_p - log_q), 0.0), axis=axis)


ONE_WAY = reductions.LogSumExp(columns=False, fixed_columns=True)
LOSSES = {
    "feature": feature,
    "released_feature": released_feature,
    "cosine": cosine,
    "smooth_l1": smooth_l1,
    "interactive": interactive,
    "affinity": affinity,
    "relation": relation,
}
