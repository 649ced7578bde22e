"""A run that hangs ends, with the stacks of its threads and exit code 76."""

import os
import subprocess
import sys
import threading

import pytest
import train_fixtures as tiny

from mmkd_jax.errors import EXIT_WATCHDOG
from mmkd_jax.train import watchdog

HANGS = """
import threading
from mmkd_jax.train.watchdog import Watchdog

def waits_for_a_peer():
    threading.Event().wait()

other = threading.Thread(target=threading.Event().wait, name="worker", daemon=True)
other.start()
with Watchdog("run", 0.01) as watched:
    for step in range(1, 4):
        watched.alive(f"step {step}")
    waits_for_a_peer()
"""


def test_a_hang_ends_with_all_stacks_and_its_exit_code(repository):
    ended = subprocess.run([sys.executable, "-c", HANGS], cwd=repository, capture_output=True, text=True, timeout=60)
    assert ended.returncode == EXIT_WATCHDOG
    assert "run: no step for 0.01 minutes after step 3" in ended.stderr
    assert "in waits_for_a_peer" in ended.stderr
    assert ended.stderr.count("hread 0x") == 3  # the main thread, the worker, the watchdog itself


def test_signs_of_life_keep_it_quiet_and_leaving_stops_it(monkeypatch):
    clock, ends = [0.0], threading.Event()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self: ends.set())
    watched = watchdog.Watchdog("run", 1)
    with watched:
        for second in range(0, 600, 50):
            clock[0] = second
            watched.alive(f"step {second}")
            watched._left.wait(0)
        assert not ends.is_set()
    assert not watched._thread.is_alive()
    with watchdog.Watchdog("run", 0) as never:
        assert not never._thread.is_alive()
    clock[0] = 0.0
    late = watchdog.Watchdog("run", 1e-4)
    with late:
        clock[0] = 1.0
        assert ends.wait(30)


@pytest.mark.full
def test_a_training_run_whose_input_hangs_ends(tmp_path, repository):
    program = (
        "import sys, threading; from mmkd_jax import cli; from mmkd_jax.data.batches import Batches;"
        "real = Batches.batch;"
        "Batches.batch = lambda self, step: threading.Event().wait() if step == 2 else real(self, step);"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = ["train", "--config", f"{tiny.CONFIGS}/stage1_clip.py:smoke", "--workdir", str(tmp_path / "run")]
    command += tiny.overrides("--config.watchdog=1.0", "--config.data.threads=0")
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tiny.world() / "compiled")}
    ended = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=repository, env=environment, capture_output=True, timeout=240
    )
    assert ended.returncode == EXIT_WATCHDOG, ended.stderr.decode()[-2000:]
    assert b"saving step 2" in ended.stderr
    assert b"after step 2" in ended.stderr
    assert b"in _train" in ended.stderr
