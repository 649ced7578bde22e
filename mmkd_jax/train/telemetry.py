"""What a run makes of its machine, kept while it trains: see `mmkd_jax.train.ledger` for the account it leaves.

Nothing here waits for the devices. The loop says what the host does; when a batch comes late, a thread that was told of
the last step's loss knows since when the devices have had nothing to do, so that input that is made while they compute
costs nothing. The first process writes, by its own clock.
"""

import contextlib
import functools
import json
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmkd_jax.planning import devices, flops
from mmkd_jax.train import ledger
from mmkd_jax.train.preemption import Preempted
from mmkd_jax.train.setup import Job

clock = time.monotonic  # seconds


class Telemetry:
    """The account of one process, while it is entered.

    Args:
      workdir: the run's folder.
    """

    def __init__(self, workdir: epath.Path):
        self._path = workdir / ledger.FILE
        self._writes = jax.process_index() == 0
        before = ledger.read(workdir)
        self._attempt = before[-1].head["attempt"] + 1 if before else 1
        self._device_seconds = sum(one.whole * one.head["devices"] for one in before)
        self._busy = Busy()
        self._begun = False
        self._phase, self._since = "start", clock()
        self._spent: dict[str, float] = {}

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._busy.close()
        if self._begun:
            self._write({**self._line(self._step), "end": _end(error)})

    def begin(self, config: ConfigDict, job: Job, mesh: Mesh, start: int) -> None:
        """A segment that goes on from `start` updates; the time since entering is the first one's."""
        if self._begun:  # the last one ended with a roll-back
            self.record(self._step)
            self._device_seconds += sum(self._spent.values()) * self._devices
            self._spent = {}
        self.to("start")
        device = mesh.devices.flat[0]
        known = devices.of_kind(device.device_kind)
        self._peak, self._devices, self._batch = known.flops if known else None, mesh.size, config.batch
        self._of_pair = closed_form(config, job)
        self._step = start
        self._flops = 0.0
        self._told = (start, 0.0, {})
        self._first, self._begun = True, True
        head = {"from": start, "attempt": self._attempt, "time": time.time(), "steps": job.steps, "batch": config.batch}
        head |= {"devices": self._devices, "kind": device.device_kind, "peak": self._peak}
        head["memory"] = _memory("bytes_limit")
        self._write(head, before="\n")  # a line that was cut short ends here
        self.record(start)

    def to(self, phase: str) -> None:
        """What follows is `phase`."""
        now = clock()
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def inputs(self, batches: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """`batches`; the wait for one counts as far as the devices have nothing else to do."""
        batches = iter(batches)
        while True:
            self.to("input")
            begin = self._since
            try:
                item = next(batches)
            except StopIteration:
                self.to("train")
                return
            now = clock()
            idle = self._busy.idle_since()
            waited = 0.0 if idle is None else now - min(max(begin, idle), now)
            self._spent["train"] = self._spent.get("train", 0.0) + (now - begin) - waited
            self._since = now - waited
            self.to("compile" if self._first else "train")
            yield item

    def dispatched(self, step: int, batch: Mapping[str, Any], loss: jax.Array) -> None:
        """The update that makes `step` is on its way, `loss` will be there when it is done."""
        self.to("train")
        self._first, self._step = False, step
        if self._of_pair:
            self._flops += self._batch * self._of_pair(float(batch["text"].mask.sum()) / len(batch["text"].mask))
        self._busy.until(loss)

    def scalars(self, step: int) -> tuple[float, dict[str, float]]:
        """Of the time since this was last asked: pairs a second, and what else goes beside the metrics, by name.

        To be asked when all that was dispatched is done.

        Returns:
          Pairs over the seconds in which it trained or waited for input; and `useful_share` (of training in all
          time), `input_share`, `mfu` while it trained, and `device_hours` and `memory_gib` up to now, each where known.
        """
        self._busy.settled()
        line = self._line(step)
        before, flops_before, spent_before = self._told
        self._told = (step, line["flops"] or 0.0, line["seconds"])
        spent = {name: value - spent_before.get(name, 0.0) for name, value in line["seconds"].items()}
        training, waiting, whole = spent.get("train", 0.0), spent.get("input", 0.0), sum(spent.values())
        held = self._device_seconds + sum(line["seconds"].values()) * self._devices
        found = {"useful_share": training / max(whole, 1e-9), "input_share": waiting / max(whole, 1e-9)}
        found["device_hours"] = held / 3600
        if self._peak and line["flops"] is not None:
            found["mfu"] = (line["flops"] - flops_before) / max(self._peak * self._devices * training, 1e-9)
        if line["memory"]:
            found["memory_gib"] = line["memory"] / 2**30
        rate = (step - before) * self._batch / max(training + waiting, 1e-9)
        return rate, {f"telemetry/{name}": value for name, value in found.items()}

    def record(self, step: int) -> None:
        """Writes what was spent up to `step` updates."""
        self._write(self._line(step))

    def _line(self, step: int) -> dict[str, Any]:
        self.to(self._phase)
        return {
            "step": step,
            "time": time.time(),
            "seconds": dict(self._spent),
            "flops": self._flops if self._of_pair else None,
            "memory": _memory("peak_bytes_in_use"),
            "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }

    def _write(self, line: Mapping[str, Any], before: str = "") -> None:
        if self._writes:
            with self._path.open("a") as file:
                file.write(before + json.dumps(line) + "\n")


class Busy:
    """Since when the devices have had nothing to do, seen by a thread that waits for the last thing they were given."""

    def __init__(self):
        self._last: Any = None
        self._done: float | None = None
        self._given: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="telemetry", daemon=True)

    def until(self, last: jax.Array) -> None:
        """They are busy until `last` is there."""
        self._last, self._done = last, None
        if not self._thread.is_alive():
            self._thread.start()
        self._given.put(last)

    def settled(self) -> None:
        """They have nothing to do, from now if it was not known."""
        if self._done is None:
            self._done = clock()

    def idle_since(self) -> float | None:
        """The time since when they have had nothing to do; None while they are busy."""
        if self._last is None:
            return float("-inf")
        if self._done is None and not self._last.is_ready():
            return None
        return clock() if self._done is None else self._done

    def close(self) -> None:
        """Ends the thread, unless it hangs with the devices."""
        if self._thread.is_alive():
            self._given.put(None)
            self._thread.join(1.0)

    def _watch(self) -> None:
        while (given := self._given.get()) is not None:
            with contextlib.suppress(Exception):  # the loop meets it too
                given.block_until_ready()
            if given is self._last and self._done is None:
                self._done = clock()


def closed_form(config: ConfigDict, job: Job) -> Callable[[float], float] | None:
    """Useful FLOPs of a pair by the mean number of tokens of a step's captions; None for what is no student."""
    if job.tokenizer is None:
        return None
    spec = job.task.model.spec
    whole = flops.model_flops(config, teachers={one.name: one.out for one in getattr(job.task, "teachers", ())})
    text = functools.partial(flops.text_flops, spec.text, spec.embed)
    return lambda tokens: whole + text(tokens) - text()


def _end(error: BaseException | None) -> str:
    """How a process ended, in a word or a line."""
    if error is None:
        return "done"
    return "preempted" if isinstance(error, Preempted) else " ".join(f"{type(error).__name__}: {error}".split())


def _memory(name: str) -> int | None:
    """The largest value among this process's devices of a number that they keep of their memory; CPUs keep none."""
    return max(((device.memory_stats() or {}).get(name, 0) for device in jax.local_devices()), default=0) or None
