"""Where an emission's time goes, part by part and teacher by teacher, and what a person sees of it meanwhile."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from tqdm import tqdm

from mmkd_jax.report.markup import duration

EVERY = 60.0  # seconds after which a line is due even within a shard


class Meter:
    """Seconds of an emission.

    Attributes:
      clock: seconds that only grow; with `time.process_time`, those of the processor.
      seconds: by part (`read`, `decode`, `preprocess`, `encode`, `store`) and teacher, "" where it serves all.
      pairs: that each teacher has encoded so far.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.pairs: Counter[str] = Counter()

    @contextlib.contextmanager
    def part(self, part: str, teacher: str = "") -> Iterator[None]:
        """Counts the block to a part."""
        begin = self.clock()
        try:
            yield
        finally:
            self.seconds[part, teacher] += self.clock() - begin

    def of(self, *parts: str) -> float:
        """Seconds of some parts, over all teachers."""
        return sum(seconds for (part, _), seconds in self.seconds.items() if part in parts)

    def rates(self) -> dict[str, float]:
        """Pairs a second of each teacher in its own time: preprocessing, encoding and storing."""
        own = {name: sum(s for (_, teacher), s in self.seconds.items() if teacher == name) for name in self.pairs}
        return {name: self.pairs[name] / max(own[name], 1e-9) for name in self.pairs}


class Progress:
    """A bar on a terminal; elsewhere a line after every shard, and after every minute within one.

    Args:
      meter: of the emission.
      shards, pairs: how many there are to do.
    """

    def __init__(self, meter: Meter, shards: int, pairs: int):
        self._meter, self._shards, self._pairs = meter, shards, pairs
        self._done = [0, 0]
        self._begin = self._last = time.monotonic()
        self._bar = tqdm(total=pairs, desc="emit", unit="pair") if sys.stderr.isatty() else None

    def add(self, *, pairs: int = 0, shards: int = 0) -> None:
        """Tells of pairs that are encoded and of shards that are written."""
        self._done = [self._done[0] + shards, self._done[1] + pairs]
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(pairs)
        elif shards or now - self._last >= EVERY:
            self._last = now
            print(self.line(now - self._begin), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """What stands there after so many seconds."""
        shards, pairs = self._done
        told = f"emit: {shards} of {self._shards} shards, {pairs} of {self._pairs} pairs, {duration(seconds)}"
        left = duration(seconds * (self._pairs - pairs) / max(pairs, 1))
        return f"{told}, {left} left; pairs/s {self._rates()}" if pairs else told

    def close(self) -> None:
        """The end, good or bad."""
        if self._bar is not None:
            self._bar.close()

    def _rates(self) -> str:
        return ", ".join(f"{name} {rate:.3g}" for name, rate in self._meter.rates().items())
