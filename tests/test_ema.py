"""The running mean of the parameters: its formula, that it changes no step, goes on exactly, and is what counts."""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_fixtures as tiny

import mmkd_jax
from mmkd_jax.errors import InputError
from mmkd_jax.specs import ModelSpec
from mmkd_jax.train import checkpoint, checkpoint_tools, ema, loop, setup, stability
from mmkd_jax.train import state as states

pytestmark = pytest.mark.usefixtures("quick_compilation")
DECAY = 0.5  # above (1 + t) / (10 + t) up to step 8
SMALL = ("--config.model.image.layers=1", "--config.model.text.layers=1", "--config.batch=8", "--config.keep=9")
EACH = ("--config.save_every=1", "--config.steps=3")


class Square:
    """A task of three numbers: the loss is their squared distance to the batch's."""

    micro_batches = 1

    def encode(self, params, extra, batch, key, step):
        return batch["x"]

    def objective(self, params, features, batch, step):
        return jnp.sum(jnp.square(params["w"] - features)), {}, {}


def expected(history, decay, first=0):
    """The mean after each update of `history` (parameters before the first update, then after each)."""
    mean, found = np.asarray(history[0], np.float64), []
    for t, params in enumerate(history[1:], first):
        share = min(decay, (1 + t) / (10 + t))
        mean = share * mean + (1 - share) * np.asarray(params, np.float64)
        found.append(mean)
    return found


def test_the_mean_follows_its_formula_and_a_skipped_step_leaves_it():
    config = types.SimpleNamespace(action="skip", loss=10.0, grad_norm=0.0, after=2, limit=10)
    transform = stability.guard(optax.sgd(0.1), config)
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    state = states.with_mean(states.TrainState(jnp.int32(0), params, transform.init(params), {}))
    step = jax.jit(states.make_step(Square(), transform, 0, 0.15))
    history, means = [params["w"]], []
    for k in range(12):
        state, _ = step(state, {"x": jnp.full(3, 1e3 if k == 6 else float(k % 3))})
        history.append(state.params["w"])
        means.append(state.ema["w"])
    skipped = expected(history, 0.15)
    with_it = [*skipped[:6], skipped[5]]
    for t in range(7, 12):
        share = min(0.15, (1 + t) / (10 + t))
        with_it.append(share * with_it[-1] + (1 - share) * np.asarray(history[t + 1], np.float64))
    np.testing.assert_array_equal(history[7], history[6])
    np.testing.assert_allclose(means, with_it, rtol=1e-6)
    assert np.abs(np.asarray(means[6]) - skipped[6]).max() > 1e-3  # had the skipped step counted
    assert 1 / 10 < 0.15 < 2 / 11  # both sides of the minimum were seen


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(decay):
    with pytest.raises(InputError, match=r"config.ema is .*; it must be 0 \(no running mean\) or a share below 1"):
        ema.check(decay)


def run(folder, *more):
    return loop.run(tiny.stage1(*SMALL, *EACH, *more), folder)


def sums(folder, step=3):
    return checkpoint.load_meta(folder / "checkpoints" / str(step))["checksums"]


def copied(source, target, last):
    """A run's folder as it was after `last` updates."""
    shutil.copytree(source, target)
    for step in range(last + 1, 4):
        shutil.rmtree(target / "checkpoints" / str(step))
    return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run without and with a mean, and the parameters before each of its updates and after the last."""
    root = tmp_path_factory.mktemp("runs")
    run(root / "plain")
    run(root / "mean", f"--config.ema={DECAY}")
    config = tiny.stage1(*SMALL, *EACH)
    first = jax.tree_util.tree_flatten_with_path(setup.build(config).task.init(jax.random.key(config.seed))[0])[0]
    history = [{checkpoint.path_of(path): np.asarray(leaf) for path, leaf in first}]
    history += [checkpoint_tools.parameters(root / "plain" / "checkpoints" / str(k)) for k in (1, 2, 3)]
    return root, history


def saved(folder, state):
    """A state of `Square` in a checkpoint of step 1, and a spec's worth of record."""
    saver = checkpoint.Checkpoints(folder)
    saver.save(1, state, checkpoint.describe(ModelSpec(), {}, {}, {}))
    saver.close()
    return checkpoint.Checkpoints(folder)


