"""Compiling in a process of its own, with a time limit, and once only: results are kept by what they depend on."""

import dataclasses
import gzip
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

import mmkd_jax
from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.planning.topologies import Topology

# What of the package decides what a step compiles to.
SOURCES = ("models", "losses", "tasks", "planning/program.py", "preprocess.py", "train/accumulate.py", "train/ema.py",
           "train/optim.py", "train/sharding.py", "train/stability.py", "train/state.py")  # fmt: skip
# Fields of a config that leave the program as it is.
APART = ("name", "data", "init", "towers", "fresh", "tokenizer", "features", "selection", "evaluation", "wandb",
         "log_every", "save_every", "keep", "save_minutes", "best", "watchdog", "epochs", "teachers")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of compiling one step.

    Attributes:
      memory: bytes a device by kind (`peak`, `argument`, `output`, `alias`, `temp`, `generated_code`), seconds of
        lowering and compiling, and the version of jax; empty if it does not fit.
      text: of the program; empty if it does not fit.
      needed: where it does not fit: bytes a device that the compiler asks for, an early estimate; None if not said.
      allowed: bytes a device that it has by its own words; None if not said.
      cached: whether it was compiled earlier.
    """

    memory: dict[str, Any]
    text: str = ""
    needed: float | None = None
    allowed: float | None = None
    cached: bool = False

    @property
    def fits(self) -> bool:
        """Whether there is a program."""
        return bool(self.text)


def step(
    config: Mapping[str, Any], topology: Topology, teachers: Mapping[str, int], cache: epath.Path, minutes: float
) -> Compiled:
    """The step of `config` (plain values) compiled for `topology`, or what was kept of an earlier time.

    Raises:
      InputError: the config does not fit the topology, the compiler gave up or crashed, or took too long.
    """
    request = {
        "config": {name: value for name, value in config.items() if name not in APART},
        "topology": dataclasses.asdict(topology),
        "teachers": dict(teachers),
        "versions": versions(topology.platform),
        "sources": _sources(),
    }
    folder = cache / io.hash_of(request)[:16]
    cached = (folder / "memory.json").exists() or (folder / "failure.json").exists()
    if not cached:
        folder.mkdir(parents=True, exist_ok=True)
        io.write_json(folder / "request.json", request | {"config": dict(config)})
        _run(folder, topology, minutes)
    if (folder / "memory.json").exists():
        text = gzip.decompress((folder / "program.txt.gz").read_bytes()).decode()
        return Compiled(io.read_json(folder / "memory.json"), text, cached=cached)
    failure = io.read_json(folder / "failure.json")
    if failure["kind"] == "memory":
        sizes = [float(size) * 2.0**30 for size in re.findall(r"\(([\d.]+)G\)", failure["text"])]
        needed, allowed = (*sizes, None, None)[:2]
        return Compiled({}, needed=needed, allowed=allowed, cached=cached)
    (folder / "failure.json").unlink()  # wrong input is said again each time
    if failure["kind"] == "input":
        raise InputError(failure["text"])
    raise InputError(f"the compiler refuses {topology.name}: {' '.join(failure['text'].split())[:300]}")


def versions(platform: str) -> dict[str, str]:
    """Of Python and of what compiles.

    Raises:
      InputError: the TPU compiler is not installed.
    """
    names = ["jax", "jaxlib", "flax", "optax"] + (["libtpu"] if platform == "tpu" else [])
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            jax = importlib.metadata.version("jax")
            raise InputError(f'the TPU compiler is not installed; `pip install "jax[tpu]=={jax}"` brings it') from None
    return found


def _sources() -> str:
    root = pathlib.Path(mmkd_jax.__file__).parent
    files = [file for name in SOURCES for file in (sorted((root / name).rglob("*.py")) or [root / name])]
    return io.hash_of({str(file.relative_to(root)): io.sha256(file.read_bytes()) for file in files if file.exists()})


def _run(folder: epath.Path, topology: Topology, minutes: float) -> None:
    """Runs the child; afterwards there is a result or a failure in `folder`."""
    words = [str(os.getpid()), os.fspath(folder / "request.json"), os.fspath(folder)]
    command = [sys.executable, "-m", "mmkd_jax.planning.child", *words]
    root = os.fspath(pathlib.Path(mmkd_jax.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    start = time.time()
    try:
        said = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=60 * minutes,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputError(
            f"compiling for {topology.name} took more than {minutes:g} minutes; give it more by --limit, "
            "or a machine with idle cores"
        ) from None
    if (folder / "memory.json").exists() or (folder / "failure.json").exists():
        return
    lines = [line for line in said.stderr.splitlines() if line.strip()]
    reason = next((line for line in lines if "SIG" in line or "Error" in line), lines[-1] if lines else "")
    raise InputError(
        f"the compiler crashed after {time.time() - start:.0f} s (exit code {said.returncode}: {reason[:200]}); "
        "try another batch or remat, or another version of jax[tpu]"
    )


def plain(value: Any) -> Any:
    """A config's values as JSON has them."""
    return json.loads(json.dumps(value))
