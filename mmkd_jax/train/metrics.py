"""Where numbers go: metrics.jsonl, TensorBoard through CLU, and a line of progress."""

import importlib
import json
import math
import os
import sys
import time
import types
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from mmkd_jax import io
from mmkd_jax.errors import InputError


class MetricsLog:
    """Writes scalars of a run to `metrics.jsonl`, TensorBoard events and, if asked, wandb; continues after a restart.

    Lines of steps that a restart will make again are dropped first, so that an interrupted run leaves the file of an
    uninterrupted one (but for the time it took). Of several processes only the first writes: all have the same numbers.

    Args:
      workdir: the run's folder.
      start: the step that it goes on from.
      config: the run's, as JSON values; its field `wandb`, if there, names a project to write to.

    Raises:
      InputError: wandb is asked for and not installed.
    """

    def __init__(self, workdir: epath.Path, start: int, config: Mapping[str, Any]):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._wandb = _wandb_run(workdir, config) if config.get("wandb") else None
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read(workdir) if line["step"] <= start]
        io.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._tensorboard = _clu_writer(workdir / "tensorboard")

    def write(self, step: int, scalars: dict[str, float], beside: Mapping[str, float] = {}) -> None:
        """Appends the scalars of `step`; one that is not finite (of a step that was skipped) is left out.

        What is `beside` them (of the clock, kept elsewhere) is only for who looks on: TensorBoard and wandb.
        """
        if not self._writes:
            return
        scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        scalars |= beside
        self._tensorboard.write_scalars(step, scalars)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flushes what is buffered."""
        if self._writes:
            self._tensorboard.flush()
            self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()


def read(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` in order of step; a last line that was cut short by a kill is left out."""
    path = io.as_path(workdir) / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Progress:
    """A bar on a terminal, plain lines elsewhere: steps done, pairs a second, time left, the loss."""

    def __init__(self, name: str, start: int, total: int, batch: int):
        self._name, self._total, self._batch = name, total, batch
        self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=name, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, rate: float) -> None:
        """Shows that `step` steps are done at `rate` pairs a second; a plain line at most every ten seconds."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} pairs/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said < 10 and step != self._total:
            return
        self._said = now
        left = (self._total - step) * self._batch / max(rate, 1e-9)
        speed = f"{rate:.0f} pairs/s, {left:.0f} s left"
        print(f"{self._name}: step {step}/{self._total}, loss {loss:.3f}, {speed}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, beside the bar if there is one."""
        line = f"{self._name}: {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _wandb_run(workdir: epath.Path, config: Mapping[str, Any]) -> Any:
    """The wandb run of a run's folder: the same one after a restart, which leaves the steps that it has as they are."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise InputError(
            "config.wandb asks for wandb, which is not installed; install the extra `wandb`, or leave the field empty"
        ) from error
    path = workdir / "wandb.json"
    if not path.exists():
        io.write_json(path, {"id": uuid.uuid4().hex})
    options = {} if "://" in os.fspath(workdir) else {"dir": os.fspath(workdir)}  # wandb's own files must be local
    options |= {"id": io.read_json(path)["id"], "resume": "allow"}
    return wandb.init(project=config["wandb"], name=config.get("name"), config=dict(config), **options)


def _clu_writer(logdir: epath.Path):
    """CLU's writers without TensorFlow.

    CLU imports its TensorFlow summary writer when it is imported, TensorFlow there or not. TensorBoard's own writer
    needs none, so a stand-in for that one module is put in place first.
    """
    name = "clu.metric_writers.summary_writer"
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.SummaryWriter = object
        sys.modules[name] = module
    from clu.metric_writers import interface
    from tensorboard.summary import Writer

    def ignore(self, *args, **kwargs):
        """Only scalars are written."""

    others = [method for method in interface.MetricWriter.__abstractmethods__ if method.startswith("write_")]

    class TensorBoardWriter(interface.MetricWriter):
        def __init__(self, path):
            self._writer = Writer(os.fspath(path))

        def flush(self):
            self._writer.flush()

        def close(self):
            self._writer.close()

    def write_scalars(self, step, scalars):
        for key, value in scalars.items():
            self._writer.add_scalar(key, float(value), step)

    body = {**dict.fromkeys(others, ignore), "write_scalars": write_scalars}
    return type("TensorBoardWriter", (TensorBoardWriter,), body)(logdir)
