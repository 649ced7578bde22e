"""Runs the commands of a sweep on this machine: a process each, one at a time on a device group, none twice.

A task that is whole has a mark, `DIR/done/TASK.json`, with its commands; the same sweep again makes what has none.
Every command goes on by itself from where it was stopped, so a sweep may be killed at any moment.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mmkd_jax import io
from mmkd_jax.errors import EXIT_PREEMPTED, InputError
from mmkd_jax.sweeps.plan import Plan, Task

CHILD = (sys.executable, "-m", "mmkd_jax.sweeps.child")
PATIENCE = 600.0  # seconds to wait for the processes of a sweep that was killed


@dataclasses.dataclass(frozen=True)
class Failure:
    """A task that did not end well: its exit code, and the last line that it said."""

    task: str
    code: int
    line: str


def run(plan: Plan, groups: Sequence[Mapping[str, str]]) -> list[Failure]:
    """Makes what is shared, then the runs, as many at a time as there are device groups.

    Args:
      plan: what to do; its `sweep.json` is there.
      groups: the environment of each device group.

    Returns:
      What failed; a failed run stops no other, but what is shared must be whole before the runs begin.

    Raises:
      InputError: another sweep works in the folder.
      SystemExit: 75, after SIGTERM, or when a run was told to save and leave: the same command goes on from there.
    """
    folder = local(plan)
    with alone(folder / ".sweep.lock") as lock, _Workers(plan, groups, folder, lock) as workers:
        return workers.make(plan.shared) or workers.make(plan.runs)


def is_done(plan: Plan, task: Task) -> bool:
    """Whether a task is whole, by just these commands."""
    path = _mark(plan, task)
    return path.exists() and io.read_json(path)["commands"] == words(plan, task)


def mark_done(plan: Plan, task: Task) -> None:
    """Says that a task is whole."""
    io.write_json(_mark(plan, task), {"commands": words(plan, task)})


def words(plan: Plan, task: Task) -> list[list[str]]:
    """The commands as they are remembered: a sweep's folder may be moved."""
    return [[word.replace(os.fspath(plan.workdir), "DIR") for word in command] for command in task.commands]


class _Workers:
    """The threads that wait for processes, and what stops them all."""

    def __init__(self, plan: Plan, groups: Sequence[Mapping[str, str]], local: pathlib.Path, lock: int):
        self._plan, self._local, self._lock = plan, local, lock
        self._free: queue.Queue[Mapping[str, str]] = queue.Queue()
        for group in groups:
            self._free.put(group)
        self._count = len(groups)
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def __enter__(self) -> "_Workers":
        self._before = signal.signal(signal.SIGTERM, lambda *_: self._stop())
        return self

    def __exit__(self, *error) -> None:
        self._stop()
        signal.signal(signal.SIGTERM, self._before)

    def make(self, tasks: Sequence[Task]) -> list[Failure]:
        """Runs those that are not whole; what failed, in their order."""
        left = [task for task in tasks if not is_done(self._plan, task)]
        with ThreadPoolExecutor(self._count) as pool:
            try:  # an interrupt comes here, in the main thread
                made = list(pool.map(lambda k: self._one(left[k], f"[{k + 1}/{len(left)}]"), range(len(left))))
            except BaseException:
                self._stop()  # before the pool waits for its threads
                raise
        if self._stopped:
            raise SystemExit(EXIT_PREEMPTED)
        return [failure for failure in made if failure]

    def _one(self, task: Task, place: str) -> Failure | None:
        group = self._free.get()
        begin = time.monotonic()
        try:
            for command in task.commands:
                if self._stopped:
                    return None
                code = self._call(task, command, group)
                if code == EXIT_PREEMPTED:
                    self._stop()
                if self._stopped:
                    return None
                if code:
                    failure = Failure(task.name, code, last_line(self._log(task)))
                    print(f"{place} {task.name}: failed ({failure.line})", flush=True)
                    return failure
            mark_done(self._plan, task)
            print(f"{place} {task.name}: done in {time.monotonic() - begin:.0f} s", flush=True)
        except BaseException:
            self._stop()  # here, before this thread takes the next task
            raise
        finally:
            self._free.put(group)

    def _call(self, task: Task, command: Sequence[str], group: Mapping[str, str]) -> int:
        """Exit code of one command, whose output goes to the task's log."""
        compiled = os.fspath(self._plan.workdir / ".compiled")  # runs of one shape compile once
        environment = {"JAX_COMPILATION_CACHE_DIR": compiled, **os.environ, **group}
        log = self._log(task)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ mmkd {shlex.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [*CHILD, *command],
                env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file, pass_fds=(self._lock,),
            )  # fmt: skip
            self._running.add(process)
            if self._stopped:  # since it was last asked; whoever stopped us did not see this process
                process.terminate()
            code = process.wait()
            self._running.discard(process)
            process.stdin.close()
        return code

    def _log(self, task: Task) -> pathlib.Path:
        return self._local / "logs" / f"{task.name.replace('/', '.')}.log"

    def _stop(self) -> None:
        """Starts nothing more, and tells what runs to save and leave."""
        self._stopped = True
        for process in list(self._running):
            process.terminate()


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[int]:
    """Holds the folder for this sweep; yields the descriptor of a lock that its processes share.

    The sweep alone holds the first lock. The second is held by its processes too, also when the sweep is dead: they
    save and leave then (see `child`), and are waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as own, path.with_suffix(".processes").open("w") as shared:
        if not _try_lock(own.fileno()):
            raise InputError(f"another mmkd sweep works in {path.parent}; wait for it, or stop it")
        begin, told = time.monotonic(), False
        while not _try_lock(shared.fileno()):
            if time.monotonic() - begin > PATIENCE:
                raise InputError(f"processes of an earlier sweep still run in {path.parent}; end them and try again")
            if not told:
                print("waiting for the processes of an earlier sweep to save and leave", flush=True)
                told = True
            time.sleep(0.1)
        yield shared.fileno()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def local(plan: Plan) -> pathlib.Path:
    """Where logs and locks lie: in the sweep's folder, or in a temporary one where that is on an object store."""
    path = os.fspath(plan.workdir)
    if "://" not in path:
        return pathlib.Path(path)
    return pathlib.Path(tempfile.gettempdir()) / f"mmkd-sweep-{io.sha256(path.encode())[:16]}"


def _mark(plan: Plan, task: Task):
    return plan.workdir / "done" / f"{task.name.replace('/', '.')}.json"


def last_line(log: pathlib.Path) -> str:
    """What a log ends with."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
