"""Processes that tests start: each dies with the test that started it, and with pytest however that ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

# The kernel kills the process when its parent is gone (PR_SET_PDEATHSIG of linux/prctl.h). It asks for that itself:
# code between fork and exec would run in a copy of a process with many threads.
_FOLLOW = """
import ctypes, runpy, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
kind, what, *words = sys.argv[1:]
sys.argv = [kind, *words]
if kind == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
else:
    exec(what, sys.modules["__main__"].__dict__)
"""
# Only the first of several processes fills JAX's cache of programs. The next time it would be ready at once, and wait
# for the others, which compile; the CPU's collectives wait 30 s for a process at most.
ALIKE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
_started: list[subprocess.Popen] = []


def start(arguments: Sequence[str], **options) -> subprocess.Popen:
    """Python with `-c PROGRAM ...` or `-m MODULE ...`, in a process group of its own; `options` as `Popen` has."""
    process = subprocess.Popen([sys.executable, "-c", _FOLLOW, *arguments], process_group=0, **options)
    _started.append(process)
    return process


def kill_all() -> None:
    """Kills what was started and still runs."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_address() -> str:
    """HOST:PORT on this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def with_devices(count: int) -> str:
    """These tests' XLA_FLAGS with so many fake devices."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return " ".join([*others, f"--xla_force_host_platform_device_count={count}"])


def together(arguments: Sequence[str], count: int, devices: int, **environ: str) -> list[subprocess.Popen]:
    """`count` processes that find each other, each with so many fake devices; alone it looks for no others."""
    address = free_address()
    flags = {"XLA_FLAGS": with_devices(devices), "JAX_PLATFORMS": "cpu"}
    processes = []
    for index in range(count):
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        place |= ALIKE
        environment = {**os.environ, **flags, **(place if count > 1 else {}), **environ}
        processes.append(start(arguments, env=environment, stderr=subprocess.PIPE, text=True))
    return processes


def succeed(processes: Sequence[subprocess.Popen], timeout: float = 600) -> list[str]:
    """What each said on standard error; all must end well."""
    said = [process.communicate(timeout=timeout)[1] for process in processes]
    codes = [process.returncode for process in processes]
    # An aborted process prints the stacks of its threads: what matters stands before.
    assert not any(codes), (codes, [text.split("Fatal Python error")[0][-2000:] for text in said])
    return said
