"""Verification of a teacher: the same pictures and texts through this project's towers and the reference libraries'.

A wrong activation, head count, epsilon, mask or pooling gives plausible features, with cosines near one. What tells
them apart is the relative difference in float32: at most some 4e-6 between right implementations, at least 6e-5 where
one of these is wrong. So the tolerance is 2e-5.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

import teachers
from mmkd_jax import preprocess
from mmkd_jax.data.sources import sample
from teachers.base import Base

TOLERANCE = 2e-5
MICRO_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far two backends are apart.

    Attributes:
      name: of the teacher.
      weights_hash: SHA-256 of its weights.
      images, texts: how many were compared.
      image_difference, text_difference: the largest difference of any feature over the largest feature.
    """

    name: str
    weights_hash: str
    images: int
    texts: int
    image_difference: float
    text_difference: float

    @property
    def agrees(self) -> bool:
        """Whether both differences are within the tolerance (not a number is not)."""
        return self.image_difference <= TOLERANCE and self.text_difference <= TOLERANCE

    def __str__(self) -> str:
        verdict = "the backends agree" if self.agrees else "THE BACKENDS DIFFER: do not use this teacher"
        return "\n".join(
            [
                f"{self.name}, weights {self.weights_hash[:12]}: flax and torch in float32, highest matmul precision",
                f"  largest relative difference over {self.images:3} images  {self.image_difference:.1e}",
                f"  largest relative difference over {self.texts:3} texts   {self.text_difference:.1e}",
                f"  tolerance {TOLERANCE:.0e}: {verdict}",
            ]
        )


def verify(
    name: str, weights: str | os.PathLike, images: Sequence[Image.Image] = (), texts: Sequence[str] = ()
) -> Comparison:
    """Loads published weights in both backends and compares their features.

    Args:
      name: of a record, or any where the weights describe themselves; see `teachers.load`.
      weights: see `teachers.load`; a checkpoint of ours has no names that torch's modules know.
      images: pictures; without any, embedded ones of seven modalities.
      texts: captions; without any, those of the embedded pictures.

    Raises:
      InputError: torch or a reference library is missing, or the weights are not the model's.
    """
    theirs = teachers.load(name, weights, backend="torch", micro_batch=MICRO_BATCH)
    ours = teachers.load(name, weights, micro_batch=MICRO_BATCH)
    if not images or not texts:
        pictures, captions = samples()
        images, texts = images or pictures, texts or captions
    return compare(ours, theirs, images, texts)


def compare(ours: Base, theirs: Base, images: Sequence[Image.Image], texts: Sequence[str]) -> Comparison:
    """Compares two teachers' features; `theirs` is the reference."""
    pixels = np.stack([theirs.preprocess(image) for image in images])
    tokens = theirs.tokenize(texts)
    return Comparison(
        name=theirs.name,
        weights_hash=theirs.weights_hash,
        images=len(images),
        texts=len(texts),
        image_difference=relative_difference(ours.encode_image(pixels), theirs.encode_image(pixels)),
        text_difference=relative_difference(ours.encode_text(tokens), theirs.encode_text(tokens)),
    )


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest absolute difference over the largest absolute value of `theirs`; not a number where either is."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def samples() -> tuple[list[Image.Image], list[str]]:
    """One crop of each embedded picture, and all their captions.

    Raises:
      InputError: a package of the extra `demo` is missing.
    """
    first = {}
    for record in sample.records():
        first.setdefault(record.extra["picture"], record)
    captions = [caption for record in first.values() for caption in record.captions]
    return [preprocess.decode(record.image) for record in first.values()], captions
