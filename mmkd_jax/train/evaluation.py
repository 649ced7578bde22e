"""The evaluators of `mmkd eval` inside training, every so many updates.

The student is judged as it would be from a checkpoint of that step: in float32, by the same code, on the same rows; the
numbers are those of `mmkd eval --seed 0` bit for bit. They go to the metrics as `eval/SET/TASK/METRIC`, and
`eval/mean/TASK/METRIC` where the task's sets, at least two, all have the metric. `config.best` may name one of them.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mmkd_jax import api
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import asked, base
from mmkd_jax.evals.summary import MEAN
from mmkd_jax.train.retention import EVALUATED
from mmkd_jax.train.setup import Job

SECONDS = "evaluation_seconds"  # beside the numbers, of the clock


class Evaluation:
    """What is asked of the student, and when; with `config.evaluation.every` 0 nothing ever is.

    Raises:
      InputError: no such pairs set, set or task, or `config.best` names a number that would not be there.
    """

    def __init__(self, config: ConfigDict, job: Job):
        settings = config.evaluation
        self._every, self._steps, self._best = settings.every, job.steps, config.best.partition(":")[2]
        if self._every < 0:
            raise InputError(f"evaluation.every must be 0 (never) or a number of steps, not {self._every}")
        if self._best.startswith(EVALUATED) and (not self._every or config.save_every % self._every):
            raise InputError(
                f"best {config.best!r} needs an evaluation at every regular checkpoint: save_every {config.save_every} "
                f"must be a multiple of evaluation.every, which is {self._every}"
            )
        if self._every:
            self._task, self._tokenizer = job.task, job.tokenizer
            self._tasks = tuple(settings.tasks)
            self._pairs = PairsSet.open(settings.pairs or config.data.pairs)
            sets = base.sets_of(self._pairs, settings.prompts, settings.split)
            self._sets = asked.chosen(sets, tuple(settings.sets))
            asked.check(self._sets, self._tasks, named=bool(settings.sets))

    def due(self, step: int) -> bool:
        """Whether the student is judged after `step` updates: at each interval, and at the end."""
        return bool(self._every) and (step % self._every == 0 or step == self._steps)

    def measure(self, params: Any, alive: Callable[[str], None]) -> dict[str, float]:
        """The numbers by name, and the seconds that they took.

        Args:
          params: of the task, on any mesh; all processes ask together.
          alive: is told what has been done, after each set.

        Raises:
          InputError: `config.best` names a number that is not among them.
        """
        begin = time.monotonic()
        jax.block_until_ready(params)  # programs with collectives, two at once, may block each other
        params = _whole(self._task.encoders(params))
        student = api.Student("student", "", self._task.model.spec, params, self._tokenizer, {})
        found: dict[str, float] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All-NaN slice")  # of the one resample, which is not reported
            evaluated = base.one_by_one(student, self._pairs, self._sets, None, tasks=self._tasks, bootstrap=1)
            for one, rows in evaluated:
                found |= {f"{EVALUATED}{one.name}/{row['task']}/{row['metric']}": row["value"] for row in rows}
                alive(f"the evaluation on {one.name}")
        found = {name: float(value) for name, value in (found | self._means(found)).items()}
        if self._best.startswith(EVALUATED) and self._best not in found:
            raise InputError(f"best: the evaluation gives no {self._best!r}; {near(self._best, found)}")
        return {**found, SECONDS: time.monotonic() - begin}

    def _means(self, found: dict[str, float]) -> dict[str, float]:
        """Means over a task's sets, of the metrics that all of them have."""
        means = {}
        for task, module in base.find(self._tasks).items():
            names = [one.name for one in self._sets if module.applies(one)]
            prefixes = [f"{EVALUATED}{name}/{task}/" for name in names]
            metrics = [key.removeprefix(prefixes[0]) for key in found if names and key.startswith(prefixes[0])]
            for metric in metrics:
                values = [found.get(prefix + metric) for prefix in prefixes]
                if len(values) > 1 and None not in values:
                    means[f"{EVALUATED}{MEAN}/{task}/{metric}"] = np.mean(values)
        return means


def _whole(params: Any) -> Any:
    """Parameters whole on this process's own devices, wherever they lie."""
    gathered = multihost_utils.process_allgather(params, tiled=True) if jax.process_count() > 1 else params
    return api.everywhere(jax.tree.map(np.asarray, gathered))
