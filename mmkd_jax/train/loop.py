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
from mmkd_jax.train import checkpoint, distributed, folder, metrics, optim, placement, setup, sharding, stability
from mmkd_jax.train.preemption import Notice, Preempted
from mmkd_jax.train.start import first_state
from mmkd_jax.train.state import make_step
from mmkd_jax.train.watchdog import Watchdog

DEVICE_FIELDS = ("image", "text", "modality", "targets")  # of a batch; the rest stays on the host
ADVICE = "lower the learning rate, clip gradients, or look at the data of that step"


class NotFiniteError(InputError):
    """The loss or a gradient stopped being a number, or too many steps were skipped."""


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
    transform = stability.guard(optim.optimizer(config.optimizer, job.steps, job.task.lr_scale), config.spikes)
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
    paths = stability.parameter_paths(state.params)
    watched: list[tuple[int, dict[str, Any]]] = []
    with distributed.failing_at_once(NotFiniteError), contextlib.closing(log), contextlib.closing(progress):
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
                scalars = _watch(watched, paths, config.spikes.limit, progress.say)
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


def _watch(watched: list[tuple[int, dict[str, Any]]], paths: list[str], limit: int, say: Any) -> dict[str, float]:
    """The last step's scalars; stops at the first step that is not finite, before anything of it is saved.

    Steps that were skipped are said; more than `limit` of them in a row are no spike, and stop the run too.
    """
    for step, reports in jax.device_get(watched):
        place = stability.where(reports.pop("not_finite"), paths)
        place = f", {place}" if place else ""
        bad = [name for name, value in reports.items() if not np.isfinite(value)]
        if in_a_row := reports.pop("skipped_in_a_row", 0):
            say(f"step {step} skipped: loss {reports['loss']:.4g}, gradient norm {reports['grad_norm']:.4g}{place}")
            if in_a_row > limit:
                raise NotFiniteError(f"{in_a_row} steps in a row were skipped, up to step {step}; {ADVICE}")
        elif bad or place:
            what = f"{', '.join(bad)} became {reports[bad[0]]}" if bad else "numbers became infinite"
            raise NotFiniteError(f"{what} at step {step}{place}; the last checkpoint is from before: {ADVICE}")
    return {name: float(value) for name, value in reports.items()}
