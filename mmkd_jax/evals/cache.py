"""Features on disk, so that each is computed once: one file for each part of the rows or texts of an encoder.

    FOLDER/<encoder>/<layer>-<part>.features

`<encoder>` is its name and the hash of all that makes its features what they are: weights, preprocessing, tokenizer,
what runs it. `<part>` is the hash of what was encoded: the hash of the pairs set with the rows, or the texts. So a file
answers one question only, and never has to be asked whether it is out of date.

A file is a line of JSON (`key`, `shape`, `sha256`) and then float32 in row order, little-endian. One that is not what
it says is named on standard error and computed again.
"""

import json
import os
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmkd_jax import io
from mmkd_jax.evals.results import file_name

SCHEMA = 1
PART = 4096  # rows or texts a file, at most


class FeatureCache:
    """The files of one encoder.

    Of several processes, which ask for the same parts in the same order, the first reads and writes and the others
    have it from there: the folder need not be one that all see.

    Args:
      folder: of all encoders; made when there is something to keep.
      name: of the encoder.
      identity: hash of the encoder, see `base.Encoder`; the kind of device that JAX computes on is added.
    """

    def __init__(self, folder: str | os.PathLike, name: str, identity: str):
        key = io.hash_of({"schema": SCHEMA, "encoder": identity, "platform": jax.default_backend()})
        self._folder = io.as_path(folder) / f"{file_name(name)}-{key[:16]}"
        self._encoder = key

    def read(self, layer: str, part: str, count: int) -> np.ndarray | None:
        """Float32 `[count, width]` of the part with hash `part`, or None if it is not there or damaged."""
        found = self._read(layer, part, count) if jax.process_index() == 0 else None
        if jax.process_count() == 1:
            return found
        width = int(multihost_utils.broadcast_one_to_all(np.int32(0 if found is None else found.shape[1])))
        if not width:
            return None
        found = np.zeros((count, width), np.float32) if found is None else found
        return np.asarray(multihost_utils.broadcast_one_to_all(found))

    def write(self, layer: str, part: str, features: np.ndarray) -> None:
        """Keeps float32 `[n, width]`; the file is there whole or not at all."""
        if jax.process_index() == 0:
            data = np.ascontiguousarray(features, "<f4").data.cast("B")
            head = {"key": self._key(layer, part), "shape": list(features.shape), "sha256": io.sha256(data)}
            io.write_bytes(self._path(layer, part), b"".join([json.dumps(head).encode(), b"\n", data]))

    def _path(self, layer: str, part: str):
        return self._folder / f"{layer}-{part[:32]}.features"

    def _key(self, layer: str, part: str) -> str:
        return io.hash_of([self._encoder, layer, part])

    def _read(self, layer: str, part: str, count: int) -> np.ndarray | None:
        path = self._path(layer, part)
        if not path.exists():
            return None
        try:
            return self._parsed(path.read_bytes(), layer, part, count)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"mmkd: {path} is damaged ({error}); computing its features again", file=sys.stderr)
            return None

    def _parsed(self, content: bytes, layer: str, part: str, count: int) -> np.ndarray:
        line, _, data = content.partition(b"\n")
        head = json.loads(line)
        if head["key"] != self._key(layer, part):
            raise ValueError("it belongs to another encoder, layer or part")
        if head["shape"][0] != count or 4 * count * head["shape"][1] != len(data):
            raise ValueError(f"it says {head['shape']} and has {len(data)} bytes for {count} rows")
        if head["sha256"] != io.sha256(data):
            raise ValueError("it does not have its own hash")
        return np.frombuffer(data, "<f4").reshape(head["shape"])


def part_of_rows(set_hash: str, rows: Sequence[int]) -> str:
    """Hash of rows of the pairs set with the hash `set_hash`."""
    return io.sha256(set_hash.encode() + b"\0" + np.asarray(rows, "<i8").tobytes())


def part_of_texts(texts: Sequence[str]) -> str:
    """Hash of texts."""
    return io.hash_of(list(texts))
