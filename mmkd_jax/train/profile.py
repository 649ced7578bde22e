"""Traces of chosen steps for XProf, in `RUN/profile`: `xprof --logdir RUN/profile` shows them."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from mmkd_jax.errors import InputError

FOLDER = "profile"


def steps(text: str) -> tuple[int, int]:
    """First and last step of `10:12`, or of `10`.

    Raises:
      InputError: it is not of that form.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise InputError(f"--profile {text}: write a step (10) or the first and last of some (10:12)")
    return first, last


class Tracer:
    """Traces the steps from a first to a last one; those that a run made before it started again are left out.

    Args:
      workdir: the run's folder.
      chosen: first and last step; None traces nothing.
      total: steps of the run.

    Raises:
      InputError: the run has no such steps.
    """

    def __init__(self, workdir: epath.Path, chosen: tuple[int, int] | None, total: int):
        if chosen and chosen[1] > total:
            raise InputError(f"--profile: the run has {total} steps, there is no step {chosen[1]} to trace")
        self._folder, self._chosen, self._on = workdir / FOLDER, chosen or (0, -1), False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the dispatch of a step: begins the trace if need be, and names the step in it."""
        if not self._chosen[0] <= number <= self._chosen[1]:
            yield
            return
        if not self._on:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of every Python function would be in it
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, state: Any) -> None:
        """Ends the trace after its last step, when what was dispatched is done."""
        if self._on and number == self._chosen[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes a trace that is going on."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
