"""Losses and gradients of both stages against torch, written there from the papers' formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmkd_jax.losses import contrastive, distill

torch = pytest.importorskip("torch", reason="torch is the reference of the losses")
N, D = 12, 16
TOLERANCE = 2e-5


def arrays(seed, count, width=D):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((N, width)).astype(np.float32) for _ in range(count)]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.max(np.abs(ours - theirs)) / max(np.max(np.abs(theirs)), 1e-30)


def both(ours, theirs, inputs):
    """Value and gradients of two functions of the same inputs: the largest relative error."""
    value, grads = jax.value_and_grad(ours, argnums=tuple(range(len(inputs))))(*map(jnp.asarray, inputs))
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    reference = theirs(*tensors)
    reference.backward()
    return max([error(value, reference.detach()), *(error(g, t.grad) for g, t in zip(grads, tensors, strict=True))])


def cross_entropy(logits):
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def clip_reference(image, text, scale):
    logits = scale * image @ text.T
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_softmax_loss_equals_torch(scale):
    image, text = map(unit, arrays(0, 2))
    inputs = [image, text, np.float32(scale)]
    assert both(contrastive.softmax_loss, clip_reference, inputs) <= TOLERANCE


def test_softmax_loss_is_symmetric_and_needs_both_directions():
    image, text = map(unit, arrays(1, 2))
    one_way = lambda i, t, s: cross_entropy(s * i @ t.T)  # noqa: E731
    inputs = [image, text, np.float32(14.3)]
    assert both(contrastive.softmax_loss, one_way, inputs) > 100 * TOLERANCE
    value = contrastive.softmax_loss(image, text, 14.3)
    np.testing.assert_allclose(value, contrastive.softmax_loss(text, image, 14.3), rtol=1e-6)


def test_normalise_has_a_zero_gradient_at_zero():
    gradient = jax.grad(lambda x: contrastive.normalise(x).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


def test_feature_mse_is_the_mean_over_rows_and_dimensions():
    student, target = arrays(2, 2)
    theirs = lambda s: torch.nn.functional.mse_loss(s, torch.tensor(target, dtype=torch.float64))  # noqa: E731
    assert both(lambda s: distill.feature_mse(s, target, jnp.ones(N)), theirs, [student]) <= TOLERANCE
    over_dimensions = lambda s: ((s - torch.tensor(target)) ** 2).sum(1).mean()  # noqa: E731
    assert both(lambda s: distill.feature_mse(s, target, jnp.ones(N)), over_dimensions, [student]) > 100 * TOLERANCE


def test_rows_without_weight_change_nothing():
    image, text, u, w = arrays(3, 4)
    weight = jnp.asarray([1.0] * (N - 4) + [0.0] * 4)
    few = slice(0, N - 4)
    for value in (np.nan, 7.0):
        u2, w2 = u.copy(), w.copy()
        u2[N - 4 :], w2[N - 4 :] = (0.0, 0.0) if np.isnan(value) else (value, value)
        whole = [
            distill.feature_mse(image, u2, weight),
            distill.interactive_contrastive(image, text, u2, w2, weight, 2.659),
            distill.affinity_kl(unit(image), unit(text), u2, w2, weight, 10.0, 20.0),
        ]
        part = [
            distill.feature_mse(image[few], u[few], weight[few]),
            distill.interactive_contrastive(image[few], text[few], u[few], w[few], weight[few], 2.659),
            distill.affinity_kl(unit(image)[few], unit(text)[few], u[few], w[few], weight[few], 10.0, 20.0),
        ]
        np.testing.assert_allclose(whole, part, rtol=1e-6)


def test_interactive_contrastive_equals_torch():
    s, r = map(unit, arrays(4, 2))
    u, w = arrays(5, 2)

    def theirs(s, r):
        return (
            cross_entropy(2.659 * s @ torch.tensor(w).double().T)
            + cross_entropy(2.659 * r @ torch.tensor(u).double().T)
        ) / 2

    ours = lambda s, r: distill.interactive_contrastive(s, r, u, w, jnp.ones(N), 2.659)  # noqa: E731
    assert both(ours, theirs, [s, r]) <= TOLERANCE
    crossed = lambda s, r: distill.interactive_contrastive(s, r, w, u, jnp.ones(N), 2.659)  # noqa: E731
    assert both(crossed, theirs, [s, r]) > 100 * TOLERANCE


def test_affinity_equals_torch_with_weights_and_masks():
    s, r = map(unit, arrays(6, 2))
    u, w = map(unit, arrays(7, 2, 24))
    weight = np.array([0, 1, 0.5, 0, 2, 1, 1, 0, 1, 1, 0.25, 1], np.float32)
    keep = np.flatnonzero(weight)

    def kl(teacher, student):
        p = torch.softmax(teacher, 1)
        return (p * (torch.log_softmax(teacher, 1) - torch.log_softmax(student, 1))).sum(1)

    def theirs(s, r):
        teacher = 20 * torch.tensor(u).double()[keep] @ torch.tensor(w).double()[keep].T
        student = 10 * s[keep] @ r[keep].T
        rows = (kl(teacher, student) + kl(teacher.T, student.T)) / 2
        of_rows = torch.tensor(weight).double()[keep]
        return (rows * of_rows).sum() / of_rows.sum()

    ours = lambda s, r: distill.affinity_kl(s, r, u, w, weight, 10.0, 20.0)  # noqa: E731
    assert both(ours, theirs, [s, r]) <= TOLERANCE
    unmasked = lambda s, r: distill.affinity_kl(s, r, u, w, np.maximum(weight, 1e-6), 10.0, 20.0)  # noqa: E731
    assert both(unmasked, theirs, [s, r]) > 100 * TOLERANCE


def test_affinity_is_zero_where_the_student_is_the_teacher():
    s, r = map(unit, arrays(8, 2))
    assert abs(distill.affinity_kl(s, r, s, r, jnp.ones(N), 10.0, 10.0)) < 1e-6


def test_no_sample_with_a_target_gives_zero_and_finite_gradients():
    s, r, u, w = map(unit, arrays(9, 4))
    nothing = jnp.zeros(N)
    for loss in (
        lambda s: distill.affinity_kl(s, r, u, w, nothing, 10.0, 10.0),
        lambda s: distill.interactive_contrastive(s, r, u, w, nothing, 2.659),
        lambda s: distill.feature_mse(s, u, nothing),
    ):
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(s))
        assert value == 0
        assert np.all(np.asarray(gradient) == 0)


def test_released_icl_cannot_fall_far_below_chance():
    """The released scale ln(1 / 0.07) leaves a soft loss: for unit targets and 1024 samples at best about 4.3 nats.

    The bound is arithmetic: positives at cosine 1 and all negatives at -1 / (N - 1) in the best simplex.
    """
    n, scale = 1024, math.log(1 / 0.07)
    bound = math.log(1 + (n - 1) * math.exp(-scale * (1 + 1 / (n - 1))))
    simplex = unit((np.eye(n) - 1 / n).astype(np.float32))
    value = distill.interactive_contrastive(simplex, simplex, simplex, simplex, jnp.ones(n), scale)
    np.testing.assert_allclose(value, bound, rtol=1e-4)
    assert 4.2 < bound < 4.4
