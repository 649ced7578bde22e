"""Which sets of a `mmkd eval` that did not come to its end are done: OUT/unfinished.json.

A set is done when its predictions and its rows of results.json are written. It is asked for again only if what its
numbers depend on has changed. The file goes when all is done: the next evaluation makes every number again.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmkd_jax import io

FILE, SCHEMA = "unfinished.json", 1


class Unfinished:
    """The sets of a result folder that an evaluation which was interrupted had done.

    Args:
      out: the result folder.
      asked: what all its numbers depend on, as JSON: tasks, seed, resamples and the like.
    """

    def __init__(self, out: str | os.PathLike, asked: dict):
        self._path, self._asked = io.as_path(out) / FILE, asked
        record = io.read_json(self._path) if self._path.exists() else {}
        self._done = dict(record.get("done", {})) if record.get("schema") == SCHEMA else {}

    def left(self, encoder, sets: Sequence) -> list:
        """Those of `sets` that `encoder` has still to be evaluated on; all processes are told the same."""
        todo = np.array([self._done.get(self._name(encoder, one)) != self._key(encoder, one) for one in sets])
        if jax.process_count() > 1:
            todo = multihost_utils.broadcast_one_to_all(todo)
        return [one for one, asked in zip(sets, todo) if asked]

    def add(self, encoder, one) -> None:
        """Notes that a set is done, once all that it gives is written."""
        self._done[self._name(encoder, one)] = self._key(encoder, one)
        io.write_json(self._path, {"schema": SCHEMA, "done": self._done})

    def clear(self) -> None:
        """Says that all is done."""
        self._path.unlink(missing_ok=True)

    def _name(self, encoder, one) -> str:
        return f"{encoder.name} on {one.name}"

    def _key(self, encoder, one) -> str:
        """Hash of what the numbers depend on; never the same for an encoder that does not identify itself."""
        identity = getattr(encoder, "identity", "") or os.urandom(8).hex()
        prompts = [p and [p.profile, p.hash] for p in (one.prompts, one.absent)]
        targets = None if one.targets is None else np.asarray(one.targets).tolist()
        about = [one.split_hash, one.train_hash, one.modality, one.class_names, one.captions, prompts, targets]
        return io.hash_of([identity, encoder.checkpoint, float(encoder.logit_scale), about, self._asked])
