"""The torch backend: published weights run once, as they are, in the modules of the libraries they were trained with.

It serves two ends: features can be emitted before a teacher's conversion is trusted, and `mmkd teachers verify` can
compare. So it shares as little as possible with the flax backend: the weights go into the reference modules under the
file's own names, read by torch where torch reads them, and nothing passes through parameters of ours. What weights do
not tell (activation, heads, epsilons, pooling, mask) comes from the same spec.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from teachers.base import Base
from teachers.torch_backend.families import Towers
from teachers.torch_backend.files import load
from teachers.torch_backend.libraries import need

__all__ = ["TorchTeacher", "Towers", "load"]


@dataclasses.dataclass(frozen=True, eq=False)
class TorchTeacher(Base):
    """A teacher whose towers torch runs, in float32.

    Attributes:
      towers: the reference modules with their weights.
      micro_batch: pictures or texts at a time; a result does not depend on how many there are beside.
    """

    towers: Towers
    micro_batch: int = 64

    @property
    def backend(self) -> str:
        """What runs the towers, with its version."""
        return f"torch {need('torch').__version__}"

    @property
    def logit_scale(self) -> float:
        """Factor on cosines, exponentiated."""
        return self.towers.logit_scale

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """Preprocessed pictures float32 `[n, S, S, 3]` to the tower's own output, float32 `[n, embed]`, any length."""
        return self._in_batches(self.towers.encode_image, np.asarray(images, np.float32))

    def encode_text(self, text: TextBatch) -> np.ndarray:
        """Tokens to the tower's own output, float32 `[n, embed]`; as `encode_image`."""
        return self._in_batches(self.towers.encode_text, np.asarray(text.ids), np.asarray(text.mask))

    def _in_batches(self, encode: Callable[..., np.ndarray], *inputs: np.ndarray) -> np.ndarray:
        """`encode` at the fixed micro-batch, the last one filled up with its own first row."""
        count, size = len(inputs[0]), self.micro_batch
        if count == 0:
            raise InputError("nothing to encode: give at least one picture or text")
        parts = []
        for start in range(0, count, size):
            real = min(size, count - start)
            rows = start + np.arange(size) * (np.arange(size) < real)
            parts.append(encode(*(part[rows] for part in inputs))[:real])
        return np.concatenate(parts)
