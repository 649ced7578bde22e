"""Start of several processes as one program."""

import os

import jax

from mmkd_jax.errors import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
    """Joins the other processes if the environment names them; a single process goes on alone.

    Reads JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      InputError: some of the three are set and others are not, or a number is none.
    """
    values = {name: os.environ.get(name) for name in VARIABLES}
    missing = [name for name, value in values.items() if not value]
    if len(missing) == len(VARIABLES):
        return
    if missing:
        raise InputError(f"{', '.join(missing)} is not set beside the others of {', '.join(VARIABLES)}")
    address, count, index = values.values()
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise InputError(f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index} do not name one of several processes")
    jax.distributed.initialize(address, int(count), int(index), initialization_timeout=60)
