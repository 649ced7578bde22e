"""Device groups of this machine: what to put into the environment of a process so that it sees its own devices only."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from mmkd_jax.errors import InputError

# Asked of a process of its own: one that has opened an accelerator keeps others from it. Chips, not cores: a chip
# cannot be divided between processes.
PROBE = (
    "import jax; d = jax.local_devices();print(d[0].platform, len({tuple(getattr(x, 'coords', (x.id,))) for x in d}))"
)
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


def groups(each: int = 1) -> list[dict[str, str]]:
    """The environment of each group of `each` devices; a CPU is one group and needs nothing.

    Raises:
      InputError: JAX finds no device, or not so many.
    """
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if found.returncode:
        line = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"JAX finds no devices here: {line}")
    platform, count = found.stdout.split()[-2:]
    return pins(platform, int(count), each, os.environ)


def pins(platform: str, count: int, each: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """`groups` for a machine with `count` devices of a platform, some of which `environment` may hide already.

    TPU variables: https://gist.github.com/skye/f82ba45d2445bb19d53545538754f9a3; they were not tried on a TPU.

    Raises:
      InputError: fewer than `each` devices, or a number that cannot be a TPU's group.
    """
    if platform == "cpu":
        return [{}]
    if not 1 <= each <= count:
        raise InputError(f"--devices {each}: this machine shows {count} devices ({platform})")
    if platform == "tpu":
        if each not in TPU_BOUNDS:
            raise InputError(f"--devices {each}: a group of TPU chips has {', '.join(map(str, TPU_BOUNDS))} of them")
        return [_tpu(chips, index) for index, chips in enumerate(_divide(list(map(str, range(count))), each))]
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else list(map(str, range(count)))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in _divide(names, each)]


def _divide(names: Sequence[str], each: int) -> list[Sequence[str]]:
    return [names[i : i + each] for i in range(0, len(names) - each + 1, each)]


def _tpu(chips: Sequence[str], index: int) -> dict[str, str]:
    port = str(8476 + index)
    return {
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(chips)],
        "TPU_VISIBLE_DEVICES": ",".join(chips),
        "TPU_MESH_CONTROLLER_ADDRESS": f"localhost:{port}",
        "TPU_MESH_CONTROLLER_PORT": port,
    }
