"""What needs no model: every one should find more in a picture than this does."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmkd_jax.errors import InputError
from mmkd_jax.specs import ModelSpec

FLOOR = "floor:pixels"


class PixelFloor:
    """16 x 16 pixels and a colour histogram as features, for tasks that learn from examples.

    Attributes:
      tasks: those that it takes part in.
    """

    name, checkpoint, spec, logit_scale = FLOOR, "", ModelSpec(name=FLOOR), 1.0
    tasks = ("linear_probe", "knn", "label_efficiency")

    def encode_image(self, images: Sequence[Image.Image], projected: bool = True) -> np.ndarray:
        """Float32 `[n, 792]`: 16 x 16 RGB in [0, 1], and 8 bins a channel."""
        rows = []
        for image in images:
            pixels = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR), np.float32) / 255
            whole = np.asarray(image.convert("RGB")).reshape(-1, 3)
            bins = [np.bincount(whole[:, c] >> 5, minlength=8) / len(whole) for c in range(3)]
            rows.append(np.concatenate([pixels.ravel(), *bins]))
        return np.asarray(rows, np.float32)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """There is nothing to say about texts."""
        raise InputError(f"the pixel floor has no text encoder; it takes part in {', '.join(self.tasks)} only")
