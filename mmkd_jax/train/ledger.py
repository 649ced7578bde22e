"""The account of a run's time, `RUN/telemetry.jsonl`, and what it adds up to.

The file only grows. A run that starts, starts again or goes back after a spike begins a segment: a line with `from`,
the updates it begins with. Its other lines say, after `step` updates, how many seconds the segment has spent on each of
`PHASES` so far, and how many useful FLOPs it has made (without them where no closed form is known).

Totals are those of a run that nothing disturbed: each update counts once, in the last segment that made it, and so do
start and compilation. What was spent beyond that (work that was made again, starting again, saving on SIGTERM) is
`lost`. Both together is what the devices were held for; the time between two processes is no one's.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd_jax import io

FILE = "telemetry.jsonl"
SETUP = ("start", "compile")
# `train`: the devices compute steps, and the host feeds them. `input`: they wait for a batch. `log`: metrics and traces
# are written. `leaving`: a save that only SIGTERM asked for.
PHASES = (*SETUP, "input", "train", "evaluation", "checkpoint", "log")
LEAVING = "leaving"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a run without interruption.

    Attributes:
      head: its first line: `from`, `attempt` (number of the process, from 1), `devices`, `kind`, `peak` (FLOP/s of a
        device, None where unknown), `batch`, `steps` (of the whole run), `memory` (bytes of a device, None where
        unknown), `time`.
      lines: the others: `step`, `seconds` by phase, `flops` (None where unknown), `time`, `memory` (peak bytes of a
        device, None where unknown), `host` (peak bytes of the process), and in the last one maybe `end`: how the
        process ended.
    """

    head: Mapping[str, Any]
    lines: tuple[Mapping[str, Any], ...]

    def at(self, step: int) -> Mapping[str, Any] | None:
        """The last line of at most `step` updates; none where the segment began later."""
        found = [line for line in self.lines if line["step"] <= step and "end" not in line]
        return found[-1] if found else None

    @property
    def whole(self) -> float:
        """All its seconds."""
        return sum(self.lines[-1]["seconds"].values()) if self.lines else 0.0


@dataclasses.dataclass(frozen=True)
class Totals:
    """What a run has come to.

    Attributes:
      step, steps: updates that count, and that it is to make.
      pairs: that those updates saw.
      seconds: by phase, as an undisturbed run would have spent them.
      lost: seconds beyond these.
      device_seconds: of all devices, lost ones too.
      flops: useful ones of the updates that count; None where no closed form is known.
      capacity: FLOPs that the devices could have made in `train` seconds, and in all; None without a known peak.
      attempts, rollbacks: processes, and returns after a spike.
      memory, host: peak bytes of a device (None where unknown) and of the first process.
    """

    step: int
    steps: int
    pairs: int
    seconds: Mapping[str, float]
    lost: float
    device_seconds: float
    flops: float | None
    capacity: tuple[float, float] | None
    attempts: int
    rollbacks: int
    memory: int | None
    host: int

    @property
    def shares(self) -> dict[str, float]:
        """Share of all time by phase, `lost` the last."""
        parts = {**self.seconds, "lost": self.lost}
        return {name: value / max(sum(parts.values()), 1e-9) for name, value in parts.items()}

    @property
    def rate(self) -> float:
        """Pairs a second while it trains and waits for input."""
        return self.pairs / max(self.seconds["train"] + self.seconds["input"], 1e-9)

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Useful FLOPs over what the devices could have made while they trained, and in all time; None if unknown."""
        if self.flops is None or self.capacity is None:
            return None
        return tuple(self.flops / max(most, 1e-9) for most in self.capacity)


def read(workdir: str | os.PathLike) -> list[Segment]:
    """The segments of a run in order, none where there is no account; lines cut short by a kill are left out."""
    path = io.as_path(workdir) / FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    starts = [place for place, line in enumerate(lines) if "from" in line]
    return [
        Segment(lines[first], tuple(line for line in lines[first + 1 : last]))
        for first, last in itertools.pairwise([*starts, len(lines)])
    ]


def totals(segments: Sequence[Segment]) -> Totals:
    """What the segments add up to; at least one."""
    kept = [_kept(segments, place) for place in range(len(segments))]
    setup = next((place for place, line in enumerate(kept) if line and line["step"] > segments[place].head["from"]), 0)
    seconds = dict.fromkeys(PHASES, 0.0)
    for place, line in enumerate(kept):
        for name, value in (line["seconds"] if line else {}).items():
            if name in seconds and (name not in SETUP or place == setup):
                seconds[name] += value
    held = [segment.whole for segment in segments]
    counted = [(segment.head, line) for segment, line in zip(segments, kept) if line]
    flops = [line["flops"] for _, line in counted]
    last = segments[-1]
    return Totals(
        step=kept[-1]["step"] if kept[-1] else last.head["from"],
        steps=last.head["steps"],
        pairs=sum((line["step"] - head["from"]) * head["batch"] for head, line in counted),
        seconds=seconds,
        lost=sum(held) - sum(seconds.values()),
        device_seconds=sum(time * one.head["devices"] for time, one in zip(held, segments)),
        flops=None if None in flops else sum(flops),
        capacity=_capacity(segments, counted, held),
        attempts=last.head["attempt"],
        rollbacks=len(segments) - len({segment.head["attempt"] for segment in segments}),
        memory=_most(segments, "memory"),
        host=_most(segments, "host") or 0,
    )


def _kept(segments: Sequence[Segment], place: int) -> Mapping[str, Any] | None:
    """The line up to which a segment counts: where a later one went on, or its last."""
    later = [one.head["from"] for one in segments[place + 1 :]]
    if later:
        return segments[place].at(min(later))
    return segments[place].lines[-1] if segments[place].lines else None


def _capacity(
    segments: Sequence[Segment], counted: Sequence[tuple[Mapping, Mapping]], held: Sequence[float]
) -> tuple[float, float] | None:
    if None in [one.head["peak"] for one in segments]:
        return None
    training = sum(head["peak"] * head["devices"] * line["seconds"].get("train", 0.0) for head, line in counted)
    return training, sum(one.head["peak"] * one.head["devices"] * time for one, time in zip(segments, held))


def _most(segments: Sequence[Segment], name: str) -> int | None:
    return max((line[name] for one in segments for line in one.lines if line.get(name)), default=None)
