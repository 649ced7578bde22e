"""The optimiser against torch's AdamW, its rules, and its schedule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from mmkd_jax.train import optim

SETTINGS = {"lr": 1e-2, "warmup": 3, "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-6, "decay": 0.2, "clip": 0.5}


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": {
            "layers": {"mlp": {"up": {"kernel": rng.normal(size=(2, 4, 8)), "bias": rng.normal(size=(2, 8))}}},
            "norm": {"scale": rng.normal(size=4)},
            "class_token": rng.normal(size=4),
            "positions": rng.normal(size=(5, 4)),
        },
        "logit_scale": np.array(2.0),
    }


def as_jax(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def updates(config, params, gradients, lr_scale=lambda path: 1.0, steps=10):
    transform = optim.optimizer(config, steps, lr_scale)
    state = transform.init(params)
    for gradient in gradients:
        change, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, change)
    return params


def test_equals_torch_adamw_with_the_decay_rule_and_clipping():
    torch = pytest.importorskip("torch", reason="torch is the reference of the optimiser")
    config, start = ConfigDict(SETTINGS), parameters()
    gradients = [jax.tree.map(lambda x: x * 0.3, parameters(i + 1)) for i in range(8)]
    ours = updates(config, as_jax(start), [as_jax(g) for g in gradients])

    leaves, names = jax.tree.leaves(start), [optim.path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(start)]
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in leaves]
    no_decay = {"image/layers/mlp/up/bias", "image/norm/scale", "image/class_token", "logit_scale"}
    groups = [
        {"params": [t], "weight_decay": 0.0 if name in no_decay else 0.2}
        for t, name in zip(tensors, names, strict=True)
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-6)
    for step, gradient in enumerate(gradients):
        rate = 1e-2 * (step + 1) / 3 if step < 3 else 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 7))
        for group in adamw.param_groups:
            group["lr"] = rate
        for tensor, value in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(value, dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_(tensors, 0.5)
        adamw.step()
    for name, mine, theirs in zip(names, jax.tree.leaves(ours), tensors, strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


def test_logit_scale_stays_within_its_bounds():
    params = {"logit_scale": jnp.asarray(math.log(100) - 1e-3), "icl_scale": jnp.asarray(1e-3), "kernel": jnp.ones(2)}
    gradients = [{"logit_scale": jnp.asarray(-1.0), "icl_scale": jnp.asarray(1.0), "kernel": -jnp.ones(2)}] * 5
    config = ConfigDict({**SETTINGS, "lr": 1.0, "decay": 0.0, "clip": 0.0})
    after = updates(config, params, gradients)
    assert float(after["logit_scale"]) == pytest.approx(math.log(100), abs=1e-6)
    assert float(after["icl_scale"]) == pytest.approx(0, abs=1e-6)
    assert float(after["kernel"][0]) > 2  # what is not bounded moves on


def test_lr_scale_freezes_a_parameter_and_scales_layers_by_row():
    config, params = ConfigDict({**SETTINGS, "clip": 0.0}), as_jax(parameters())
    factors = {"image/positions": 0.0, "image/layers/mlp/up/kernel": np.array([0.0, 1.0])}
    after = updates(config, params, [as_jax(parameters(1))] * 3, lambda path: factors.get(path, 1.0))
    whole = updates(config, params, [as_jax(parameters(1))] * 3)
    up = after["image"]["layers"]["mlp"]["up"]
    assert np.array_equal(after["image"]["positions"], params["image"]["positions"])
    assert np.array_equal(up["kernel"][0], params["image"]["layers"]["mlp"]["up"]["kernel"][0])
    assert np.array_equal(up["kernel"][1], whole["image"]["layers"]["mlp"]["up"]["kernel"][1])
    assert not np.array_equal(up["kernel"][1], params["image"]["layers"]["mlp"]["up"]["kernel"][1])


@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (1, 2000), (5, 0), (4, 4)])
def test_schedule_is_finite_positive_and_ends_low(steps, warmup):
    rate = optim.schedule(1.0, steps=steps, warmup=warmup)
    values = [float(rate(step)) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    assert float(rate(steps)) == pytest.approx(0, abs=1e-6)
