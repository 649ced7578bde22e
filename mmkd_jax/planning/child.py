"""The process that compiles: one step of one config for one topology, then it is gone.

    python -m mmkd_jax.planning.child PARENT REQUEST.json FOLDER

It leaves `program.txt.gz` and `memory.json` in FOLDER, or `failure.json` that says what was wrong. PARENT is the number
of the process that waits for it: when that is gone, however it ended, so is this one.
"""

import ctypes
import gzip
import os
import signal
import sys
import time

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # else JAX looks for a TPU
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans may run side by side
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any keeps it quiet, whatever is compiled for
    "TPU_WORKER_HOSTNAMES": "localhost",
    "HF_HUB_OFFLINE": "1",
}
PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal that the kernel sends when the parent is gone


def main(parent: str, request_file: str, folder: str) -> None:
    """Compiles what the request says."""
    _die_with(int(parent))
    from mmkd_jax import io
    from mmkd_jax.errors import InputError

    request, folder = io.read_json(request_file), io.as_path(folder)
    topology = request["topology"]
    os.environ.update(ENVIRONMENT)
    if topology["platform"] == "cpu":
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={topology['devices']}"
    try:
        memory, text = compiled(request)
    except InputError as error:
        io.write_json(folder / "failure.json", {"kind": "input", "text": str(error)})
    except Exception as error:  # whatever the compiler says is for the caller to tell
        kind = "memory" if "RESOURCE_EXHAUSTED" in str(error) else "compiler"
        io.write_json(folder / "failure.json", {"kind": kind, "text": f"{type(error).__name__}: {error}"})
    else:
        io.write_bytes(folder / "program.txt.gz", gzip.compress(text.encode(), 6, mtime=0))
        io.write_json(folder / "memory.json", memory)  # last: with it the result is whole


def compiled(request: dict) -> tuple[dict, str]:
    """What the compiler says of memory, how long it took, and the program's text."""
    import jax
    from ml_collections import ConfigDict

    from mmkd_jax.planning import program

    config = ConfigDict(_tuples(request["config"]))
    start = time.time()
    lowered = program.lower(config, _devices(request["topology"], config.mesh.slices), request["teachers"])
    middle = time.time()
    found = lowered.compile()
    stats = found.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    memory = {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in names}
    memory["peak"] = int(getattr(stats, "peak_memory_in_bytes", 0))
    memory |= {"lower_seconds": middle - start, "compile_seconds": time.time() - middle, "jax": jax.__version__}
    return memory, found.as_text()


def _die_with(parent: int) -> None:
    """Asks the kernel to end this process with its parent, which a compiler at work would not notice; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it was gone before
            sys.exit(1)


def _devices(topology: dict, slices: int) -> list:
    import jax
    from jax.experimental import topologies

    if topology["platform"] == "cpu":
        return jax.devices()
    options = dict(topology["options"]) | ({"num_slices": slices} if slices > 1 else {})
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology["name"], **options).devices)


def _tuples(value):
    """JSON's lists as the tuples that configs hold."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main(*sys.argv[1:])
