"""Preemption: SIGTERM says that the machine will be taken away; the run saves and leaves with exit code 75."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from mmkd_jax.errors import EXIT_PREEMPTED


class Preempted(SystemExit):
    """The run was asked to leave and has saved; the same command goes on from there."""

    def __init__(self, step: int):
        super().__init__(EXIT_PREEMPTED)
        self.step = step


class Notice:
    """Listens for SIGTERM while it is entered.

    Several processes: any of them may get the signal, and JAX's preemption service agrees on a step that none has
    passed. That service takes the signal over in `jax.distributed.initialize` and is not there without it, so a process
    alone listens for itself (in its main thread: Python lets no other set a handler).
    """

    def __init__(self):
        self._came = False
        self._before = None
        self._listens = not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Notice":
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to save after `step` updates and leave: the same answer on all processes; to be asked every step."""
        self._came = self._came or multihost_utils.reached_preemption_sync_point(step)
        return self._came

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
