"""Runs the parts of a sweep as jobs of a cluster, SLURM or GKE, through the launch scripts; collects their states.

Every part is a job (see `job`). Which job has which part stands in DIR/jobs.json, so that the sweep may be stopped at
any moment: its jobs go on, and the same command again finds them. What was preempted (exit code 75), or has left the
queue without a word, is submitted again; a job that its cluster starts again by itself is still in the queue.
"""

import collections
import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from mmkd_jax import io
from mmkd_jax.errors import EXIT_PREEMPTED, InputError
from mmkd_jax.sweeps import job, runner
from mmkd_jax.sweeps.plan import Plan, Task
from mmkd_jax.sweeps.runner import Failure

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = {"slurm": "slurm.sh", "gke": "gke.sh"}
POLL = 30.0  # seconds between two looks at the queue
RETRIES = 10  # of each part
GONE = "gone"
BUCKETS = "gcsfs"  # the package that reads and writes gs://


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A queue of jobs behind a launch script.

    Attributes:
      kind: `slurm` or `gke`.
      options: words for the script's submission: partition, machine, image.
    """

    kind: str
    options: tuple[str, ...] = ()

    def submission(self, plan: Plan, task: Task, attempt: int) -> list[str]:
        """The words that submit a part."""
        command = ["--", "python", "-m", "mmkd_jax.sweeps.job", os.fspath(plan.workdir), task.name]
        script = ["bash", str(LAUNCH / SCRIPTS[self.kind])]
        if self.kind == "gke":
            name = f"mmkd-{io.hash_of([os.fspath(plan.workdir), task.name])[:10]}-{attempt}"
            return [*script, "run", name, *self.options, *command]
        log = log_of(plan, task)
        return [*script, "submit", f"--job-name={task.name}", f"--output={log}", *self.options, *command]

    def submit(self, plan: Plan, task: Task, attempt: int) -> str:
        """The new job's name.

        Raises:
          InputError: it was refused; the cluster's own message, and what to do, were printed.
        """
        words = self.submission(plan, task, attempt)
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise InputError(f"{self.kind} refused {task.name} (exit code {done.returncode}; see above)")
        if self.kind == "gke":
            return words[3]
        return done.stdout.split()[-1].partition(";")[0]  # sbatch says NUMBER, or NUMBER;CLUSTER

    def printed(self, plan: Plan, task: Task) -> str:
        """What the launch script would run to submit a part.

        Raises:
          InputError: the script refuses the options.
        """
        words = self.submission(plan, task, 1)
        cut = words.index("--")
        words = [*words[:cut], "--dry-run", *words[cut:]]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise InputError(f"{words[1]} refuses these options (see above)")
        return done.stdout.strip()

    def state(self, name: str) -> str:
        """`queued`, `running`, `gone`, or `unknown` where the cluster does not answer."""
        words = ["bash", str(LAUNCH / SCRIPTS[self.kind]), "state", name]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        return "unknown" if done.returncode else done.stdout.strip()


def run(plan: Plan, cluster: Cluster, sleep: Callable[[float], None] = time.sleep) -> list[Failure]:
    """Makes what is shared, then the runs; returns what failed, as `runner.run` does.

    Args:
      plan: what to do; its `sweep.json` is there.
      cluster: where.
      sleep: waits between two looks at the queue.

    Raises:
      InputError: see `check`; a job was refused, an earlier job of other commands is still there, or another sweep
        works in the folder.
    """
    check(plan, cluster)
    with runner.alone(runner.local(plan) / ".sweep.lock"):
        return _Jobs(plan, cluster, sleep).make(plan.shared) or _Jobs(plan, cluster, sleep).make(plan.runs)


def check(plan: Plan, cluster: Cluster) -> None:
    """Refuses a folder that jobs or this machine cannot reach.

    Raises:
      InputError: it does.
    """
    if "://" not in os.fspath(plan.workdir):
        if cluster.kind == "gke":
            raise InputError(f"--workdir {plan.workdir} is a folder of this machine; GKE takes gs://BUCKET/FOLDER")
    elif not importlib.util.find_spec(BUCKETS):
        raise InputError(f"{plan.workdir} takes the package {BUCKETS}: pip install 'mmkd-jax[gcs]'")


def log_of(plan: Plan, task: Task) -> pathlib.Path:
    """Where SLURM writes what a part says."""
    return runner.local(plan) / "logs" / f"{task.name.replace('/', '.')}.log"


class _Jobs:
    """The jobs of parts that do not wait for each other."""

    def __init__(self, plan: Plan, cluster: Cluster, sleep: Callable[[float], None]):
        self._plan, self._cluster, self._sleep = plan, cluster, sleep
        self._path = plan.workdir / "jobs.json"
        self._known = io.read_json(self._path) if self._path.exists() else {}
        self._silent: set[str] = set()  # gone without a word when last asked
        self._retries: collections.Counter[str] = collections.Counter()

    def make(self, tasks: Sequence[Task]) -> list[Failure]:
        """Submits those that are not whole, and waits for them; what failed, in their order."""
        left = [task for task in tasks if not runner.is_done(self._plan, task)]
        for task in left:
            if not self._goes_on(task):
                self._submit(task)
        failures: dict[str, Failure] = {}
        before = None
        while left:
            states = collections.Counter()
            for task in list(left):
                state = self._look(task)
                if isinstance(state, Failure):
                    failures[task.name] = state
                if isinstance(state, Failure) or state == "done":
                    left.remove(task)
                states["failed" if isinstance(state, Failure) else state] += 1
            told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            if told != before:
                print(told, flush=True)
            before = told
            if left:
                self._sleep(POLL)
        return [failures[task.name] for task in tasks if task.name in failures]

    def _goes_on(self, task: Task) -> bool:
        """Whether a job of an earlier call still has this part, or has ended with it as it should.

        Raises:
          InputError: the job that has it does something else.
        """
        known = self._known.get(task.name)
        if not known or known["cluster"] != self._cluster.kind:
            return False
        there = self._cluster.state(known["job"]) != GONE
        if known["commands"] != runner.words(self._plan, task):
            if there:
                raise InputError(f"job {known['job']} still makes {task.name} by other commands; cancel it, or wait")
            return False
        return there or self._code(task) in (0, EXIT_PREEMPTED)

    def _submit(self, task: Task) -> None:
        attempt = self._known.get(task.name, {}).get("attempt", 0) + 1
        commands, result = job.files(self._plan.workdir, task.name)
        if result.exists():
            result.unlink()
        io.write_json(commands, {"commands": task.commands})
        log_of(self._plan, task).parent.mkdir(parents=True, exist_ok=True)
        name = self._cluster.submit(self._plan, task, attempt)
        what = runner.words(self._plan, task)
        self._known[task.name] = {"cluster": self._cluster.kind, "job": name, "attempt": attempt, "commands": what}
        io.write_json(self._path, self._known)
        print(f"{task.name}: job {name}{f', attempt {attempt}' if attempt > 1 else ''}", flush=True)

    def _code(self, task: Task) -> int | None:
        path = job.files(self._plan.workdir, task.name)[1]
        return io.read_json(path)["code"] if path.exists() else None

    def _look(self, task: Task) -> str | Failure:
        """State of a part: queued, running, unknown, done, or its failure; submits again what was preempted."""
        known = self._known[task.name]
        state = self._cluster.state(known["job"])
        if state != GONE:
            return state
        code = self._code(task)
        if code == 0:
            runner.mark_done(self._plan, task)
            print(f"{task.name}: done", flush=True)
            return "done"
        if code is None and known["job"] not in self._silent:  # a shared file system may be late
            self._silent.add(known["job"])
            return "unknown"
        if code in (None, EXIT_PREEMPTED) and self._retries[task.name] < RETRIES:
            self._retries[task.name] += 1
            print(f"{task.name}: {'preempted' if code else 'lost'}", flush=True)
            self._submit(task)
            return "queued"
        failure = Failure(task.name, -1 if code is None else code, self._said(task, known["job"]))
        print(f"{task.name}: failed ({failure.line})", file=sys.stderr, flush=True)
        return failure

    def _said(self, task: Task, name: str) -> str:
        log = log_of(self._plan, task)
        line = runner.last_line(log) if log.exists() else ""
        return line or f"bash launch/{SCRIPTS[self._cluster.kind]} logs {name}"
