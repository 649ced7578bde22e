"""Arrays in `.npz` files: the same bytes for the same arrays, never a pickle; and artefacts that know their hash."""

import io as std_io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from mmkd_jax import io
from mmkd_jax.errors import InputError

Artefact = TypeVar("Artefact")  # has a property `hash`


def to_bytes(**arrays: np.ndarray) -> bytes:
    """An uncompressed `.npz` whose bytes depend on the arrays alone."""
    buffer = std_io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read(path: str | os.PathLike, what: str) -> dict[str, np.ndarray]:
    """All arrays of an `.npz`.

    Raises:
      InputError: it is missing or damaged.
    """
    path = io.as_path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; it should hold the {what}")
    try:
        with np.load(std_io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} (the {what}) is damaged: {error}; copy or write it again") from error


def save_artefact(path: str | os.PathLike, hash: str, meta: Mapping[str, Any], **arrays: np.ndarray) -> None:
    """Writes one file, atomically, the same bytes every time: the arrays, and a JSON record with the hash."""
    record = json.dumps({**meta, "hash": hash}).encode()
    io.write_bytes(path, to_bytes(**arrays, meta=np.frombuffer(record, np.uint8)))


def load_artefact(
    path: str | os.PathLike, what: str, make: Callable[[dict[str, np.ndarray], dict[str, Any]], Artefact], again: str
) -> Artefact:
    """What `make` gives for the arrays and the record of a saved file, if its hash is the one that it states.

    Args:
      path: see `save_artefact`.
      what: its kind, such as `row index`.
      make: from arrays and record to the artefact.
      again: what to do about a damaged one, such as `make it again`.

    Raises:
      InputError: there is none, or it is damaged.
    """
    arrays = read(path, what)
    try:
        meta = json.loads(arrays["meta"].tobytes())
        found, stated = make(arrays, meta), meta["hash"]
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is not a {what} ({error}); {again}") from error
    if found.hash != stated:
        raise InputError(f"{path} does not have the hash that it states; {again}")
    return found
