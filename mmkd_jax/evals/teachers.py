"""A teacher as an encoder: whatever `teachers.load` gives, called like a student."""

import inspect
from collections.abc import Sequence

import numpy as np

from mmkd_jax import io
from mmkd_jax.errors import InputError

LOGIT_SCALE = 100.0  # the cap that trained CLIP models reach (arXiv 2103.00020, section 2.5); argmax does not depend


class TeacherEncoder:
    """Makes a `base.Encoder` of a teacher.

    Args:
      name: of the teacher; results call it `teacher:NAME`.
      weights: where they come from, for the results.
      teacher: an object with `spec`, `preprocess(PIL) -> [H, W, 3]`, `tokenize(texts) -> TextBatch`, `encode_image`,
        `encode_text`, and `logit_scale` (exponentiated) if its weights tell one; with `weights_hash` and
        `preprocess_hash` its features can be cached.
      role: what stands before its name in results.
    """

    def __init__(self, name: str, weights: str, teacher, role: str = "teacher:"):
        self.name, self.checkpoint, self.spec = f"{role}{name}", str(weights), teacher.spec
        self.logit_scale = float(getattr(teacher, "logit_scale", LOGIT_SCALE))
        self.identity = _identity(teacher)
        self.teacher = teacher

    def encode_image(self, images: Sequence, projected: bool = True) -> np.ndarray:
        """Float32 `[n, width]` of PIL images; before the projection if not `projected` and the teacher can."""
        encode = self.teacher.encode_image
        if not projected and "projected" not in inspect.signature(encode).parameters:
            raise InputError(f"{self.name} gives projected features only; leave the probe layer at embedding")
        options = {} if projected else {"projected": False}
        return np.asarray(encode(np.stack([self.teacher.preprocess(image) for image in images]), **options))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 `[m, width]`."""
        return np.asarray(self.teacher.encode_text(self.teacher.tokenize(list(texts))))


def _identity(teacher) -> str:
    """Hash of all that makes its features what they are, what runs the towers included; "" if it tells too little."""
    hashes = [getattr(teacher, name, "") for name in ("weights_hash", "preprocess_hash")]
    if not all(hashes):
        return ""
    spec = {name: value for name, value in teacher.spec.to_dict().items() if name in ("image", "text", "embed")}
    return io.hash_of([*hashes, spec, f"{type(teacher).__module__}.{type(teacher).__qualname__}"])
