"""The account of a run's time, on a clock that only the test moves, against sums made by hand."""

import dataclasses
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny

from mmkd_jax import io
from mmkd_jax.data.batches import Batches
from mmkd_jax.errors import InputError
from mmkd_jax.planning.devices import Device
from mmkd_jax.train import checkpoint, ledger, loop, metrics, profile, setup, telemetry

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Seconds by hand: of building and initialising, of tracing and compiling, for a batch, of a step on the devices, of an
# evaluation, of a save, until the last save is written, of a line of metrics.
START, COMPILE, INPUT, STEP, EVALUATION, SAVE, CLOSE, LOG = 7.0, 11.0, 2.0, 3.0, 5.0, 4.0, 6.0, 0.5
PEAK = 1e6  # FLOP/s of each of the eight devices


@pytest.fixture
def clock(monkeypatch):
    """The telemetry's clock, at 1000 s; which only `now` and `passes` move."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

        def passes(self, seconds, real):
            """`real`, taking so many seconds."""

            def slow(*args, **options):
                found = real(*args, **options)
                self.now += seconds
                return found

            return slow

    made = Clock()
    monkeypatch.setattr(telemetry, "clock", made)
    return made


class Judge:
    """An evaluation after every second step that finds nothing out."""

    def __init__(self, config, job):
        pass

    def due(self, step):
        return step % 2 == 0

    def measure(self, params, alive):
        return {}


class Small:
    """A task that compiles at once and says that it trains the student of the config."""

    micro_batches = 1

    def __init__(self, spec):
        self.model = types.SimpleNamespace(spec=spec)

    def init(self, key):
        return {"image": {"kernel": jnp.ones((3, 4))}, "text": {"scale": jnp.ones(4)}}, {}

    def encode(self, params, extra, batch, key, step):
        return (batch["image"].mean((1, 2)) / 255) @ params["image"]["kernel"], batch["text"].ids[:, :4] / 60

    def objective(self, params, features, batch, step):
        loss = jnp.square(features[0] - params["text"]["scale"] * features[1]).mean()
        return loss, {"loss/task": loss}, {}

    def lr_scale(self, path):
        return 1.0


def build(config):
    """The job that the config describes, but for its task."""
    job = setup.build(config)
    return dataclasses.replace(job, task=Small(job.task.model.spec))


def train(config, run):
    return loop.run(config, run, build)


@pytest.fixture
def timed(clock, monkeypatch):
    """Everything that a run does takes its seconds."""
    watch = loop.stability.watch

    def computing(watched, *args):
        clock.now += STEP * len(watched)
        return watch(watched, *args)

    def stepping(*args):
        step = make_step(*args)
        return lambda state, batch: clock.passes(COMPILE, step)(state, batch)  # the body runs when it is traced

    make_step = loop.make_step
    monkeypatch.setattr(loop.stability, "watch", computing)
    monkeypatch.setattr(loop, "make_step", stepping)
    monkeypatch.setattr(loop, "first_state", clock.passes(START, loop.first_state))
    monkeypatch.setattr(loop.evaluation, "Evaluation", Judge)
    monkeypatch.setattr(Judge, "measure", clock.passes(EVALUATION, Judge.measure))
    monkeypatch.setattr(checkpoint.Checkpoints, "save", clock.passes(SAVE, checkpoint.Checkpoints.save))
    monkeypatch.setattr(checkpoint.Checkpoints, "close", clock.passes(CLOSE, checkpoint.Checkpoints.close))
    monkeypatch.setattr(metrics.MetricsLog, "write", clock.passes(LOG, metrics.MetricsLog.write))
    monkeypatch.setattr(Batches, "batch", clock.passes(INPUT, Batches.batch))
    monkeypatch.setattr(telemetry.devices, "of_kind", lambda kind: Device("test", kind, PEAK, 1.0, 1.0))
    return clock


def config(*more):
    return tiny.stage1("--config.data.threads=0", *more)


def totals(run):
    return ledger.totals(ledger.read(run))


# A run of four steps, each logged, saved after the second and the fourth, judged after both.
BY_HAND = {
    "start": START,
    "compile": COMPILE,
    "input": 4 * INPUT,
    "train": 4 * STEP,
    "evaluation": 2 * EVALUATION,
    "checkpoint": 2 * SAVE + CLOSE,
    "log": 4 * LOG,
}


def flops_by_hand(lengths):
    """Of one pair in a batch of 8 with captions of so many tokens (a mean): two layers of width 32 in either tower,
    five image tokens, a classification token's projection, BERT's pooler off or on as the spec has it."""

    def blocks(tokens):
        projections, attention, hidden = 4 * 32 * 32, 2 * tokens * 32, 2 * 32 * 128
        return 2 * tokens * 2 * (projections + attention + hidden)

    patches = 2 * (4 * 16 * 16 * 3 * 32)  # no gradient of the picture
    image = 2 * patches + 3 * (blocks(5) + 2 * 32 * 32)
    text = 3 * (blocks(lengths) + 2 * 32 * 32 + 2 * 32 * 32)
    return image + text + 3 * 2 * 8 * 32


def useful(steps=4):
    """FLOPs of a run by hand, with the tokens that its captions really have."""
    batches = setup.build(config()).batches
    return sum(8 * flops_by_hand(batches.batch(step)["text"].mask.sum() / 8) for step in range(steps))


def test_a_run_is_what_was_counted_by_hand(timed, tmp_path):
    run = train(config(), tmp_path / "run")
    found, made, whole = totals(run), useful(), sum(BY_HAND.values())
    assert found.seconds == pytest.approx(BY_HAND)
    assert (found.step, found.steps, found.pairs, found.lost, found.attempts) == (4, 4, 32, pytest.approx(0.0), 1)
    assert found.shares == pytest.approx({**{name: x / whole for name, x in BY_HAND.items()}, "lost": 0.0})
    assert found.rate == pytest.approx(32 / (4 * (INPUT + STEP)))
    assert found.device_seconds == pytest.approx(8 * whole)
    assert found.flops == pytest.approx(made, rel=1e-6)
    assert found.mfu == pytest.approx((made / (8 * PEAK * 4 * STEP), made / (8 * PEAK * whole)), rel=1e-6)
    padded = 4 * 8 * flops_by_hand(16)
    assert made < 0.9 * padded  # padding is no useful work, and the difference would be seen
    rates = [line["pairs_per_second"] for line in metrics.read(run)]
    assert rates == pytest.approx([8 / (INPUT + STEP)] * 4)


class Killed(BaseException):
    pass


def killed(run, monkeypatch, place, name, calls):
    """A run that is killed in the so-maniest call of something; a kill writes nothing more."""
    real, made = getattr(place, name), []

    def dies(*args, **options):
        made.append(args)
        if len(made) == calls:
            raise Killed
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, dies)
        patch.setattr(telemetry.Telemetry, "__exit__", lambda self, *error: self._busy.close())
        with pytest.raises(Killed):
            train(config(), run)


@pytest.mark.parametrize(
    ("place", "name", "calls", "again"),
    [
        (loop.stability, "watch", 1, 0),  # in the first step
        (loop.stability, "watch", 3, 2),  # in the one after the first checkpoint
        (Judge, "measure", 1, 0),
        (checkpoint.Checkpoints, "save", 2, 2),  # before the last one
    ],
)
def test_after_a_resume_the_totals_are_those_of_an_undisturbed_run(
    timed, tmp_path, monkeypatch, place, name, calls, again
):
    """Those that the test above has counted by hand, and seen in an undisturbed run."""
    run, begin = tmp_path / "run", timed.now
    killed(run, monkeypatch, place, name, calls)
    train(config(), run)
    assert ledger.read(run)[1].head["from"] == again
    found, made, whole = totals(run), useful(), sum(BY_HAND.values())
    assert found.seconds == pytest.approx(BY_HAND)
    assert (found.step, found.pairs, found.attempts, found.rollbacks) == (4, 32, 2, 0)
    assert found.flops == pytest.approx(made, rel=1e-6)
    assert found.mfu == pytest.approx(
        (made / (8 * PEAK * 4 * STEP), made / (8 * PEAK * (whole + found.lost))), rel=1e-6
    )
    # What was lost is in all time, as far as it was written before the kill.
    assert START <= found.lost <= timed.now - begin - whole


def test_what_a_kill_cost_is_told_apart(timed, tmp_path, monkeypatch):
    """Killed in the fourth step: lost are the third, its line and the second start; of the fourth nothing is told."""
    run = tmp_path / "run"
    killed(run, monkeypatch, loop.stability, "watch", 4)
    train(config(), run)
    assert totals(run).lost == pytest.approx(INPUT + STEP + LOG + START + COMPILE)
    # Negative control: an account that were kept by process alone would have counted these twice.
    plain = sum(segment.lines[-1]["seconds"]["train"] for segment in ledger.read(run))
    assert plain == pytest.approx(BY_HAND["train"] + STEP)


def test_an_interruption_that_closes_the_account_is_no_different(timed, tmp_path, monkeypatch):
    run, real = tmp_path / "run", loop.stability.watch

    def fails(watched, *args):
        if watched[0][0] == 3:
            raise KeyboardInterrupt
        return real(watched, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.stability, "watch", fails)
        with pytest.raises(KeyboardInterrupt):
            train(config(), run)
    assert ledger.read(run)[0].lines[-1]["end"].startswith("KeyboardInterrupt")
    train(config(), run)
    assert totals(run).seconds == pytest.approx(BY_HAND)
    assert ledger.read(run)[-1].lines[-1]["end"] == "done"


def test_a_save_that_only_a_signal_asked_for_is_lost(timed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Notice, "reached", lambda self, step: step == 3)
        with pytest.raises(loop.Preempted):
            train(config(), run)
    train(config(), run)
    found = totals(run)
    assert found.seconds == pytest.approx(BY_HAND)
    assert found.lost == pytest.approx(SAVE + CLOSE + START + COMPILE)
    assert ledger.read(run)[0].lines[-1]["end"] == "preempted"


def test_a_roll_back_is_told_from_a_restart(timed, tmp_path, monkeypatch):
    real, spikes = loop.stability.watch, [loop.stability.Spike(3, 100.0, 1.0)]

    def spiking(watched, *args):
        scalars, spike = real(watched, *args)
        return (scalars, spikes.pop()) if watched[-1][0] == 3 and spikes else (scalars, spike)

    monkeypatch.setattr(loop.stability, "watch", spiking)
    found = totals(train(config(), tmp_path / "run"))
    assert (found.attempts, found.rollbacks) == (1, 1)
    assert {**found.seconds, "train": 0} == pytest.approx({**BY_HAND, "train": 0})
    assert found.seconds["train"] == pytest.approx(4 * STEP)
    assert found.lost == pytest.approx(INPUT + STEP + START + COMPILE)


def test_without_a_known_peak_there_is_no_utilisation(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry.devices, "of_kind", lambda kind: None)
    assert totals(train(config("--config.steps=1"), tmp_path / "run")).mfu is None


class Result:
    """What a step gives: there when the test says so."""

    def __init__(self, ready=False):
        self.ready = ready

    def is_ready(self):
        return self.ready

    def block_until_ready(self):
        pass


def waiting(clock, monkeypatch, finished):
    """Seconds of `input` and `train` in a wait of 10 s during which the devices finish after `finished` (None: not)."""
    monkeypatch.setattr(telemetry.Busy, "_watch", lambda self: None)  # the test is the thread
    told = telemetry.Telemetry(io.as_path("/nowhere"))
    told._of_pair, told._first = None, False
    told.to("train")
    result = Result()
    told.dispatched(1, {}, result)

    def batches():
        begin = clock.now
        if finished is not None:
            clock.now = begin + finished
            result.ready = True
            told._busy.settled()
        clock.now = begin + 10
        yield 1, {}

    next(told.inputs(batches()))
    told.to("train")
    return told._spent.get("input", 0.0), told._spent["train"]


@pytest.mark.parametrize(
    ("finished", "idle"),
    [(None, 0.0), (10.0, 0.0), (7.0, 3.0), (0.0, 10.0)],
)
def test_a_wait_counts_as_far_as_the_devices_have_nothing_to_do(clock, monkeypatch, finished, idle):
    assert waiting(clock, monkeypatch, finished) == (idle, 10.0 - idle)


def test_the_thread_sees_when_devices_have_done(monkeypatch):
    busy = telemetry.Busy()
    assert busy.idle_since() == float("-inf")
    value = jax.jit(lambda x: (x @ x).sum())(np.ones((64, 64), np.float32))
    busy.until(value)
    value.block_until_ready()
    busy.close()
    assert busy._done is not None
    assert busy.idle_since() == busy._done


def test_damaged_lines_are_left_out_and_the_next_segment_is_whole(tmp_path):
    head = {"from": 0, "attempt": 1, "time": 0.0, "steps": 4, "batch": 8, "devices": 1, "kind": "cpu", "peak": None}
    line = {"step": 1, "time": 1.0, "seconds": {"train": 2.0}, "flops": None, "memory": None, "host": 1}
    text = (
        "\n"
        + json.dumps(head)
        + "\n"
        + json.dumps(line)
        + '\n{"step": 2, "sec'
        + "\n"
        + json.dumps({**head, "from": 1, "attempt": 2})
        + "\n"
        + json.dumps({**line, "step": 2})
    )
    (tmp_path / ledger.FILE).write_text(text)
    first, second = ledger.read(tmp_path)
    assert [one["step"] for one in first.lines] == [1]
    found = ledger.totals([first, second])
    assert (found.step, found.pairs, found.seconds["train"], found.attempts) == (2, 16, 4.0, 2)
    assert ledger.read(tmp_path / "none") == []


def test_gradient_norms_by_tower_make_up_the_whole(tmp_path):
    run = train(config("--config.steps=2"), tmp_path / "run")
    for line in metrics.read(run):
        parts = line["grad_norm/image"], line["grad_norm/text"]
        assert min(parts) > 0
        np.testing.assert_allclose(np.hypot(*parts), line["grad_norm"], rtol=1e-6)  # nothing else is trained here


def test_tensorboard_has_the_shares_too(timed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(config(), tmp_path / "run")
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    names = set(board.Tags()["tensors"])
    assert {"telemetry/useful_share", "telemetry/input_share", "telemetry/mfu", "telemetry/device_hours"} < names
    values = [event.tensor_proto.float_val[0] for event in board.Tensors("telemetry/input_share")]
    # The second interval: its line of metrics was written in it.
    assert values[1] == pytest.approx(INPUT / (LOG + INPUT + STEP))
    assert not any(name.startswith("telemetry/") for line in metrics.read(run) for name in line)


@pytest.mark.parametrize("text", ["", "0", "3:2", "a", "1:2:3", "-1"])
def test_steps_to_trace_are_refused_unless_they_can_be(text):
    with pytest.raises(InputError, match="--profile"):
        profile.steps(text)


def test_chosen_steps_are_traced_and_no_others(tmp_path):
    assert profile.steps("2:3") == (2, 3)
    run = loop.run(config(), tmp_path / "run", build, traced=(2, 3))
    (file,) = pathlib.Path(run / profile.FOLDER).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    steps = {
        dict(event.stats)["step_num"]
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert steps == {2, 3}
    with pytest.raises(InputError, match="has 4 steps"):
        loop.run(config(), tmp_path / "other", build, traced=(4, 5))
