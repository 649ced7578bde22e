"""One command of a sweep, in a process that ends when the sweep ends: `python -m mmkd_jax.sweeps.child VERB ...`.

The sweep holds the other end of this process's standard input. However it dies, that end closes, and this process gets
a SIGTERM, as it would before a preemption; so no orphan goes on writing where the next sweep will write.
"""

import os
import signal
import sys
import threading


def follow() -> None:
    """Waits for the end of standard input, then sends this process a SIGTERM."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=follow, daemon=True).start()
    from mmkd_jax import cli

    sys.exit(cli.main())
