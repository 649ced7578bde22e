"""Checkpoints: the one place where Orbax is called.

A checkpoint is `RUN/checkpoints/STEP` with the items `state` (the train state), `meta` (JSON: config, spec, tokenizer
files, data identity, checksums), so that it can be loaded, evaluated and exported with nothing else at hand, and
`metrics` (JSON: the scalars of its step). What is read back from it, `stored` says.
"""

import base64
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.specs import ModelSpec
from mmkd_jax.train.checksums import checksums, path_of
from mmkd_jax.train.commits import COMMIT, FOLDER, find, one_line, reading
from mmkd_jax.train.retention import Retention
from mmkd_jax.train.stored import SCHEMA, averaged, load_meta, load_params, stored, sums, verify

__all__ = [
    "Checkpoints", "averaged", "describe", "find", "load_meta", "load_params", "path_of", "stored", "sums",
    "tokenizer_files",
]  # fmt: skip

PAUSES = (1.0, 5.0, 15.0)  # seconds before a failed save is tried again, each time
logger = logging.getLogger(__name__)
_absl = logging.getLogger("absl")
# Orbax writes a page for each error, through absl, before it raises it; what is raised is told here in one line. Where
# absl's log lines are asked for (--verbose), the pages are too.
_absl.addFilter(
    lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname or _absl.isEnabledFor(logging.INFO)
)


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, and what stays of them.

    A save that fails (a full disk, a store that does not answer after the storage library's own attempts) does not
    end the run: the committed checkpoints stay as they are, and the state of a later step is tried. When all attempts
    have failed, the last error is raised. With several processes it is raised at once, since they cannot agree on
    another attempt once one of them has missed a barrier; the same command then goes on from the last good one.

    Args:
      workdir: the run's folder.
      every, keep, best: see `Retention`.
      minutes: between temporary checkpoints; 0: none.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, every: int = 1, keep: int = 2, best: str = "", minutes: float = 0.0
    ):
        self._retention = Retention(every, keep, best)
        self._folder = io.as_path(workdir) / FOLDER
        self._minutes = minutes
        self._saved_at = time.monotonic()
        self._failures: list[str] = []  # why each attempt failed, since the last that did not
        self._pending: tuple[Any, ...] | None = None  # the save that is under way, or has failed
        self._writing = False
        atomicity = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=True,
            # Folders are made before the write begins: where making one fails in the background, its threads wait
            # minutes for a folder that never comes, and the process does not end before them.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            best_fn=lambda scalars: 0.0,  # only so that scalars are stored; what stays is decided here
            atomicity_options=atomicity,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All committed steps, in order."""
        return sorted(self._manager.all_steps())

    def due(self, step: int) -> bool:
        """Whether `step` gets a regular checkpoint."""
        return step % self._retention.every == 0

    def overdue(self) -> bool:
        """Whether a temporary checkpoint is due, or a failed one to be tried again; all processes ask together."""
        age = time.monotonic() - self._saved_at
        answer = bool(self._minutes and age >= 60 * self._minutes)
        if jax.process_count() > 1:
            return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer))) if self._minutes else False
        if self._writing and not self._manager.is_saving_in_progress():
            self._settle()
        return answer or bool(self._failures and age >= PAUSES[len(self._failures) - 1])

    def save(self, step: int, state: Any, meta: Mapping[str, Any], scalars: Mapping[str, float] | None = None) -> None:
        """Starts to write; what failed earlier is tried again with this state, and raised after the last attempt.

        Args:
          step: of `state`.
          state: the train state.
          meta: what `describe` returns.
          scalars: of that step, for `best`.

        Raises:
          InputError: saving has failed too often; or `best` names no scalar.
        """
        self._settle()
        if step == self.latest():
            return
        self._retention.check(scalars or {})
        self._prune()
        finite = {name: value for name, value in (scalars or {}).items() if math.isfinite(value)}
        self._pending = step, state, {**meta, "checksums": checksums(state)}, finite
        self._start()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and meta of `step`; `like` gives shapes, dtypes and placements (they may differ from those saved).

        Raises:
          InputError: the checkpoint is damaged; the message names the one before.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore())
        with reading(self._folder / str(step)):
            restored = self._manager.restore(step, args=items)
            verify(restored["state"], restored["meta"])
        return restored["state"], restored["meta"]

    def back(self, step: int) -> int:
        """Deletes what is newer than the last regular checkpoint before `step`; returns that one's step, 0 if none."""
        self._settle()
        self._pending, self._failures = None, []  # what could not be written is not to be any more
        to = max((saved for saved in self.steps() if saved < step and self.due(saved)), default=0)
        self._delete([saved for saved in self.steps() if saved > to])
        return to

    def path(self, step: int) -> epath.Path:
        """The checkpoint of `step`."""
        return self._folder / str(step)

    def meta(self, step: int) -> dict[str, Any]:
        """The record of `step` without its arrays."""
        return load_meta(self.path(step))

    def close(self) -> None:
        """Waits for what is being written, tries again what failed, and raises if it cannot be done."""
        try:
            self._settle()
            while self._failures and self._alive():
                time.sleep(PAUSES[len(self._failures) - 1])
                self._start()
                self._settle()
            if not self._failures:
                self._prune()
        finally:
            self._manager.close()

    def _start(self) -> None:
        step, state, meta, scalars = self._pending
        self._saved_at = time.monotonic()
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            self._writing = self._manager.save(step, args=items, metrics=scalars)
        except (ValueError, OSError, RuntimeError) as error:
            self._failed(error)

    def _settle(self) -> None:
        """Waits for the save under way and counts it."""
        if not self._writing:
            return
        self._writing = False
        try:
            self._manager.wait_until_finished()
        except (ValueError, OSError, RuntimeError) as error:
            self._failed(error)
        else:
            self._pending, self._failures = None, []

    def _failed(self, error: Exception) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise error  # of the devices, or of a process that is gone: nothing is wrong with the storage
        self._failures.append(one_line(error))
        step, good = self._pending[0], self.latest()
        # What failed first is the cause; later attempts may also stumble over what it left.
        why = "; then: ".join(dict.fromkeys((self._failures[0], self._failures[-1])))
        message = f"checkpoint {step} of {self._folder.parent} could not be written ({why})"
        if len(self._failures) > len(PAUSES) or jax.process_count() > 1:
            kept = "there is none yet" if good is None else f"the last good one is {self._folder / str(good)}"
            raise InputError(f"{message}, attempt {len(self._failures)}; {kept}; the same command continues") from error
        logger.warning("%s; another attempt follows", message)

    def _alive(self) -> bool:
        """Whether the state of the save under way is still there: a later step may have taken its memory."""
        leaves = jax.tree.leaves(self._pending[1])
        return not any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves)

    def _prune(self) -> None:
        """Deletes what need not stay."""
        saved = {step: self._manager.metrics(step) or {} for step in self.steps()}
        self._delete(sorted(set(saved) - self._retention.stay(saved)))
        if jax.process_index() == 0:  # what an interrupted save or deletion left
            for child in self._folder.iterdir():
                if child.name.isdigit() and int(child.name) < (self.latest() or 0) and not (child / COMMIT).exists():
                    child.rmtree()

    def _delete(self, steps: Sequence[int]) -> None:
        """Deletes checkpoints, each unmarked first: half deleted, it must not count."""
        if steps and jax.process_count() > 1:
            multihost_utils.sync_global_devices("all have decided what to delete")
        for step in steps:
            if jax.process_index() == 0:
                (self._folder / str(step) / COMMIT).unlink()
            self._manager.delete(step)


def describe(
    spec: ModelSpec, tokenizer_files: dict[str, bytes], config: dict[str, Any], identity: dict[str, Any],
    inherited: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The `meta` item: what it takes to use the parameters anywhere, and licences of what they started from."""
    return {
        "schema": SCHEMA,
        "spec": spec.to_dict(),
        "tokenizer": {name: base64.b64encode(data).decode() for name, data in sorted(tokenizer_files.items())},
        "config": config,
        "data": identity,
        "inherited": inherited or {},
    }


def tokenizer_files(meta: dict[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files as stored by `describe`."""
    return {name: base64.b64decode(text) for name, text in meta["tokenizer"].items()}
