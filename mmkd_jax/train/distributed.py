"""Start of several processes as one program."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mmkd_jax.errors import EXIT_WRONG_INPUT, InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
START = ("MMKD_START_SECONDS", 50)  # to wait for all processes: an answer within a minute
HEARTBEAT = ("MMKD_HEARTBEAT_SECONDS", 100)  # without a sign of life, then a process is taken for dead


def start() -> None:
    """Joins the other processes if the environment names them; a single process goes on alone.

    Plain hosts and GPUs on Kubernetes: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, for which JOB_COMPLETION_INDEX of an indexed job stands in. Steps of SLURM, Open MPI and TPU pods
    (virtual machines or GKE) need nothing: JAX reads what these set.

    When a process does not come within MMKD_START_SECONDS (50), each that waits says so in one line and leaves with
    exit code 2. Once started, a process that dies takes the others with it after MMKD_HEARTBEAT_SECONDS (100): the
    runtime aborts them, and each prints the stacks of its threads.

    Raises:
      InputError: the variables contradict each other, or what JAX finds in the environment does not do.
    """
    found = settings(os.environ)
    if found is None:
        return
    seconds, heartbeat = (_seconds(*variable) for variable in (START, HEARTBEAT))
    faulthandler.enable()
    arrived = threading.Event()
    waiting = threading.Thread(target=_leave_unless, args=(arrived, seconds, found), daemon=True)
    waiting.start()
    try:
        jax.distributed.initialize(
            **found,
            # The runtime's own end of waiting is an abort with a stack of C++; ours comes before it.
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=heartbeat,
            # A process that failed waits at its exit for the others, which wait for it in a collective.
            shutdown_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        if _on_tpu(os.environ) and "coordinator_address should be defined" in str(error):
            return  # a TPU that belongs to this host alone
        raise InputError(f"cannot join the other processes: {error}; or set {', '.join(VARIABLES)}") from error
    finally:
        arrived.set()


@contextlib.contextmanager
def failing_at_once(alike: type[Exception] | tuple[()]) -> Iterator[None]:
    """What fails in one of several processes ends that process at once, told as the command line tells it.

    On its way out it would wait for the others in barriers, and they for it in a collective, all of them alive. Gone,
    it is missed: the runtime ends the others as it does when a machine fails.

    Args:
      alike: an error that all processes raise in the same step, and leave by in order; `()` for none.
    """
    try:
        yield
    except alike:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, InputError):
            print(f"mmkd: {error}", file=sys.stderr, flush=True)
            os._exit(EXIT_WRONG_INPUT)
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)


def settings(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` that `environ` gives; `{}` where JAX finds all; None to go alone.

    Raises:
      InputError: some of the three variables are set and others are not, or a number is none.
    """
    values = {name: environ.get(name) or None for name in VARIABLES}
    values["JAX_PROCESS_ID"] = values["JAX_PROCESS_ID"] or environ.get("JOB_COMPLETION_INDEX")
    named = any(environ.get(name) for name in VARIABLES)
    if named and None not in values.values():
        return _plain(*values.values())
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _slurm(environ)
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 or _on_tpu(environ):
        return {}
    if named:
        missing = [name for name, value in values.items() if value is None]
        raise InputError(f"{', '.join(missing)} is not set beside the others of {', '.join(VARIABLES)}")
    return None


def _plain(address: str, count: str, index: str) -> dict[str, Any]:
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise InputError(f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index} do not name one of several processes")
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise InputError(f"JAX_COORDINATOR_ADDRESS={address} is not HOST:PORT of process 0")
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    """JAX takes one GPU a task, by the task's number on its node; the only task of a node is given all of them."""
    alone = environ.get("SLURM_STEP_NUM_TASKS") == environ.get("SLURM_STEP_NUM_NODES")
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    return {"local_device_ids": list(range(int(gpus)))} if alone and gpus.isdigit() else {}


def _on_tpu(environ: Mapping[str, str]) -> bool:
    """Whether JAX saw TPU chips and their library when it was imported, and may use them."""
    allowed = environ.get("JAX_PLATFORMS", "tpu")
    return environ.get("TPU_ML_PLATFORM") == "JAX" and (not allowed or "tpu" in allowed)


def _seconds(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"{name}={value} is not a number of seconds")
    return int(value)


def _leave_unless(arrived: threading.Event, seconds: int, found: dict[str, Any]) -> None:
    """Ends the process if not all have come: the thread that waits is in C++ and cannot be interrupted."""
    if arrived.wait(seconds):
        return
    print(f"mmkd: {_complaint(seconds, **found)}", file=sys.stderr, flush=True)
    os._exit(EXIT_WRONG_INPUT)


def _complaint(
    seconds: int, coordinator_address: str = "", num_processes: int = 0, process_id: int = 0, **others: Any
) -> str:
    if not coordinator_address:
        return f"not all processes came within {seconds} s; look at the scheduler's list of hosts and at their logs"
    who = f"process {process_id} of {num_processes} waited {seconds} s"
    host, _, port = coordinator_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError as error:
        reason = error.strerror or error
        return f"{who} for process 0, which does not answer at {coordinator_address} ({reason}); start it, or open it"
    return f"{who}: not all {num_processes} came to {coordinator_address}; look which host has no such process"
