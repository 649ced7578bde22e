"""The one training loop. Its order is the contract: update, watch, log, save."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax.train import (
    checkpoint,
    distributed,
    evaluation,
    folder,
    metrics,
    optim,
    placement,
    rollback,
    setup,
    sharding,
    stability,
)
from mmkd_jax.train.preemption import Notice, Preempted
from mmkd_jax.train.start import first_state, inherited
from mmkd_jax.train.state import make_step
from mmkd_jax.train.watchdog import Watchdog


def run(
    config: ConfigDict, workdir: str | os.PathLike, build: Callable[[ConfigDict], setup.Job] = setup.build
) -> epath.Path:
    """Trains as `config` says in `workdir`, from where an earlier run there stopped; returns the folder.

    What is trained is what `build` makes of the config: a student, unless another builder is given (of a head on
    features, say, whose config `heads.config` makes).

    Left behind: `config.json`, `provenance.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and `rollbacks.json`
    if it went back after spikes.

    Raises:
      InputError: the config does not fit the data, the folder cannot be written to or holds another run, or the loss
        is no longer finite.
      Preempted: SIGTERM came; the state is saved, and left as it is the process ends with exit code 75.
    """
    with folder.opened(workdir) as workdir:
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(config.batch, mesh)
        job = build(config)
        folder.refuse_another(workdir, folder.record(config, job))
        saver = checkpoint.Checkpoints(
            workdir, every=config.save_every, keep=config.keep, minutes=config.save_minutes, best=config.best
        )
        with Watchdog(config.name, config.watchdog) as watchdog, Notice() as notice, contextlib.closing(saver):
            if saver.latest() != job.steps:
                past = rollback.read(workdir)
                while spike := _train(config, workdir, mesh, job, saver, notice, watchdog, past):
                    past = rollback.go_back(workdir, saver, spike, past, config.spikes.limit)
        return workdir


def _train(
    config: ConfigDict,
    workdir: epath.Path,
    mesh: Any,
    job: setup.Job,
    saver: checkpoint.Checkpoints,
    notice: Notice,
    watchdog: Watchdog,
    past: list[dict[str, Any]],
) -> stability.Spike | None:
    """Trains to the end, or up to a spike that asks for a roll-back, which it returns."""
    transform = stability.guard(optim.optimizer(config.optimizer, job.steps, job.task.lr_scale), config.spikes)
    judge = evaluation.Evaluation(config, job)
    state = first_state(config, mesh, job, transform, saver)
    folder.claim(workdir, folder.record(config, job))
    placement.report(state.params, mesh, workdir)
    placed = jax.tree.map(lambda x: x.sharding, state)
    step_fn = sharding.program(make_step(job.task, transform, config.seed, config.get("ema", 0.0)), mesh, placed)
    start = int(state.step)
    log = metrics.MetricsLog(workdir, start, configs.to_dict(config))
    progress = metrics.Progress(config.name, start, job.steps, config.batch)
    kept = inherited(config, saver)
    meta = checkpoint.describe(job.task.model.spec, job.files(), configs.to_dict(config), job.identity, kept)
    paths = stability.parameter_paths(state.params)
    watched: list[tuple[int, dict[str, Any]]] = []
    with distributed.failing_at_once(stability.NotFiniteError), contextlib.closing(log), contextlib.closing(progress):
        for done, batch in rollback.iterate(job.batches, past, start, job.steps, config.data.threads):
            step = done + 1
            on_device = sharding.global_batch({k: batch[k] for k in job.fields if k in batch}, mesh)
            with jax.transfer_guard("disallow"):  # nothing is copied from or between devices unnoticed
                state, reports = step_fn(state, on_device)
            watched.append((step, reports))
            watchdog.alive(f"step {step}")
            leave = notice.reached(step) and step != job.steps
            logged = step % config.log_every == 0 or judge.due(step)
            save = saver.due(step) or step == job.steps or leave
            if save or logged:
                scalars, spike = stability.watch(watched, paths, config.spikes, progress.say)
                if spike:
                    return spike
                progress.update(step, scalars["loss"])
                if judge.due(step):
                    scalars |= judge.measure(state.weights, watchdog.alive)
                    progress.leave_out(scalars[evaluation.SECONDS])
                if logged or step == job.steps:
                    log.write(step, {**scalars, "pairs_per_second": progress.rate(step)})
                watched.clear()
            if logged and not save:
                jax.block_until_ready(state)  # the question is a program of its own: two at once may block each other
                save = saver.overdue()
            if save:
                progress.say(f"saving step {step}")
                saver.save(step, state, meta, scalars)
            if leave:
                progress.say("leaving on SIGTERM; the same command goes on from here")
                raise Preempted(step)
    return None
