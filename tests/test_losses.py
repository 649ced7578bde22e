"""Losses and gradients against torch, written there from the papers' formulas, in every form and on several meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from mmkd_jax.errors import InputError
from mmkd_jax.losses import contrastive, distill, forms
from mmkd_jax.losses.base import Inputs, normalise
from mmkd_jax.models import constraints
from mmkd_jax.train import sharding

torch = pytest.importorskip("torch", reason="torch is the reference of the losses")
pytestmark = pytest.mark.usefixtures("quick_compilation")
N, D, WIDE = 48, 16, 24  # samples; width of the student, and of a teacher that is compared by affinities alone
TOLERANCE = 1e-5
SCALE, TARGET_SCALE, BIAS = 14.3, 20.0, -3.0
MESHES = {
    "one device": {"data": 1},
    "eight": {"data": 2, "fsdp": 4},
    "eight with tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
OWN = ("feature", "released_feature", "cosine", "smooth_l1")  # losses of each sample by itself
GLOBAL = ("softmax", "sigmoid", "interactive", "affinity", "relation")
LOSSES = contrastive.LOSSES | distill.LOSSES


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def given(name: str) -> dict[str, np.ndarray]:
    """Inputs of a loss; samples of three weights and some of none."""
    rng = np.random.default_rng(7)
    v, t, u, w = (unit(rng.standard_normal((N, D)) + 0.3) for _ in range(4))
    if name in ("affinity", "relation"):
        u, w = (unit(rng.standard_normal((N, WIDE)) + 0.3) for _ in range(2))
    if name in (*OWN, "interactive"):
        u, w = 1.7 * u, 0.6 * w  # targets of any length
    weight = rng.choice(np.array([0, 0.25, 1, 2], np.float32), N)
    made = {"image": v, "text": t, "target_image": u, "target_text": w, "weight": weight}
    if name in contrastive.LOSSES:
        made = {"image": v, "text": t}
    return made | {"scale": np.float32(SCALE), "target_scale": np.float32(TARGET_SCALE), "bias": np.float32(BIAS)}


# --- the reference: loops over samples in float64, gradients by torch ----------------------------------------------


def tensors(name):
    made = {k: torch.tensor(x, dtype=torch.float64) for k, x in given(name).items()}
    for key in ("image", "text", "scale", "bias"):
        made[key].requires_grad_()
    return made


def reference(name: str, wrong: str = ""):
    """Value and gradients by image, text, scale and bias; `wrong` names a mistake to make, as a negative control."""
    x = tensors(name)
    if name == "softmax":
        value = of_matches(x["scale"] * x["image"] @ x["text"].T)
        if wrong == "one direction":
            value = torch.nn.functional.cross_entropy(x["scale"] * x["image"] @ x["text"].T, torch.arange(N))
    elif name == "sigmoid":
        value = pairwise(x, wrong)
    else:
        weight = torch.ones(N, dtype=torch.float64) if name == "relation" or wrong == "unmasked" else x["weight"]
        rows = [i for i in range(N) if weight[i] > 0]
        terms = {"interactive": crossed, "affinity": divergence, "relation": divergence}.get(name, own)
        value = sum(weight[i] * terms(x, i, rows, wrong or name) for i in rows) / sum(weight[rows])
    value.backward()
    keys = ("image", "text", "scale", "bias")
    return value.item(), {k: np.zeros(x[k].shape) if x[k].grad is None else x[k].grad.numpy() for k in keys}


def of_matches(logits):
    labels = torch.arange(N)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def pairwise(x, wrong):
    total = 0.0
    for i in range(N):
        for j in range(N):
            sign = 1.0 if i == j or wrong == "no negatives" else -1.0
            logit = x["scale"] * x["image"][i] @ x["text"][j] + (0.0 if wrong == "no bias" else x["bias"])
            total = total - torch.nn.functional.logsigmoid(sign * logit)
    return total / (N * N if wrong == "mean over pairs" else N)


def own(x, i, rows, name):
    """Of one sample: squares, cosines or smooth L1 of both towers."""
    total = 0.0
    for tower in ("image", "text"):
        s, t = x[tower][i], x[f"target_{tower}"][i]
        if name == "feature":
            total = total + (s - t).square().sum()
        elif name == "released_feature":
            total = total + (s - t).square().mean()
        elif name == "cosine":
            total = total + 0.5 * (1 - torch.nn.functional.cosine_similarity(s, t, dim=0))
        else:
            total = total + 0.5 * torch.nn.functional.smooth_l1_loss(s, t)
    return total


def crossed(x, i, rows, name):
    total, place = 0.0, rows.index(i)
    for tower, other in (("image", "text"), ("text", "image")):
        targets = x[f"target_{tower if name == 'within a tower' else other}"][rows]
        logits = x["scale"] * targets @ x[tower][i]
        total = total + 0.5 * (torch.logsumexp(logits, 0) - logits[place])
    return total


def divergence(x, i, rows, name):
    total, target_scale = 0.0, x["scale"].detach() if name == "the student's temperature" else x["target_scale"]
    for a, b in (("image", "text"), ("text", "image")):
        log_p = torch.log_softmax(target_scale * x[f"target_{b}"][rows] @ x[f"target_{a}"][i], 0)
        log_q = torch.log_softmax(x["scale"] * x[b][rows] @ x[a][i], 0)
        if name == "the other direction":
            log_p, log_q = log_q, log_p
        total = total + 0.5 * (log_p.exp() * (log_p - log_q)).sum()
    return total


expected = functools.cache(reference)


# --- ours ----------------------------------------------------------------------------------------------------------


@functools.cache
def computed(form: str, mesh: str) -> dict:
    """{loss: (value, gradients)} of all losses by one program a form and mesh."""
    names = GLOBAL if (form, mesh) != ("plain", "one device") else tuple(LOSSES)
    sizes = MESHES[mesh]
    devices = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    whole = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
    divided = {
        name: {k: sharding.global_batch(x, devices) if np.ndim(x) else jax.device_put(x, whole) for k, x in of.items()}
        for name, of in ((name, given(name)) for name in names)
    }

    def every(inputs):
        def value(name, live):
            return LOSSES[name](Inputs(**{**inputs[name], **live}), form)

        keys = ("image", "text", "scale", "bias")
        live = {name: {k: inputs[name][k] for k in keys} for name in names}
        return {name: jax.value_and_grad(functools.partial(value, name))(live[name]) for name in names}

    tile, forms.TILE = forms.TILE, 4  # blocks of 6 and of 48 in several tiles
    try:
        return jax.jit(constraints.under(devices, every))(divided)
    finally:
        forms.TILE = tile


def error(ours, theirs):
    """The largest error of a value or gradient, relative to the largest entry of each."""
    (value, gradients), (expected_value, expected_gradients) = ours, theirs
    pairs = [(value, expected_value), *((gradients[k], x) for k, x in expected_gradients.items())]
    scale = [max(np.max(np.abs(x)), 1e-9) for _, x in pairs]
    return max(np.max(np.abs(np.asarray(a, np.float64) - b)) / s for (a, b), s in zip(pairs, scale, strict=True))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize("name", GLOBAL)
def test_global_losses_equal_torch_in_every_form(name, form, mesh):
    assert error(computed(form, mesh)[name], expected(name)) <= TOLERANCE


@pytest.mark.parametrize("name", OWN)
def test_losses_of_each_sample_equal_torch(name):
    assert error(computed("plain", "one device")[name], expected(name)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("softmax", "one direction"),
        ("sigmoid", "no negatives"),
        ("sigmoid", "no bias"),
        ("sigmoid", "mean over pairs"),
        ("interactive", "within a tower"),
        ("interactive", "unmasked"),
        ("affinity", "unmasked"),
        ("affinity", "the other direction"),
        ("affinity", "the student's temperature"),
        ("feature", "released_feature"),
        ("cosine", "smooth_l1"),
    ],
)
def test_losses_differ_from_what_is_wrong(name, wrong):
    theirs = reference(name, wrong)
    assert all(error(computed(form, "eight")[name], theirs) > 100 * TOLERANCE for form in forms.FORMS if name in GLOBAL)
    assert error(computed("plain", "one device")[name], theirs) > 100 * TOLERANCE


@pytest.mark.parametrize("form", forms.FORMS)
def test_limits(form):
    """A student that is its teacher; a batch in which nobody has a target; targets that are not there."""
    x = Inputs(**given("affinity"))
    same = x._replace(target_image=x.image, target_text=x.text, target_scale=x.scale)
    nobody, weight = same._replace(weight=jnp.zeros(N)), np.array(x.weight)
    away = jnp.where(weight[:, None] > 0, x.image, 7.0)
    names = (*OWN, "interactive", "affinity", "relation")

    @jax.jit
    def found():
        nothing = {n: jax.value_and_grad(lambda v: LOSSES[n](nobody._replace(image=v), form))(x.image) for n in names}  # noqa: B023
        hidden = [LOSSES[n](same._replace(target_image=target), form) for n in names[:-1] for target in (x.image, away)]
        return {n: LOSSES[n](same, form) for n in names}, nothing, jnp.stack(hidden)

    itself, nothing, hidden = found()
    assert all(abs(itself[name]) < 1e-6 for name in names if name != "interactive")
    np.testing.assert_array_equal(hidden[::2], hidden[1::2])
    for name in names[:-1]:
        assert nothing[name][0] == 0
        assert not np.any(nothing[name][1])
    assert nothing["relation"][0] < 1e-6  # it looks at no weights


def test_released_icl_cannot_fall_far_below_chance():
    """The released scale ln(1 / 0.07) leaves a soft loss: for unit targets and 1024 samples at best about 4.3 nats.

    The bound is arithmetic: positives at cosine 1 and all negatives at -1 / (N - 1) in the best simplex.
    """
    n, scale = 1024, math.log(1 / 0.07)
    bound = math.log(1 + (n - 1) * math.exp(-scale * (1 + 1 / (n - 1))))
    simplex = unit(np.eye(n) - 1 / n)
    value = distill.interactive(Inputs(simplex, simplex, simplex, simplex, scale=scale))
    np.testing.assert_allclose(value, bound, rtol=1e-4)
    assert 4.2 < bound < 4.4


def test_normalise_has_a_zero_gradient_at_zero():
    gradient = jax.grad(lambda x: normalise(x).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


# --- what the programs hold ----------------------------------------------------------------------------------------


def equations(jaxpr):
    """All equations of a program, those of the programs within too."""
    inner = (core.Jaxpr, core.ClosedJaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, inner)):
            if isinstance(value, inner):
                yield from equations(getattr(value, "jaxpr", value))


def program(name, form, n=64, width=4):
    """Equations of a loss's value and gradient on eight devices."""
    mesh = sharding.make_mesh({"data": 8}, jax.devices())
    x = jnp.ones((n, width), jnp.float32)

    def loss(image, text, scale):
        return LOSSES[name](Inputs(image, text, x, x, jnp.ones(n), scale, 1.0, 0.0), form)

    traced = jax.make_jaxpr(constraints.under(mesh, jax.value_and_grad(loss, argnums=(0, 1, 2))))(x, x, 1.0)
    return list(equations(traced.jaxpr))