def test_a_checkpoint_gives_both_back_and_its_mean_to_whoever_loads_it(tmp_path):
    params, mean = {"w": jnp.array([1.0, 2.0, 3.0])}, {"w": jnp.array([0.5, 0.5, 0.5])}
    plain = states.TrainState(jnp.int32(1), params, (), {})
    averaged = states.with_mean(plain).replace(ema=mean)
    assert averaged.weights is mean
    assert plain.weights is params
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), averaged)
    saver = saved(tmp_path / "averaged", averaged)
    found = saver.restore(1, like)[0]
    saver.close()
    jax.tree.map(np.testing.assert_array_equal, (found.params, found.ema), (params, mean))
    saver = saved(tmp_path / "plain", plain)
    saver.close()
    for name, wanted in (("averaged", mean), ("plain", params)):
        loaded = checkpoint.load_params(tmp_path / name, like.params)
        np.testing.assert_array_equal(loaded["w"], wanted["w"])
        assert checkpoint.averaged(tmp_path / name) == (name == "averaged")
        kept = checkpoint.sums(checkpoint.load_meta(tmp_path / name))
        assert set(kept) == {"ema/w" if name == "averaged" else "params/w"}


@pytest.mark.full
def test_steps_are_the_same_and_the_mean_is_what_counts(runs):
    root, history = runs
    plain, mean = sums(root / "plain"), sums(root / "mean")
    assert {name: value for name, value in mean.items() if not name.startswith("ema/")} == plain
    assert {name[4:] for name in mean if name.startswith("ema/")} == {
        name[7:] for name in plain if name[:7] == "params/"
    }
    assert [checkpoint.averaged(root / name) for name in ("mean", "plain")] == [True, False]
    found = checkpoint_tools.parameters(root / "mean")
    assert set(found) == set(history[0])
    for name, value in found.items():
        wanted = expected([params[name] for params in history], DECAY)[-1]
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-7)
    moved = "image/patch/kernel"
    assert np.abs(found[moved] - history[-1][moved]).max() > 1e-4  # the parameters themselves would be seen
    student, other = mmkd_jax.load(root / "mean"), mmkd_jax.load(root / "plain")
    np.testing.assert_array_equal(student.params["image"]["patch"]["kernel"], found[moved])
    assert student.identity != other.identity


@pytest.mark.full
def test_the_next_run_starts_from_the_mean(runs):
    root, _ = runs
    job = setup.build(tiny.stage1(*SMALL, *EACH))
    like = jax.eval_shape(lambda: job.task.init(jax.random.key(0))[0])
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), like)
    loaded = checkpoint.load_params(root / "mean", like)
    np.testing.assert_array_equal(loaded["logit_scale"], checkpoint_tools.parameters(root / "mean")["logit_scale"])


@pytest.mark.full
def test_stopped_and_started_again_it_ends_the_same(runs, tmp_path):
    root, _ = runs
    again = copied(root / "mean", tmp_path / "again", 1)
    run(again, f"--config.ema={DECAY}")
    assert sums(again) == sums(root / "mean")


@pytest.mark.full
def test_a_mean_can_be_asked_for_later_and_given_up(runs, tmp_path):
    """A checkpoint without a mean goes on with one that starts from its parameters; one with a mean without it."""
    root, history = runs
    later = run(copied(root / "plain", tmp_path / "later", 1), f"--config.ema={DECAY}")
    found = checkpoint_tools.parameters(later)
    for name, value in found.items():
        wanted = expected([params[name] for params in history[1:]], DECAY, first=1)[-1]
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-7)
    given_up = run(copied(root / "mean", tmp_path / "given-up", 2))
    assert sums(given_up) == sums(root / "plain")


@pytest.mark.full
def test_training_evaluates_the_mean(runs, tmp_path, monkeypatch):
    root, _ = runs
    seen = []

    class Judge:
        def __init__(self, config, job):
            pass

        def due(self, step):
            return step == 3

        def measure(self, params, alive):
            seen.append(jax.tree.map(np.asarray, params))
            return {"evaluation_seconds": 0.0}

    monkeypatch.setattr(loop.evaluation, "Evaluation", Judge)
    again = copied(root / "mean", tmp_path / "again", 2)
    run(again, f"--config.ema={DECAY}")
    expected_kernel = checkpoint_tools.parameters(root / "mean")["image/patch/kernel"]
    np.testing.assert_array_equal(seen[0]["image"]["patch"]["kernel"], expected_kernel)
