"""Going back after a spike: to the last regular checkpoint before it, and on without the batches up to the spike.

Large runs are saved like that by hand (PaLM, arXiv 2204.02311, section 5.1): what makes a spike are certain batches in
a certain state of the parameters; with the same checkpoint and later batches it does not come again.

`RUN/rollbacks.json` lists what happened, in order. With the config it makes the run: an update takes the batch of its
step plus all that was left out up to there. Checkpoints by time or at preemption lie where they happen to, so none of
them is gone back to. What is newer than the regular one is deleted, and then the record is written: a run that is
killed in between meets the same spike again and does the same.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from mmkd_jax import io
from mmkd_jax.data.batches import Batches
from mmkd_jax.train import distributed, stability
from mmkd_jax.train.checkpoint import Checkpoints

FILE, SCHEMA = "rollbacks.json", 1
logger = logging.getLogger(__name__)


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """The roll-backs of a run in order, see `go_back`; none where there is no record."""
    path = workdir / FILE
    return io.read_json(path)["rollbacks"] if path.exists() else []


def go_back(
    workdir: epath.Path, saver: Checkpoints, spike: stability.Spike, past: Sequence[dict[str, Any]], limit: int
) -> list[dict[str, Any]]:
    """Returns to the last regular checkpoint before `spike` (to the start, if there is none) and records it.

    Returns:
      `past` and one more: `step`, `loss` and `grad_norm` of the spike (None if not finite), `to`, the updates that are
      kept, and `left_out`, the number of batches after them that are not used.

    Raises:
      NotFiniteError: there were `limit` roll-backs.
    """
    values = f"loss {spike.loss:.4g}, gradient norm {spike.grad_norm:.4g}"
    with distributed.failing_at_once(stability.NotFiniteError):
        if len(past) >= limit:
            raise stability.NotFiniteError(
                f"step {spike.step} is a spike ({values}) after {len(past)} roll-backs; {stability.ADVICE}"
            )
        to = saver.back(spike.step)
        about = {"loss": _finite(spike.loss), "grad_norm": _finite(spike.grad_norm)}
        record = [*past, {"step": spike.step, **about, "to": to, "left_out": spike.step - to}]
        if jax.process_index() == 0:
            io.write_json(workdir / FILE, {"schema": SCHEMA, "rollbacks": record})
    logger.warning("step %d is a spike (%s): back to step %d, without its %d batches", spike.step, values, to,
                   spike.step - to)  # fmt: skip
    return record


def iterate(
    batches: Batches, past: Sequence[dict[str, Any]], start: int, stop: int, threads: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Steps `start` to `stop` with their batches, as `Batches.iterate`, without those that `past` leaves out."""
    edges = sorted({one["to"] for one in past if start < one["to"] < stop})
    for first, last in itertools.pairwise([start, *edges, stop]):
        shift = sum(one["left_out"] for one in past if one["to"] <= first)
        for place, batch in batches.iterate(first + shift, last + shift, threads=threads):
            yield place - shift, batch


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
