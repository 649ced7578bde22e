"""One part of a sweep as a job of a cluster: `python -m mmkd_jax.sweeps.job DIR PART`.

Its commands are in DIR/jobs/PART.json, where `submit` wrote them. They run one after the other, in every process of the
job; how they ended, {"code": exit code}, is DIR/jobs/PART.result.json, written by the first process.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from mmkd_jax import io

CHILD = (sys.executable, "-m", "mmkd_jax")
# Where a scheduler says which process of a job this is: none but the first has anything but 0.
INDICES = ("JAX_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID", "MEGASCALE_SLICE_ID")


def files(workdir: str | os.PathLike, part: str):
    """The paths of a part's commands and of its result."""
    folder, name = io.as_path(workdir) / "jobs", part.replace("/", ".")
    return folder / f"{name}.json", folder / f"{name}.result.json"


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this is the only process of the job, or the one that speaks for all."""
    return all(environment.get(name, "0") == "0" for name in INDICES)


def run(commands: Sequence[Sequence[str]]) -> int:
    """Exit code of the first command that does not end with 0, else 0; a SIGTERM goes on to the one that runs."""
    running: list[subprocess.Popen] = []
    stopped = []

    def stop(*_):
        stopped.append(True)
        for process in running:
            process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    code = 0
    try:
        for command in commands:
            running[:] = [subprocess.Popen([*CHILD, *command])]
            if stopped:  # since it was last asked
                stop()
            code = running[0].wait()
            if code:
                break
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code


def main(words: Sequence[str]) -> int:
    """Runs the part and says how it ended."""
    commands, result = files(*words)
    first = is_first(os.environ)
    if first and result.exists():  # of an earlier attempt
        result.unlink()
    code = run(io.read_json(commands)["commands"])
    if first:
        io.write_json(result, {"code": code})
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
