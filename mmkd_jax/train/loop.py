"""The one training loop. Its order is the contract: update, watch, log, save."""

import contextlib
import os
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax.errors import InputError
from mmkd_jax.models import constraints
from mmkd_jax.train import checkpoint, folder, metrics, optim, placement, setup, sharding
from mmkd_jax.train.preemption import Notice, Preempted
from mmkd_jax.train.start import first_state
from mmkd_jax.train.state import make_step
from mmkd_jax.train.watchdog import Watchdog

DEVICE_FIELDS = ("image", "text", "modality", "targets")  # of a batch; the rest stays on the host


class NotFiniteError(InputError):
    """The loss or a gradient stopped being a number."""


def run(config: ConfigDict, workdir: str | os.PathLike) -> epath.Path:
    """Trains as `config` says in `workdir`, from where an earlier run there stopped; returns the folder.

    Left behind: `config.json`, `provenance.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`.

    Raises:
      InputError: the config does not fit the data, the folder cannot be written to or holds another run, or the loss
        is no longer finite.
      Preempted: SIGTERM came; the state is saved, and left as it is the process ends with exit code 75.
    """
    with folder.opened(workdir) as workdir:
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(config.batch, mesh)
        job = setup.build(config)
        folder.refuse_another(workdir, folder.record(config, job))
        saver = checkpoint.Checkpoints(
            workdir, every=config.save_every, keep=config.keep, minutes=config.save_minutes, best=config.best
        )
        with Watchdog(config.name, config.watchdog) as watchdog, Notice() as notice, contextlib.closing(saver):
            if saver.latest() != job.steps:
                _train(config, workdir, mesh, job, saver, notice, watchdog)
        return workdir


def _train(
    config: ConfigDict,
    workdir: epath.Path,
    mesh: Any,
    job: setup.Job,
    saver: checkpoint.Checkpoints,
    notice: Notice,
    watchdog: Watchdog,
) -> None:
    transform = optim.optimizer(config.optimizer, job.steps, job.task.lr_scale)
    state = first_state(config, mesh, job, transform, saver)
    folder.claim(workdir, folder.record(config, job))
    placement.report(state.params, mesh, workdir)
    step_fn = jax.jit(
        constraints.under(mesh, make_step(job.task, transform, config.seed)),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    start = int(state.step)
    log = metrics.MetricsLog(workdir, start, configs.to_dict(config))
    progress = metrics.Progress(config.name, start, job.steps, config.batch)
    meta = checkpoint.describe(job.task.model.spec, job.tokenizer.files(), configs.to_dict(config), job.identity)
    watched: list[tuple[int, dict[str, jax.Array]]] = []
    with contextlib.closing(log), contextlib.closing(progress):
        for done, batch in job.batches.iterate(start, job.steps, threads=config.data.threads):
            step = done + 1
            on_device = sharding.global_batch({k: batch[k] for k in DEVICE_FIELDS if k in batch}, mesh)
            with jax.transfer_guard("disallow"):  # nothing is copied from or between devices unnoticed
                state, reports = step_fn(state, on_device)
            watched.append((step, reports))
            watchdog.alive(f"step {step}")
            leave = notice.reached(step) and step != job.steps
            logged = step % config.log_every == 0
            save = saver.due(step) or step == job.steps or leave or (logged and saver.overdue())
            if save or logged:
                scalars = _watch(watched)
                progress.update(step, scalars["loss"])
                if logged or step == job.steps:
                    log.write(step, {**scalars, "pairs_per_second": progress.rate(step)})
                watched.clear()
            if save:
                progress.say(f"saving step {step}")
                saver.save(step, state, meta, scalars)
            if leave:
                progress.say("leaving on SIGTERM; the same command goes on from here")
                raise Preempted(step)


def _watch(watched: list[tuple[int, dict[str, jax.Array]]]) -> dict[str, float]:
    """The last step's scalars; stops at the first step that is not finite, before anything of it is saved."""
    for step, reports in jax.device_get(watched):
        bad = [name for name, value in reports.items() if not np.isfinite(value)]
        if bad:
            raise NotFiniteError(
                f"{', '.join(bad)} became {reports[bad[0]]} at step {step}; the last checkpoint is from before: "
                "lower the learning rate, clip gradients, or look at the data of that step"
            )
    return {name: float(value) for name, value in reports.items()}
