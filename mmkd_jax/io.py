"""Paths and small files: every path goes through epath, every write is atomic, every artefact has a hash.

A local file appears under its name only when it is complete: it is written beside its place under a temporary name
and renamed. On object stores a single write is atomic by itself.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from mmkd_jax.errors import InputError


def as_path(path: str | os.PathLike) -> epath.Path:
    """`path` as an absolute epath (a local path or `gs://...`)."""
    name = os.fspath(path)
    path = epath.Path(name).expanduser() if name.startswith("~") else epath.Path(name)
    return path if "://" in name or path.is_absolute() else epath.Path(os.path.abspath(path))


def temporary_name(path: epath.Path) -> epath.Path:
    """A name beside `path` that no reader takes for finished."""
    return path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` under a temporary name and renames it into place.

    Raises:
      InputError: the folder cannot be written to.
    """
    write_parts(path, [data])


def write_parts(path: str | os.PathLike, parts: Iterable[bytes | memoryview]) -> None:
    """As `write_bytes`, one part after the other."""
    path = as_path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(parts)
        temporary.replace(path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a writable place") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 `text` atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


def json_form(value: Any) -> Any:
    """`value` as it comes back from a JSON file (tuples as lists, arrays as lists, keys as strings)."""
    return json.loads(json.dumps(value, default=_plain))


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: there is no such file, or it is not JSON.
    """
    path = as_path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); it is damaged or not what it is taken for") from error


def make_workdir(path: str | os.PathLike) -> epath.Path:
    """Creates `path` if needed and proves that it can be written to.

    Raises:
      InputError: it cannot.
    """
    path = as_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(path / "probe")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}; choose a writable folder") from error
    return path


@contextlib.contextmanager
def workdir(path: str | os.PathLike) -> Iterator[epath.Path]:
    """The folder at `path`, made if need be; one that was made here and stays empty is removed again.

    Raises:
      InputError: it cannot be written to.
    """
    fresh = not as_path(path).exists()
    folder = make_workdir(path)
    try:
        yield folder
    finally:
        if fresh:
            remove_if_empty(folder)


def remove_if_empty(folder: epath.Path) -> None:
    """Removes a folder that is there with nothing in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[epath.Path]:
    """A folder to fill, which becomes `path` when the block ends well, and is removed when it does not.

    Raises:
      InputError: `path` exists or cannot be written.
    """
    path = as_path(path)
    if path.exists():
        raise InputError(f"{path} exists; choose another folder or remove it")
    temporary = make_workdir(temporary_name(path))
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        temporary.rmtree(missing_ok=True)
        raise


def sha256(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike, chunk: int = 1 << 20) -> str:
    """Hex SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with as_path(path).open("rb") as file:
        while piece := file.read(chunk):
            digest.update(piece)
    return digest.hexdigest()


def hash_of(value: Any) -> str:
    """Hex SHA-256 of a JSON-like value in canonical form (sorted keys, no spaces)."""
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode())


def _plain(value: Any) -> Any:
    """JSON form of NumPy scalars and arrays, mappings and paths."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
