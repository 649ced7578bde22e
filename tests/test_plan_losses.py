"""What losses over the global batch exchange between devices, by the compiled program."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmkd_jax import config as configs
from mmkd_jax.losses import base, contrastive, distill, forms
from mmkd_jax.losses.base import Inputs
from mmkd_jax.models import constraints
from mmkd_jax.planning import count, program
from mmkd_jax.specs import ModelSpec
from mmkd_jax.tasks.base import Features

ROWS, WIDTH, OTHER = 64, 24, 40
LOSSES = {
    "softmax": contrastive.softmax,
    "sigmoid": contrastive.sigmoid,
    "interactive": distill.interactive,
    "affinity": distill.affinity,
}


def exchanged(loss, form):
    """Collectives of a loss and its gradient on eight devices, and whether a matrix of all pairs is anywhere."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2, 1), constraints.AXES)
    over, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ([constraints.BATCH_AXES], ()))
    wide = OTHER if loss is distill.affinity else WIDTH

    def value(student, targets, weight, scale):
        student, targets = ([base.normalise(x) for x in pair] for pair in (student, targets))
        return loss(Inputs(*student, *targets, weight, scale, 10.0, -1.0), form)

    def rows(width):
        return jax.ShapeDtypeStruct((ROWS, width), jnp.float32, sharding=over)

    weight = jax.ShapeDtypeStruct((ROWS,), jnp.float32, sharding=over)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.jit(constraints.under(mesh, jax.value_and_grad(value, argnums=(0, 3))))
    text = step.lower((rows(WIDTH),) * 2, (rows(wide),) * 2, weight, scale).compile().as_text()
    found = count.count(text, dict(mesh.shape)).collectives
    return found, f"[{ROWS},{ROWS}]" in text


def allowed(one, wide=WIDTH):
    """Features of one side, vectors as long as the batch, masks and scalars; indices are none of these."""
    if one.dtype not in ("f32", "pred"):
        return False
    sides = {(ROWS, WIDTH), (ROWS, wide)}
    within = len(one.dims) < 2 or one.dims in sides
    return within or one.kind in ("collective-permute", "all-to-all")  # tiles that travel; statistics of columns


QUICK = {("softmax", "plain"), ("softmax", "ring"), ("interactive", "plain")}
CASES = [
    pytest.param(name, form, marks=() if (name, form) in QUICK else pytest.mark.full)
    for name in LOSSES
    for form in forms.FORMS
]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_losses_exchange_features_of_one_side_and_vectors(name, form, quick_compilation):
    found, square = exchanged(LOSSES[name], form)
    wide = OTHER if name == "affinity" else WIDTH
    assert not [(one, number) for one, number in found.items() if not allowed(one, wide)]
    assert not square
    gathered = sum(number for one, number in found.items() if one.kind == "all-gather" and len(one.dims) == 2)
    # One side of what is compared: student's, and in stage 2 the stored targets as well.
    assert gathered <= {"softmax": 1, "sigmoid": 1, "interactive": 2, "affinity": 2}[name] * (form != "ring") * (
        2 if form == "rows" else 1
    )


def test_losses_that_compare_the_same_features_exchange_them_once(quick_compilation):
    """Stage 2 has the task's loss and an affinity for each teacher, all of them of the student's images and texts."""
    config = configs.load(f"{tiny.CONFIGS}/stage2_mmkd.py:recipe=plus,smoke", [f"--config.batch={ROWS}"])
    teachers, spec = {"a": 40, "b": 48}, ModelSpec.from_dict(configs.to_dict(config.model))
    task = program.assumed_task(config, spec, teachers)
    mesh = Mesh(np.asarray(jax.devices()).reshape(8, 1, 1), constraints.AXES)
    over, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ([constraints.BATCH_AXES], ()))
    shaped = lambda tree, at: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree)  # noqa: E731
    params = jax.eval_shape(task.init, jax.random.key(0))[0]
    params = shaped({name: params[name] for name in ("heads", "logit_scale")}, whole)
    batch = program.batch_shapes(config, spec, teachers)
    features = Features(*(jax.ShapeDtypeStruct((ROWS, spec.embed), jnp.float32),) * 2)

    def loss(params, features, batch):
        return task.objective(params, features, batch, 0)[0]

    step = jax.jit(constraints.under(mesh, jax.grad(loss, argnums=(0, 1))))
    text = step.lower(params, shaped(features, over), shaped(batch, over)).compile().as_text()
    found = count.count(text, dict(mesh.shape)).collectives
    times = collections.Counter()
    for one, number in found.items():
        times[one.kind, one.dims] += number
    side = (ROWS, spec.embed)
    assert times["all-gather", side] == 1
    assert times["all-reduce", side] + times["reduce-scatter", side] <= 1
    assert all(times["all-gather", (ROWS, width)] == 1 for width in teachers.values())


def test_a_diagonal_by_indices_would_be_seen(monkeypatch, quick_compilation):
    monkeypatch.setattr(contrastive, "matches", jnp.diagonal)
    found, _ = exchanged(contrastive.softmax, "plain")
    assert any(one.dtype == "s32" for one in found)


def test_matches_are_the_diagonal_and_its_gradient():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)
    np.testing.assert_array_equal(base.matches(x), np.diagonal(x))
    found, expected = (jax.grad(lambda x, f=f: jnp.sum(f(x) ** 3))(x) for f in (base.matches, jnp.diagonal))
    np.testing.assert_array_equal(found, expected)
