"""The one training loop. Its order is the contract: update, watch, log, save."""

import os
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax.train import (
    checkpoint,
    distributed,
    evaluation,
    folder,
    ledger,
    metrics,
    optim,
    placement,
    profile,
    rollback,
    setup,
    sharding,
    stability,
)
from mmkd_jax.train.preemption import Notice, Preempted
from mmkd_jax.train.start import first_state, inherited
from mmkd_jax.train.state import TrainState, make_step
from mmkd_jax.train.telemetry import Telemetry
from mmkd_jax.train.watchdog import Watchdog


class Company(NamedTuple):
    """What goes along with a run through all its roll-backs."""

    saver: checkpoint.Checkpoints
    notice: Notice
    watchdog: Watchdog
    told: Telemetry
    tracer: profile.Tracer


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    build: Callable[[ConfigDict], setup.Job] = setup.build,
    traced: tuple[int, int] | None = None,
) -> epath.Path:
    """Trains as `config` says in `workdir`, from where an earlier run there stopped; returns the folder.

    What is trained is what `build` makes of the config: a student, unless another builder is given (of a head on
    features, say, whose config `heads.config` makes). `traced` are the first and last step of a trace for XProf.

    Left behind: `config.json`, `provenance.json`, `metrics.jsonl`, `telemetry.jsonl`, `tensorboard/`, `checkpoints/`,
    `rollbacks.json` if it went back after spikes, and `profile/` if steps were traced.

    Raises:
      InputError: the config does not fit the data, the folder cannot be written to or holds another run, or the loss
        is no longer finite.
      Preempted: SIGTERM came; the state is saved, and left as it is the process ends with exit code 75.
    """
    with folder.opened(workdir) as workdir, Telemetry(workdir) as told:
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(config.batch, mesh)
        job = build(config)
        folder.refuse_another(workdir, folder.record(config, job))
        tracer = profile.Tracer(workdir, traced, job.steps)
        saver = checkpoint.Checkpoints(
            workdir, every=config.save_every, keep=config.keep, minutes=config.save_minutes, best=config.best
        )
        with Watchdog(config.name, config.watchdog) as watchdog, Notice() as notice, closing(saver), closing(tracer):
            if saver.latest() != job.steps:
                past, company = rollback.read(workdir), Company(saver, notice, watchdog, told, tracer)
                while spike := _train(config, workdir, mesh, job, company, past):
                    past = rollback.go_back(workdir, saver, spike, past, config.spikes.limit)
        return workdir


def _train(
    config: ConfigDict,
    workdir: epath.Path,
    mesh: Any,
    job: setup.Job,
    company: Company,
    past: list[dict[str, Any]],
) -> stability.Spike | None:
    """Trains to the end, or up to a spike that asks for a roll-back, which it returns."""
    saver, notice, watchdog, told, tracer = company
    judge = evaluation.Evaluation(config, job)
    state, step_fn, meta = _beginning(config, workdir, mesh, job, saver)
    start = int(state.step)
    told.begin(config, job, mesh, start)
    log = metrics.MetricsLog(workdir, start, configs.to_dict(config))
    progress = metrics.Progress(config.name, start, job.steps, config.batch)
    paths = stability.parameter_paths(state.params)
    watched: list[tuple[int, dict[str, Any]]] = []
    with distributed.failing_at_once(stability.NotFiniteError), closing(log), closing(progress):
        for done, batch in told.inputs(rollback.iterate(job.batches, past, start, job.steps, config.data.threads)):
            step = done + 1
            on_device = sharding.global_batch({k: batch[k] for k in job.fields if k in batch}, mesh)
            with tracer.step(step), jax.transfer_guard("disallow"):  # no device copies anything unnoticed
                state, reports = step_fn(state, on_device)
            told.dispatched(step, batch, reports["loss"])
            watched.append((step, reports))
            watchdog.alive(f"step {step}")
            leave = notice.reached(step) and step != job.steps
            logged = step % config.log_every == 0 or judge.due(step)
            save = saver.due(step) or step == job.steps or leave
            if save or logged:
                scalars, spike = stability.watch(watched, paths, config.spikes, progress.say)
                if spike:
                    return spike
                rate, beside = told.scalars(step)
                progress.update(step, scalars["loss"], rate)
                if judge.due(step):
                    told.to("evaluation")
                    scalars |= judge.measure(state.weights, watchdog.alive)
                told.to("log")
                if logged or step == job.steps:
                    log.write(step, {**scalars, "pairs_per_second": rate}, beside)
                watched.clear()
            if logged and not save:
                jax.block_until_ready(state)  # the question is a program of its own: two at once may block each other
                save = saver.overdue()
            if save:
                progress.say(f"saving step {step}")
                told.to("checkpoint" if saver.due(step) or not leave else ledger.LEAVING)
                saver.save(step, state, meta, scalars)
            if save or logged:
                told.record(step)
            told.to("log")
            tracer.after(step, state)
            if leave:
                progress.say("leaving on SIGTERM; the same command goes on from here")
                told.to(ledger.LEAVING)
                raise Preempted(step)
    told.to("checkpoint")  # the last one is waited for
    return None


def _beginning(
    config: ConfigDict, workdir: epath.Path, mesh: Any, job: setup.Job, saver: checkpoint.Checkpoints
) -> tuple[TrainState, Callable[..., Any], dict[str, Any]]:
    """The placed state to go on from, the step as a program, what checkpoints tell of the run; claims the folder."""
    transform = stability.guard(optim.optimizer(config.optimizer, job.steps, job.task.lr_scale), config.spikes)
    state = first_state(config, mesh, job, transform, saver)
    folder.claim(workdir, folder.record(config, job))
    placement.report(state.params, mesh, workdir)
    placed = jax.tree.map(lambda x: x.sharding, state)
    step_fn = sharding.program(make_step(job.task, transform, config.seed, config.get("ema", 0.0)), mesh, placed)
    kept = inherited(config, saver)
    meta = checkpoint.describe(job.task.model.spec, job.files(), configs.to_dict(config), job.identity, kept)
    return state, step_fn, meta
