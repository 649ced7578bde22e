"""Timing things against each other: in one process, turn by turn, so that what else the machine does hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds` rounds, after one that is not counted (it compiles).

    Calls must return when their work is done, not when it is on its way. Every second round runs them in reverse.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in list(calls) if number % 2 == 0 else reversed(list(calls)):
            begin = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(values: Sequence[float]) -> str:
    """Median, and the least and largest value in brackets, to three digits."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"
