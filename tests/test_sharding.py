"""Meshes and sharding rules: which placement a parameter gets, what is refused; placement changes no result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny
from jax.sharding import PartitionSpec

from mmkd_jax import cli
from mmkd_jax.errors import InputError
from mmkd_jax.models import constraints
from mmkd_jax.train import optim, setup, sharding
from mmkd_jax.train import state as states

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = ("--config.model.image.layers=1", "--config.model.text.layers=1")
TREE = {
    "image": {"mlp": {"kernel": jnp.zeros((2, 8, 16)), "bias": jnp.zeros((2, 16))}},
    "text": {"tokens": {"embedding": jnp.zeros((60, 8))}},
    "logit_scale": jnp.zeros(()),
}


def mesh(**sizes):
    return sharding.make_mesh({"data": 1, **sizes})


def placed(rules, **sizes):
    made = sharding.shardings(TREE, rules, mesh(**{"data": -1, **sizes}))
    return {optim.path_of(path): x.spec for path, x in jax.tree_util.tree_leaves_with_path(made)}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1}, (8, 1, 1)),
        ({"data": 8, "fsdp": 1, "tensor": 1}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 1, "tensor": -1}, (1, 1, 8)),
        ({}, None),
        ({"data": 3}, None),
        ({"data": -1, "fsdp": 3}, None),
        ({"data": -1, "fsdp": -1}, None),
        ({"data": 4}, None),
        ({"data": 16}, None),
        ({"data": 0}, None),
        ({"data": -1, "fsdp": 0}, None),
        ({"data": -2}, None),
        ({"data": -2, "fsdp": -4}, None),
    ],
)
def test_a_mesh_takes_every_device_once_or_is_refused(sizes, shape):
    if shape is None:
        with pytest.raises(InputError, match=r"does not fit 8 devices; give one axis -1") as caught:
            sharding.make_mesh(sizes)
        assert "\n" not in str(caught.value)
        return
    made = sharding.make_mesh(sizes)
    assert tuple(made.shape.values()) == shape
    assert tuple(made.shape) == ("data", "fsdp", "tensor")
    assert sorted(device.id for device in made.devices.flat) == list(range(8))


def test_the_first_rule_that_matches_wins():
    specific, general = ("mlp/kernel$", (None, "fsdp", "tensor")), (".*", ())
    found = placed((specific, general), fsdp=2, tensor=2)
    assert found == {
        "image/mlp/kernel": PartitionSpec(None, "fsdp", "tensor"),
        "image/mlp/bias": PartitionSpec(),
        "text/tokens/embedding": PartitionSpec(),
        "logit_scale": PartitionSpec(),
    }
    assert set(placed((general, specific), fsdp=2, tensor=2).values()) == {PartitionSpec()}
    both = placed((("kernel", (None, "fsdp")), ("mlp", (None, "tensor")), general), fsdp=2, tensor=2)
    assert both["image/mlp/kernel"] == PartitionSpec(None, "fsdp")
    assert both["image/mlp/bias"] == PartitionSpec(None, "tensor")


def test_a_parameter_that_no_rule_matches_is_named():
    with pytest.raises(InputError, match="no sharding rule matches parameter text/tokens/embedding") as caught:
        placed((("^image/", ()),))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no sharding rule matches parameter image/mlp/bias"):
        placed(())
    placed((("^image/", ()), ("embedding$", ())))  # a scalar needs no rule


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (("embedding", ("fsdp",)), r"embedding of shape \(60, 8\) cannot be divided over fsdp of 8 devices"),
        (("bias", ("fsdp",)), r"bias of shape \(2, 16\) cannot be divided over fsdp of 8 devices"),
        (("bias", (None, None, "fsdp")), "places 3 dimensions, it has 2"),
        (("kernel", (None, "fsdp", "fsdp")), "gives one mesh axis to two dimensions"),
        (("kernel", (None, "fsd")), "names the mesh axis 'fsd'; did you mean 'fsdp'"),
        (("kernel", (None, ("data", "fsdp"))), "names the mesh axis"),
    ],
)
def test_a_rule_that_cannot_be_kept_names_the_parameter(rule, says):
    with pytest.raises(InputError, match=says) as caught:
        placed((rule, (".*", ())), data=1, fsdp=-1)
    assert "\n" not in str(caught.value)
    assert rule[0] in str(caught.value)


def test_the_same_rule_can_be_kept_on_another_mesh():
    assert placed((("embedding", ("fsdp",)), (".*", ())), fsdp=4)["text/tokens/embedding"] == PartitionSpec("fsdp")


def test_a_batch_must_be_divisible():
    divided = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharding.check_batch(12, divided)  # the tensor axis does not divide the batch
    with pytest.raises(InputError, match="batch 14 is not a multiple of the 4 data-parallel devices"):
        sharding.check_batch(14, divided)
    image = sharding.global_batch({"image": np.arange(24).reshape(12, 2)}, divided)["image"]
    assert image.addressable_shards[0].data.shape == (3, 2)
    np.testing.assert_array_equal(image, np.arange(24).reshape(12, 2))


def test_optimiser_state_follows_its_parameter_and_no_placement_changes_the_loss():
    """A step divided over fsdp and tensor by the shipped rules against one where everything is everywhere."""
    config = tiny.stage1("--config.batch=16", *SMALL, "--config.model.image.heads=4", "--config.model.text.heads=4")
    job = setup.build(config)
    transform = optim.optimizer(config.optimizer, job.steps, job.task.lr_scale)
    batch = {k: v for k, v in job.batches.batch(0).items() if k in job.fields}
    init = lambda: states.init_state(job.task, transform, 0)  # noqa: E731
    rules = {
        "everywhere": ((".*", ()),),
        "divided": config.sharding,
    }
    found = {}
    divided = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for name, rule in rules.items():
        placement = sharding.shardings(jax.eval_shape(init), rule, divided)
        under = functools.partial(constraints.under, divided)
        state = jax.jit(under(init), out_shardings=placement)()
        step = jax.jit(under(states.make_step(job.task, transform, 0)), out_shardings=(placement, None))
        state, reports = step(state, sharding.global_batch(batch, divided))
        found[name] = state, reports
    state, reports = found["divided"]
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    up = [leaf for path, leaf in leaves if optim.path_of(path).endswith("image/layers/mlp/up/kernel")]
    assert len(up) == 3  # the parameter and both moments
    for leaf in up:
        assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    other, expected = found["everywhere"]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(reports[name], expected[name], rtol=2e-5)
    for one, two in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(other.opt_state), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=2e-5 * max(np.abs(two).max(), 1e-30))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--config.mesh.fsdp=3", "does not fit 8 devices"),
        ("--config.mesh.data=0", "does not fit 8 devices"),
        ("--config.sharding=(('image', ()),)", "no sharding rule matches parameter"),
        ("--config.sharding=(('.*', ('data',)),)", "cannot be divided over data"),
        ("--config.sharding=(('.*', ('model',)),)", "names the mesh axis 'model'"),
    ],
)
def test_wrong_rules_are_one_line(tmp_path, capsys, override, says):
    command = ["train", "--config", f"{tiny.CONFIGS}/stage1_clip.py:smoke", "--workdir", str(tmp_path / "run")]
    assert cli.main([*command, *tiny.overrides(*SMALL), override]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("run/checkpoints/*"))
