"""Numbers that are not finite are named with step and parameter; spikes are left out where that is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_fixtures as tiny

from mmkd_jax.errors import InputError
from mmkd_jax.tasks.clip import ClipTask
from mmkd_jax.train import loop, stability

pytestmark = pytest.mark.usefixtures("quick_compilation")
PARAMS = {"a": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2))}}


def gradients(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), PARAMS)


def train(transform, steps):
    """Parameters after updates with (gradients, loss)."""
    params, state = PARAMS, transform.init(PARAMS)
    update = jax.jit(transform.update)
    for grads, loss in steps:
        updates, state = update(grads, state, params, value=jnp.float32(loss))
        params = optax.apply_updates(params, updates)
    return params, state


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


QUIET = [(gradients(seed), 1.0 + 0.1 * (seed % 3)) for seed in range(8)]


@pytest.mark.parametrize(
    "spike",
    [
        (gradients(9), 5.0),
        (gradients(9, 100.0), 1.0),
        (gradients(9), np.nan),
        (gradients(9), np.inf),
        ({**gradients(9), "a": jnp.asarray([0.0, np.nan, 0.0])}, 1.0),
    ],
)
def test_a_skipped_step_leaves_no_trace(spike):
    inner = optax.adamw(optax.linear_schedule(0.1, 0.0, 20))
    guarded = stability.skip_spikes(inner, loss=2.0, grad_norm=5.0, after=3)
    params, state = train(guarded, [*QUIET[:5], spike, spike, *QUIET[5:]])
    expected, plain = train(optax.with_extra_args_support(inner), QUIET)
    same(params, expected)
    same(state.inner, plain)
    assert (int(state.skipped), int(state.in_a_row), int(state.counted)) == (2, 0, 8)
    _, state = train(guarded, [*QUIET, spike, spike])
    assert int(state.in_a_row) == 2


def test_what_is_not_asked_for_is_not_skipped():
    inner = optax.sgd(0.1)
    loud, steep = (gradients(9), 5.0), (gradients(9, 100.0), 1.0)
    cases = (
        ({"loss": 0.0, "grad_norm": 5.0, "after": 3}, loud),
        ({"loss": 2.0, "grad_norm": 0.0, "after": 3}, steep),
        ({"loss": 2.0, "grad_norm": 5.0, "after": 6}, loud),  # too early to know what is usual
        ({"loss": 6.0, "grad_norm": 200.0, "after": 3}, loud),
    )
    for options, step in cases:
        steps = [*QUIET[:5], step, *QUIET[5:]]
        params, state = train(stability.skip_spikes(inner, **options), steps)
        assert int(state.skipped) == 0
        same(params, train(optax.with_extra_args_support(inner), steps)[0])


def test_where_numbers_stopped_being_finite():
    paths = stability.parameter_paths(PARAMS)
    assert paths == ["a", "b/c"]
    bad = {"a": PARAMS["a"], "b": {"c": PARAMS["b"]["c"].at[1, 0].set(jnp.inf)}}
    worse = {**bad, "a": PARAMS["a"] * jnp.nan}
    found = jax.device_get(jax.jit(stability.not_finite)(worse, bad))
    assert stability.where(found, paths) == (
        "in the gradients of 2 of 2 parameters, first a and in the new values of 1 of 2 parameters, first b/c"
    )
    assert stability.where(jax.device_get(stability.not_finite(PARAMS, PARAMS)), paths) == ""


class Disturbed(ClipTask):
    """Stage 1 with text gradients that are no numbers in the third step, or with a loss a hundred times too large."""

    how = "nan"

    def objective(self, params, features, batch, step):
        loss, reports, extra = super().objective(params, features, batch, step)
        if self.how == "nan":
            loss += jnp.where(step == 2, jnp.nan, 0.0) * features.text.sum()
        if self.how == "loud":
            loss *= jnp.where(step == 2, 100.0, 1.0)
        if self.how == "lost":
            loss *= jnp.where(step >= 2, jnp.nan, 1.0)
        return loss, reports, extra


def disturbed(config, spec, pairs, features):
    """A task as a config names it."""
    return Disturbed(spec)


def config(*more):
    small = ("--config.model.image.layers=1", "--config.model.text.layers=1", "--config.save_every=4")
    return tiny.stage1("--config.task=test_stability.disturbed", *small, *more)


def test_the_first_bad_step_and_parameter_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Disturbed, "how", "nan")
    with pytest.raises(InputError, match=r"became nan at step 3, in the gradients of \d+ of \d+") as caught:
        loop.run(config("--config.log_every=4"), tmp_path / "run")
    assert "first text/" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))


def test_a_spike_is_skipped_and_said_and_too_many_end_the_run(tmp_path, monkeypatch, capfd):
    skip = ("--config.spikes.action=skip", "--config.spikes.after=1")
    monkeypatch.setattr(Disturbed, "how", "loud")
    loop.run(config(*skip), tmp_path / "run")
    assert "step 3 skipped: loss 2" in capfd.readouterr().err
    assert [line["skipped"] for line in tiny.losses(tmp_path / "run")] == [0, 0, 1, 1]
    monkeypatch.setattr(Disturbed, "how", "lost")
    with pytest.raises(InputError, match="2 steps in a row were skipped, up to step 4; lower"):
        loop.run(config(*skip, "--config.spikes.limit=1"), tmp_path / "lost")
    assert "step 3 skipped: loss nan" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"config.spikes.action 'skp': did you mean 'skip'"):
        loop.run(config("--config.spikes.action=skp"), tmp_path / "wrong")
