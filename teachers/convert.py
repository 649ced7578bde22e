"""Conversion: published weights once into a checkpoint of ours, which then needs no record, vocabulary or converter."""

import os

from etils import epath

import teachers
from mmkd_jax import io
from mmkd_jax.train import checkpoint


def convert(name: str, weights: str | os.PathLike, out: str | os.PathLike) -> epath.Path:
    """Writes a teacher's weights, spec and tokenizer as a checkpoint that `mmkd_jax.load` and `teachers.load` read.

    Args:
      name: of a record, or any where the weights describe themselves; see `teachers.load`.
      weights: see `teachers.load`.
      out: the folder, which must not exist; it appears when it is complete.

    Returns:
      The folder.

    Raises:
      InputError: `out` exists or cannot be written, or the weights are not the model's.
    """
    out = io.as_path(out)
    with io.new_folder(out) as folder:
        teacher = teachers.load(name, weights)
        source = {"teacher": name, "file": io.as_path(teacher.checkpoint).name, "sha256": teacher.weights_hash}
        meta = checkpoint.describe(teacher.spec, teacher.tokenizer.files(), {"converted": source}, {})
        writer = checkpoint.Checkpoints(folder)
        writer.save(0, {"params": teacher.params}, meta)
        writer.close()
    return out
