"""Numbers that are not finite are named with step and parameter; spikes are left out where that is asked for."""

import contextlib
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_fixtures as tiny
from disturbed import Disturbed, poisoning
from test_train import assert_same

from mmkd_jax import io
from mmkd_jax.data.batches import Batches
from mmkd_jax.errors import InputError
from mmkd_jax.models import constraints
from mmkd_jax.train import checkpoint, loop, metrics, rollback, sharding, stability

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


def config(*more):
    small = ("--config.model.image.layers=1", "--config.model.text.layers=1", "--config.save_every=4")
    return tiny.stage1("--config.task=disturbed.disturbed", *small, *more)


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
    lines = (tmp_path / "lost" / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert ["loss" in json.loads(line) for line in lines.splitlines()] == [True, True, False]
    with pytest.raises(InputError, match=r"config.spikes.action 'skp': did you mean 'skip'"):
        loop.run(config("--config.spikes.action=skp"), tmp_path / "wrong")


# Going back. The run saves at 2, 4, 6 and 8; the batches that its updates would take are counted from 0.

STEPS = 10
BACK = (
    "--config.spikes.action=rollback",
    "--config.spikes.after=1",
    f"--config.steps={STEPS}",
    "--config.save_every=2",
    "--config.keep=9",
)


@pytest.fixture
def poisoned(monkeypatch):
    """A function: from now on, batches of these numbers are poisoned, and others are no part of the set's."""
    real = Batches.batch
    monkeypatch.setattr(Disturbed, "how", "poisoned")
    return lambda *bad, left_out=(): monkeypatch.setattr(Batches, "batch", poisoning(real, bad, left_out))


@pytest.fixture(scope="module", autouse=True)
def programs_are_made_once(quick_compilation):
    """A restart in the same process takes the step that the first start traced, if the task is the same."""
    made, real = {}, constraints.under

    def under(mesh, function):
        return made.setdefault((Disturbed.how, function.__name__), real(mesh, function))

    with pytest.MonkeyPatch.context() as patch:
        for module in (constraints, sharding):
            patch.setattr(module, "under", under)
        yield made


def steps_saved(run):
    return sorted(int(path.parent.name) for path in run.glob("checkpoints/*/commit_success.txt"))


def record(run):
    return [(one["step"], one["to"], one["left_out"]) for one in rollback.read(io.as_path(run))]


@pytest.mark.full
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_spike_takes_the_run_back_and_leaves_its_batches_out(tmp_path, poisoned, caplog, log_every):
    """Batch 6 spikes in step 7 (back to 6), batch 10 in step 10, which takes it then (back to 8)."""
    often = f"--config.log_every={log_every}"
    poisoned(6, 10)
    loop.run(config(*BACK, often), tmp_path / "run")
    assert record(tmp_path / "run") == [(7, 6, 1), (10, 8, 2)]
    events = rollback.read(io.as_path(tmp_path / "run"))
    assert all(event["loss"] > 100 and event["grad_norm"] > 0 for event in events)
    said = [entry.getMessage() for entry in caplog.records if entry.name == rollback.__name__]
    assert [line.split(" (")[0] for line in said] == ["step 7 is a spike", "step 10 is a spike"]
    assert said[1].endswith("back to step 8, without its 2 batches")
    poisoned(left_out=(6, 9, 10))
    loop.run(config(*BACK, often), tmp_path / "told")
    assert not (tmp_path / "told" / rollback.FILE).exists()
    assert_same(tmp_path / "run", tmp_path / "told")
    poisoned(left_out=(6, 10))
    loop.run(config(*BACK, often), tmp_path / "other")  # one batch more is another run
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", tmp_path / "other")


def test_what_was_saved_since_is_no_part_of_the_run_any_more(tmp_path, poisoned):
    """A checkpoint at preemption lies between the regular one and the spike: batches 4, 5 and 6 are left out."""
    every = (*BACK, "--config.save_every=4")
    poisoned(6)
    real = loop.sharding.global_batch
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr(
            loop.sharding,
            "global_batch",
            lambda *args: calls.append(len(calls) == 4 and signal.raise_signal(signal.SIGTERM)) or real(*args),
        )
        with pytest.raises(SystemExit):
            loop.run(config(*every), tmp_path / "run")
    assert steps_saved(tmp_path / "run") == [4, 5]
    loop.run(config(*every), tmp_path / "run")
    assert record(tmp_path / "run") == [(7, 4, 3)]
    assert steps_saved(tmp_path / "run") == [4, 8, 10]
    poisoned(left_out=(4, 5, 6))
    loop.run(config(*every), tmp_path / "told")
    assert_same(tmp_path / "run", tmp_path / "told")


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory, programs_are_made_once):
    """A run that nothing else disturbed: batch 3 spikes in step 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Disturbed, "how", "poisoned")
        patch.setattr(Batches, "batch", poisoning(Batches.batch, (3,)))
        whole = loop.run(config(*BACK), tmp_path_factory.mktemp("back") / "run")
    assert record(whole) == [(4, 2, 2)]
    return whole


@pytest.mark.parametrize(
    "where", ["record", *(pytest.param(where, marks=pytest.mark.full) for where in ("delete", "restore", "later"))]
)
def test_killed_while_it_goes_back_a_run_ends_the_same(gone_back, tmp_path, poisoned, monkeypatch, where):
    poisoned(3)

    def die(*args, **options):
        raise Killed

    def dies_then(real, calls):
        return lambda *args, **options: die() if len(calls) else calls.append(1) or real(*args, **options)

    with monkeypatch.context() as patch:
        if where == "delete":
            patch.setattr(checkpoint.Checkpoints, "_delete", lambda this, steps: die())
        if where == "record":
            patch.setattr(rollback.io, "write_json", real_json(rollback.io.write_json, die))
        if where == "restore":
            patch.setattr(checkpoint.Checkpoints, "restore", die)
        if where == "later":
            patch.setattr(metrics.MetricsLog, "__init__", dies_then(metrics.MetricsLog.__init__, []))
        with pytest.raises(Killed):
            loop.run(config(*BACK), tmp_path / "run")
    assert record(tmp_path / "run") == ([(4, 2, 2)] if where in ("restore", "later") else [])
    loop.run(config(*BACK), tmp_path / "run")
    assert record(tmp_path / "run") == [(4, 2, 2)]
    assert_same(tmp_path / "run", gone_back)


def real_json(real, die):
    return lambda path, value: die() if path.name == rollback.FILE else real(path, value)


@pytest.mark.parametrize("lost", [False, True])
def test_started_again_later_it_knows_what_was_left_out(gone_back, tmp_path, poisoned, lost):
    """With the negative control: a run that lost its record."""
    poisoned(3)
    shutil.copytree(gone_back, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    if lost:
        (tmp_path / "run" / rollback.FILE).unlink()
    loop.run(config(*BACK), tmp_path / "run")
    with pytest.raises(AssertionError) if lost else contextlib.nullcontext():
        assert_same(tmp_path / "run", gone_back)


def test_too_many_spikes_end_the_run_and_before_the_first_checkpoint_it_starts_anew(tmp_path, poisoned):
    poisoned(1)
    loop.run(config(*BACK), tmp_path / "early")
    assert record(tmp_path / "early") == [(2, 0, 2)]
    poisoned(left_out=(0, 1))
    loop.run(config(*BACK), tmp_path / "told")
    assert_same(tmp_path / "early", tmp_path / "told")
    poisoned(*range(5, 40))
    with pytest.raises(InputError, match=r"step 5 is a spike \(loss \d.*\) after 2 roll-backs; lower") as caught:
        loop.run(config(*BACK, "--config.spikes.limit=2"), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert record(tmp_path / "run") == [(6, 4, 2), (5, 4, 1)]
    assert steps_saved(tmp_path / "run") == [2, 4]


def test_left_out_batches_are_counted_from_any_start():
    class Numbers:
        def iterate(self, start, stop, threads):
            assert start < stop
            return ((number, {"number": number}) for number in range(start, stop))

    past = [{"to": 4, "left_out": 3}, {"to": 4, "left_out": 1}, {"to": 6, "left_out": 10}]
    expected = [*range(4), 8, 9, *range(20, 24)]  # of the steps 0 to 9
    for start in range(10):
        found = list(rollback.iterate(Numbers(), past, start, 10, 0))
        assert [step for step, _ in found] == list(range(start, 10))
        assert [batch["number"] for _, batch in found] == expected[start:]
