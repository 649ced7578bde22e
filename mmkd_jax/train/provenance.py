"""Where a result comes from: commit, versions, flags, devices, data."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "tokenizers")


def provenance(identity: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON record of this process: code, packages, flags, devices, and the hashes of the data (`identity`)."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "data": identity or {},
    }


def commit() -> str:
    """Commit of the checkout that this package is used from, `-dirty` if it was changed; "unknown" outside of one."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=folder, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return head.stdout.strip() or "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