def products(found):
    return [e.params["precision"] for e in found if e.primitive.name == "dot_general"]


@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize("name", GLOBAL)
def test_every_product_is_at_highest_precision(name, form):
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    precisions = products(program(name, form))
    least = {"plain": 3, "rows": 4, "ring": 4}[form] - (name == "interactive")
    assert len(precisions) >= least
    assert all(precision == highest for precision in precisions)
    wrong = list(equations(jax.make_jaxpr(lambda a: jax.jit(lambda x: x @ x.T)(a))(jnp.ones((3, 3))).jaxpr))
    assert products(wrong) == [None]  # the walk would see one


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "interactive", "affinity"])
def test_the_ring_holds_no_matrix_of_all_pairs(name, monkeypatch):
    """The largest array of each program: features [64, 4] at most in the ring, 8 rows against all 64 by rows."""
    monkeypatch.setattr(forms, "TILE", 8)
    largest = {
        form: max(math.prod(out.aval.shape) for e in program(name, form) for out in e.outvars) for form in forms.FORMS
    }
    assert largest["ring"] <= 64 * 4
    assert largest["rows"] == 8 * 64
    assert largest["plain"] == 64 * 64


def test_a_batch_that_the_mesh_cannot_divide_is_refused():
    with pytest.raises(InputError, match="a global batch of 12 cannot be divided over 8 devices"):
        program("softmax", "ring", n=12)
