"""A watchdog: a run that makes no step for long ends, and says where it hangs."""

import faulthandler
import os
import sys
import threading
import time

from mmkd_jax.errors import EXIT_WATCHDOG


class Watchdog:
    """Ends the process with exit code 76 when nothing was heard of it for too long, while it is entered.

    The stacks of all threads go to standard error first. A hang in a collective, in the input or in a save cannot be
    broken from within, so there is no exception to catch: the scheduler starts the same command again.

    Args:
      name: of the run, for the message.
      minutes: to wait for the next sign of life; 0 waits for ever.
    """

    def __init__(self, name: str, minutes: float):
        self._name, self._seconds = name, 60 * minutes
        self._last, self._doing = time.monotonic(), "the start"
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.alive("the start")
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        if self._seconds:
            self._thread.join()

    def alive(self, doing: str) -> None:
        """A sign of life; `doing` says in the message after what the run stood still ("step 12")."""
        self._last, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        while not self._left.wait(max(0.0, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last >= self._seconds:
                return self._end()

    def _end(self) -> None:
        sys.stdout.flush()
        print(
            f"{self._name}: no step for {self._seconds / 60:g} minutes after {self._doing}; the stacks of all threads "
            f"follow; leaving with exit code {EXIT_WATCHDOG}",
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(EXIT_WATCHDOG)
